"""The commands of cmim.

python -m cmim                     # lists them; `cmim` does the same where the package is installed
python -m cmim train CONFIG ...    # is python -m cmim.train CONFIG ...
python -m cmim --version
"""

import ast
import difflib
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

from cmim.early import version
from cmim.errors import UserError, run_command

COMMANDS = ("check", "train", "evaluate", "predict", "compare", "report", "export")


def main() -> None:
    """Run the command that the first argument names; without one, list all."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        del sys.argv[1]
        runpy.run_module(f"cmim.{name}", run_name="__main__", alter_sys=True)
    else:
        run_command(lambda: print(_answer(name), flush=True))


def _answer(name):
    if name in ("-h", "--help"):
        return _overview()
    if name == "--version":
        return f"cmim {version()}"
    nearest = difflib.get_close_matches(name, COMMANDS, 1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"expected {', '.join(COMMANDS)} or --version"
    raise UserError(f"there is no command {name}; {hint}")


def _overview():
    lines = [f"  {name:<{max(map(len, COMMANDS)) + 2}}{_summary(name)}" for name in COMMANDS]
    return "\n".join(
        ["usage: cmim COMMAND ...    (or python -m cmim COMMAND ...)", "", *lines, "", "cmim COMMAND --help says more."]
    )


def _summary(name):
    """The first line of a command's docstring; nothing is imported, which would take seconds."""
    source = Path(find_spec(f"cmim.{name}").origin).read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)).splitlines()[0]


if __name__ == "__main__":
    main()
