"""--help: answered before PyTorch is imported, and complete."""

import ast
import os
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import cmim
from cmim import __main__ as overview
from cmim.command_line import _sections, parser_of, section_help, sections
from cmim.early import NEEDED
from cmim.settings import Config

COMMANDS = ("check", "train", "evaluate", "predict", "compare", "report", "export")


def run(*arguments, before=""):
    program = f"{before}\nimport runpy, sys\nsys.argv[1:] = {list(arguments[1:])!r}\n"
    program += f"runpy.run_module({arguments[0]!r}, run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"}
    )


NO_TORCH = """
import atexit, sys
atexit.register(lambda: "torch" in sys.modules and print("torch was imported", file=sys.stderr))
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_needs_no_torch_and_lists_every_setting(command):
    result = run(f"cmim.{command}", "--help", before=NO_TORCH)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    for name in sections():
        for key in _sections(Config, "")[name].model_fields:
            assert any(line.startswith(f"  {key}: ") for line in lines) or f"{name}.{key}" in sections()
    assert "seed: 0" in lines and any(line.startswith("  --version ") for line in lines)
    settings = lines[lines.index("seed: 0") :]
    assert max(map(len, settings)) <= 80


def test_every_setting_has_a_meaning():
    every = _sections(Config, "")
    for name, section in every.items():
        for key, field in section.model_fields.items():
            assert field.description or f"{name}.{key}" in every, f"{name}.{key} has no docstring"
    assert Config.model_fields["seed"].description


def test_one_section():
    result = run("cmim.train", "--help", "mask", before=NO_TORCH)
    assert result.stdout.startswith("mask\n  ratio: 0.6\n      Share") and "usage" not in result.stdout
    result = run("cmim.train", "--help", "maks", before=NO_TORCH)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: --help maks: there is no such section of the settings; did you mean mask?\n"
    assert "data.shapes" in sections() and section_help("data.shapes", 80)[0] == "data.shapes"
    assert "  fill: mean" in section_help("mask", 80) and any("learned" in line for line in section_help("mask", 80))


@pytest.mark.parametrize("command", COMMANDS)
def test_own_options_have_help_too(command):
    for action in parser_of(command, "")._actions:
        assert action.help, f"{command}: {action.dest}"


@pytest.mark.parametrize("module", ["timm", "pydantic", "yaml"])
def test_what_is_not_installed_is_one_line(module):
    hidden = (
        f"import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == {module!r} else f(n, *a)"
    )
    result = run("cmim.train", before=hidden)
    assert result.returncode == 2
    assert result.stderr == f"error: {NEEDED[module]} not installed; install the trainer: pip install 'cmim[train]'\n"


def test_a_reader_that_stops_reading_is_no_error():
    command = f"{sys.executable} -m cmim.train --help | head -n 1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert result.stdout.startswith("usage: ") and result.stderr == ""


def test_the_overview_lists_every_command_with_one_line():
    result = run("cmim", before=NO_TORCH)
    assert (result.returncode, result.stderr) == (0, "") and result.stdout == run("cmim", "--help").stdout
    folder = Path(cmim.__file__).parent
    commands = {path.stem: path.read_text() for path in folder.glob("*.py") if "early.begin(" in path.read_text()}
    assert set(commands) == set(overview.COMMANDS), "COMMANDS of cmim/__main__.py lists them"
    for name, source in commands.items():
        line = next(line for line in result.stdout.splitlines() if line.startswith(f"  {name} "))
        assert line.split(maxsplit=1)[1] == ast.get_docstring(ast.parse(source)).splitlines()[0] and len(line) <= 100


def test_commands_and_the_version_through_the_overview():
    assert run("cmim", "train", "--help", "mask", before=NO_TORCH).stdout.startswith("mask\n  ratio: 0.6\n")
    result = run("cmim", "--version", before=NO_TORCH)
    assert (result.stdout, result.stderr) == (f"cmim {cmim.__version__}\n", "")
    for command in overview.COMMANDS:
        result = run(f"cmim.{command}", "--version", before=NO_TORCH)
        assert (result.stdout, result.stderr) == (f"cmim {cmim.__version__}\n", "")
    result = run("cmim", "evalute", "RUN", before=NO_TORCH)
    assert (result.returncode, result.stderr) == (2, "error: there is no command evalute; did you mean evaluate?\n")
    result = run("cmim", "train", "--output", "", before="")
    assert (result.returncode, result.stderr) == (
        2,
        "error: the argument output is empty; give a value; see python -m cmim.train --help\n",
    )


def test_the_installed_command_is_the_overview():
    scripts = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]["scripts"]
    module, name = scripts["cmim"].split(":")
    assert getattr(import_module(module), name) is overview.main
