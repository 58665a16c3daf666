"""Loader processes, and how their batches reach the main process.

PyTorch passes tensors through files in /dev/shm. If /dev/shm is too small for them, as in a container with its default of 64
MB, a loader would print a traceback and the run would wait for ever. In that case arrays are pickled through a pipe instead.
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
"""Number of items that each loader process prepares in advance (the default of PyTorch)."""
STOPPING = (signal.SIGINT, signal.SIGTERM)
"""Signals that ask a run to stop."""
LEAST = 256 << 20
"""Bytes of shared memory below which it is not used."""


def make_loader(dataset: Dataset, sampler: Sequence[int], workers: int, bytes_each: int) -> Iterable:
    """The items `sampler` of a data set, in order, made by `workers` processes; in pinned memory if there is CUDA.

    Args:
        bytes_each: approximate size of an item.
    """
    way = transport(workers, bytes_each)
    # Without its own generator, a loader would draw from the global generator of torch.
    options = dict(sampler=sampler, batch_size=None, pin_memory=torch.cuda.is_available(), generator=torch.Generator())
    if way == "none" or not workers:
        return DataLoader(dataset, **options)
    options |= dict(num_workers=workers, worker_init_fn=_outlive_signals)
    if way == "shared":
        return _Loader(dataset, **options)
    return _AsTensors(_Loader(_AsArrays(dataset), collate_fn=_as_it_is, **options | {"pin_memory": False}))


def transport(workers: int, bytes_each: int = 0) -> Literal["shared", "pickled", "none"]:
    """How items come from the loader processes: through shared memory, through a pipe, or not at all, if the system cannot
    create the locks that such processes need."""
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
    """A line for the user if the loader processes cannot use shared memory; `asked`: the setting `data.workers`."""
    workers = loader_workers(asked)
    way = transport(workers)
    if way == "shared":
        return None
    if way == "none":
        return f"{SHARED} cannot be used, so that images are loaded without processes of their own (data.workers 0)"
    return f"{SHARED} has little space, so that images are passed through pipes, which is slower; docker run --shm-size=8g"


class _Loader(DataLoader):
    """Block signals until the loader processes have started: a new process still has the signal handlers of the run, which
    would raise an exception in it."""

    def __iter__(self) -> Iterator[Any]:
        if not hasattr(signal, "pthread_sigmask"):
            return super().__iter__()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _AsArrays(Dataset):
    """A data set whose tensors are converted to arrays, which are pickled directly."""

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
    """Ignore SIGINT and delay SIGTERM in a loader process: Ctrl-C in a terminal and the end of a container reach these
    processes too. The run finishes its step and then ends them; PyTorch makes sure that they do not outlive the run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(1))
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
