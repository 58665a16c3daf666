"""Processes that train together: who they are, what they sum up, and what becomes of them when one dies."""

import torch.distributed as dist


def rank():
    """Number of this process; 0 alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def size():
    """Number of processes; 1 alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(tensor):
    """Sum of `tensor` over all processes, in place; every process calls it, with equal shapes."""
    if size() > 1:
        dist.all_reduce(tensor)
    return tensor
