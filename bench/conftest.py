"""Fixture `timed`, machine and versions in the JSON, and the table of ratios at the end."""

import platform
import shlex
import subprocess
import sys

import pytest
import torch
import triton
from cpuinfo import get_cpu_info

import cmim_kernels
from bench import floor, inputs
from bench.clock import time_calls
from bench.comparison import OURS
from bench.table import ratio_table


def pytest_addoption(parser):
    parser.addoption("--profile-steps", metavar="FOLDER", help="write a profiler trace of every training step that is timed")
    parser.addoption("--threads", type=int, default=1, help="on a CPU; with more than one, time is that of the wall")
    parser.addoption("--dtype", choices=("float32", "bfloat16"), help="of what is computed on")


def pytest_configure(config):
    if not inputs.ON_GPU:
        torch.set_num_threads(config.getoption("threads"))
    if config.getoption("dtype"):
        inputs.DTYPE = getattr(torch, config.getoption("dtype"))  # before a benchmark is imported
    if not config.getoption("benchmark_verbose", False):
        config.option.benchmark_quiet = True  # the table of ratios replaces pytest-benchmark's


@pytest.fixture
def timed(benchmark, request):
    """timed(group, name, function, arguments): time `function(*arguments)` as the baseline `name` of a group.

    What it measures goes into pytest-benchmark's JSON and, at once, into the lines of `bench.recorder`.
    """
    result = _Timed(benchmark)
    yield result
    request.node.user_properties += result.properties()


class _Timed:
    def __init__(self, benchmark):
        self.benchmark, self.timing, self.extra = benchmark, None, {}

    def __call__(self, group, name, function, arguments, *, capture=True, ours=None, images=None, **extra):
        """`capture`: device time, or that of Python too. `ours`: our own function, called in turn on a CPU. `images` of a
        call; `extra` goes into the JSON."""
        self.benchmark.group = group
        self.timing = time_calls(self.benchmark, function, list(arguments), capture=capture, ours=ours)
        self.benchmark.extra_info |= {"baseline": name, **self.timing._asdict(), **self.extra, **extra}
        if images is not None:
            self.benchmark.extra_info["images_per_second"] = images / self.benchmark.stats.stats.min

    def floor(self, comparison, backward):
        """Bytes a second and, on CUDA, the share of the target."""
        if comparison.moved is None:
            return
        moved, seconds = comparison.moved[backward], self.benchmark.stats.stats.min
        info = self.benchmark.extra_info
        info |= {"moved_bytes": moved, "bytes_per_second": moved / seconds}
        if inputs.ON_GPU:
            launches = comparison.launches[backward] if comparison.launches else self.timing.launches
            work = comparison.exponentials[backward], comparison.products[backward]
            info["target_seconds"] = floor.target_seconds(moved, launches, *work)
            info["share_of_target"] = info["target_seconds"] / seconds

    def properties(self):
        """What a line of the recorder holds besides: nothing where the test failed before it measured."""
        if self.timing is None or self.benchmark.stats is None:
            return []
        stats = self.benchmark.stats.stats
        times = {"min": stats.min, "median": stats.median, "max": stats.max, "rounds": stats.rounds}
        return [("group", self.benchmark.group), ("stats", times), ("extra_info", dict(self.benchmark.extra_info))]


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info |= versions()
    machine_info.pop("node", None)  # the name of somebody's machine


@pytest.fixture
def machine():
    return versions()


def versions():
    """Of the software and, on CUDA, the device; the command and the commit."""
    found = {
        "command": shlex.join(["pytest", *sys.argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cmim_kernels": cmim_kernels.__version__,
        "threads": torch.get_num_threads(),
        "dtype": str(inputs.DTYPE).removeprefix("torch."),
        "cpu_name": get_cpu_info().get("brand_raw", platform.machine()),
        "commit": _said("git", "rev-parse", "HEAD"),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpu_memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda,
        }
    return found


def _said(*command):
    """The first word that a command prints."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, IndexError, subprocess.CalledProcessError):
        return "unknown"


def pytest_benchmark_update_json(config, benchmarks, output_json):
    for entry in output_json["benchmarks"]:  # results are kept in the repository
        entry["stats"].pop("data", None)
        for name in ("options", "params", "param"):
            entry.pop(name)


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    measured = [b for b in session.benchmarks if not b.has_error and "baseline" in b.extra_info] if session else []
    if measured:
        rows = [(b.group, b.extra_info["baseline"], b.stats.min, b.extra_info) for b in measured]
        terminalreporter.section(f"best of the rounds; in brackets, times as long as {OURS}")
        for line in ratio_table(rows):
            terminalreporter.write_line(line)
