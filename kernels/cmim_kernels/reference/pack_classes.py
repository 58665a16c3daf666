"""The order that packs the tokens of each image by (class, visible before masked), ignored tokens last."""

import torch

from cmim_kernels.numerics import class_ids, empty_contiguous


def pack_classes_forward(labels, masked, num_classes):
    """The five tensors of `cmim_kernels.ClassLayout`, in its order."""
    batch, tokens = labels.shape
    device, ignored = labels.device, 2 * num_classes
    classes = class_ids(labels, num_classes)
    key = torch.where(classes < num_classes, 2 * classes + masked, ignored).to(torch.int32)
    segment, order = key.contiguous().sort(dim=1, stable=True)
    places = torch.arange(tokens, device=device, dtype=torch.int32).expand(batch, -1)
    inverse = torch.zeros_like(places, memory_format=torch.contiguous_format).scatter_(1, order, places)
    # A segment starts where its id would be inserted. No id is 2K + 1, so the "start" of 2K + 1 is the number of tokens.
    bounds = torch.arange(ignored + 2, device=device, dtype=torch.int32).repeat(batch, 1)
    offsets = torch.searchsorted(segment, bounds, out_int32=True)
    first_token = torch.arange(batch, device=device, dtype=torch.int32)[:, None] * tokens
    class_starts = (offsets[:, : ignored + 1 : 2] + first_token).flatten()
    end = torch.full((1,), batch * tokens, dtype=torch.int32, device=device)
    return order.to(torch.int32), inverse, segment, offsets, torch.cat([class_starts, end])


def empty_layout(labels, masked, num_classes):
    """The five tensors, uninitialised: the fake implementation for `torch.compile`, and the outputs that launchers fill."""
    starts = (labels.shape[0], 2 * num_classes + 2), (labels.shape[0] * (num_classes + 1) + 1,)
    of_tokens = [empty_contiguous(labels, torch.int32) for _ in range(3)]
    return *of_tokens, *(labels.new_empty(shape, dtype=torch.int32) for shape in starts)
