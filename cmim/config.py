"""Settings from YAML files and `--section.key VALUE` overrides.

Unknown keys, invalid values and contradictory settings raise errors of one line; for an unknown key it suggests the nearest
one. `cmim.settings` defines the settings.
"""

import difflib
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import ValidationError

from cmim.errors import UserError
from cmim.settings import Config, Section


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The settings of a YAML file with overrides.

    Args:
        path: YAML file.
        overrides: command-line arguments, `--section.key VALUE` or `--section.key=VALUE`; values are YAML, except that
            paths and names are used literally.

    Raises:
        UserError: an unreadable file, an unknown key, an invalid value, or contradictory settings.
    """
    return override(read_yaml(path), path, overrides)


def override(values: dict, source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Validated settings from nested dictionaries with overrides; otherwise as `load_config`. `source` says in error
    messages where the dictionaries come from."""
    if not overrides:
        return config_from(values, source)
    _validate(values, source)  # separately, so that an error names either the file or the command line
    for key, text in overridden(overrides):
        section = values
        *parents, last = key.split(".")
        for parent in parents:
            if section.get(parent) is None:
                section[parent] = {}
            section = section[parent]
            if not isinstance(section, dict):
                raise UserError(f"--{key}: {parent} is a value, not a section")
        section[last] = _parse(key, text)
    return config_from(values, "command line")


def config_from(values: dict, source: str | Path) -> Config:
    """Validated settings from nested dictionaries; `source` says in error messages where they come from."""
    config = _validate(values, source)
    _check(config)
    return config


def _validate(values, source):
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: {_explain(error)}") from None


def dump_config(config: Config) -> str:
    """The resolved settings as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def words_of(settings: Mapping[str, Any]) -> list[str]:
    """Overrides {"section.key": value} as on a command line."""
    return [f"--{key}={_as_word(value)}" for key, value in settings.items()]


def _as_word(value):
    """Text as it is, everything else as YAML in one line."""
    if isinstance(value, str | Path):
        return str(value)
    return yaml.safe_dump(plain(value), default_flow_style=True, width=10**6).partition("\n...")[0].strip()


def plain(value: object) -> Any:
    """A value with mappings, sequences and paths of any type as what YAML can write: dict, list, text."""
    if isinstance(value, Mapping):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def changed_settings(config: Config) -> dict[str, object]:
    """The settings that are not the defaults, by their keys, as plain values."""

    def leaves(values, section, prefix=""):
        for name, value in values.items():
            inner = getattr(section, name)
            if isinstance(inner, Section):
                yield from leaves(value, inner, f"{prefix}{name}.")
            else:
                yield prefix + name, value

    defaults = dict(leaves(Config().model_dump(mode="json"), Config()))
    return {key: v for key, v in leaves(config.model_dump(mode="json"), config) if key not in defaults or v != defaults[key]}


def default_config_path() -> Path:
    """configs/shapes.yaml: inside an installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "configs" / "shapes.yaml"
    return inside if inside.exists() else Path(__file__).parent.parent / "configs" / "shapes.yaml"


def read_yaml(path: str | Path, what: str = "config") -> dict:
    """The mapping in a YAML file, without empty values. `what` says in error messages what kind of file it is.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        values = _load(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the {what} {path}: {getattr(error, 'strerror', None) or 'not a text file'}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    except RecursionError:
        raise UserError(f"{path} is not valid YAML: too deeply nested") from None
    if values is not None and not isinstance(values, dict):
        raise UserError(f"{path}: expected sections such as 'train:', got {_short(values)}")
    return {key: value for key, value in (values or {}).items() if value is not None}  # an empty section means the defaults


def overridden(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The key and the value (as text) of each override on a command line."""
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


def _parse(key, text):
    field = _fields(Config).get(key)
    if field and not text.strip():  # for example from an empty shell variable; YAML would read null
        raise UserError(f"--{key} is empty; give a value" + ", or null for none" * (NoneType in get_args(field.annotation)))
    types = set(get_args(field.annotation) or [field.annotation]) if field else set()
    if types and types <= {Path, str, NoneType}:
        return _text(text)
    try:
        value = _load(text)
    except (yaml.YAMLError, RecursionError):
        if types & {Path, str}:
            return text
        raise UserError(f"--{key}: {text!r} is not a YAML value") from None
    if types & {Path, str} and not isinstance(value, int | float):  # a path or a name where a number is allowed too
        return _text(text)
    # YAML ignores underscores in numbers, but 1_8 is a name or a mistake.
    return text if isinstance(value, int | float) and "_" in text else value


def _text(text):
    """A path or a name, used literally because YAML would cut `run #2` and refuse `@home`. Quotes around the whole text are
    removed, and `null` means none unless a file of this name exists."""
    if Path(text).exists():
        return text
    if text == "null":
        return None
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        try:
            unquoted = yaml.safe_load(text)
        except yaml.YAMLError:
            return text
        return unquoted if isinstance(unquoted, str) else text
    return text


class _Loader(yaml.SafeLoader):
    """Reads plain scalars as YAML 1.2 does: yes, no, on and off are names, for example of classes, and 12:30, 010 and
    2024-01-01 are not numbers. Digits may still be grouped by underscores. A repeated key is an error."""

    def construct_mapping(self, node, deep=False):
        places = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in places:
                    raise yaml.constructor.ConstructorError(
                        f"{key.value} of line {places[key.value]} is repeated here; remove one of the two",
                        problem_mark=key.start_mark,
                    )
                places[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


_PLAIN = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    "float": (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
        r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
}
_Loader.yaml_implicit_resolvers = {
    first: [r for r in resolvers if r[0].rpartition(":")[2] not in (*_PLAIN, "timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, (_pattern, _first) in _PLAIN.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), list(_first))


def _load(text):
    return yaml.load(text, _Loader)


def _explain(error):
    """The first problem of a ValidationError in one line; for an unknown key with the nearest one."""
    problem = min(error.errors(), key=lambda e: len(e["loc"]))  # prefer problems of a whole value to those of its entries
    if problem["type"] in ("extra_forbidden", "invalid_key"):
        return unknown_key(".".join(str(p) for p in problem["loc"] if p != "[key]"))
    fields = _fields(Config)
    place = [str(p) for p in problem["loc"]]
    while ".".join(place) not in fields:  # an entry of a list, or the name of one of several allowed types
        place.pop()
    key = ".".join(place)
    if problem["type"] in ("model_type", "dict_type"):
        return f"{key}: expected settings of its own, got {_short(problem['input'])}"
    if _is_choice(fields[key].annotation):  # pydantic reports one problem for each type: print the description instead
        return f"{key}: got {_short(problem['input'])}, expected: {' '.join(fields[key].description.split())}"
    if problem["type"] in ("path_type", "string_type") and isinstance(problem["input"], int | float):
        return f"{key}: expected text, got {_short(problem['input'])}; write it in quotes"
    hint = f"; {HINTS[key]}" if key in HINTS else ""
    return f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}, got {_short(problem['input'])}{hint}"


_shortened = reprlib.Repr()
_shortened.maxlevel, _shortened.maxstring, _shortened.maxother = 2, 120, 120
_shortened.maxlist = _shortened.maxtuple = _shortened.maxset = _shortened.maxdict = 12
_short = _shortened.repr


HINTS = {
    "data.mean": "values are from 0 to 1: divide by 255",
    "data.std": "values are from 0 to 1: divide by 255",
    "data.size": "give [height, width]",
    "data.flips": "give a list, such as [horizontal, vertical]",
    "data.scale": "give [lowest, highest]",
    "data.range": "give [the value that becomes 0, the value that becomes 255]",
    "evaluation.scales": "give a list, such as [0.75, 1, 1.25]",
    "evaluation.table": "give a list, such as [iou, dice]",
    "mim.views": "give a list, such as [labelled, weak]",
    "model.atrous_rates": "give a list, such as [6, 12, 18]",
    "data.colour_tolerance": "it is a distance in RGB, 0 to 442",
    "data.label_map": "give {mask value: class}, such as {255: 1}",
}
"""What to write instead of an invalid value."""


def unknown_key(key: str) -> str:
    """The error message for an unknown key, with the nearest key that exists."""
    fields = _fields(Config)
    name, names = key.rpartition(".")[2], {k.rpartition(".")[2]: k for k in reversed(fields)}
    if name in names:  # a right key in the wrong section
        return f"unknown key {key}; did you mean {names[name]}?"
    nearest = difflib.get_close_matches(key, fields, 1, 0.7)
    nearest += [names[n] for n in difflib.get_close_matches(name, names, 1, 0.75)]
    return f"unknown key {key}" + (f"; did you mean {nearest[0]}?" if nearest else "")


def _is_choice(annotation):
    """Whether a type annotation is a union of several types, not counting None."""
    return get_origin(annotation) in (Union, UnionType) and len(set(get_args(annotation)) - {NoneType}) > 1


def _fields(section, prefix=""):
    """Every key of a section and of its nested sections, with its pydantic field."""
    fields = {}
    for name, field in section.model_fields.items():
        fields[prefix + name] = field
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, Section):
                fields |= _fields(part, f"{prefix}{name}.")
    return fields


def _check(config: Config) -> None:
    """Refuse contradictory settings, within a section or between sections; sections that the preset does not use are not
    checked. `cmim.models.build.check_sizes` checks what depends on the network, `check_counts` what depends on the
    images."""
    preset = config.preset
    unused = set() if preset.masked else {"mim", "mask"}
    if "pix" not in preset.masked:
        unused.add("reconstruction")
    for name, section in config:
        if isinstance(section, Section) and name not in unused:
            section.check()

    data, mask = config.data, config.mask
    window, step = config.evaluation.window or data.crop, config.evaluation.stride
    if step is not None and step > window:
        raise UserError(f"evaluation.stride is {step}, more than the window of {window} pixels: pixels would not be covered")
    if preset.uses_unlabelled and config.method.cutmix > 0 and config.train.unlabelled_batch % 2:
        raise UserError(
            f"train.unlabelled_batch is {config.train.unlabelled_batch}: CutMix pairs images, so it must be even "
            "(or set method.cutmix to 0)"
        )
    if config.model.checkpointing and config.train.compile:
        raise UserError("model.checkpointing does not work with train.compile; leave one of them away")
    if config.attention == "xformers" and config.train.compile:
        raise UserError("reconstruction.attention xformers does not work with train.compile; leave one of them away")
    decay = config.optimizer.layer_decay
    if decay < 1 and config.model.arch != "dpt":
        raise UserError(
            f"optimizer.layer_decay is {decay:g}, but model.arch {config.model.arch} has no transformer blocks; leave it "
            "out, or use --model.arch dpt"
        )
    if decay < 1 and config.model.freeze_encoder:
        raise UserError(
            f"optimizer.layer_decay is {decay:g}, but model.freeze_encoder trains no block; leave one of them away"
        )
    if not preset.masked:
        return
    if not preset.uses_unlabelled and config.mim.views != ["labelled"]:
        raise UserError(f"mim.views is {config.mim.views}, but {config.method.preset} has labelled views only")
    if data.crop % mask.block:
        lower = max(mask.block, data.crop // mask.block * mask.block)
        raise UserError(f"data.crop is {data.crop}, which is not a multiple of mask.block {mask.block}; try {lower}")
    blocks = (data.crop // mask.block) ** 2
    if not 0 < round(mask.ratio * blocks) < blocks:
        hidden = "nothing" if round(mask.ratio * blocks) == 0 else "everything"
        raise UserError(f"mask.ratio {mask.ratio} of {blocks} blocks hides {hidden}; change it, mask.block or data.crop")


OF_UNLABELLED = (
    "train.unlabelled_batch", "method.tau", "method.class_thresholds", "method.align", "method.w_unlabelled", "method.start",
    "method.ramp", "method.cutmix", "method.dropout", "method.class_balance", "method.logit_adjustment", "method.batch_norm",
    "data.colour_jitter", "teacher.run",
)  # fmt: skip
"""Settings of the terms of unlabelled images."""


def without_effect(config: Config, overrides: Sequence[str]) -> list[str]:
    """The keys of overrides that the preset does not use. Those of a file are left aside: a file serves several presets."""
    preset, unused = config.preset, []
    for key, _ in overridden(overrides):
        section = key.partition(".")[0]
        masked = section in ("mim", "mask") and not preset.masked
        pixels = section == "reconstruction" and "pix" not in preset.masked
        if masked or pixels or (key in OF_UNLABELLED and not preset.uses_unlabelled):
            unused.append(key)
    return unused


def check_counts(config: Config, labelled: int, unlabelled: int, processes: int) -> None:
    """Raise a UserError if there are too few images, or if the processes cannot share a batch equally."""
    train = config.train
    if max(labelled, 2 * processes) < train.labelled_batch:  # BatchNorm may need two in a pass, even of a single image
        raise UserError(
            f"{labelled} labelled images are fewer than train.labelled_batch {train.labelled_batch}; "
            "lower it, or raise data.labelled"
        )
    if config.preset.uses_unlabelled and unlabelled < train.unlabelled_batch:
        raise UserError(
            f"{unlabelled} unlabelled images are fewer than train.unlabelled_batch "
            f"{train.unlabelled_batch}; lower it, add images to unlabeled/, or lower data.labelled"
        )
    if train.epochs is not None and unlabelled < train.unlabelled_batch * train.accumulate:
        raise UserError(
            f"train.epochs counts passes over the unlabelled images, but {unlabelled} are fewer than the "
            f"{train.unlabelled_batch * train.accumulate} of a step; give train.steps, or lower train.unlabelled_batch"
        )
    pairs = 2 if config.method.cutmix > 0 else 1
    for name, size, multiple in (
        ("labelled_batch", train.labelled_batch, 1),
        ("unlabelled_batch", train.unlabelled_batch if config.preset.uses_unlabelled else 0, pairs),
    ):
        if size % (processes * multiple):
            each = "pairs of images (method.cutmix)" if multiple == 2 else "images"
            more = -(-size // (processes * multiple)) * processes * multiple
            raise UserError(f"train.{name} is {size}, but {processes} processes share {each} equally; try {more}")


def check_background(config: Config, classes: int) -> None:
    """Raise a UserError if `data.background` is not one of the classes."""
    background = config.data.background
    if background is not None and background >= classes:
        raise UserError(
            f"data.background is {background}, but the classes are 0 to {classes - 1}; give one of them, or null"
        )


def check_class_weights(config: Config, classes: int) -> None:
    """Raise a UserError if `method.class_weights` lists another number of weights than there are classes."""
    weights = config.method.class_weights
    if isinstance(weights, list) and len(weights) != classes:
        raise UserError(
            f"method.class_weights has {len(weights)} numbers, but there are {classes} classes; give one for each"
        )
