"""Settings of the method, `method`, `mim`, `mask`, `reconstruction`, `centroids` and `teacher`, and the table of presets."""

from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from cmim.errors import UserError
from cmim.settings.section import Fraction, NonNegative, Positive, Section


class OhemSettings(Section):
    threshold: Annotated[float, Field(gt=0, le=1, strict=True)] = 0.7
    """Only pixels whose true class is predicted with at most this probability count."""
    min_kept: Positive = 800_000
    """Minimum number of pixels that count in the labelled batch of all processes; where fewer are below the threshold, the
    hardest ones count."""


class Preset(NamedTuple):
    """What a preset trains on: its views, its loss terms and their weights. `cmim.method.objective` defines the terms."""

    sup: float
    """Weight of the supervised term."""
    strong: float = 0
    """Weight of the consistency term of each strong view."""
    strong_views: int = 0
    """Number of strong views of each unlabelled image; with 0, no unlabelled image is used."""
    fp: float = 0
    """Weight of the term of the feature-perturbed view: the weak view with channels of its features dropped. With 0 there is
    no such view."""
    weak_pass: bool = True
    """Whether the student's training pass contains the weak views even if an EMA teacher makes the pseudo-labels."""
    complementary: bool = False
    """Whether complementary halves of the channels may be dropped from the two strong views."""
    masked: tuple[Literal["pix", "feat", "sem"], ...] = ()
    """Terms of the masked views; their weights are settings, `mim.w_*`."""
    class_wise: bool = False
    """Whether the terms of the masked views are computed for each class separately."""
    base: str | None = None
    """The preset that masked terms are added to; its views and weights stay."""

    @property
    def uses_unlabelled(self) -> bool:
        return self.strong_views > 0


PRESETS: dict[str, Preset] = {
    "supervised": Preset(sup=1),
    "fixmatch": Preset(sup=1 / 2, strong=1 / 2, strong_views=1),
    "fixmatch_fp": Preset(sup=1 / 2, strong=1 / 4, strong_views=1, fp=1 / 4),
    "unimatch": Preset(sup=1 / 2, strong=1 / 8, strong_views=2, fp=1 / 4),
    "unimatch_v2": Preset(sup=1 / 2, strong=1 / 4, strong_views=2, weak_pass=False, complementary=True),
}
"""All code that depends on the preset reads its row here. Masked terms can be added to any row above: add a row below."""
BASES = tuple(PRESETS)


def standing_on(base: str, *masked: str, class_wise: bool = False) -> Preset:
    """The row of a preset that adds the masked terms `masked` to the preset `base`."""
    return PRESETS[base]._replace(masked=masked, class_wise=class_wise, base=base)


PRESETS["semantic"] = standing_on("fixmatch_fp", "sem")
PRESETS["mim"] = standing_on("fixmatch_fp", "pix", "feat", "sem")
PRESETS["cmim"] = standing_on("fixmatch_fp", "pix", "feat", "sem", class_wise=True)


class MethodSettings(Section):
    preset: Literal[*PRESETS] = "cmim"
    """Which views and loss terms are used; docs/method.md has the formulas."""
    base: Literal[*BASES] | None = None
    """The preset without masked terms to whose terms `semantic`, `mim` and `cmim` add theirs; by default fixmatch_fp."""
    tau: Fraction = 0.95
    """Minimum confidence of a pseudo-label that is used for the strong and the feature-perturbed views."""
    class_thresholds: bool = False
    """Lower thresholds for classes that are predicted less confidently: `tau` and `mim.tau` times the mean confidence of the
    class, relative to that of the most confident class."""
    class_balance: bool = False
    """Weight the confident pixels of the strong and the feature-perturbed views by their classes, so that the classes count
    as in the labelled images, at most 10 times."""
    logit_adjustment: bool = False
    """Add to the logits of unlabelled views, in their cross-entropies, the logarithm of each class's share of the confident
    pixels relative to its share of the labelled ones, so that classes that pseudo-labels lack are not unlearnt. It may do
    harm where the labelled images are too few to have the shares of all images."""
    align: bool = False
    """Distribution alignment: multiply the probabilities of pseudo-labels so that the classes are as frequent in them as in
    the labelled images."""
    batch_norm: Literal["batch", "shared", "running"] = "shared"
    """BatchNorm in the pass of the strong views, as of mim.batch_norm: with `batch`, running statistics are those of images
    that look like the ones of evaluation."""
    w_unlabelled: Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)] = 1.0
    """Factor of the terms of the strong and the feature-perturbed views."""
    start: Fraction = 0.0
    """Fraction of the training after which unlabelled images are used; before, training is supervised."""
    ramp: Fraction = 0.0
    """Fraction of the training over which the terms of strong and feature-perturbed views then reach their full weight."""
    cutmix: Fraction = 0.5
    """Probability of a CutMix box in a strong view."""
    dropout: Annotated[float, Field(ge=0, lt=1, strict=True)] = 0.5
    """Probability with which a channel is dropped in the feature-perturbed view."""
    complementary: bool = True
    """For unimatch_v2: for half of the images, complementary halves of the encoder's channels are dropped from the two
    strong views."""
    ohem: OhemSettings | None = None
    """Online hard example mining in the supervised term; none: off."""
    class_weights: (
        Literal["none", "inverse", "median"] | list[Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)]]
    ) = "none"
    """Weights of the classes in the supervised cross-entropy: `none`; `inverse`, to the number of labelled pixels of each
    class; `median`, median-frequency balancing; or a list with a number, 0 or more, for each class. Weights from the data
    are printed and kept in class_weights.txt of the run."""
    dice: NonNegative = 0.0
    """Weight of the Dice loss of the labelled images, relative to their cross-entropy."""

    @property
    def counts_classes(self) -> bool:
        """Whether the classes of labels and of confident pixels are counted."""
        return self.class_balance or self.logit_adjustment

    def check(self) -> None:
        if isinstance(self.class_weights, list) and not any(self.class_weights):
            raise UserError(
                "method.class_weights has no number above 0, so that no class would count; give one for each class"
            )


class MimSettings(Section):
    views: list[Literal["labelled", "weak", "strong"]] = ["labelled", "weak", "strong"]
    """Views that are masked: any of labelled, weak and strong."""
    tau: Fraction = 0.95
    """Minimum confidence of a pseudo-label that is used in the masked terms."""
    start: Fraction = 0.0
    """Fraction of the training after which the masked terms are switched on."""
    ramp: Fraction = 0.05
    """Fraction of the training over which their weights then grow linearly from 0 to the full weights."""
    w_pix: NonNegative = 0.5
    """Weight of the pixel reconstruction term. A masked term of weight 0 is not computed."""
    w_feat: NonNegative = 0.1
    """Weight of the distance between the centroids of hidden and visible tokens of a class."""
    w_sem: NonNegative = 1.0
    """Weight of the cross-entropy on masked views."""
    isolate: Literal["none", "input"] = "none"
    """`input`: hide all classes but one, drawn at random for each image, from the encoder."""
    batch_norm: Literal["batch", "shared", "running"] = "batch"
    """BatchNorm in the pass of the masked views. `batch`: batch statistics, without updating the running statistics;
    `shared`: the same with updating; `running`: running statistics."""

    def check(self) -> None:
        if not self.views:
            raise UserError("mim.views is empty: name at least one of labelled, weak, strong")
        if len(set(self.views)) < len(self.views):
            raise UserError(f"mim.views names a view twice: {', '.join(self.views)}")


class MaskSettings(Section):
    ratio: Annotated[float, Field(gt=0, lt=1, strict=True)] = 0.6
    """Share of the blocks that are hidden."""
    block: Positive = 32
    """Side length of a mask block in pixels."""
    fill: Literal["mean", "black", "learned"] = "mean"
    """Colour of hidden pixels: the mean colour of the data (zero after normalisation), black, or a learned colour."""
    per_class: bool = False
    """Apply the ratio within each class of each image instead of over the whole image."""


class ReconstructionSettings(Section):
    tokens: Literal["decoder", "encoder", "pixel"] = "decoder"
    """Feature map for reconstruction and, by default, centroids: the output of the segmenter's decoder or of its encoder; or
    `pixel`: a map of its own, fused from the encoder's map at stride 4 and its deepest one (of a transformer from the latter
    alone), of `width` channels."""
    decoder: Literal["conv", "attention"] = "conv"
    """`conv`: ConvNeXt blocks whose convolutions mix tokens of the same class only; `attention`: transformer blocks with
    attention within each class."""
    width: Positive = 128
    """Channels of the reconstruction decoder."""
    depth: Positive = 4
    """Number of blocks of the reconstruction decoder."""
    kernel_size: Positive = 7
    """Kernel size of the conv decoder; odd."""
    num_heads: Positive = 8
    """Attention heads of the attention decoder."""
    attention: Literal["class_attention", "xformers", "varlen", "sdpa"] = "class_attention"
    """What computes the attention decoder's attention, with equal results: `class_attention`, our own; PyTorch's `sdpa` with
    a mask (anywhere, in memory that grows with the square of the tokens) or `varlen` (bf16 and fp16 on CUDA); `xformers`, a
    package (CUDA)."""
    checkpointing: bool = False
    """Activation checkpointing: keep only the inputs of the blocks' MLPs, and compute the rest of them again in the backward
    pass, which takes less memory and more time."""
    mask_token: bool = True
    """Replace the features of hidden tokens by a learned mask token before decoding."""
    distance: Literal["l1", "mse", "smooth_l1"] = "l1"
    """Loss between predicted and true pixels; smooth_l1 has beta 1."""
    normalize: bool = False
    """Normalise each target patch by its own mean and variance, as MAE does."""
    balance: Literal["token", "class"] = "token"
    """`token`: mean over all tokens; `class`: mean over tokens within each class, then over classes."""
    min_share: Fraction = 0.5
    """Share of a patch's pixels that its majority class must have; other patches are ignored."""

    def check(self) -> None:
        if self.kernel_size % 2 == 0:
            raise UserError(f"reconstruction.kernel_size is {self.kernel_size}, expected an odd number")
        if self.decoder == "attention" and self.width % (4 * self.num_heads):
            raise UserError("reconstruction.width must be a multiple of 4 x reconstruction.num_heads")
        if self.decoder != "attention" and self.attention != "class_attention":
            raise UserError(
                f"reconstruction.attention is {self.attention}, but the {self.decoder} decoder has no attention; leave it "
                "out, or use --reconstruction.decoder attention"
            )
        if self.attention in ("varlen", "xformers") and self.width % (8 * self.num_heads):
            raise UserError(
                f"reconstruction.attention {self.attention} needs reconstruction.width to be a multiple of 8 x "
                "reconstruction.num_heads"
            )


class CentroidSettings(Section):
    features: Literal["decoder", "encoder", "pixel"] | None = None
    """Feature map whose centroids are compared, as of reconstruction.tokens, which is the default; `decoder` if that is
    pixel."""
    distance: Literal["cosine", "l2"] = "cosine"
    """Distance between centroids: 1 - cosine similarity, or the mean of squared differences."""
    detach: Literal["visible", "masked", "none"] = "visible"
    """Centroid that gets no gradient."""
    min_tokens: Positive = 4
    """Number of hidden and of visible tokens that a class must have in an image to count."""


class TeacherSettings(Section):
    kind: Literal["student", "ema"] = "student"
    """Network that makes the pseudo-labels. `student`: the network itself, in the training pass; `ema`: an exponential
    moving average of its weights, in eval mode."""
    run: Path | None = None
    """A run whose last weights make the pseudo-labels instead, unchanged in training: a larger network of the same classes,
    for example. `kind` then only says whose weights are evaluated."""
    decay: Annotated[float, Field(ge=0, lt=1, strict=True)] = 0.996
    """Decay of the moving average; in early steps it is smaller: min(1 - 1 / (step + 1), decay)."""
