"""Most likely class and its probability at every pixel of bilinearly upsampled logits, in one launch (`upsampling.py`)."""

import torch
import triton
import triton.language as tl

from cmim_kernels.triton_kernels.upsampling import (
    AXES,
    add_exponential,
    axes,
    pixels_of_span,
    tile,
    tile_grid,
    tile_launch,
    upsample,
)


@triton.jit(do_not_specialize=[*AXES, "tiles_down", "tiles_along"])
def _upsample_pseudo_labels_kernel(
    logits,  # (B, K, h, w)
    label,  # (B, H, W) int32, contiguous
    confidence,  # (B, H, W) float32, contiguous
    strides, num_classes, tiles_down, tiles_along,
    row_cells, row_pixels, row_step, row_start, row_unit,
    column_cells, column_pixels, column_step, column_start, column_unit,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Memory traffic (minimum): logits, labels and confidences. Every tile around a cell reads it, after the first time
    from the cache. A pixel has 12 bytes of state, for any number of classes."""
    row_axis = (row_cells, row_pixels, row_step, row_start, row_unit)
    column_axis = (column_cells, column_pixels, column_step, column_start, column_unit)
    image, row, column, inside, offsets, along, down = tile(
        strides, row_axis, column_axis, tiles_down, tiles_along, ROWS, COLUMNS
    )
    plane = logits + image * strides[0]
    best = tl.zeros((ROWS, COLUMNS), tl.int32)
    largest = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for kind in tl.range(0, num_classes, loop_unroll_factor=2):
        z = upsample(plane, offsets, along, down)
        best = tl.where(z > largest, kind, best)  # among equals the first is kept
        largest, total = add_exponential(largest, total, z)
        plane += strides[1]
    pixel = (image * row_axis[1] + row) * column_axis[1] + column
    tl.store(label + pixel, best, mask=inside)
    tl.store(confidence + pixel, 1 / total, mask=inside)


def upsample_pseudo_labels_forward(logits, size, align_corners):
    label = logits.new_empty((len(logits), *size), dtype=torch.int32)
    confidence = torch.empty_like(label, dtype=torch.float32)
    if label.numel():
        row_axis, column_axis = axes(logits, size, align_corners)
        launch = tile_launch(pixels_of_span(row_axis))
        grid, *tiles = tile_grid(launch, len(logits), row_axis, column_axis)
        # Products and sums are not fused, so they round as in PyTorch: labels are the same, also for ties.
        _upsample_pseudo_labels_kernel[grid](
            logits, label, confidence, logits.stride(), logits.shape[1], *tiles, *row_axis, *column_axis,
            enable_fp_fusion=False, **launch._asdict(),
        )  # fmt: skip
    return label, confidence
