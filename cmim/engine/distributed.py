"""Processes that train together: who they are, what they add up, and what is said when one dies.

`torchrun` starts them and names them in the environment. Everything that can be a user's mistake is checked before they
join, so that nobody waits for a process that has gone.
"""

import os
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

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


def world():
    """The `World` that the environment describes; it needs no process group."""
    number = lambda name, default: int(os.environ.get(name, default))  # noqa: E731
    return World(number("RANK", 0), number("WORLD_SIZE", 1), number("LOCAL_RANK", 0), number("LOCAL_WORLD_SIZE", 1))


@contextmanager
def joined(device):
    """Inside the `with` block the processes know one another; alone nothing happens. NCCL on CUDA, gloo on the CPU."""
    if world().size == 1:
        yield
        return
    if "MASTER_ADDR" not in os.environ:
        raise UserError(f"WORLD_SIZE is {world().size}, but not MASTER_ADDR: start with torchrun, or unset WORLD_SIZE")
    backend, place = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    dist.init_process_group(backend, timeout=PATIENCE, device_id=place)
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise UserError(
            "another process of this run has ended: its own message or torchrun's report says why (exit code -9: killed, "
            "often for want of memory); training continues from its last checkpoint with --output RUN --resume"
        ) from error
    dist.destroy_process_group()  # not after an error: it would wait for those that have gone


def rank():
    """Number of this process; 0 alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def size():
    """Number of processes that have joined; 1 alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(tensor):
    """Sum of `tensor` over all processes, in place; every process calls it, with equal shapes."""
    if size() > 1:
        dist.all_reduce(tensor)
    return tensor


def from_first(value):
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


# Everybody's result holds everybody's x, so the gradient of x is the sum of everybody's gradients.
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
