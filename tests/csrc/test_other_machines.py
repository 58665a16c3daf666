"""The kernels for the CPU on other instruction sets, processors and compilers than those of this machine.

cpu_driver.cpp runs them all; its outputs are held against those of g++ and the baseline here, which tests/backends compares
with PyTorch. QEMU runs what this processor cannot, and stops at an instruction that an older processor lacks.
"""

import functools
import os
import platform
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from cmim_kernels.libraries import cpu

from .emulation import ROOT, csrc
from .test_vector import runs_here

DRIVER = ROOT / "tests/csrc/cpu_driver.cpp"
TOLERANCE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
FEW = 0.005
"""The share of values that may differ: where two are equal but for rounding, the larger and the sign are chance."""
MACHINES = {
    "clang, baseline": ("clang++", "x86_64", "baseline", []),
    "clang, avx2": ("clang++", "x86_64", "avx2", []),
    "clang, avx512": ("clang++", "x86_64", "avx512", []),
    "g++, avx2": ("g++", "x86_64", "avx2", []),
    "g++, avx512": ("g++", "x86_64", "avx512", []),
    "a Core 2, baseline": ("g++", "x86_64", "baseline", ["qemu-x86_64-static", "-cpu", "core2duo"]),
    "a Haswell, avx2": ("g++", "x86_64", "avx2", ["qemu-x86_64-static", "-cpu", "Haswell"]),
    "aarch64": ("aarch64-linux-gnu-g++", "aarch64", "baseline", ["qemu-aarch64-static"]),
}


def outputs_of(compiler, processor, instruction_set, emulator, file):
    """[(name, tensor)] of the driver; several of an op are as it writes them."""
    for program in (compiler, *emulator[:1]):
        if shutil.which(program) is None:
            pytest.skip(f"no {program}")
    if not emulator and not runs_here(instruction_set):
        pytest.skip(f"this machine has no {instruction_set}")
    folder = ROOT / "build" / "other_machines" / f"{compiler}-{instruction_set}"
    sets = csrc.INSTRUCTION_SETS[processor]
    command = [compiler, *csrc.CPU_FLAGS, *sets[instruction_set], f"-DCMIM_ISA={instruction_set}", "-pthread"]
    command += ["-Werror", "-static"] if emulator else ["-Werror"]
    objects = csrc.compile_sources([*command, "-fno-exceptions"], csrc.cpu_sources(), folder)
    objects += csrc.compile_sources([*command, "-I", csrc.CSRC], [DRIVER], folder)
    program = folder / "driver"
    csrc.run([*command, *objects, "-o", program], folder / "link.log")
    result = subprocess.run([*emulator, program, file], capture_output=True, text=True)
    assert result.returncode == 0, f"{result.returncode}: {result.stdout}{result.stderr}"
    return list(read(file))


def read(path):
    with open(path, "rb") as file:
        while line := file.readline():
            name, dtype, size = line.split()
            numbers = np.frombuffer(file.read(int(size)), np.uint8).copy()
            yield name.decode(), torch.from_numpy(numbers).view(getattr(torch, dtype.decode()))


@functools.cache
def expected(folder):
    return outputs_of("g++", platform.machine(), "baseline", [], folder / "expected")


@pytest.mark.slow
@pytest.mark.parametrize("machine", MACHINES)
def test_the_same_numbers(machine, tmp_path_factory):
    if platform.machine() != "x86_64":
        pytest.skip("compared with x86-64")
    want = expected(tmp_path_factory.getbasetemp())
    got = outputs_of(*MACHINES[machine], tmp_path_factory.mktemp("driver") / "outputs")
    assert [name for name, _ in got] == [name for name, _ in want] and len(want) > 300
    for (name, a), (_, b) in zip(got, want, strict=True):
        differ = a != b
        if b.is_floating_point():
            size = b.float().abs().amax().clamp(min=0.1)  # of a single class gradients are 0 but for rounding
            differ = (a.float() - b.float()).abs() > TOLERANCE[str(b.dtype)[6:]] * size
        assert differ.sum() <= FEW * differ.numel(), f"{name}: {differ.sum()} of {differ.numel()} differ"


PROGRAM = """
import sys; sys.path[:0] = {path}
import torch
from cmim_kernels import class_centroids, use_backend
x, labels, masked = torch.randn(1, 64, 33), torch.randint(0, 3, (1, 64)), torch.rand(1, 64) < 0.5
with use_backend("cpu"):
    got = class_centroids(x, labels, masked, 3).mean
with use_backend("torch"):
    torch.testing.assert_close(got, class_centroids(x, labels, masked, 3).mean)
print(torch.ops.cmim_cpu.instruction_set(""))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("processor", "instruction_set"), [("Nehalem", "baseline"), ("Haswell", "avx2")])
def test_the_library_chooses_what_an_older_processor_runs(processor, instruction_set):
    """In PyTorch, on a processor that stops at any other instruction."""
    if platform.machine() != "x86_64" or shutil.which("qemu-x86_64-static") is None:
        pytest.skip("needs x86-64 and qemu-x86_64-static")
    reason = cpu.unavailable_reason(torch.device("cpu"))
    if reason:
        pytest.skip(reason)
    program = PROGRAM.format(path=[path for path in sys.path if path])
    command = ["qemu-x86_64-static", "-cpu", processor, os.path.realpath(sys.executable), "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [instruction_set]
