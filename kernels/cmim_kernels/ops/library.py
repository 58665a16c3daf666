"""Declares the ops of this package to PyTorch.

Every op is a pair `cmim_kernels::<op>_forward` and `cmim_kernels::<op>_backward`. A public function (in `ops/<op>.py`)
checks its arguments and calls one `autograd.Function`, which calls the pair. Implementations are called in no other way, so
a backend is added through `declare` only.
"""

import functools
import importlib

import torch

from cmim_kernels import backends

_LIBRARY = torch.library.Library("cmim_kernels", "DEF")
KERNELS = {}
"""Name of each declared op -> the backends besides PyTorch that have a kernel of it."""


def declare(schema, *, torch_backend, fake, kernels=()):
    """Declare `cmim_kernels::<schema>` and return the callable op.

    Args:
        schema: `name(Tensor x, ...) -> ...` in PyTorch's schema language, with the name of torch_backend.
        torch_backend: the explicit formulas of `reference/<op>.py`; run on every device and are not tracked by autograd.
        fake: shapes, dtypes and strides of the outputs, for `torch.compile` and `torch.export`.
        kernels: the other backends that have the op: of "triton", "cuda" and "cpu". `<backend>_kernels/<op>.py`, which is
            imported when it first runs, has a launcher with the same name and arguments.
    """
    name = schema.split("(", 1)[0]
    KERNELS[name] = frozenset(kernels)
    implementation = _choosing(name, torch_backend) if kernels else torch_backend
    _LIBRARY.define(schema)
    for dispatch_key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, implementation, dispatch_key)
    torch.library.register_fake(f"cmim_kernels::{name}", fake, lib=_LIBRARY)
    return _directly(getattr(torch.ops.cmim_kernels, name).default, implementation)


def _directly(op, implementation):
    """`op`, but calls its implementation directly if PyTorch's dispatcher has nothing to do: for ordinary tensors in eager
    mode. What that saves is in bench/LOG.md."""

    @functools.wraps(implementation)
    def call(*arguments):
        if torch.compiler.is_compiling() or _is_watched():
            return op(*arguments)
        for a in arguments:
            if isinstance(a, torch.Tensor) and (type(a) not in _ORDINARY or not (a.is_cpu or a.is_cuda)):
                return op(*arguments)
        return implementation(*arguments)

    return call


_ORDINARY = (torch.Tensor, torch.nn.Parameter)


def _is_watched():
    """Whether a dispatch mode (fake tensors, tracing, a counter), a transform of `torch.func` or the profiler is active."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.autograd._profiler_enabled()
    )


def _choosing(name, torch_backend):
    """An implementation that runs the chosen backend (`cmim_kernels.backends`); float64 always uses PyTorch."""

    def implementation(*arguments):
        for a in arguments:
            if isinstance(a, torch.Tensor) and a.dtype is torch.float64:
                return torch_backend(*arguments)
        device = arguments[0].device
        backend = backends.choose(KERNELS[name], device).backend
        if backend == "torch":
            return torch_backend(*arguments)
        launcher = _launcher(backend, name)
        if backend == "cpu" or device.type != "cuda" or device.index == torch.cuda.current_device():
            return launcher(*arguments)
        with torch.cuda.device(device):  # launches go to the current device
            return launcher(*arguments)

    return implementation


@functools.cache
def _launcher(backend, name):
    op = name.removesuffix("_forward").removesuffix("_backward")
    return getattr(importlib.import_module(f"cmim_kernels.{backend}_kernels.{op}"), name)
