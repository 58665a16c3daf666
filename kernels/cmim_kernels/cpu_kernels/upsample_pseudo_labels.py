"""Pseudo-labels from bilinearly upsampled logits: see csrc/cpu/upsample_pseudo_labels.cpp."""

import torch


def upsample_pseudo_labels_forward(logits, size, align_corners):
    shape = (logits.shape[0], *size)
    label, confidence = logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape, dtype=torch.float32)
    if label.numel():
        torch.ops.cmim_cpu.upsample_pseudo_labels.default(logits, align_corners, label, confidence)
    return label, confidence
