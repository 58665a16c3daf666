"""Mistakes of the user: reported in one line that names the file or key and the remedy, with exit code 2, no traceback."""

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

# Errors of a path: the disk is full, the path is protected or missing, or a file is where a folder is needed.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PROTECTED = (errno.EACCES, errno.EPERM)
_OF_THE_PLACE = (
    *_FULL, *_PROTECTED, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG,
    errno.ELOOP,
)  # fmt: skip
# Errors from limits of the operating system.
_TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)
RANK0_HEAD_START = 10
"""Seconds for which the other processes of a run delay an error message: process 0 finds most mistakes too, and then only
its message is printed."""


OUT_OF_MEMORY = (
    "out of memory: lower data.crop, train.labelled_batch and train.unlabelled_batch (train.accumulate compensates), "
    "evaluation.batch, data.size or evaluation.scales, or take a smaller model"
)

TOO_MANY_FILES = "too many open files: raise the limit (ulimit -n 4096), or lower data.workers"

TOO_MANY_PROCESSES = (
    "the system starts no more processes or threads: raise the limit (ulimit -u), free memory, or lower data.workers"
)

LOADER_KILLED = (
    "a process that loads images was killed, often because memory ran out: lower data.workers, or data.crop and the batches;"
    " a run continues from its last checkpoint with --output RUN --resume"
)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether PyTorch reports that host or GPU memory ran out, or that a tensor is too large for any memory."""
    said = str(error).lower()
    beyond = (
        "out of memory",
        "can't allocate memory",
        "storage size calculation overflowed",
        "could not create a primitive",
    )
    return any(words in said for words in beyond)


class UserError(Exception):
    """A mistake that the user can correct. The message is one line: what is wrong, where, and what to do."""

    def __init__(self, message: object):
        # An error from a DataLoader worker has a whole traceback as its message: keep only the last line.
        message = str(message).strip()
        if "DataLoader worker" in message:
            message = message.rsplit("UserError: ", 1)[-1]
        super().__init__(" ".join(re.sub(r"\x1b\[[0-9;]*m", "", message).split()))  # without colour codes


class Stopped(BaseException):
    """The command was stopped by a signal; `code` is its exit code, 128 + the number of the signal. It is not an
    `Exception`, so that handlers of errors do not catch it."""

    def __init__(self, number: int):
        self.code = 128 + number
        super().__init__(f"stopped by signal {number}")


@contextmanager
def _signals() -> Iterator[None]:
    """Inside the `with` block, Ctrl-C raises KeyboardInterrupt and SIGTERM raises `Stopped`."""

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

    Under `torchrun`, an error that all processes find is reported once, by the first process; one that only another process
    finds, such as a damaged file among its images, is reported by that process, with its number.
    """
    threading.excepthook = _report_thread
    try:
        with _signals():
            main()
        return
    except UserError as error:
        code, message = 2, str(error)
    except BrokenPipeError:  # the reader of the output, such as `head`, has ended
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
        sys.unraisablehook = lambda unraisable: None  # a half-built loader would complain when it is deleted
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
        os._exit(code)  # a normal exit may wait for processes of the group that have ended already
    sys.exit(code)


def _report_thread(arguments):
    """Print no traceback when a thread, such as TensorBoard's, finds the disk full: the main thread reports that in one
    line."""
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
    if report is not None:  # torchrun takes the message for its report from this file
        Path(report).write_text(json.dumps({"message": message, "timestamp": int(time.time())}))
