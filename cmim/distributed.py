"""Processes that train together: who they are, which cores they have, what they add up, and what is said when one dies.

`torchrun` starts them and names them in the environment. Everything that can be a user's mistake is checked before the
process group is made, so that no process waits for one that has ended.
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
"""How long a process waits for the others, who may be saving or drawing."""


class World(NamedTuple):
    """This process among those of `torchrun`; the only one without it."""

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
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def loader_workers(asked: int | None = None) -> int:
    """Loader processes of this process: `asked`, or all but one of its share of the machine's cores, at most 8."""
    return max(0, min(available_cores() // world().local_size - 1, 8)) if asked is None else asked


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """The process group of all processes exists inside the `with` block: NCCL on CUDA, gloo on the CPU. A process that is
    alone needs none."""
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
            "often for want of memory); training continues from its last checkpoint with --output RUN --resume"
        ) from error
    dist.destroy_process_group()  # not after an error, when it would wait for processes that have ended


def rank() -> int:
    """Number of this process; 0 where it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """Number of processes in the group; 1 where there is none."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum of `tensor` over all processes, in place; every process calls it, with equal shapes."""
    if size() > 1:
        dist.all_reduce(tensor)
    return tensor


_hosts = None
"""Where the group is one of CUDA devices, a group of the same processes for numbers that are on no device."""


def largest(number: int) -> int:
    """The largest of the non-negative numbers that the processes pass. No device is waited for."""
    if size() == 1:
        return number
    value = torch.tensor(number)
    dist.all_reduce(value, dist.ReduceOp.MAX, group=_hosts)
    return int(value)


def from_rank0(value: Any) -> Any:
    """What process 0 passed, a plain value, in every process."""
    values = [value]
    if size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


@torch.library.custom_op("cmim::all_reduce", mutates_args=())
def all_reduce(x: Tensor) -> Tensor:
    """Sum over all processes as a new tensor; differentiable, and one opaque call inside `torch.compile`."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


@all_reduce.register_fake
def _(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# The result on every process depends on the x of every process, so the gradient of x sums the gradients of all.
all_reduce.register_autograd(lambda context, gradient: all_reduce(gradient))


@torch.library.custom_op("cmim::all_gather", mutates_args=())
def all_gather(x: Tensor, ranks: int) -> Tensor:
    """x of every process, one after another along the first dimension, of equal shapes; no gradient."""
    parts = x.new_empty(ranks * x.shape[0], *x.shape[1:])
    dist.all_gather(list(parts.chunk(ranks)), x.contiguous())
    return parts


@all_gather.register_fake
def _(x, ranks):
    return x.new_empty(ranks * x.shape[0], *x.shape[1:])
