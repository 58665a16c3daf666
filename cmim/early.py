"""What a command does before the import of PyTorch, which takes seconds: report missing packages, answer --help and
--version, and react to signals."""

import importlib.util
import os
import re
import signal
import sys
from pathlib import Path

NEEDED = {
    "torch": "torch", "torchvision": "torchvision", "timm": "timm", "safetensors": "safetensors", "PIL": "Pillow",
    "yaml": "PyYAML", "pydantic": "pydantic", "rich": "rich", "tensorboard": "tensorboard", "matplotlib": "matplotlib",
}  # fmt: skip
"""Module -> distribution of everything that the trainer needs: the extra `train` of pyproject.toml."""

BACKENDS = ("auto", "cpu", "cuda", "triton", "torch")
"""Allowed values of CMIM_KERNELS_BACKEND."""


def begin(command: str, doc: str) -> None:
    """Called at the top of the module of a command. Ends the process after --help, --version and an error, else returns.

    Args:
        command: its name, as in `python -m cmim.<command>`.
        doc: the module's docstring.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # until cmim.errors.run_command takes over
        signal.signal(number, lambda number, frame: os._exit(128 + number))
    missing = [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"error: {', '.join(missing)} not installed; install the trainer: pip install 'cmim[train]'", file=sys.stderr)
        sys.exit(2)
    backend = os.environ.get("CMIM_KERNELS_BACKEND", "auto")
    if backend not in BACKENDS:
        print(f"error: CMIM_KERNELS_BACKEND is {backend!r}, expected one of {', '.join(BACKENDS)}", file=sys.stderr)
        sys.exit(2)
    for stream in (sys.stdout, sys.stderr):  # a name that the locale cannot print must not end the run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if "--version" in sys.argv[1:]:
        print(f"cmim {version()}")
        sys.exit(0)
    if {"-h", "--help"} & set(sys.argv[1:]):
        from cmim.command_line import print_help
        from cmim.errors import run_command

        run_command(lambda: print_help(command, doc, sys.argv[1:]))
        sys.exit(0)


def version() -> str:
    """The version of cmim: that of cmim_kernels, which defines it, from its source."""
    source = Path(importlib.util.find_spec("cmim_kernels").origin).read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.*)"$', source, re.M)[1]
