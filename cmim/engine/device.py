"""Device, precision and memory layout of a run."""

import os
import platform
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cmim.data.batches import IMAGES
from cmim.distributed import available_cores, world
from cmim.errors import UserError
from cmim_kernels import __version__


def choose_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device of `train.device` for this process. On the CPU, one core is left to the loader unless OMP_NUM_THREADS is
    set: OpenMP threads wait for each other after every operation, so one that shares its core slows all of them down."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device is cuda, but PyTorch sees no CUDA device; use --train.device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, available_cores() // world().local_size - 1))
        return torch.device("cpu")
    here = world()
    if here.local_size > torch.cuda.device_count():
        raise UserError(
            f"{here.local_size} processes on this machine, but PyTorch sees {torch.cuda.device_count()} CUDA devices; "
            "start that many with --nproc-per-node, or use --train.device cpu"
        )
    torch.cuda.set_device(here.local_rank)
    return torch.device("cuda", here.local_rank)


def choose_precision(name: Literal["auto", "fp32", "bf16", "fp16"], device: torch.device) -> torch.dtype | None:
    """The autocast dtype, or None for float32."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    if name == "fp16" and device.type == "cpu":
        raise UserError("train.precision is fp16, which needs a CUDA device; use bf16 or fp32")
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Autocast to the dtype from `choose_precision`; None: no autocast."""
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def processor(device: torch.device | None = None) -> str:
    """The name of the device; by default of the GPU, if there is one, else of the processor."""
    if torch.cuda.is_available() and (device is None or device.type == "cuda"):
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def environment(device: torch.device) -> dict[str, str]:
    """Time, versions and machine, by what a report calls them."""
    found = {"started": f"{datetime.now().astimezone():%Y-%m-%d %H:%M %z}", "cmim": __version__}
    found |= {"Python": platform.python_version(), "PyTorch": torch.__version__}
    for name in ("numpy", "torchvision", "timm", "segmentation-models-pytorch", "Pillow"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    processes = world().size
    return found | {
        "device": processor(device), "processes": str(processes), "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
    }  # fmt: skip


def to_device(batch: dict[str, Tensor], device: torch.device, channels_last: bool) -> dict[str, Tensor]:
    """Copy a batch to the device without waiting; images become channels-last if asked for."""
    moved = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    if channels_last:
        for name in moved.keys() & set(IMAGES):
            image = moved[name]
            flat = image.flatten(0, -4).contiguous(memory_format=torch.channels_last)
            moved[name] = flat.unflatten(0, image.shape[:-3])
    return moved


def eager_if(wanted: bool) -> AbstractContextManager:
    """If `wanted`, compiled code inside the `with` block runs eagerly."""
    return torch.compiler.set_stance("force_eager") if wanted else nullcontext()
