"""Kernels and their tests run where only PyTorch, Triton, NumPy, pytest and hypothesis are: never with the trainer."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("kernels", "tests/backends", "tests/kernels", "tests/csrc")
KNOWN = {"cmim_kernels", "torch", "triton", "numpy", "pytest", "hypothesis", *sys.stdlib_module_names}
FILES = [ROOT / "tests/conftest.py", *(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))]


def imported(source):
    """The modules that a source imports by name, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def foreign(source):
    ours = tuple(folder.replace("/", ".") + "." for folder in FOLDERS[1:])
    return {m for m in imported(source) if m.split(".")[0] not in KNOWN and not f"{m}.".startswith(ours)}


def test_nothing_else_is_imported():
    assert {str(path.relative_to(ROOT)): found for path in FILES if (found := foreign(path.read_text()))} == {}


def test_what_counts_as_else():
    sources = [
        "from cmim import config",
        "def f():\n    import pydantic.main",
        "from tests import tiny_runs",
        "import cmim.train",
    ]
    assert [len(foreign(source)) for source in sources] == [1, 1, 1, 1]
    assert not foreign("import os, numpy as np\nfrom tests.backends import launches\nfrom . import calls")
