"""csrc/cpu/vector.h against PyTorch, on every instruction set of this machine: conversions.cpp."""

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from .emulation import ROOT, csrc

SETS = csrc.INSTRUCTION_SETS.get(platform.machine(), {})
FLAGS = {"avx2": ("avx2", "fma", "bmi2"), "avx512": ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")}
"""Name of an instruction set -> what /proc/cpuinfo must list; the baseline is everywhere."""


def runs_here(name):
    said = Path("/proc/cpuinfo").read_text().split()
    return all(flag in said for flag in FLAGS.get(name, ()))


@pytest.fixture(scope="module", params=SETS)
def library(request, tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    if not runs_here(request.param):
        pytest.skip(f"this machine has no {request.param}")
    target = tmp_path_factory.mktemp(request.param) / "conversions.so"
    flags = [*csrc.CPU_FLAGS, *SETS[request.param], f"-DCMIM_ISA={request.param}", "-Werror", "-shared", "-I", csrc.CSRC]
    subprocess.run(["g++", *flags, ROOT / "tests/csrc/conversions.cpp", "-o", target], check=True)
    return ctypes.CDLL(str(target))


def call(function, x, *outputs):
    function(*(ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.numel())), *(ctypes.c_void_p(o.data_ptr()) for o in outputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number_is_widened(library, dtype):
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    vectors, numbers = torch.empty(2**16), torch.empty(2**16)
    call(getattr(library, f"widen_{str(dtype)[6:]}s"), x, vectors, numbers)
    for got in (vectors, numbers):
        torch.testing.assert_close(got, x.float(), rtol=0, atol=0, equal_nan=True)
        assert torch.equal(got.signbit(), x.float().signbit())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_numbers_are_rounded_to_16_bits(library, dtype):
    """Every 97th float32 of all, and those around each 16-bit number and each middle between two."""
    every = torch.arange(-(2**31), 2**31, 97).to(torch.int32)
    grid = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float().view(torch.int32).long()
    half = 2**12 if dtype == torch.float16 else 2**15
    near = (grid[:, None] + torch.tensor([-half - 1, -half, -half + 1, -1, 0, 1, half - 1, half, half + 1])).flatten()
    x = torch.cat([every, near.clamp(-(2**31), 2**31 - 1).to(torch.int32)]).view(torch.float32)
    x = x[: len(x) // 16 * 16].contiguous()
    vectors, numbers = (torch.empty(len(x), dtype=dtype) for _ in range(2))
    call(getattr(library, f"narrow_{str(dtype)[6:]}s"), x, vectors, numbers)
    for got in (vectors, numbers):
        wrong = (got.view(torch.int16) != x.to(dtype).view(torch.int16)) & ~(got.isnan() & x.isnan())
        assert not wrong.any(), x[wrong][:5]


def test_exponentials(library):
    """To one and a half units in the last place where the library has multiply-adds; the argument's rounding without."""
    x = torch.cat([torch.linspace(-87.3, 88, 2**20), torch.linspace(-1, 1, 2**16)])
    got = torch.empty_like(x)
    call(library.exps, x, got)
    error = (got.double() / x.double().exp() - 1).abs() / torch.finfo(torch.float32).eps
    assert error[x.abs() < 1].max() < 1.6 and error.max() < 90
    special = torch.tensor([0.0, -0.0, -87.34, -1e3, -torch.inf, -3.4e38, torch.nan, 1.0]).repeat(2)
    got = torch.empty_like(special)
    call(library.exps, special, got)
    assert got[:6].tolist() == [1, 1, 0, 0, 0, 0] and got[6].isnan() and abs(got[7] - 2.7182818) < 3e-7


def test_logarithms(library):
    x = torch.cat([torch.logspace(-37, 38, 2**20), torch.linspace(0.5, 2, 2**16)])
    got = torch.empty_like(x)
    call(library.logs, x, got)
    want = x.double().log()
    assert ((got - want).abs() / want.abs().clamp(min=1e-2)).max() < 2.5e-7
    special = torch.tensor([1.0, torch.nan] * 8)
    got = torch.empty_like(special)
    call(library.logs, special, got)
    assert got[0] == 0 and got[1].isnan()
