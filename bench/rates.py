"""Kernels that do nothing but arithmetic in registers: what a multiprocessor can do at most."""

import torch
import triton
import triton.language as tl

STEPS = 256
BLOCK = 1024


@triton.jit
def _exponentials_kernel(x_ptr, out_ptr, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    for _ in tl.static_range(STEPS):
        x = tl.exp2(-x)
    tl.store(out_ptr + offsets, x)


@triton.jit
def _multiply_adds_kernel(x_ptr, out_ptr, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    factor = x * 0.5
    for _ in tl.static_range(STEPS):
        x = x * factor + factor
    tl.store(out_ptr + offsets, x)


KERNELS = {"exponentials": _exponentials_kernel, "multiply_adds": _multiply_adds_kernel}


def run(kind, x):
    """STEPS exponentials or multiply-adds of each element of x, whose number is a multiple of BLOCK."""
    out = torch.empty_like(x)
    KERNELS[kind][(x.numel() // BLOCK,)](x, out, STEPS=STEPS, BLOCK=BLOCK, num_warps=4)
    return out
