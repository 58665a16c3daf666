"""One op, or a larger part, in several formulations that give the same result."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from bench.clock import with_gradients
from bench.inputs import DEVICE
from cmim_kernels import backends, cuda

OURS = "cmim_kernels"


@dataclass
class Comparison:
    inputs: list[torch.Tensor]
    rivals: dict[str, Callable]
    """Name -> function of the inputs, all with the same results: the first is ours, the next the one to check against."""
    moved: tuple[int, int] | None = None
    """Bytes that forward must move, and forward and backward together."""
    launches: tuple[int, int] | None = None
    """At most, likewise."""
    tolerance: float | None = None
    """Of the largest magnitude; by default a few roundings of the inputs' dtype."""
    unchecked: set = field(default_factory=set)
    """Rivals with another result: what the same work would cost without classes."""


def compiled(function):
    """`torch.compile` in its best form for fixed shapes."""
    return torch.compile(function, fullgraph=True, dynamic=False)


BACKENDS = {"our formulas in PyTorch": "torch", "ours in CUDA C++": "cuda"} if DEVICE.type == "cuda" else {}
"""Rivals that are our own ops on another backend than the one that users get."""


def ours(function, *, csrc=False):
    """Name -> `function` as users get it and, on CUDA, on other backends; `csrc`: the op has kernels in CUDA C++."""
    missing = set() if csrc and cuda.obstacle(DEVICE) is None else {"cuda"}
    return {OURS: function} | {name: function for name, backend in BACKENDS.items() if backend not in missing}


@contextlib.contextmanager
def prepared(comparison, name, *, backward=False):
    """The function to be timed, once its results are known to equal the reference's."""
    wrap = (lambda function: with_gradients(function, comparison.inputs)) if backward else (lambda function: function)
    reference = next(other for other in comparison.rivals if other != OURS and other not in BACKENDS)
    with torch.set_grad_enabled(backward):
        want = wrap(comparison.rivals[reference])(*comparison.inputs)
        with backends.use_backend(BACKENDS.get(name, "auto")):
            function = wrap(comparison.rivals[name])
            if name not in comparison.unchecked:
                assert_equal(name, function(*comparison.inputs), want, comparison.tolerance or roundings(comparison))
            yield function


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
