"""Launchers of the CUDA C++ kernels of the ops: `<op>.py` allocates and launches `cmim_cuda::*`, which csrc/ implements.

A launcher has the signature of the reference's function of the same name. The few inputs that the kernels do not cover it
hands to the reference, and says which.
"""

import functools

import torch


def launch(op, first, *arguments):
    """Run `cmim_cuda::<op>`(first, *arguments) on the current stream of the device of the tensor `first`."""
    stream = torch.cuda.current_stream(first.device).cuda_stream if first.is_cuda else 0
    getattr(torch.ops.cmim_cuda, op).default(stream, first, *arguments)


@functools.cache
def constant(name):
    """A number that csrc/launchers.h defines and launchers need."""
    return torch.ops.cmim_cuda.constant.default(name)
