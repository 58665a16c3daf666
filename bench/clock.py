"""What a time is.

On CUDA: device time. Calls are captured into a CUDA graph that goes round copies of the inputs, together larger than three
times the L2 cache, so that every call finds it cold; CUDA events around a replay give the time, divided by the number of
calls. What cannot be captured, because the host waits for the device in it, is called from Python between two events
("eager" in the results). On the CPU: time of the process, all threads together.
"""

import time
from typing import NamedTuple

import torch

ROUNDS = 15
CPU_SECONDS = 0.4  # about how long a benchmark repeats on the CPU
AT_LEAST_ON_DEVICE = 0.002  # seconds of work in a graph


class Timing(NamedTuple):
    clock: str  # "graph", "eager" or "process"
    peak_bytes: int | None  # of memory that one call adds; None on the CPU
    launches: int | None  # kernels of one call; None on the CPU


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


def time_calls(benchmark, function, inputs, *, capture=True):
    """Time `function(*inputs)` with the fixture `benchmark`; returns the `Timing`. Without `capture`: called from Python."""
    if not torch.cuda.is_available():
        seconds = _seconds_on_cpu(function, inputs)
        benchmark._timer = time.process_time
        rounds = max(3, min(ROUNDS, int(CPU_SECONDS / max(seconds, 1e-9))))
        # Short calls are repeated: the clock has its own grain.
        repeats = max(1, min(1000, int(CPU_SECONDS / ROUNDS / max(seconds, 1e-9))))
        benchmark.pedantic(function, inputs, rounds=rounds, iterations=repeats)
        return Timing("process", None, None)
    copies = _copies(inputs) if capture else [inputs]
    peak = _peak_bytes(function, inputs)
    launches = _launches(function, inputs)
    calls = max(len(copies), min(200, int(AT_LEAST_ON_DEVICE / _seconds_eager(function, inputs)) + 1))
    replay, clock = _captured(function, copies, calls) if capture else (None, "eager")

    def call():
        for i in range(calls):
            function(*copies[i % len(copies)])

    benchmark._timer = DeviceClock(calls)
    benchmark.pedantic(replay or call, rounds=ROUNDS, warmup_rounds=3)
    return Timing(clock, peak, launches)


def _captured(function, copies, calls):
    try:
        return capture_graph(function, copies, calls).replay, "graph"
    except RuntimeError:
        torch.cuda.synchronize()
        return None, "eager"


def with_gradients(function, inputs):
    """A function of the same inputs that runs forward and backward, from random gradients of the outputs."""
    generator = torch.Generator(inputs[0].device).manual_seed(2)

    def outputs_of(arguments):
        outputs = function(*arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return [x for x in outputs if isinstance(x, torch.Tensor) and x.requires_grad]

    cotangents = [
        torch.randn(x.shape, generator=generator, device=x.device).to(x.dtype) for x in outputs_of(differentiable(inputs))
    ]

    def both(*arguments):
        arguments = differentiable(arguments)
        return torch.autograd.grad(outputs_of(arguments), [x for x in arguments if x.requires_grad], cotangents)

    return both


def differentiable(inputs):
    return [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs]


def _seconds_on_cpu(function, inputs):
    function(*inputs)
    start = time.process_time()
    function(*inputs)
    return time.process_time() - start


def _seconds_eager(function, inputs):
    function(*inputs)
    torch.cuda.synchronize()
    start = time.perf_counter()
    function(*inputs)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _copies(inputs):
    """Copies that are together three times as large as the L2 cache."""
    size = sum(x.numel() * x.element_size() for x in inputs)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    clone = lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)  # noqa: E731
    return [[clone(x) for x in inputs] for _ in range(max(2, min(64, -(-3 * cache // max(size, 1)))))]


def capture_graph(function, copies, calls):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function(*copies[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            function(*copies[i % len(copies)])
    return graph


def _peak_bytes(function, inputs):
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function(*inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _launches(function, inputs):
    from torch.autograd import DeviceType

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function(*inputs)
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in profile.events())
