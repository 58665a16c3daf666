"""Every setting of a run: its type, its default and what it does.

The defaults are meant for DeepLabV3+ on photographs; a file in configs/ states only what differs. docs/method.md says where
the defaults of the method come from. `check` of a section holds the rules within this section; rules between sections are in
`cmim.config`.
"""

from typing import Annotated, Literal

from pydantic import Field

from cmim.settings.data import IMAGENET_MEAN, IMAGENET_STD, MOST_PIXELS, DataSettings, ShapesSettings, as_colour
from cmim.settings.method import (
    BASES,
    PRESETS,
    CentroidSettings,
    MaskSettings,
    MethodSettings,
    MimSettings,
    OhemSettings,
    Preset,
    ReconstructionSettings,
    TeacherSettings,
    standing_on,
)
from cmim.settings.model import NAMED_WEIGHTS, ModelSettings
from cmim.settings.section import Section
from cmim.settings.training import EvaluationSettings, LoggingSettings, OptimizerSettings, TrainSettings

__all__ = [
    "BASES",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "MOST_PIXELS",
    "NAMED_WEIGHTS",
    "PRESETS",
    "CentroidSettings",
    "Config",
    "DataSettings",
    "EvaluationSettings",
    "LoggingSettings",
    "MaskSettings",
    "MethodSettings",
    "MimSettings",
    "ModelSettings",
    "OhemSettings",
    "OptimizerSettings",
    "Preset",
    "ReconstructionSettings",
    "Section",
    "ShapesSettings",
    "TeacherSettings",
    "TrainSettings",
    "as_colour",
    "standing_on",
]


class Config(Section):
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63, strict=True)] = 0
    """Seed of all randomness except the choice of the labelled images."""
    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    method: MethodSettings = MethodSettings()
    mim: MimSettings = MimSettings()
    mask: MaskSettings = MaskSettings()
    reconstruction: ReconstructionSettings = ReconstructionSettings()
    centroids: CentroidSettings = CentroidSettings()
    teacher: TeacherSettings = TeacherSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    train: TrainSettings = TrainSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    logging: LoggingSettings = LoggingSettings()

    @property
    def preset(self) -> Preset:
        """The row of `PRESETS`, on `method.base` and without masked terms of weight 0."""
        row = PRESETS[self.method.preset]
        if row.masked and self.method.base is not None:
            row = standing_on(self.method.base, *row.masked, class_wise=row.class_wise)
        return row._replace(masked=tuple(term for term in row.masked if getattr(self.mim, f"w_{term}") > 0))

    @property
    def attention(self) -> str | None:
        """`reconstruction.attention` if the run has an attention decoder, else None."""
        uses = "pix" in self.preset.masked and self.reconstruction.decoder == "attention"
        return self.reconstruction.attention if uses else None

    @property
    def gains_parameters(self) -> bool:
        """Whether some parameters get their first gradient in a later step: the reconstruction decoder and a learned fill
        colour, if the masked terms begin later."""
        return bool(self.preset.masked) and max(self.mim.start, self.method.start) > 0

    @property
    def centroid_features(self) -> Literal["decoder", "encoder", "pixel"]:
        """The feature map whose centroids are compared."""
        tokens = self.reconstruction.tokens
        return self.centroids.features or ("decoder" if tokens == "pixel" else tokens)

    @property
    def has_teacher(self) -> bool:
        return self.teacher.kind == "ema"

    @property
    def evaluated_weights(self) -> Literal["teacher", "student"]:
        """Whose weights are evaluated, and saved as best.pt."""
        return "teacher" if self.has_teacher and self.evaluation.weights == "teacher" else "student"
