"""Which backend computes an op: PyTorch (`reference/`) or Triton (`triton_kernels/`).

The environment variable CMIM_KERNELS_BACKEND, read when this package is imported, asks for one:

    auto    Triton on CUDA devices that it supports, for the ops that have kernels; else PyTorch. The default.
    triton  Triton for the ops that have kernels, or an error that says why it cannot run. On CPU tensors it needs
            TRITON_INTERPRET=1, which interprets the kernels (slow: for tests).
    torch   PyTorch.

float64 inputs go to PyTorch whatever was asked for. `python -m cmim_kernels.info` prints the choice for each op.
"""

import contextlib
import functools
import importlib.util
import os
from typing import NamedTuple

import torch

OPTIONS = ("auto", "triton", "torch")


class Choice(NamedTuple):
    backend: str
    reason: str


def _checked(option):
    if option == "cuda":
        raise ValueError(
            "CMIM_KERNELS_BACKEND is 'cuda', but this installation has no CUDA build; use auto, triton or torch"
        )
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


def choose(has_triton, device):
    """The `Choice` for an op with or without Triton kernels on tensors of a `torch.device`, float64 aside.

    Raises:
        RuntimeError: Triton was asked for by name and cannot run on `device`.
    """
    return _choose(_requested, has_triton, device)


@functools.cache
def _choose(option, has_triton, device):
    if option == "torch":
        return Choice("torch", "asked for")
    if not has_triton:
        return Choice("torch", "has no Triton kernels")
    obstacle = triton_obstacle(device)
    if option == "triton":
        if obstacle:
            raise RuntimeError(f"CMIM_KERNELS_BACKEND=triton cannot run on {device}: {obstacle}")
        return Choice("triton", "asked for")
    if device.type == "cpu":  # interpreted kernels are for those who ask for them
        return Choice("torch", "the tensors are on the CPU")
    return Choice("torch", obstacle) if obstacle else Choice("triton", "the device supports it")


def triton_obstacle(device):
    """Why the Triton kernels cannot run on tensors of a `torch.device`; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cpu":
        from triton import knobs

        return None if knobs.runtime.interpret else "no GPU; set TRITON_INTERPRET=1 to interpret the kernels on the CPU"
    if torch.version.cuda is None:
        return "this PyTorch is not built for CUDA"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"compute capability {major}.{minor} is below 8.0"
