"""Shared code of the backward passes of gathering and scattering: see csrc/rows.cu."""

import torch

from cmim_kernels.cuda_kernels import launch
from cmim_kernels.numerics import multiprocessors


def backward_blocks(grad, places):
    """The number of blocks that share the places: at most one for each place, and few enough that their partial sums of the
    mask token's gradient stay small."""
    vectors = -(-grad.shape[2] * grad.itemsize // 16)
    rows = 256 // min(32, 1 << max(0, vectors - 1).bit_length())
    return max(1, min(-(-places // rows), 8 * multiprocessors(grad)))


def parameter_gradients(run, grad, mask_token, position, blocks, *, empty):
    """Gradients of mask_token and position, computed by run(groups, grad_position); empty if the input is None."""
    groups = None if mask_token is None else grad.new_empty((blocks, grad.shape[2]), dtype=torch.float32)
    grad_position = None if position is None else position.new_empty(position.shape)
    grad_mask_token = grad.new_empty(0) if mask_token is None else mask_token.new_empty(mask_token.shape)
    if empty:  # without images or rows the gradients are zero
        for out in (grad_mask_token, grad_position):
            if out is not None:
                out.zero_()
    else:
        run(groups, grad_position)
        if groups is not None:
            launch("sum_rows", groups, grad_mask_token, None, None)
    return grad_mask_token, grad.new_empty(0) if position is None else grad_position
