"""Packing of tokens by class: see csrc/pack_classes.cu."""

import torch

from cmim_kernels.cuda_kernels import constant, launch
from cmim_kernels.reference import pack_classes as reference


def pack_classes_forward(labels, masked, num_classes):
    if num_classes > constant("PACK_MAX_CLASSES"):
        return reference.pack_classes_forward(labels, masked, num_classes)
    outputs = reference.empty_layout(labels, masked, num_classes)
    if labels.numel() == 0:
        return tuple(out.zero_() for out in outputs)
    batch, tokens = labels.shape
    tiles = -(-tokens // constant("PACK_TILE"))
    counts = labels.new_empty((batch, tiles, 2 * num_classes + 2), dtype=torch.int32) if tiles > 1 else None
    launch("pack_classes", labels, masked, num_classes, counts, *outputs)
    return outputs
