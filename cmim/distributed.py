"""Processes that train together: their ranks, their cores, sums over them, and the error message when one of them dies.

`torchrun` starts them and describes them in environment variables. Everything that can be a user's mistake is checked before
the process group is created, so that no process waits for one that has ended.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cmim.errors import UserError

PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others, which may be saving a checkpoint or drawing a picture."""


class World(NamedTuple):
    """Position of this process among those of `torchrun`; without `torchrun` it is the only one."""

    rank: int
    size: int
    local_rank: int  # among the processes of this machine
    local_size: int


def world() -> World:
    """The `World` that the environment describes; it needs no process group."""

    def number(name, default):
        text = os.environ.get(name, str(default))
        if not text.strip().isdecimal() or int(text) < default:
            what = "a number from 1" if default else "a number"
            raise UserError(f"{name} is {text!r}, expected {what}: start with torchrun, or unset {name}")
        return int(text)

    found = World(number("RANK", 0), number("WORLD_SIZE", 1), number("LOCAL_RANK", 0), number("LOCAL_WORLD_SIZE", 1))
    if found.rank >= found.size:
        raise UserError(f"RANK is {found.rank}, but WORLD_SIZE is {found.size}: start with torchrun, or unset RANK")
    return found


def available_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def loader_workers(asked: int | None = None) -> int:
    """Number of loader processes of this process: `asked`, or all but one of its share of the cores, but at most 8."""
    return max(0, min(available_cores() // world().local_size - 1, 8)) if asked is None else asked


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Inside the `with` block the process group exists: NCCL on CUDA, gloo on the CPU. A single process needs none."""
    if world().size == 1:
        yield
        return
    if "MASTER_ADDR" not in os.environ:
        raise UserError(f"WORLD_SIZE is {world().size}, but not MASTER_ADDR: start with torchrun, or unset WORLD_SIZE")
    backend, place = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    dist.init_process_group(backend, timeout=PATIENCE, device_id=place)
    global _hosts
    _hosts = dist.new_group(backend="gloo", timeout=PATIENCE) if backend == "nccl" else None
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise UserError(
            "another process of this run has ended: its own message or torchrun's report says why (exit code -9: killed, "
            "often because memory ran out); training continues from its last checkpoint with --output RUN --resume"
        ) from error
    dist.destroy_process_group()  # not after an error, where it would wait for processes that have ended


def rank() -> int:
    """Rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum `tensor` over all processes, in place; every process must call it, with equal shapes."""
    if size() > 1:
        dist.all_reduce(tensor)
    return tensor


_hosts = None
"""If the process group uses NCCL, a gloo group of the same processes, for numbers in host memory."""


def largest(number: int) -> int:
    """The largest of the non-negative numbers that the processes pass; does not synchronise with a device."""
    if size() == 1:
        return number
    value = torch.tensor(number)
    dist.all_reduce(value, dist.ReduceOp.MAX, group=_hosts)
    return int(value)


def from_rank0(value: Any) -> Any:
    """The value that process 0 passed, in every process; a plain value, not a tensor."""
    values = [value]
    if size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


@torch.library.custom_op("cmim::all_reduce", mutates_args=())
def all_reduce(x: Tensor) -> Tensor:
    """Sum over all processes as a new tensor; differentiable, and one opaque op for `torch.compile`."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


@all_reduce.register_fake
def _(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# The result in every process depends on the x of every process, so the gradient of x is the sum of all gradients.
all_reduce.register_autograd(lambda context, gradient: all_reduce(gradient))


@torch.library.custom_op("cmim::all_gather", mutates_args=())
def all_gather(x: Tensor, ranks: int) -> Tensor:
    """Concatenate x of all processes, which have equal shapes, along the first dimension; no gradient."""
    parts = x.new_empty(ranks * x.shape[0], *x.shape[1:])
    dist.all_gather(list(parts.chunk(ranks)), x.contiguous())
    return parts


@all_gather.register_fake
def _(x, ranks):
    return x.new_empty(ranks * x.shape[0], *x.shape[1:])
