"""Files of `torch.export` (.pt2): reading one without running code that it may hold.

`torch.export.load` unpickles, evaluates expressions and looks up functions by their names. `refuse_code` therefore reads the
archive first and lets only pass what a plain network needs: tensors stored as bytes, operators of ATen, and expressions of
sizes.
"""

import io
import json
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmim.errors import UserError

_MEMBERS = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)|models/model\.json"
    r"|data/weights/(model_weights_config\.json|weight_\d+)|data/constants/(model_constants_config\.json|tensor_\d+)"
    r"|data/sample_inputs/model\.pt|extra/cmim\.json"
)
_OPERATOR = re.compile(
    r"torch\.ops\.aten\.(?!from_file)\w+\.\w+|torch\.sym_\w+|math\.\w+"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|eq|ne|lt|le|gt|ge|getitem|and_|or_)"
)
_WORDS = """
    Symbol Integer Float Rational Add Mul Pow Mod PythonMod Max Min FloorDiv CleanDiv CeilDiv IntTrueDiv FloatTrueDiv
    TruncToInt TruncToFloat ToFloat CeilToInt FloorToInt RoundToInt Eq Ne Lt Le Gt Ge Equality Unequality StrictLessThan
    LessThan StrictGreaterThan GreaterThan And Or Not Where positive integer nonnegative negative True False true false
    L images size and or not max min torch sym_max sym_min
"""
_NAMES = frozenset(_WORDS.split())
"""Words of expressions of sizes."""
_SIZE = re.compile(r"[su]\d+")
_SIGNS = re.compile(r"([\w\s+\-*/%(),<>=!'\[\]]|\.\d|\.size\(\)|(?<=torch)\.sym_)*")
_NODES = frozenset(("builtins.tuple", "builtins.list", "builtins.dict", None))


def read_extra(path: Path, name: str) -> str:
    """The text of an extra file of an archive."""
    with zipfile.ZipFile(path) as archive:
        (member,) = (found for found in archive.namelist() if found.partition("/")[2] == f"extra/{name}")
        return archive.read(member).decode()


def read_program(path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The program of a file, on a device: images (B, C, H, W) float32 -> what it gives.

    Raises:
        UserError: the file is damaged, or holds more than a network. The program raises one for images that are too small.
    """
    refuse_code(path)
    try:
        with warnings.catch_warnings(action="ignore"):
            program = torch.export.load(path)
            if device.type != "cpu":
                program = torch.export.passes.move_to_device_pass(program, device)
        module = program.module()
    except Exception as error:  # of many types, as for other versions of PyTorch
        raise UserError(
            f"{path} cannot be read by PyTorch {torch.__version__} ({type(error).__name__}); export the run again"
        ) from None

    def run(images: Tensor) -> Tensor:
        try:
            return module(images)
        except (AssertionError, RuntimeError) as error:
            if "Guard failed" not in str(error):
                raise
            height, width = images.shape[-2:]
            raise UserError(f"{path} takes no images of {width} x {height} pixels; give larger ones") from None

    return run


def refuse_code(path: Path) -> None:
    """Raise a UserError if an archive holds anything that could run code when it is read, or is no archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise ValueError("another checksum")
            members = {name.partition("/")[2]: name for name in archive.namelist()}
            foreign = next((name for name in members if not _MEMBERS.fullmatch(name)), None)
            read = lambda name: json.loads(archive.read(members[name]))  # noqa: E731
            model = read("models/model.json")
            configs = [read(name) for name in members if name.endswith("_config.json")]
            with warnings.catch_warnings(action="ignore"):
                torch.load(io.BytesIO(archive.read(members["data/sample_inputs/model.pt"])), weights_only=True)
    except Exception as error:  # a damaged file raises exceptions of many types
        raise UserError(f"{path} is not a readable .pt2 file ({type(error).__name__}); export the run again") from None
    found = foreign if foreign is not None else next(_suspicious(model, configs), None)
    if found is not None:
        raise UserError(f"{path} holds more than a network: {found:.80}; it is not read, because it could run code")


def _suspicious(model: Any, configs: list[Any]) -> Iterator[str]:
    """What no network exported by `cmim.export` holds."""
    for config in configs:
        for payload in config["config"].values():
            if payload.get("use_pickle") is not False or not re.fullmatch(r"(weight|tensor)_\d+", payload["path_name"]):
                yield f"the pickle {payload['path_name']}"
    if model["graph_module"].get("treespec_namedtuple_fields"):
        yield "types of its own"
    for key, value in _texts(model):
        if key == "target" and not _OPERATOR.fullmatch(value):
            yield f"the operator {value}"
        elif key in ("in_spec", "out_spec") and not set(_node_types(json.loads(value)[1])) <= _NODES:
            yield f"types of its own, {value}"
        elif key in ("expr_str", "guards_code") and not _is_of_sizes(value):
            yield f"the expression {value}"


def _is_of_sizes(text):
    words = re.findall(r"[A-Za-z_]\w*", text)
    return bool(_SIGNS.fullmatch(text)) and all(word in _NAMES or _SIZE.fullmatch(word) for word in words)


def _node_types(spec):
    yield spec["type"]
    for child in spec["children_spec"]:
        yield from _node_types(child)


def _texts(value, key=None):
    """Each text of a JSON document with its key; the entries of a list have that of the list."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry, key)
    elif isinstance(value, dict):
        for name, entry in value.items():
            yield from _texts(entry, name)
