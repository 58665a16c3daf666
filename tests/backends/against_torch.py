"""One op on two backends: PyTorch's formulas, and the kernels of Triton or CUDA C++ wherever they can run here."""

import os

import torch
from hypothesis import settings

from cmim_kernels.backends import use_backend
from cmim_kernels.libraries import cpu, cuda
from tests.csrc.emulation import cpu_library, emulated_library
from tests.kernels.op_checks import assert_equal, run

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
few = settings(max_examples=15)  # a program takes the interpreter milliseconds
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LABELS = (torch.uint8, torch.int32, torch.int64)
# Both sides compute in float32 and round once; the interpreter truncates bfloat16 where a device rounds.
TOLERANCE = {
    torch.float32: dict(rtol=2e-5, atol=2e-6),
    torch.float16: dict(rtol=2e-3, atol=1e-5),
    torch.bfloat16: dict(rtol=1e-2, atol=1e-4),
}


kernels_of = "triton"
"""The backend under test: see the fixture `backend` in conftest.py."""


def missing(backend):
    """Why the kernels of a backend cannot run here; None if they can."""
    if backend == "triton":
        return None
    if backend == "cpu":
        if not cpu.file.exists():
            cpu.file = cpu_library() or cpu.file
        return cpu.unavailable_reason(DEVICE)
    if INTERPRETED:
        if emulated_library() is None:
            return "no C++ compiler to emulate the CUDA kernels on the CPU"
        cuda.file, cuda.devices = emulated_library(), ("cpu",)
    return cuda.unavailable_reason(DEVICE)


def assert_like_torch(function, inputs, *, gradient=True, tolerance=TOLERANCE):
    """function(*inputs) and its gradients have the values, dtypes and strides that they have in PyTorch, and the same
    bits when the backend under test computes them again. Returns its outputs and gradients."""
    with use_backend("torch"):
        want = run(function, inputs, gradient)
    with use_backend(kernels_of):
        got, again = run(function, inputs, gradient), run(function, inputs, gradient)
    assert_equal(got, again, rtol=0, atol=0, equal_nan=True)
    for a, b in zip(got[0] + got[1], want[0] + want[1], strict=True):
        if b is None:
            assert a is None
            continue
        assert a.dtype == b.dtype and layout(a) == layout(b)
        torch.testing.assert_close(a, b, equal_nan=True, **tolerance.get(a.dtype, {}))
    return got


def layout(x):
    """Strides of the dimensions that have some: no others mean anything."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1 and x.numel()]


def random_labels(shape, classes, dtype=torch.int64, seed=0):
    """Labels of which some are out of range, on both sides where the dtype has a sign, and masks: on the device."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0 if dtype == torch.uint8 else -1, classes + 2, shape, generator=g)
    masked = torch.rand(shape, generator=g) < 0.5
    return labels.to(DEVICE, dtype), masked.to(DEVICE)


def strided(x):
    """The values of x in memory of another order, so that no dimension but one has stride 1."""
    return x.mT.contiguous().mT if x.dim() > 1 else torch.stack([x, x], dim=-1)[..., 0]
