"""Stopping a run by SIGINT (Ctrl-C) or SIGTERM: it finishes its step, writes a checkpoint and prints how to continue."""

import os
import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cmim import distributed


class Interrupted(BaseException):
    """Raised to stop work that changes nothing, such as an evaluation, at once."""


class StopSignals:
    """A `with` block in which signals are only recorded. A second Ctrl-C stops without a checkpoint."""

    def __init__(self):
        self.number, self._before, self._at_once = 0, {}, False

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self) -> int:
        """The signal that any process of this run got, the same number in all processes; 0 for none."""
        return distributed.largest(self.number)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside the `with` block a signal raises `Interrupted`, unless other processes would wait for this one."""
        self._at_once = distributed.size() == 1
        try:
            if self.number and self._at_once:
                raise Interrupted
            yield
        finally:
            self._at_once = False

    def _note(self, number, frame):
        # torchrun forwards a signal that its processes may have got already.
        if self.number and number == signal.SIGINT and "RANK" not in os.environ:
            raise KeyboardInterrupt
        self.number = self.number or number
        # The loader processes may have got the signal too, and PyTorch would raise an error when one of them ends.
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if self._at_once:
            raise Interrupted


def continuing_command(folder: Path) -> str:
    """The command line that continues the run of a folder."""
    local = distributed.world().local_size
    start = f"torchrun --nproc-per-node {local} -m cmim.train" if distributed.size() > 1 else "python -m cmim.train"
    return f"{start} --output {shlex.quote(str(folder))} --resume"
