"""The compiled libraries of csrc/: finds and loads them, or says why this is not possible.

Loading a library registers the ops that launchers call: `cuda` registers `cmim_cuda::*` for `cuda_kernels/`, and `cpu`
registers `cmim_cpu::*` for `cpu_kernels/`.
"""

from pathlib import Path

import torch


class Library:
    """One shared library inside this package."""

    def __init__(self, name, file, devices):
        self.name = name
        self.file = Path(__file__).parent / file
        self.devices = devices
        """The device types that it has kernels for. Tests replace the CUDA library by one that emulates CUDA on the CPU."""
        self._outcomes = {}

    def build_report(self):
        """The build report of the installation: how the library was built, or why it was not."""
        report = self.file.with_suffix(".txt")
        return report.read_text().strip() if report.exists() else "not built: this copy was never installed"

    def load_failure(self):
        """Load the library once. Returns None, or why it could not be loaded."""
        if self.file not in self._outcomes:
            try:
                torch.ops.load_library(self.file)
                self._outcomes[self.file] = None
            except OSError as error:
                self._outcomes[self.file] = f"{self.file} could not be loaded: {error.__cause__ or error}"
        return self._outcomes[self.file]

    def unavailable_reason(self, device):
        """Why the kernels cannot run on tensors of a `torch.device`; None if they can."""
        if not self.file.exists():
            return f"the {self.name} kernels were {self.build_report()}"
        if device.type not in self.devices:
            return "no GPU" if device.type == "cpu" else f"its kernels are for tensors on the {self.name}"
        return self.load_failure() or (device_unavailable_reason(device) if device.type == "cuda" else None)


def device_unavailable_reason(device):
    """Why neither Triton nor CUDA C++ kernels can run on a CUDA device; None if they can."""
    if torch.version.cuda is None:
        return "this PyTorch is not built for CUDA"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"compute capability {major}.{minor} is below 8.0"


cuda = Library("CUDA", "libcmim_kernels.so", ("cuda",))
cpu = Library("CPU", "libcmim_cpu.so", ("cpu",))
