"""One op, or a larger part, in several formulations that give the same result."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from bench.clock import with_gradients
from bench.inputs import DEVICE
from cmim_kernels import backends
from cmim_kernels.libraries import cuda

OURS = "cmim_kernels"


@dataclass
class Comparison:
    inputs: list[torch.Tensor]
    """Gradients are those of the floating-point ones."""
    baselines: dict[str, Callable]
    """Name -> function of inputs and constants, all with the same results: the first is ours, the next the one to check
    against."""
    constants: list[torch.Tensor] = field(default_factory=list)
    """What is read besides and gets no gradient: whatever a function keeps to itself stays in the cache, and flatters it."""
    moved: tuple[int, int] | None = None
    """Bytes that forward must move, and forward and backward together."""
    exponentials: tuple[int, int] = (0, 0)
    products: tuple[int, int] = (0, 0)
    """Exponentials and multiply-adds of tensor cores that are needed, likewise."""
    launches: tuple[int, int] | None = None
    """At most, likewise."""
    tolerance: float | None = None
    """Of the largest magnitude; by default a few roundings of the inputs' dtype."""
    unchecked: set = field(default_factory=set)
    """Baselines with another result: what the same work would cost without classes."""
    eager: set = field(default_factory=set)
    """Baselines that no CUDA graph can capture, because the host waits for the device in them."""

    @property
    def arguments(self):
        return [*self.inputs, *self.constants]


def compiled(function):
    """`torch.compile` in its best form for fixed shapes."""
    return torch.compile(function, fullgraph=True, dynamic=False)


FORMULAS, CUDA_CPP = "our formulas in PyTorch", "ours in CUDA C++"
BACKENDS = {FORMULAS: "torch", CUDA_CPP: "cuda"} if DEVICE.type == "cuda" else {}
"""Baselines that are our own ops on another backend than the one that users get."""


def ours(function, *, csrc=False):
    """Name -> `function` as users get it and, on CUDA, on other backends; `csrc`: the op has kernels in CUDA C++."""
    missing = set() if csrc and cuda.unavailable_reason(DEVICE) is None else {"cuda"}
    return {OURS: function} | {name: function for name, backend in BACKENDS.items() if backend not in missing}


@contextlib.contextmanager
def prepared(comparison, name, *, backward=False):
    """The function of `comparison.arguments` to be timed, once its results are known to equal the reference's."""
    reference = next(other for other in comparison.baselines if other != OURS and other not in BACKENDS)
    with torch.set_grad_enabled(backward):
        want = _wrapped(comparison, reference, backward)(*comparison.arguments)
        with backends.use_backend(BACKENDS.get(name, "auto")):
            function = _wrapped(comparison, name, backward)
            if name not in comparison.unchecked:
                assert_equal(name, function(*comparison.arguments), want, comparison.tolerance or roundings(comparison))
            yield function


def _wrapped(comparison, name, backward):
    function = comparison.baselines[name]
    return with_gradients(function, comparison.inputs, comparison.constants) if backward else function


def error_against_float64(comparison, name, *, backward=False):
    """The largest |ours - exact| / |exact| (Frobenius norms) of the outputs and gradients of one of our backends.

    `exact` are our formulas in float64. None where nothing is floating-point.
    """
    exact_of = lambda x: x.double() if x.is_floating_point() else x  # noqa: E731
    arguments = [exact_of(x) for x in comparison.arguments]
    function, inputs = comparison.baselines[name], arguments[: len(comparison.inputs)]
    with torch.set_grad_enabled(backward):
        run = with_gradients(function, inputs, arguments[len(inputs) :]) if backward else function
        with backends.use_backend("torch"):
            exact = run(*arguments)
        with backends.use_backend(BACKENDS.get(name, "auto")):
            got = _wrapped(comparison, name, backward)(*comparison.arguments)
    pairs = [(a.double(), b.double()) for a, b in zip(_flat(got), _flat(exact), strict=True) if a.is_floating_point()]
    return max((((a - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in pairs if b.numel()), default=None)


def roundings(comparison):
    """A few roundings of the coarsest dtype that goes in."""
    return 8 * max((torch.finfo(x.dtype).eps for x in comparison.inputs if x.is_floating_point()), default=0)


def assert_equal(name, got, want, tolerance):
    """That results are those of the reference; `tolerance` is relative to the largest magnitude of each tensor."""
    got, want = _flat(got), _flat(want)
    assert len(got) == len(want), f"{name} returns {len(got)} tensors, expected {len(want)}"
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape, f"{name}: shape {tuple(a.shape)}, expected {tuple(b.shape)}"
        if not b.is_floating_point():
            assert torch.equal(a.long(), b.long()), f"{name} differs"
            continue
        error, size = (a.double() - b.double()).abs().max(), b.double().abs().max()
        assert error <= max(tolerance, 1e-5) * size, f"{name} differs by {error:g}, the largest magnitude is {size:g}"


def _flat(outputs):
    return list(outputs) if isinstance(outputs, tuple | list) else [outputs]


def size_of(*tensors):
    return sum(x.numel() * x.element_size() for x in tensors)
