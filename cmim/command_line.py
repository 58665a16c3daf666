"""Command lines: each command's own options, `--section.key VALUE` overrides of the config, and --help."""

import argparse
import difflib
import re
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from pydantic.fields import FieldInfo

from cmim.config import default_config_path, unknown_key
from cmim.errors import UserError
from cmim.settings import PRESETS, Config, Section


class CommandLine(argparse.ArgumentParser):
    """An ArgumentParser whose help text is the module's docstring and whose errors are one line.

    `parse(arguments)` returns (namespace, overrides), with overrides for `cmim.config.load_config`.
    """

    def __init__(self, module: str, doc: str):
        super().__init__(
            prog=f"python -m {module}",
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        # `cmim.early` answers it before PyTorch is imported; here it is for the help text.
        self.add_argument("--version", action="store_true", default=argparse.SUPPRESS, help="show the version and exit")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    def parse(self, arguments: Sequence[str] = ()) -> tuple[argparse.Namespace, list[str]]:
        own, overrides, words = [], [], list(arguments)
        while words:
            word = words.pop(0)
            key = word.removeprefix("--").partition("=")[0]
            if word.startswith("--") and ("." in key or key in Config.model_fields):
                overrides.append(word)
                # The next word is the value, which may be a negative number. `cmim.config` reports a missing value.
                if "=" not in word and words and not words[0].startswith("--"):
                    overrides.append(words.pop(0))
            else:
                own.append(word)
        namespace, rest = self.parse_known_args(own)
        unknown = [word for word in rest if word.startswith("-")]
        if unknown:
            word = unknown[0].partition("=")[0]
            nearest = difflib.get_close_matches(word, self._option_string_actions, 1, 0.75)
            self.error(f"unknown option {word}; did you mean {nearest[0]}?" if nearest else unknown_key(word.lstrip("-")))
        if rest:
            self.error(f"unexpected argument {rest[0]!r}")
        values = {name: value if isinstance(value, list) else [value] for name, value in vars(namespace).items()}
        empty = next((name for name, value in values.items() if "" in value or Path("") in value), None)
        if empty is not None:  # for example from an empty shell variable; it would mean the current folder or the default
            self.error(f"the argument {empty} is empty; give a value")
        return namespace, overrides


def parser_of(command: str, doc: str) -> CommandLine:
    """The parser of `python -m cmim.<command>`; `doc` is the docstring of its module."""
    parser = CommandLine(f"cmim.{command}", doc)
    add = parser.add_argument
    if command == "train":
        add("config", nargs="?", help="a YAML file or a folder of images; without it, the built-in `shapes` set")
        add("--output", metavar="RUN", help="run folder; by default runs/<config>-<time>")
        add("--resume", action="store_true", help="continue the run in --output, or start it if there is none")
        add(
            "--dry-run",
            action="store_true",
            help="print settings, data, network, memory and time, measured on a few steps, and write nothing",
        )
    elif command == "check":
        add("path", help="a folder of images and masks, or a config file")
        add("--output", type=Path, metavar="CONFIG", help="config to write; by default NAME.yaml, NAME that of the folder")
        add("--convert", type=Path, metavar="OUT", help="make masks of polygons (COCO, LabelMe, CVAT) in OUT, and check OUT")
    elif command == "compare":
        add("config", nargs="?", default=default_config_path(), help="a YAML file; without it, the built-in `shapes` set")
        add("--output", type=Path, required=True, help="folder of the runs and the table")
        add(
            "--presets",
            nargs="+",
            choices=tuple(PRESETS),
            default=tuple(PRESETS),
            metavar="PRESET",
            help=f"presets to train, of {', '.join(PRESETS)}; by default all",
        )
        add("--variants", type=Path, metavar="FILE", help="YAML file of variants to train, instead of presets")
        add("--base", metavar="NAME", help="variant that the others are compared with; by default the first")
        add("--draw-splits", action="store_true", help="the seed also draws the labelled images (data.split_seed)")
        add("--results", type=Path, metavar="DIR", help="folder of the results to keep; by default OUTPUT/results")
        add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="random seeds; by default 0 1 2")
        add("--jobs", type=int, default=1, help="number of runs at a time; by default 1")
        add("--gpus", type=int, default=1, help="number of processes (and GPUs) of each run; by default 1")
    else:
        files = command in ("evaluate", "predict")
        add("run", help="folder of a run" + ", or a file that cmim.export wrote" * files)
        if command == "export":
            add("--output", type=Path, metavar="DIR", help="folder of the files; by default RUN/export")
            add(
                "--formats",
                nargs="+",
                choices=("safetensors", "pt2", "onnx"),
                default=("safetensors", "pt2", "onnx"),
                help="files to write, of safetensors, pt2 and onnx; by default all",
            )
            add("--argmax", action="store_true", help="pt2 and onnx return the class of each pixel instead of logits")
        if command == "report":
            return parser
        if command == "predict":
            add("images", nargs="+", help="images, folders of images, patterns in quotes")
            add("-o", "--output", type=Path, required=True, help="folder for masks/, overlays/ and classes.csv")
            add("--confidence", action="store_true", help="also write confidence/, the probability of each predicted class")
            add(
                "--clear",
                metavar="CLASS",
                help="class that overlays leave out, by name or number, such as the background",
            )
            add("--legend", action="store_true", help="add the class names below each overlay")
        default = None if files else "last"  # a file has no checkpoints to choose from
        add("--checkpoint", choices=("last", "best"), default=default, help="checkpoint of the run; by default last")
        if command == "evaluate":
            add("--split", choices=("val", "test"), help="by default test, or val if there is no test split")
    return parser


def print_help(command: str, doc: str, arguments: Sequence[str]) -> None:
    """Print the help for `--help`, or for `--help SECTION` that of one section of the settings.

    Raises:
        UserError: there is no such section.
    """
    width = min(120, shutil.get_terminal_size((100, 24)).columns)
    words = list(arguments)
    at = next(i for i, word in enumerate(words) if word in ("-h", "--help"))
    asked = words[at + 1] if len(words) > at + 1 and not words[at + 1].startswith("-") else None
    if asked is None:
        print(parser_of(command, doc).format_help())
        print("Settings: keys of the YAML file, overridden by --SECTION.KEY VALUE. --help SECTION shows one section only.\n")
    elif asked not in sections():
        nearest = difflib.get_close_matches(asked, sections(), 1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"expected one of {', '.join(sections())}"
        raise UserError(f"--help {asked}: there is no such section of the settings; {hint}")
    if asked is None:
        print("\n".join(_lines("", {"seed": Config.model_fields["seed"]}, width)) + "\n")
    for name in [asked] if asked else sections():
        print("\n".join(section_help(name, width)) + "\n")


def sections() -> list[str]:
    """Names of the sections of the settings; nested ones in the form `data.shapes`."""
    return list(_sections(Config, ""))


def _sections(section: type[Section], prefix: str) -> dict[str, type[Section]]:
    found = {}
    for name, field in section.model_fields.items():
        kinds = [a for a in (field.annotation, *getattr(field.annotation, "__args__", ())) if isinstance(a, type)]
        inner = next((kind for kind in kinds if issubclass(kind, Section)), None)
        if inner is not None:
            found |= {prefix + name: inner} | _sections(inner, f"{prefix}{name}.")
    return found


def section_help(name: str, width: int) -> list[str]:
    """The keys, defaults and meanings of a section, in lines of at most `width` characters."""
    section = _sections(Config, "")[name]
    inner = _sections(section, "")
    return [name, *_lines("  ", {key: f for key, f in section.model_fields.items() if key not in inner}, width)]


def _lines(indent: str, fields: dict[str, FieldInfo], width: int) -> list[str]:
    lines = []
    for key, field in fields.items():
        default = "none" if field.default is None else _in_yaml(field.default)
        meaning, choices = " ".join((field.description or "").split()), _choices(field.annotation)
        if choices and not all(re.search(rf"\b{re.escape(choice)}\b", meaning) for choice in choices):
            meaning = f"{' | '.join(choices)}. {meaning}"
        lines += textwrap.wrap(f"{indent}{key}: {default}", width, subsequent_indent=indent + "  ")
        lines += textwrap.wrap(meaning, width, initial_indent=indent + "    ", subsequent_indent=indent + "    ")
    return lines


def _choices(annotation: object) -> list[str]:
    parts = getattr(annotation, "__args__", ())
    return [str(part) for part in parts] if "Literal" in str(getattr(annotation, "__origin__", "")) else []


def _in_yaml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_in_yaml, value)) + "]"
    return "{}" if value == {} else str(value)
