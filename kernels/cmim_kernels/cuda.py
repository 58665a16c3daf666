"""The compiled csrc/: finds and loads it, or says why it cannot.

Loading registers the ops `cmim_cuda::*`, which the launchers in `cuda_kernels/` call.
"""

import functools
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("libcmim_kernels.so")
DEVICES = ("cuda",)
"""The types of device that the library has kernels for: tests put an emulation for the CPU in its place."""


def build_report():
    """What the installation says about the library: how it was built, or why not."""
    report = LIBRARY.with_suffix(".txt")
    return report.read_text().strip() if report.exists() else "not built: this copy was never installed"


@functools.cache
def load_obstacle():
    """Load the library; None, or why it could not be loaded."""
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"{LIBRARY} could not be loaded: {error.__cause__ or error}"
    return None


def obstacle(device):
    """Why the CUDA kernels cannot run on tensors of a `torch.device`; None if they can."""
    if not LIBRARY.exists():
        return f"the CUDA kernels were {build_report()}"
    if device.type not in DEVICES:
        return "no GPU"
    return load_obstacle() or (device_obstacle(device) if device.type == "cuda" else None)


def device_obstacle(device):
    """Why no kernels, whoever compiles them, can run on a CUDA device; None if they can."""
    if torch.version.cuda is None:
        return "this PyTorch is not built for CUDA"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"compute capability {major}.{minor} is below 8.0"
