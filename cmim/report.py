"""Write the page of a run again: curves, classes, confusions, pictures and settings.

    python -m cmim.report runs/shapes-20260101-120000       # RUN/report.html

Training writes the page at every evaluation and at its end; this command is for runs of earlier versions, for runs that
were stopped, and after files of the run folder changed. The page is one file that needs no network and no server: open it in
a browser, or send it to somebody.
"""

from cmim import early

if __name__ == "__main__":
    early.begin("report", __doc__)

import sys
from collections.abc import Sequence
from pathlib import Path

from cmim.command_line import parser_of
from cmim.engine.logging import console
from cmim.engine.report import write_report
from cmim.engine.run import Run
from cmim.errors import UserError, run_command


def main(arguments: Sequence[str]) -> Path:
    """Write the page; returns its path."""
    given, overrides = parser_of("report", __doc__).parse(arguments)
    if overrides:
        raise UserError(f"{overrides[0]} has no effect on a report; leave it out")
    path = write_report(Run(given.run))
    console.print(str(path))
    return path


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
