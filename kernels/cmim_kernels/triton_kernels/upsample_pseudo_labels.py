"""Most likely class and its probability at every pixel of bilinearly upsampled logits, in one launch (`upsampling.py`)."""

import torch
import triton
import triton.language as tl

from cmim_kernels.triton_kernels.upsampling import (
    add_exponential,
    axis,
    pixels_of_span,
    tile,
    tile_grid,
    tile_launch,
    upsample,
)


@triton.jit
def _label_kernel(
    logits,  # (B, K, h, w)
    label,  # (B, H, W) int32, contiguous
    confidence,  # (B, H, W) float32, contiguous
    strides, num_classes, row_axis, column_axis, in_span, in_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Must move logits, labels and confidences once, and does, but for caches: a cell is read for each tile around it.
    The state of a pixel is 12 bytes."""
    image, row, column, inside, offsets, along, down = tile(
        tl.program_id(0), row_axis, column_axis, in_span, in_row, strides[2], strides[3], ROWS, COLUMNS
    )
    logits += image * strides[0]
    best = tl.zeros((ROWS, COLUMNS), tl.int32)
    largest = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for kind in range(0, num_classes):
        z = upsample(logits, offsets, along, down)
        best = tl.where(z > largest, kind, best)  # the first of equals wins
        largest, total = add_exponential(largest, total, z)
        logits += strides[1]
    pixel = (image * row_axis[1] + row) * column_axis[1] + column
    tl.store(label + pixel, best, mask=inside)
    tl.store(confidence + pixel, 1 / total, mask=inside)


def upsample_pseudo_labels_forward(logits, size, align_corners):
    label = logits.new_empty((len(logits), *size), dtype=torch.int32)
    confidence = torch.empty_like(label, dtype=torch.float32)
    if label.numel():
        batch, num_classes, *cells = logits.shape
        axes = [axis(*one, align_corners) for one in zip(cells, size, strict=True)]
        launch = tile_launch(pixels_of_span(axes[0]))
        grid, *cuts = tile_grid(launch, batch, *axes)
        # Without fusion of products and sums logits are rounded as in PyTorch: the labels are the same to the last tie.
        _label_kernel[grid](
            logits, label, confidence, logits.stride(), num_classes, *axes, *cuts, enable_fp_fusion=False, **launch._asdict()
        )
    return label, confidence
