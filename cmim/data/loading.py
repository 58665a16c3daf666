"""Loader processes, and how what they make reaches the run.

PyTorch passes tensors through files of /dev/shm. Where these are too large for it, as in a container with its usual 64 MB, a
loader would print a traceback and the run would wait for ever: then arrays are pickled through a pipe instead.
"""

import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import get_context
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cmim.distributed import loader_workers, world

SHARED = "/dev/shm"
AHEAD = 2
"""Items that PyTorch has each loader make ahead of time."""
STOPPING = (signal.SIGINT, signal.SIGTERM)
"""Signals that ask a run to stop."""
LEAST = 256 << 20
"""Bytes of shared memory below which none is used."""


def make_loader(dataset: Dataset, sampler: Sequence[int], workers: int, bytes_each: int) -> Iterable:
    """The items `sampler` of a data set, in order, made by `workers` processes; in pinned memory where there is CUDA.

    Args:
        bytes_each: about the size of an item.
    """
    way = transport(workers, bytes_each)
    # Without a generator of its own, a loader would draw from torch's global one.
    options = dict(sampler=sampler, batch_size=None, pin_memory=torch.cuda.is_available(), generator=torch.Generator())
    if way == "none" or not workers:
        return DataLoader(dataset, **options)
    options |= dict(num_workers=workers, worker_init_fn=_outlive_signals)
    if way == "shared":
        return _Loader(dataset, **options)
    return _AsTensors(_Loader(_AsArrays(dataset), collate_fn=_as_it_is, **options | {"pin_memory": False}))


def transport(workers: int, bytes_each: int = 0) -> Literal["shared", "pickled", "none"]:
    """How items come from the loader's processes: through shared memory, through a pipe, or not, because the system cannot
    make the locks that such processes need."""
    if not workers or not sys.platform.startswith("linux"):
        return "shared"
    try:
        get_context().Lock()
        status = os.statvfs(SHARED)
    except OSError:
        return "none"
    needed = max(LEAST, 2 * AHEAD * workers * bytes_each * world().local_size)
    return "shared" if status.f_bavail * status.f_frsize >= needed else "pickled"


def transport_note(asked: int | None) -> str | None:
    """A line for the user where the loader's processes cannot use shared memory; `asked` as of `data.workers`."""
    workers = loader_workers(asked)
    way = transport(workers)
    if way == "shared":
        return None
    if way == "none":
        return f"{SHARED} cannot be used, so that images are loaded without processes of their own (data.workers 0)"
    return f"{SHARED} has little space, so that images are passed through pipes, which is slower; docker run --shm-size=8g"


class _Loader(DataLoader):
    """Signals wait until its processes are there: one that came in between would raise in a new process, which still has the
    handlers of the run."""

    def __iter__(self) -> Iterator[Any]:
        if not hasattr(signal, "pthread_sigmask"):
            return super().__iter__()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _AsArrays(Dataset):
    """A data set whose tensors are arrays, which are pickled as they are."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Any:
        return _convert(self.dataset[i], Tensor, Tensor.numpy)


class _AsTensors:
    def __init__(self, loader: DataLoader):
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return (_convert(item, np.ndarray, torch.from_numpy) for item in self.loader)


def _convert(item, kind, how):
    if isinstance(item, dict):
        return {name: _convert(value, kind, how) for name, value in item.items()}
    if isinstance(item, tuple):
        return tuple(_convert(value, kind, how) for value in item)
    return how(item) if isinstance(item, kind) else item


def _as_it_is(item):
    return item


def _outlive_signals(worker):
    """Ctrl-C in a terminal and the end of a container reach the loader's processes too. The run, which then finishes its
    step, ends them; PyTorch sees to it that they do not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(1))
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
