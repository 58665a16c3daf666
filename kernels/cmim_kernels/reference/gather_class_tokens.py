"""Tokens in packed order, with the mask token and the positions written in the same pass.

    out[b, i] = (mask_token if i is in a masked segment else tokens[b, order[b, i]]) + position[order[b, i]]

for i < length. Masked segments have odd ids, 2k + 1; the segment of ignored tokens, 2K, is not masked.
"""

import torch
import torch.nn.functional as F

from cmim_kernels.numerics import accumulation_dtype


def gather_class_tokens(tokens, order, segment, mask_token=None, position=None, *, length):
    """The definition, differentiable by autograd. Shapes as in `cmim_kernels.gather_class_tokens`."""
    dtype = accumulation_dtype(tokens, mask_token, position)
    order = order[:, :length]
    out = take_rows(tokens, order).to(dtype)
    if mask_token is not None:
        out = torch.where(_masked(segment[:, :length]), mask_token.to(dtype), out)
    if position is not None:
        out = out + position.to(dtype)[order.to(torch.int64)]
    return out


def gather_class_tokens_forward(tokens, order, inverse, segment, mask_token, position, length):
    """`inverse` is for backends that loop over the original places; this one loops over the packed positions."""
    return gather_class_tokens(tokens, order, segment, mask_token, position, length=length).to(tokens.dtype)


def gather_class_tokens_backward(grad, inverse, segment, mask_token, position):
    """Gradients of tokens, mask_token and position (empty where the input is None).

    Each original place reads one packed row, given by `inverse`.
    """
    dtype, length = accumulation_dtype(grad, mask_token, position), grad.shape[1]
    grad_mask_token, grad_position = grad.new_empty(0), grad.new_empty(0)
    # An additional row of zeros is used for all packed positions from `length` on.
    by_place = take_rows(F.pad(grad, (0, 0, 0, 1)), inverse.clamp(max=length))
    if position is not None:
        grad_position = by_place.sum(dim=0, dtype=dtype).to(position.dtype)
    if mask_token is not None:
        replaced = _masked(segment.gather(1, inverse.to(torch.int64)))
        grad_mask_token = torch.where(replaced, by_place, 0).sum(dim=(0, 1), dtype=dtype).to(mask_token.dtype)
        by_place = torch.where(replaced, 0, by_place)
    return by_place, grad_mask_token, grad_position


def take_rows(x, index):
    """x[b, index[b, i]] for x (B, N, C) and index (B, L): (B, L, C)."""
    return x.gather(1, index.to(torch.int64)[..., None].expand(-1, -1, x.shape[-1]))


def _masked(segment):
    return (segment % 2 == 1)[..., None]
