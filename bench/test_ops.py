"""Every op against what a user would run instead: forward, and forward and backward together.

pytest bench/test_ops.py -k class_centroids
"""

import functools

import pytest
import torch

from bench import baselines_pixels as pixels
from bench import baselines_tokens as tokens
from bench.comparison import BACKENDS, OURS, error_against_float64, prepared
from bench.inputs import ON_GPU, SHAPES

OPS = {
    "pack_classes": (tokens.packing, ["two sorts"]),
    "gather_class_tokens": (tokens.gathering, ["index"]),
    "scatter_class_tokens": (tokens.scattering, ["append and gather"]),
    "class_centroids": (
        tokens.centroids,
        [
            "index_add", "one-hot matmul", "scatter_add", "scatter_reduce", "segment_reduce", "torch_scatter",
            "class by class, compiled",
        ],
    ),
    "class_attention": (
        tokens.attention,
        [
            "SDPA with a mask", "flex_attention", "varlen_attn", "varlen_attn, full window", "xformers, block-diagonal",
        ],
    ),
    "same_class_conv2d": (pixels.convolution, [
            "unfold and mask", "class by class", pixels.BLIND_CONVOLUTION, "tap by tap, compiled",
        ]),
    "masked_patch_loss, as MAE": (pixels.mae_loss, ["patchify"]),
    "masked_patch_loss, as SimMIM": (pixels.simmim_loss, ["mask of pixels"]),
    "masked_patch_loss, by class": (pixels.class_loss, ["one-hot", "index_add, compiled"]),
    "upsample_cross_entropy": (pixels.cross_entropy, ["interpolate"]),
    "upsample_pseudo_labels": (pixels.pseudo_labels, ["interpolate"]),
    "patch_labels": (pixels.majority, ["one-hot pooling"]),
}  # fmt: skip
"""Name -> the function that makes the comparison of a shape, and the baselines' names; most are compiled too."""
ONLY_WITH_CLASSES = {"upsample_cross_entropy", "upsample_pseudo_labels", "patch_labels"}
WITHOUT_GRADIENT = {"pack_classes", "upsample_pseudo_labels", "patch_labels"}


def cases():
    for shape in SHAPES:
        for op, (_, names) in OPS.items():
            if shape.classes == 1 and op in ONLY_WITH_CLASSES:
                continue
            everyone = [OURS, *BACKENDS, *names]
            everyone += [f"{name}, compiled" for name in names if not name.endswith("compiled")]
            if not ON_GPU and shape != SHAPES[0]:  # compilation takes seconds
                everyone = [name for name in everyone if not name.endswith("compiled")]
            for part in ("forward",) if op in WITHOUT_GRADIENT else ("forward", "forward and backward"):
                for name in everyone:
                    yield pytest.param(op, shape, part, name, id=f"{op}; {shape.name}; {part}; {name}")


@functools.lru_cache(maxsize=1)  # baselines of one comparison run one after the other, on the same inputs
def comparison_of(op, shape):
    torch._dynamo.reset()
    return OPS[op][0](shape)


@pytest.mark.parametrize("op, shape, part, name", list(cases()))
def test_op(op, shape, part, name, timed):
    comparison = comparison_of(op, shape)
    if name not in comparison.baselines:
        pytest.skip("not for this device, installation or shape")
    backward = part != "forward"
    with prepared(comparison, name, backward=backward) as function:
        if name == OURS or name in BACKENDS:
            timed.extra["error"] = error_against_float64(comparison, name, backward=backward)
        timed.extra["comparable"] = name not in comparison.unchecked
        timed(f"{op}; {shape.name}; {part}", name, function, comparison.arguments, capture=name not in comparison.eager)
        timed.floor(comparison, backward)


def test_every_baseline_has_a_name():
    """Names above and those of the comparisons are the same, so that nothing is left out in silence."""
    for op in OPS:
        shape = SHAPES[0]
        comparison = comparison_of(op, shape)
        names = {case.values[3] for case in cases() if case.values[:2] == (op, shape)}
        assert set(comparison.baselines) <= names, op
