"""Launchers of the CUDA C++ kernels: `<op>.py` allocates and launches `cmim_cuda::*`, which csrc/ implements.

A launcher has the signature of the function of the same name in the reference. The few inputs that a kernel does not support
are passed to the reference; the launcher says which ones.
"""

import functools

import torch


def launch(op, first, *arguments):
    """Run `cmim_cuda::<op>`(first, *arguments) on the current stream of the device of the tensor `first`."""
    stream = torch.cuda.current_stream(first.device).cuda_stream if first.is_cuda else 0
    getattr(torch.ops.cmim_cuda, op).default(stream, first, *arguments)


@functools.cache
def constant(name):
    """A constant of csrc/launchers.h that launchers need."""
    return torch.ops.cmim_cuda.constant.default(name)
