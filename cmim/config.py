"""Every setting of a run, with its type, its default and what it does; YAML files and `--section.key VALUE` overrides.

The defaults are those of DeepLabV3+ on photographs; a file in configs/ states only what differs. Where a default
comes from is in the README's table. Unknown and ill-typed keys are errors that name the nearest key.
"""

import difflib
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cmim.engine.errors import UserError

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1, strict=True)]
NonNegative = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class ShapesSettings(Section):
    labelled: Positive = 48
    unlabelled: Positive = 400
    val: Positive = 100
    test: Positive = 200


class DataSettings(Section):
    format: Literal["shapes", "folder"] = "folder"
    """`shapes`: drawn on the fly. `folder`: train/, val/, test/ with images/ and masks/, optionally unlabeled/."""
    root: Path | None = None
    classes: list[str] | Positive | None = None
    """Names or number of the classes; by default read from ROOT/classes.txt, one name a line."""
    ignore: Annotated[int, Field(ge=0, le=255)] = 255
    """Mask value without a class."""
    label_map: dict[int, int] = {}
    """Mask values to class ids, e.g. {255: 1} for masks of 0 and 255; a value that is not listed stays."""
    background: Annotated[int, Field(ge=0)] | None = None
    """Class left out of the "foreground" figures of the log; none by default."""
    labelled: Path | Positive | Annotated[float, Field(gt=0, le=1, strict=True)] = 0.125
    """Labelled share of train/ (at most 1), number of labelled images, or a text file of their names; the rest is
    unlabelled."""
    split_seed: int = 0
    """Draws the labelled images; apart from `seed`, so that runs of several seeds share a split."""
    val: str = "val"
    test: str | None = "test"
    size: tuple[Positive, Positive] | None = None
    """Images are resized to (height, width) first; evaluation still compares at the original resolution."""
    crop: Positive = 320
    """Side of the training crop in pixels."""
    scale: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.5, 2.0)
    """Random resize of the weak augmentation."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Processes that load data; by default the cores but one, at most 8."""
    shapes: ShapesSettings = ShapesSettings()


class ModelSettings(Section):
    arch: Literal["deeplabv3plus"] = "deeplabv3plus"
    encoder: str = "resnet101s.gluon_in1k"
    """A timm model that can return features at strides 4 and `output_stride`."""
    weights: str = "timm"
    """`timm`: pretrained weights of the encoder, fetched by timm; `none`: random; else a file (.pt or .safetensors)."""
    output_stride: Literal[8, 16] = 16
    atrous_rates: tuple[Positive, ...] = (6, 12, 18)
    decoder_width: Positive = 256
    low_level_width: Positive = 48


class OhemSettings(Section):
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.7
    min_kept: Positive = 200_000


class MethodSettings(Section):
    preset: Literal["supervised", "fixmatch", "unimatch", "mim", "cmim"] = "cmim"
    tau: Fraction = 0.95
    """Confidence from which a pseudo-label trains the strong and the dropped-out view."""
    cutmix: Fraction = 0.5
    """Probability of a CutMix box in a strong view."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Channel dropout of the feature-perturbed view."""
    ohem: OhemSettings | None = None
    """Online hard example mining in the supervised term."""


class MimSettings(Section):
    views: list[Literal["labelled", "weak", "strong"]] = ["labelled", "weak", "strong"]
    tau: Fraction = 0.95
    """Confidence from which a pixel of an unlabelled view has a class in the masked terms."""
    start: Fraction = 0.0
    ramp: Fraction = 0.05
    """The masked terms begin at `start` and grow linearly over `ramp`, both fractions of the training."""
    w_pix: NonNegative = 0.5
    w_feat: NonNegative = 0.1
    w_sem: NonNegative = 1.0
    isolate: Literal["none", "input"] = "none"
    """`input`: before the encoder, hide every class but one drawn for each image."""
    batch_norm: Literal["batch", "shared", "running"] = "batch"
    """Masked pass: batch statistics without updating the running ones; with updating; or running statistics."""


class MaskSettings(Section):
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.6
    block: Positive = 32
    """Side of a mask block in pixels."""
    fill: Literal["mean", "black", "learned"] = "mean"
    """Colour of hidden pixels: the mean colour of the data (zero after normalisation), black, or a learned colour."""
    per_class: bool = False
    """Mask the ratio inside each class of each image instead of over the whole image."""


class ReconstructionSettings(Section):
    tokens: Literal["decoder", "encoder"] = "decoder"
    """Feature map that is decoded and whose centroids are compared: the segmenter's decoder or its encoder."""
    decoder: Literal["conv", "attention"] = "conv"
    width: Positive = 128
    depth: Positive = 4
    kernel_size: Positive = 7
    """Of the conv decoder; odd."""
    num_heads: Positive = 8
    """Of the attention decoder."""
    mask_token: bool = True
    """Replace the features of hidden tokens by a learned token before decoding."""
    distance: Literal["l1", "mse", "smooth_l1"] = "l1"
    normalize: bool = False
    """Compare with patches normalised by their own mean and variance."""
    balance: Literal["token", "class"] = "token"
    """Mean over tokens, or mean over the classes of their means."""
    min_share: Fraction = 0.5
    """Share of a patch's pixels that its class must hold; a patch below it is ignored."""


class CentroidSettings(Section):
    distance: Literal["cosine", "l2"] = "cosine"
    detach: Literal["visible", "masked", "none"] = "visible"
    min_tokens: Positive = 4


class TeacherSettings(Section):
    kind: Literal["student", "ema"] = "student"
    """`student`: pseudo-labels of the training pass itself; `ema`: of a moving average of the weights, in eval mode."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.996


class OptimizerSettings(Section):
    name: Literal["sgd", "adamw"] = "sgd"
    lr: Annotated[float, Field(gt=0)] = 0.001
    """Of the encoder."""
    head_lr_factor: Annotated[float, Field(gt=0)] = 10.0
    """Everything but the encoder learns at lr x this."""
    momentum: Fraction = 0.9
    weight_decay: NonNegative = 1e-4
    poly_power: NonNegative = 0.9


class TrainSettings(Section):
    steps: Positive = 40_000
    labelled_batch: Positive = 8
    unlabelled_batch: Positive = 8
    accumulate: Positive = 1
    """Micro-batches of the above sizes per optimiser step; every micro-batch has its own denominators."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on CUDA, fp32 on the CPU."""
    compile: bool | None = None
    """torch.compile; by default on CUDA only."""
    channels_last: bool = True
    log_every: Positive = 20
    evaluate_every: Positive = 1000
    checkpoint_every: Positive = 500
    picture_every: Positive = 1000


class EvaluationSettings(Section):
    weights: Literal["teacher", "student"] = "teacher"
    """Which weights are evaluated, chosen and exported where the teacher is an EMA."""
    batch: Positive = 8
    """Images of equal size that are evaluated together."""


class Config(Section):
    seed: int = 0
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


def load_config(path, overrides=()):
    """The settings of a YAML file with overrides.

    Args:
        path: YAML file.
        overrides: command-line words, `--section.key VALUE` or `--section.key=VALUE`; values are YAML.

    Raises:
        UserError: an unreadable file, an unknown key (the nearest one is named), a value that does not fit, or
            settings that contradict each other.
    """
    values = _read_yaml(path)
    config = _validate(values, path)  # before the overrides, so that an error names the file or the command line
    if overrides:
        for key, text in _pairs(overrides):
            section = values
            *parents, last = key.split(".")
            for parent in parents:
                if section.get(parent) is None:
                    section[parent] = {}
                section = section[parent]
                if not isinstance(section, dict):
                    raise UserError(f"--{key}: {parent} is a value, not a section")
            section[last] = _parse(text, f"--{key}")
        config = _validate(values, "command line")
    _check(config)
    return config


def config_from(values, source):
    """Validated settings from nested dictionaries; `source` names them in errors."""
    config = _validate(values, source)
    _check(config)
    return config


def _validate(values, source):
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: {_explain(error)}") from None


def dump_config(config):
    """The resolved settings as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def default_config_path():
    """configs/shapes.yaml: inside an installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "configs" / "shapes.yaml"
    return inside if inside.exists() else Path(__file__).parent.parent / "configs" / "shapes.yaml"


def _read_yaml(path):
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the config {path}: {getattr(error, 'strerror', None) or 'not a text file'}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if values is not None and not isinstance(values, dict):
        raise UserError(f"{path}: expected sections such as 'train:', got {values!r}")
    return {key: value for key, value in (values or {}).items() if value is not None}  # an empty section: its defaults


def _pairs(words):
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise UserError(f"unexpected argument {word!r}; settings are given as --section.key VALUE")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not words or (words[0].startswith("--")):
                raise UserError(f"--{key}: a value is missing")
            text = words.pop(0)
        yield key, text


def _parse(text, where):
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"{where}: {text!r} is not a YAML value") from None


def _explain(error):
    """The first problem of a ValidationError in one line, with the nearest key for an unknown one."""
    problem = min(error.errors(), key=lambda e: len(e["loc"]))  # of a whole value rather than of an entry in it
    if problem["type"] in ("extra_forbidden", "invalid_key"):
        return unknown_key(".".join(str(p) for p in problem["loc"] if p != "[key]"))
    fields = _fields(Config)
    place = [str(p) for p in problem["loc"]]
    while ".".join(place) not in fields:  # an entry of a list, or the name of one of several types
        place.pop()
    key = ".".join(place)
    if problem["type"] in ("model_type", "dict_type"):
        return f"{key}: expected settings of its own, got {problem['input']!r}"
    if _is_choice(fields[key].annotation):  # pydantic complains once for each type: say what they stand for
        return f"{key}: got {problem['input']!r}, expected: {' '.join(fields[key].description.split())}"
    return f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}, got {problem['input']!r}"


def unknown_key(key):
    """What to say of a key that is not a setting, with the nearest one that is."""
    fields = _fields(Config)
    name, names = key.rpartition(".")[2], {k.rpartition(".")[2]: k for k in reversed(fields)}
    if name in names:  # a right key in the wrong section
        return f"unknown key {key}; did you mean {names[name]}?"
    nearest = difflib.get_close_matches(key, fields, 1, 0.7)
    nearest += [names[n] for n in difflib.get_close_matches(name, names, 1, 0.75)]
    return f"unknown key {key}" + (f"; did you mean {nearest[0]}?" if nearest else "")


def _is_choice(annotation):
    """Whether it is a union of several types, None aside."""
    return get_origin(annotation) in (Union, UnionType) and len(set(get_args(annotation)) - {NoneType}) > 1


def _fields(section, prefix=""):
    """Every key of a section and of the sections in it, with its pydantic field."""
    fields = {}
    for name, field in section.model_fields.items():
        fields[prefix + name] = field
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, Section):
                fields |= _fields(kind, f"{prefix}{name}.")
    return fields


def token_stride(config):
    """Pixels per side of a token, which is also the patch that is reconstructed from it."""
    return 4 if config.reconstruction.tokens == "decoder" else config.model.output_stride


def uses_unlabelled(config):
    return config.method.preset != "supervised"


def uses_masking(config):
    return config.method.preset in ("mim", "cmim")


def _check(config):
    """Settings that contradict each other."""
    data, mask, stride = config.data, config.mask, token_stride(config)
    if data.format == "folder" and data.root is None:
        raise UserError("data.root is missing: give the data folder as --data.root PATH")
    if data.scale[0] > data.scale[1]:
        raise UserError(f"data.scale: the lower bound {data.scale[0]} is above the upper bound {data.scale[1]}")
    if uses_unlabelled(config) and config.method.cutmix > 0 and config.train.unlabelled_batch % 2:
        raise UserError(
            f"train.unlabelled_batch is {config.train.unlabelled_batch}: CutMix pairs images, so it must be even "
            "(or set method.cutmix to 0)"
        )
    if not uses_masking(config):
        return
    if mask.block % stride:
        raise UserError(f"mask.block is {mask.block}, which is not a multiple of the token stride {stride}")
    if data.crop % mask.block:
        lower = max(mask.block, data.crop // mask.block * mask.block)
        raise UserError(f"data.crop is {data.crop}, which is not a multiple of mask.block {mask.block}; try {lower}")
    blocks = (data.crop // mask.block) ** 2
    if not 0 < round(mask.ratio * blocks) < blocks:
        hidden = "nothing" if round(mask.ratio * blocks) == 0 else "everything"
        raise UserError(f"mask.ratio {mask.ratio} of {blocks} blocks hides {hidden}; change it, mask.block or data.crop")
    if not config.mim.views:
        raise UserError("mim.views is empty: name at least one of labelled, weak, strong")
    if len(set(config.mim.views)) < len(config.mim.views):
        raise UserError(f"mim.views names a view twice: {', '.join(config.mim.views)}")
    if config.reconstruction.kernel_size % 2 == 0:
        raise UserError(f"reconstruction.kernel_size is {config.reconstruction.kernel_size}, expected an odd number")
    if config.reconstruction.decoder == "attention" and config.reconstruction.width % (4 * config.reconstruction.num_heads):
        raise UserError("reconstruction.width must be a multiple of 4 x reconstruction.num_heads")
