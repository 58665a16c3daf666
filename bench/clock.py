"""What a time is.

On CUDA: device time. Calls are captured into a CUDA graph that goes round copies of everything they read, together larger
than three times the L2 cache, so that every call finds it cold; CUDA events around a replay give the time, divided by the
number of calls. What cannot be captured, because the host waits for the device in it, is called from Python between two
events ("eager" in the results). `host_seconds` is what a call costs the host, without waiting for the device. On the CPU:
time of the process with one thread, which other processes disturb least; with more, time of the wall.
"""

import time
from typing import NamedTuple

import torch

ROUNDS = 15
CPU_SECONDS = 0.4  # about how long a benchmark repeats on the CPU
ALTERNATIONS_SECONDS = 10  # likewise, of two functions that are timed beside each other
AT_LEAST_ON_DEVICE = 0.002  # seconds of work in a graph
MOST_CALLS = 200  # in a graph


class CaptureError(Exception):
    """A function that no CUDA graph can hold. PyTorch may then capture what comes next in the process, too."""


class Timing(NamedTuple):
    clock: str  # "graph", "eager", "process" or "wall"
    peak_bytes: int | None = None  # of memory that one call adds; None on the CPU
    launches: int | None = None  # kernels of one call; None on the CPU
    host_seconds: float | None = None  # None on the CPU, where it is the time itself
    ours_beside: float | None = None  # least time of our own function, called in turn with this one


class DeviceClock:
    """A timer in seconds for pytest-benchmark, divided by the number of calls between two readings."""

    def __init__(self, calls):
        self.calls, self.start = calls, torch.cuda.Event(enable_timing=True)
        self.start.record()

    def __call__(self):
        now = torch.cuda.Event(enable_timing=True)
        now.record()
        now.synchronize()
        return self.start.elapsed_time(now) / 1000 / self.calls


def time_calls(benchmark, function, arguments, *, capture=True, ours=None):
    """Time `function(*arguments)` with the fixture `benchmark`; returns the `Timing`.

    Args:
        arguments: tensors.
        capture: into a CUDA graph; else the function is called from Python.
        ours: on the CPU, call this function with the same arguments in turn with `function`, so that a ratio close to 1
            does not depend on what else the machine did in one of two minutes.

    Raises:
        CaptureError: the function cannot be captured.
    """
    if not torch.cuda.is_available():
        one_thread = torch.get_num_threads() == 1
        clock = time.process_time if one_thread else time.perf_counter
        seconds = _seconds_on_cpu(clock, function, arguments)
        benchmark._timer = clock
        if ours is not None:
            ours(*arguments)  # as `function` was called before
            beside = []
            rounds = max(5, min(20, int(ALTERNATIONS_SECONDS / (2 * seconds))))
            benchmark.pedantic(
                function, arguments, setup=lambda: beside.append(_seconds(clock, ours, arguments)), rounds=rounds
            )
            return Timing("process" if one_thread else "wall", ours_beside=min(beside))
        rounds = max(3, min(ROUNDS, int(CPU_SECONDS / max(seconds, 1e-9))))
        # Short calls are repeated: the clock has its own grain.
        repeats = max(1, min(1000, int(CPU_SECONDS / ROUNDS / max(seconds, 1e-9))))
        benchmark.pedantic(function, arguments, rounds=rounds, iterations=repeats)
        return Timing("process" if one_thread else "wall")
    copies = copies_of(arguments) if arguments else [[]]
    peak, launches = _peak_bytes(function, arguments), _launches(function, arguments)
    seconds, host = _seconds_eager(function, arguments)
    calls = calls_in_a_graph(seconds, copies)

    def call():
        for i in range(calls):
            function(*copies[i % len(copies)])

    run = capture_graph(function, copies, calls).replay if capture else call
    benchmark._timer = DeviceClock(calls)
    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=3)
    return Timing("graph" if capture else "eager", peak, launches, host)


def calls_in_a_graph(seconds, copies):
    """How many calls of `seconds` each: all copies, and enough work for the clock."""
    return max(len(copies), min(MOST_CALLS, int(AT_LEAST_ON_DEVICE / seconds) + 1))


def seconds_in_a_graph(function, copies):
    """The least time of a call, measured as `time_calls` does."""
    calls = calls_in_a_graph(_seconds_eager(function, copies[0])[0], copies)
    graph = capture_graph(function, copies, calls)
    clock, readings = DeviceClock(calls), []
    for _ in range(ROUNDS):
        start = clock()
        graph.replay()
        readings.append(clock() - start)
    return min(readings)


def with_gradients(function, inputs, constants=()):
    """A function of inputs and constants that runs forward and backward, from random gradients of the outputs."""
    generator = torch.Generator(inputs[0].device).manual_seed(2)

    def outputs_of(inputs, constants):
        outputs = function(*inputs, *constants)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return [x for x in outputs if isinstance(x, torch.Tensor) and x.requires_grad]

    cotangents = [
        torch.randn(x.shape, generator=generator, device=x.device).to(x.dtype)
        for x in outputs_of(differentiable(inputs), constants)
    ]

    def both(*arguments):
        leaves, constants = differentiable(arguments[: len(inputs)]), arguments[len(inputs) :]
        return torch.autograd.grad(outputs_of(leaves, constants), [x for x in leaves if x.requires_grad], cotangents)

    return both


def differentiable(inputs):
    return [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs]


def _seconds_on_cpu(clock, function, arguments):
    function(*arguments)
    return _seconds(clock, function, arguments)


def _seconds(clock, function, arguments):
    start = clock()
    function(*arguments)
    return clock() - start


def _seconds_eager(function, arguments, calls=10):
    """Of a call from Python: with the device's work, and without."""
    function(*arguments)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function(*arguments)
    host = time.perf_counter() - start
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls, host / calls


def copies_of(arguments):
    """Copies that are together three times as large as the L2 cache."""
    size = sum(x.numel() * x.element_size() for x in arguments)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    clone = lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)  # noqa: E731
    return [[clone(x) for x in arguments] for _ in range(max(2, min(64, -(-3 * cache // max(size, 1)))))]


def capture_graph(function, copies, calls):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function(*copies[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for i in range(calls):
                function(*copies[i % len(copies)])
    except Exception as error:
        raise CaptureError(f"cannot be captured into a CUDA graph: {error}") from error
    return graph


def _peak_bytes(function, arguments):
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function(*arguments)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _launches(function, arguments):
    from torch.autograd import DeviceType

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function(*arguments)
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in profile.events())
