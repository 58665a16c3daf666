"""NVIDIA's memory and race checkers over every op, and hardware counters of the kernels: on a GPU, as far as installed."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from cmim_kernels.libraries import cuda

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
BACKENDS = ["triton"] + ["cuda"] * cuda.file.exists()
COUNTERS = (
    "gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,"
    "sm__throughput.avg.pct_of_peak_sustained_elapsed,sm__warps_active.avg.pct_of_peak_sustained_active,"
    "launch__registers_per_thread,launch__waves_per_multiprocessor"
)


def run(tool, *arguments):
    path = shutil.which(tool) or shutil.which(tool, path="/usr/local/cuda/bin")
    if path is None:
        pytest.skip(f"no {tool}")
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run([path, *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_no_error(tool, backend, record_property):
    command = ("--tool", tool, "--error-exitcode", "1", sys.executable, "-m", "bench.smoke", backend)
    result = run("compute-sanitizer", *command)
    record_property("output", result.stdout[-1500:])
    assert result.returncode == 0, result.stdout[-1500:] + result.stderr[-500:]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["same_class_conv2d", "class_attention", "upsample_cross_entropy", "class_centroids"])
def test_counters(op, backend, record_property):
    command = ("--csv", "--metrics", COUNTERS, "--kernel-name", "regex:kernel", "--clock-control", "none", sys.executable)
    result = run("ncu", *command, "-m", "bench.smoke", backend, "--large", "--op", op)
    lines = [line for line in result.stdout.splitlines() if line.startswith('"')]
    record_property("counters", lines[:120])
    assert result.returncode == 0 and len(lines) > 1, result.stdout[-1500:] + result.stderr[-500:]
