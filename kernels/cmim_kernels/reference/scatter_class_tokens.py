"""Packed tokens back in their original order, with the mask token and the positions written in the same pass.

out[b, n] = (packed[b, inverse[b, n]] if inverse[b, n] < L else mask_token, or zero without one) + position[n]
"""

import torch

from cmim_kernels.numerics import accumulation_dtype
from cmim_kernels.reference.gather_class_tokens import take_rows


def scatter_class_tokens(packed, inverse, mask_token=None, position=None):
    """The definition, differentiable by autograd. Shapes as in `cmim_kernels.scatter_class_tokens`."""
    batch, length, channels = packed.shape
    dtype = accumulation_dtype(packed, mask_token, position)
    fill = packed.new_zeros(channels) if mask_token is None else mask_token
    rows = torch.cat([packed.to(dtype), fill.to(dtype).expand(batch, 1, channels)], dim=1)
    out = take_rows(rows, inverse.clamp(max=length))
    return out if position is None else out + position.to(dtype)


def scatter_class_tokens_forward(packed, inverse, mask_token, position):
    return scatter_class_tokens(packed, inverse, mask_token, position).to(packed.dtype)


def scatter_class_tokens_backward(grad, order, inverse, mask_token, position, length):
    """Gradients of packed, mask_token and position (empty where the input is None).

    Packed row i belongs to the place order[b, i]; the places of the rows from `length` on got the mask token. `inverse` is
    for backends that loop over the original places; this one loops over the packed positions.
    """
    dtype = accumulation_dtype(grad, mask_token, position)
    grad_mask_token, grad_position = grad.new_empty(0), grad.new_empty(0)
    if mask_token is not None:
        grad_mask_token = take_rows(grad, order[:, length:]).sum(dim=(0, 1), dtype=dtype).to(mask_token.dtype)
    if position is not None:
        grad_position = grad.sum(dim=0, dtype=dtype).to(position.dtype)
    return take_rows(grad, order[:, :length]), grad_mask_token, grad_position
