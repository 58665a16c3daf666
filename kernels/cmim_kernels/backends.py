"""The choice of the backend of an op: PyTorch (`reference/`), Triton (`triton_kernels/`), CUDA C++ (`cuda_kernels/`) or, on
the CPU, C++ (`cpu_kernels/`).

The environment variable CMIM_KERNELS_BACKEND requests a backend; it is read when this package is imported:

    auto    The default: on the CPU, C++ if it was compiled; on CUDA devices that Triton supports, Triton; PyTorch for ops
            without such a kernel. CUDA C++ is not chosen until a measurement on a GPU shows that it is faster.
    cpu     C++ on the CPU for ops that have a C++ kernel, or an error that says why it cannot run; else as `auto`.
    cuda    CUDA C++ for ops that have a CUDA C++ kernel, or an error that says why it cannot run; else as `auto`.
    triton  Triton for ops that have a Triton kernel, or an error that says why it cannot run. On CPU tensors it needs
            TRITON_INTERPRET=1, which interprets the kernels (slow, for tests).
    torch   PyTorch.

float64 inputs always use PyTorch. `python -m cmim_kernels.info` prints the choice for each op.
"""

import contextlib
import functools
import importlib.util
import os
from typing import NamedTuple

from cmim_kernels import libraries

OPTIONS = ("auto", "cpu", "cuda", "triton", "torch")


class Choice(NamedTuple):
    backend: str
    reason: str


def _checked(option):
    if option not in OPTIONS:
        raise ValueError(f"CMIM_KERNELS_BACKEND is {option!r}, expected one of {', '.join(OPTIONS)}")
    return option


_requested = _checked(os.environ.get("CMIM_KERNELS_BACKEND", "auto"))


def requested():
    return _requested


@contextlib.contextmanager
def use_backend(option):
    """Request another backend inside the `with` block. It holds for all threads, because backward passes run in other
    threads.

    Args:
        option: a value of CMIM_KERNELS_BACKEND: "auto", "cpu", "cuda", "triton" or "torch".
    """
    global _requested
    before, _requested = _requested, _checked(option)
    try:
        yield
    finally:
        _requested = before


def choose(kernels, device):
    """The `Choice` for an op on tensors of a `torch.device` whose dtype is not float64.

    Args:
        kernels: the backends besides PyTorch that have a kernel of the op: a subset of "triton", "cuda" and "cpu".
        device: a `torch.device`.

    Raises:
        RuntimeError: the requested backend cannot run on `device`.
    """
    return _choose(_requested, frozenset(kernels), device)


@functools.cache
def _choose(option, kernels, device):
    if option == "torch":
        return Choice("torch", "asked for")
    if option in kernels:
        reason = UNAVAILABLE_REASONS[option](device)
        if reason:
            raise RuntimeError(f"CMIM_KERNELS_BACKEND={option} cannot run on {device}: {reason}")
        return Choice(option, "asked for")
    # Interpreted Triton kernels are used only on request.
    automatic = "cpu" if device.type == "cpu" and option != "triton" else "triton"
    if automatic not in kernels:
        return Choice("torch", f"has no kernels for {'the CPU' if automatic == 'cpu' else 'Triton'}")
    if automatic == "cpu":
        reason = libraries.cpu.unavailable_reason(device)
        return Choice("torch", reason) if reason else Choice("cpu", "the tensors are on the CPU")
    reason = triton_unavailable_reason(device)
    if reason:
        return Choice("torch", reason)
    return Choice("triton", "the device supports it" + ("; not yet measured against cuda" if "cuda" in kernels else ""))


def triton_unavailable_reason(device):
    """Why the Triton kernels cannot run on tensors of a `torch.device`; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cpu":
        from triton import knobs

        return None if knobs.runtime.interpret else "no GPU; set TRITON_INTERPRET=1 to interpret the kernels on the CPU"
    return libraries.device_unavailable_reason(device)


UNAVAILABLE_REASONS = {
    "triton": triton_unavailable_reason,
    "cuda": libraries.cuda.unavailable_reason,
    "cpu": libraries.cpu.unavailable_reason,
}
