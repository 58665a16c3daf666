"""The class of each patch by majority vote: see csrc/cpu/patch_labels.cpp."""

import torch


def patch_labels_forward(labels, patch_size, num_classes, min_share):
    batch, height, width = labels.shape
    out = labels.new_empty((batch, height // patch_size, width // patch_size), dtype=torch.int32)
    if out.numel():
        torch.ops.cmim_cpu.patch_labels.default(labels, patch_size, num_classes, min_share, out)
    return out
