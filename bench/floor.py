"""The least time that the hardware allows, measured in the same run (CUDA only): copies and empty launches."""

import functools

import torch

from bench.clock import DeviceClock, capture_graph


def target_seconds(moved, launches):
    """(time of a copy of the bytes that must move) / 0.85 + launches x the time of an empty kernel."""
    return copy_seconds(moved) / 0.85 + launches * empty_seconds()


@functools.cache
def copy_seconds(moved):
    """Of `moved` bytes, half of them read and half written, by the device's own copy."""
    size = max(16, moved // 2)
    copies = max(1, -(-(3 * torch.cuda.get_device_properties(0).L2_cache_size) // (2 * size)))
    noise = lambda: torch.empty(size, dtype=torch.uint8, device="cuda").random_()  # noqa: E731
    pairs = [[noise(), noise()] for _ in range(min(copies, 64))]
    return _seconds(lambda source, out: out.copy_(source), pairs)


@functools.cache
def empty_seconds():
    """Of a kernel that writes one number, between others of its kind."""
    return _seconds(lambda x: x.neg_(), [[torch.empty(1, device="cuda")]])


def _seconds(function, copies):
    calls = max(len(copies), 50)
    graph = capture_graph(function, copies, calls)
    clock, readings = DeviceClock(calls), []
    for _ in range(10):
        start = clock()
        graph.replay()
        readings.append(clock() - start)
    return min(readings)
