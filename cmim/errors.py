"""Mistakes of a user: one line that names the file or key and the remedy, exit code 2, no traceback."""

import errno
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Errors of a place: it is full, it is protected or not there, or a file stands where a folder is needed.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PROTECTED = (errno.EACCES, errno.EPERM)
_OF_THE_PLACE = (
    *_FULL, *_PROTECTED, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG,
    errno.ELOOP,
)  # fmt: skip
# Errors of a limit of the system.
_TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)
RANK0_HEAD_START = 10
"""Seconds that the other processes of a run wait with a message: process 0 meets most mistakes too, and then its message is
the only one."""


OUT_OF_MEMORY = (
    "out of memory: lower data.crop, train.labelled_batch and train.unlabelled_batch (train.accumulate makes up for them), "
    "evaluation.batch, data.size or evaluation.scales, or take a smaller model"
)

TOO_MANY_FILES = "too many open files: raise the limit (ulimit -n 4096), or lower data.workers"

TOO_MANY_PROCESSES = (
    "the system starts no more processes or threads: raise the limit (ulimit -u), free memory, or lower data.workers"
)

LOADER_KILLED = (
    "a process that loads images was killed, often for want of memory: lower data.workers, or data.crop and the batches; a "
    "run continues from its last checkpoint with --output RUN --resume"
)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether PyTorch says that memory, of the machine or of a GPU, is short, or that a size is beyond all memory."""
    said = str(error).lower()
    beyond = (
        "out of memory",
        "can't allocate memory",
        "storage size calculation overflowed",
        "could not create a primitive",
    )
    return any(words in said for words in beyond)


class UserError(Exception):
    """A mistake that the user can mend. The message is one line: what is wrong, where, and what to do."""

    def __init__(self, message: object):
        # A DataLoader worker re-raises with a whole traceback as the message: keep the line of the mistake.
        message = str(message).strip()
        if "DataLoader worker" in message:
            message = message.rsplit("UserError: ", 1)[-1]
        super().__init__(" ".join(re.sub(r"\x1b\[[0-9;]*m", "", message).split()))  # without colour codes


class Stopped(BaseException):
    """The command was asked to stop, and did; `code` is its exit code, 128 and the number of the signal. It may be raised
    anywhere, and is no `Exception`, so that nobody takes it for a mistake."""

    def __init__(self, number: int):
        self.code = 128 + number
        super().__init__(f"stopped by signal {number}")


@contextmanager
def _signals() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt and SIGTERM `Stopped` inside the `with` block."""

    def stop(number, frame):
        raise Stopped(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.SIGTERM: signal.signal(signal.SIGTERM, stop),
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_command(main: Callable[[], object]) -> None:
    """Call main() and turn a user's mistake into one line on stderr and exit code 2.

    Under `torchrun` a mistake that all processes meet is told once, by the first; one that only another process meets (a
    damaged file among its images) is told by that one, with its number.
    """
    threading.excepthook = _report_thread
    try:
        with _signals():
            main()
        return
    except UserError as error:
        code, message = 2, str(error)
    except BrokenPipeError:  # who read our output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code, message = 128 + signal.SIGPIPE, None
    except OSError as error:
        of_the_system = {errno.ENOMEM: OUT_OF_MEMORY, errno.EAGAIN: TOO_MANY_PROCESSES}
        of_the_system |= dict.fromkeys(_TOO_MANY_FILES, TOO_MANY_FILES)
        if error.errno not in (*_OF_THE_PLACE, *of_the_system):
            raise
        place = error.filename2 or error.filename or "the output folder"
        remedy = "give another --output"
        if error.errno in _FULL:
            remedy = "free some space or give another --output"
        elif error.errno in _PROTECTED:
            remedy = "let this user read it, or write there, or give another path"
        code, message = 2, of_the_system.get(error.errno, f"{error.strerror}: {place}; {remedy}")
        sys.unraisablehook = lambda unraisable: None  # a loader that was not quite there complains when it is taken away
    except MemoryError:
        code, message = 2, OUT_OF_MEMORY
    except RuntimeError as error:
        message = OUT_OF_MEMORY if is_out_of_memory(error) else LOADER_KILLED
        if "can't start new thread" in str(error):
            message = TOO_MANY_PROCESSES
        elif message == LOADER_KILLED and "DataLoader worker (pid" not in str(error):
            raise
        code = 2
    except Stopped as stop:
        code, message = stop.code, None
    except KeyboardInterrupt:
        code, message = 130, None
    if message is not None:
        _say(message)
    if "RANK" in os.environ:
        sys.stdout.flush()
        os._exit(code)  # a usual exit may wait for processes of the group that have ended already
    sys.exit(code)


def _report_thread(arguments):
    """A thread that writes, such as TensorBoard's, meets a full disk first; the main thread says it in one line."""
    known = (*_OF_THE_PLACE, *_TOO_MANY_FILES)
    if not (isinstance(arguments.exc_value, OSError) and arguments.exc_value.errno in known):
        threading.__excepthook__(arguments)


def _say(message):
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(RANK0_HEAD_START)  # when process 0 has ended with its message, torchrun ends this one
        message = f"process {rank}: {message}"
    print(f"error: {message}", file=sys.stderr, flush=True)
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if report is not None:  # the file that torchrun takes the message of its report from
        Path(report).write_text(json.dumps({"message": message, "timestamp": int(time.time())}))
