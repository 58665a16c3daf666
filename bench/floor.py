"""The least time that the hardware allows, from ceilings measured in the same run (CUDA only)."""

import functools

import torch

from bench.clock import copies_of, seconds_in_a_graph


def target_seconds(moved, launches, exponentials=0, products=0):
    """The largest of three times, over 0.85, and launches x the time of an empty kernel.

    The three: a copy of the `moved` bytes; the exponentials; the multiply-adds of tensor cores (`products`).
    """
    work = max(copy_seconds(moved), exponentials / exponentials_per_second(), products / products_per_second())
    return work / 0.85 + launches * empty_seconds()


@functools.cache
def copy_seconds(moved):
    """Of `moved` bytes, half of them read and half written, by the device's own copy."""
    size = max(16, moved // 2)
    pair = [torch.empty(size, dtype=torch.uint8, device="cuda").random_() for _ in range(2)]
    return seconds_in_a_graph(lambda source, out: out.copy_(source), copies_of(pair))


@functools.cache
def empty_seconds():
    """Of a kernel that writes one number, between others of its kind."""
    return seconds_in_a_graph(lambda x: x.neg_(), [[torch.empty(1, device="cuda")]])


@functools.cache
def products_per_second():
    """Multiply-adds of a large bf16 matrix product."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return n**3 / seconds_in_a_graph(torch.mm, [[a, b]])


@functools.cache
def exponentials_per_second():
    return _rate("exponentials")


@functools.cache
def multiply_adds_per_second():
    """Of float32, without tensor cores."""
    return _rate("multiply_adds")


def _rate(kind):
    """Of the kernel `rates.<kind>`, whose every element does STEPS of them in registers."""
    from bench import rates

    x = torch.rand(1 << 22, device="cuda")
    return x.numel() * rates.STEPS / seconds_in_a_graph(lambda x: rates.run(kind, x), [[x]])
