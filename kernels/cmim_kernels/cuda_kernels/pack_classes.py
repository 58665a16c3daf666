"""Packing of tokens by class: see csrc/pack_classes.cu."""

import torch

from cmim_kernels.cuda_kernels import kernels
from cmim_kernels.reference import pack_classes as reference

MAX_CLASSES = 1151
"""With more, the counters of a block leave its shared memory, and PyTorch's sort takes over."""
TILE = 1024
"""Tokens that one block sorts; an image of more takes three launches instead of one."""


def pack_classes_forward(labels, masked, num_classes):
    if num_classes > MAX_CLASSES:
        return reference.pack_classes_forward(labels, masked, num_classes)
    outputs = reference.empty_layout(labels, masked, num_classes)
    if labels.numel() == 0:
        return tuple(out.zero_() for out in outputs)
    batch, tokens = labels.shape
    tiles = -(-tokens // TILE)
    counts = labels.new_empty((batch, tiles, 2 * num_classes + 2), dtype=torch.int32) if tiles > 1 else None
    kernels.pack_classes(labels, masked, num_classes, counts, *outputs)
    return outputs
