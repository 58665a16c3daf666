"""Launchers of the CUDA C++ kernels of the ops: `<op>.py` allocates and calls `cmim_cuda::*`, which csrc/ implements.

A launcher has the signature of the reference's function of the same name. The few inputs that the kernels do not cover it
hands to the reference, and says which.
"""

import torch

kernels = torch.ops.cmim_cuda
