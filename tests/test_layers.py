"""Imports run downwards: read from the source, so that an import inside a function counts too."""

import ast
from pathlib import Path

import pytest

import cmim_kernels

ROOT = Path(__file__).parent.parent
PACKAGES = {"cmim": ROOT / "cmim", "cmim_kernels": ROOT / "kernels" / "cmim_kernels"}
GROUND = ("cmim.errors", "cmim.randomness", "cmim.distributed", "cmim.checkpoint")
SETTINGS = ("cmim.settings", "cmim.config", "cmim.command_line", "cmim.early")
COMMANDS = (
    "cmim.__main__", "cmim.api", "cmim.check", "cmim.suggest", "cmim.train", "cmim.evaluate", "cmim.predict", "cmim.compare",
    "cmim.report", "cmim.export",
)  # fmt: skip
PUBLIC = {
    "cmim",
    "cmim.__version__",
    "cmim_kernels",
    "cmim_kernels.__version__",
    *(f"cmim_kernels.{name}" for name in cmim_kernels.__all__),
}
KERNELS = ("cmim_kernels.reference", "cmim_kernels.triton_kernels", "cmim_kernels.cuda_kernels")
MAY_IMPORT = {
    **dict.fromkeys(GROUND, GROUND),
    **dict.fromkeys(SETTINGS, (*SETTINGS, *GROUND)),
    "cmim.data": ("cmim.data", *SETTINGS, *GROUND),
    "cmim.models": ("cmim.models", *SETTINGS, *GROUND),
    "cmim.method": ("cmim.method", "cmim.models", "cmim.data", *SETTINGS, *GROUND),
    "cmim.engine": ("cmim.engine", "cmim.method", "cmim.models", "cmim.data", *SETTINGS, *GROUND),
    **dict.fromkeys(COMMANDS, ("cmim.engine", "cmim.method", "cmim.models", "cmim.data", *COMMANDS, *SETTINGS, *GROUND)),
}
"""What the modules of each part of `cmim` may import of `cmim`."""


def module_of(path):
    """The dotted name of a file of one of the packages."""
    package, root = next((name, root) for name, root in PACKAGES.items() if path.is_relative_to(root))
    parts = [package, *path.relative_to(root).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for root in PACKAGES.values() for path in sorted(root.rglob("*.py"))}


def imports(source, module, is_package):
    """Names that a module's source imports, with dots: modules, or what is taken from them. A string that is the name of a
    module counts, as `importlib` may import it; relative names are made whole."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            here = module.split(".")[: len(module.split(".")) + is_package - node.level] if node.level else []
            yield from (".".join([*here, *filter(None, [node.module]), alias.name]) for alias in node.names)
        elif isinstance(node, ast.Constant) and node.value in MODULES:
            yield node.value


def inside(name, part):
    return name == part or name.startswith(f"{part}.")


def may_import(module, name):
    """Whether the import runs downwards, and to public names of the other package only."""
    if inside(module, "cmim"):
        allowed = (
            ("cmim",)
            if module == "cmim"
            else next((allowed for part, allowed in MAY_IMPORT.items() if inside(module, part)), ())
        )
        return name in PUBLIC or any(inside(name, part) for part in (*allowed, "cmim_kernels.checks"))
    return not inside(name, "cmim") and not (
        inside(name, "cmim_kernels.ops") and any(inside(module, part) for part in KERNELS)
    )


def wrong_imports(source, module, is_package=False):
    names = [name for name in imports(source, module, is_package) if name.partition(".")[0] in PACKAGES]
    return [name for name in names if not may_import(module, name)]


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downwards(module):
    path = MODULES[module]
    assert not wrong_imports(path.read_text(), module, path.name == "__init__.py")


def test_every_module_has_its_place():
    parts = (*MAY_IMPORT, "cmim_kernels")
    assert [name for name in MODULES if not any(inside(name, part) for part in parts)] == ["cmim"]


@pytest.mark.parametrize(
    "module, line",
    [
        ("cmim.settings", "from cmim.models.build import geometry"),
        ("cmim.config", "import cmim.models.build"),
        ("cmim.config", "from cmim import models"),
        ("cmim.errors", "from cmim.settings import Config"),
        ("cmim.checkpoint", "from . import config"),
        ("cmim.data.batches", "def f():\n    from cmim.models.build import token_stride"),
        ("cmim.data.batches", "from ..method import masking"),
        ("cmim.data.shapes", "import cmim.engine.run as run"),
        ("cmim.models.weights", "from cmim.data.datasets import IGNORED"),
        ("cmim.models.build", "X = {'a': 'cmim.method.masking'}"),
        ("cmim.method.objective", "from cmim.engine import pictures"),
        ("cmim.engine.run", "from cmim import train"),
        ("cmim.models.segmenter", "from cmim_kernels.ops import checks"),
        ("cmim.models.segmenter", "import cmim_kernels.reference.patch_labels"),
        ("cmim.models.segmenter", "from cmim_kernels import ops"),
        ("cmim_kernels.reference.patch_labels", "from cmim_kernels.ops.library import declare"),
        ("cmim_kernels.reference.patch_labels", "from ..ops import library"),
        ("cmim_kernels.triton_kernels.patch_labels", "def f():\n    import cmim_kernels.ops.library"),
        ("cmim_kernels.cuda_kernels.packing", "from cmim_kernels import ops"),
        ("cmim_kernels.checks", "from cmim.errors import UserError"),
    ],
)
def test_an_import_upwards_is_found(module, line):
    assert wrong_imports(line, module)
