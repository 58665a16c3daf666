"""`python -m cmim_kernels.info`: versions, device, backends, and which backend runs each op and why."""

import importlib.metadata
import importlib.util
import os
import sys

import torch

import cmim_kernels
from cmim_kernels import backends, libraries
from cmim_kernels.ops.library import KERNELS


def report():
    """The lines of the report."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    triton = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "not installed"
    built = lambda library: f"; {library.build_report()}" if library.file.exists() else ""  # noqa: E731
    lines = [
        f"cmim_kernels {cmim_kernels.__version__}, torch {torch.__version__}, triton {triton}",
        f"device: {_describe(device)}",
        f"CMIM_KERNELS_BACKEND={backends.requested()}",
        "backend torch: runs everywhere",
        f"backend triton: {backends.triton_unavailable_reason(device) or 'can run'}",
        f"backend cuda: {libraries.cuda.unavailable_reason(device) or 'can run'}{built(libraries.cuda)}",
        f"backend cpu: {libraries.cpu.unavailable_reason(torch.device('cpu')) or 'can run'}{built(libraries.cpu)}",
        "",
    ]
    rows = [("op", "backend", "why")]
    for name, kernels in sorted(KERNELS.items()):
        try:
            rows.append((name, *backends.choose(kernels, device)))
        except RuntimeError as error:
            rows.append((name, "none", str(error)))
    width = max(len(name) for name, *_ in rows)
    lines += [f"{name:{width}}  {backend:7}  {why}" for name, backend, why in rows]
    return [*lines, "", "float64 inputs always use torch."]


def _describe(device):
    if device.type == "cpu":
        return "cpu (no CUDA device)"
    properties = torch.cuda.get_device_properties(device)
    return (
        f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"{properties.multi_processor_count} multiprocessors, CUDA {torch.version.cuda}"
    )


if __name__ == "__main__":
    try:
        print("\n".join(report()), flush=True)
    except BrokenPipeError:  # the reader of the output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
