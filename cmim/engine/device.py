"""Where and how a run computes: device, autocast, memory layout."""

import os

import torch

from cmim.data.batches import available_cores
from cmim.engine.distributed import world
from cmim.errors import UserError


def choose_device(name):
    """The device of `train.device` for this process. On the CPU, a core is left to the loader unless OMP_NUM_THREADS says
    otherwise: OpenMP threads wait for one another after every operation, so one that shares its core holds up all."""
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
            "start as many with --nproc-per-node, or use --train.device cpu"
        )
    torch.cuda.set_device(here.local_rank)
    return torch.device("cuda", here.local_rank)


def choose_precision(name, device):
    """The autocast dtype, or None for float32."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    if name == "fp16" and device.type == "cpu":
        raise UserError("train.precision is fp16, which needs a CUDA device; use bf16 or fp32")
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def autocast(device, dtype):
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def to_device(batch, device, channels_last):
    """A batch on the device, images (B, 3, H, W) channels-last where asked, without waiting for the copy."""
    moved = {}
    for name, value in batch.items():
        value = value.to(device, non_blocking=True)
        if channels_last and value.dim() == 4 and name.endswith("_image"):
            value = value.contiguous(memory_format=torch.channels_last)
        moved[name] = value
    return moved
