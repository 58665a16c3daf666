"""Where the ops of this package are declared to PyTorch.

Every op is a pair `cmim_kernels::<op>_forward` and `cmim_kernels::<op>_backward` with a schema written here in
Python. A public function (in `ops/<op>.py`) validates its arguments and calls one `autograd.Function`, which calls
the pair. Nothing else reaches an implementation, so a backend is added in `declare` and nowhere else.
"""

import contextlib
import functools
import importlib

import torch

from cmim_kernels import backends

_LIBRARY = torch.library.Library("cmim_kernels", "DEF")
KERNELS = {}
"""Name of each declared op -> the backends besides PyTorch that have kernels of it."""


def declare(schema, *, torch_backend, fake, kernels=()):
    """Declare `cmim_kernels::<schema>` and return the callable op.

    Args:
        schema: `name(Tensor x, ...) -> ...` in PyTorch's schema language; the name is that of torch_backend.
        torch_backend: the explicit formulas of `reference/<op>.py`. Runs on every device, never sees autograd.
        fake: shapes, dtypes and strides of the outputs, for `torch.compile` and `torch.export`.
        kernels: the other backends that have the op, of "triton" and "cuda": `triton_kernels/<op>.py` or
            `cuda_kernels/<op>.py` has a launcher of the same name and arguments, and is imported when it first runs.
    """
    name = schema.split("(", 1)[0]
    KERNELS[name] = frozenset(kernels)
    implementation = _choosing(name, torch_backend) if kernels else torch_backend
    _LIBRARY.define(schema)
    for dispatch_key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, implementation, dispatch_key)
    torch.library.register_fake(f"cmim_kernels::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.cmim_kernels, name).default


def _choosing(name, torch_backend):
    """The implementation that runs the chosen backend (`cmim_kernels.backends`); float64 always runs in PyTorch."""

    def implementation(*arguments):
        if any(isinstance(a, torch.Tensor) and a.dtype == torch.float64 for a in arguments):
            return torch_backend(*arguments)
        device = arguments[0].device
        backend = backends.choose(KERNELS[name], device).backend
        if backend == "torch":
            return torch_backend(*arguments)
        current = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with current:  # launches go to the current device
            return _launcher(backend, name)(*arguments)

    return implementation


@functools.cache
def _launcher(backend, name):
    op = name.removesuffix("_forward").removesuffix("_backward")
    return getattr(importlib.import_module(f"cmim_kernels.{backend}_kernels.{op}"), name)


def differentiable(function, *arguments):
    """`function.apply(*arguments)` of an `autograd.Function`, or its forward alone where nobody asks for a gradient:
    `torch.compile` fails on an `autograd.Function` with `setup_context` that none of whose inputs requires one."""
    if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in arguments):
        return function.apply(*arguments)
    return function.forward(*arguments)


def multiprocessors(tensor):
    """How many programs or blocks run at least at once, to decide how finely to cut the work. The CPU, where kernels are
    interpreted or emulated, gets an H200's number."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 132


def empty_like_layout(x, dtype=None):
    """An uninitialised tensor of x's shape: channels-last where a 4-D x is channels-last, else contiguous.

    `torch.empty_like` would also copy arbitrary permuted strides, which a kernel then has to honour.
    """
    channels_last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device, memory_format=memory_format)


def as_layout(value, like):
    """`value` in the dtype of `like`, laid out as `empty_like_layout(like)` promises, never an alias of an input."""
    return empty_like_layout(like).copy_(value)


def accumulation_dtype(*tensors):
    """float64 if any tensor is float64, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def class_ids(labels, num_classes):
    """int64 labels in which `num_classes` stands for every ignored value.

    Widened before the comparison: PyTorch wraps the bound of `uint8 < 300` to 44.
    """
    labels = labels.to(torch.int64)
    return torch.where((labels >= 0) & (labels < num_classes), labels, num_classes)


def segment_sum(rows, segment, num_segments):
    """Sums of float `rows` (n, ...) by `segment` (n,) int64, deterministic on both devices: (num_segments, ...).

    Adding selects: an inf or NaN stays in its own segment, where a one-hot product would spread it.
    """
    out = rows.new_zeros(num_segments, *rows.shape[1:])
    if rows.is_cuda:  # sorts by index; index_add_ would use float atomics here
        return out.index_put_((segment,), rows, accumulate=True)
    # One row after the other (index_put_ would use float atomics here): float32 would lose a digit in long sums.
    return out.double().index_add_(0, segment, rows.double()).to(rows.dtype)


def segment_count(segment, num_segments):
    """How many entries of `segment` (n,) int64 name each segment: (num_segments,) int32."""
    ones = torch.ones_like(segment, dtype=torch.int32)
    return ones.new_zeros(num_segments).index_add_(0, segment, ones)


@contextlib.contextmanager
def full_float32(device):
    """Products and convolutions of float32 in float32 inside a backend, which autocast and TF32 would otherwise reach."""
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv)
    before = [s.fp32_precision for s in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        # "none" inherits. Writing back an inherited precision would cut the setting off from later global changes.
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = "none"
            if setting.fp32_precision != precision:
                setting.fp32_precision = precision
