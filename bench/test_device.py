"""Versions, and what the device can do at most: the ceilings that the targets of the ops are measured against."""

import platform

import pytest
import torch

from bench import floor, rates
from bench.inputs import DEVICE

ON_GPU = DEVICE.type == "cuda"


def test_versions(record_property, machine):
    record_property("machine", machine)
    assert platform.python_version() and machine["torch"] == torch.__version__


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("mebibytes", [1, 64, 1024])
def test_copy(mebibytes, record_property):
    moved = mebibytes * 2**20
    record_property("bytes_per_second", moved / floor.copy_seconds(moved))


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize(
    "ceiling", ["empty_seconds", "products_per_second", "exponentials_per_second", "multiply_adds_per_second"]
)
def test_ceiling(ceiling, record_property):
    value = getattr(floor, ceiling)()
    record_property(ceiling, value)
    assert value > 0


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("kind", list(rates.KERNELS))
def test_rates_compute_what_they_count(kind):
    """So that no compiler has left the arithmetic out."""
    x = torch.rand(rates.BLOCK, device=DEVICE)
    want = x.double()
    for _ in range(rates.STEPS):
        want = torch.exp2(-want) if kind == "exponentials" else want * (x.double() / 2) + x.double() / 2
    torch.testing.assert_close(rates.run(kind, x).double(), want, rtol=1e-4, atol=1e-4)
