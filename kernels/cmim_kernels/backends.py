"""Which backend computes an op: PyTorch (`reference/`), Triton (`triton_kernels/`), CUDA C++ (`cuda_kernels/`) or, on the
CPU, C++ (`cpu_kernels/`).

The environment variable CMIM_KERNELS_BACKEND, read when this package is imported, asks for one:

    auto    C++ on the CPU where it was compiled, and Triton on CUDA devices that it supports, for the ops that have their
            kernels; else PyTorch. The default. CUDA C++ is left out until a measurement on a GPU shows it to be faster.
    cpu     C++ on the CPU for the ops that have its kernels, or an error that says why it cannot run; `auto` for the others.
    cuda    CUDA C++ for the ops that have its kernels, or an error that says why it cannot run; `auto` for the others.
    triton  Triton for the ops that have its kernels, or an error that says why it cannot run. On CPU tensors it needs
            TRITON_INTERPRET=1, which interprets the kernels (slow: for tests).
    torch   PyTorch.

float64 inputs go to PyTorch whatever was asked for. `python -m cmim_kernels.info` prints the choice for each op.
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
    """Ask for another backend for a while, in all threads: backward passes run in threads of autograd."""
    global _requested
    before, _requested = _requested, _checked(option)
    try:
        yield
    finally:
        _requested = before


def choose(kernels, device):
    """The `Choice` for an op on tensors of a `torch.device`, float64 aside.

    Args:
        kernels: the backends besides PyTorch that have kernels of the op, a set of "triton", "cuda" and "cpu".
        device: a `torch.device`.

    Raises:
        RuntimeError: a backend was asked for by name and cannot run on `device`.
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
    # Triton's kernels, interpreted, are for those who ask for them.
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
