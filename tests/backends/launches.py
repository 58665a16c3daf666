"""Calls of the launchers on meta tensors that make every kernel run in every launch configuration and with every pair of
flags, dtypes and layouts; and the launch configurations that there are."""

import functools
import itertools

import torch

from cmim_kernels.triton_kernels import class_attention as attention
from cmim_kernels.triton_kernels import class_centroids as centroids
from cmim_kernels.triton_kernels import gather_class_tokens as gather
from cmim_kernels.triton_kernels import masked_patch_loss as loss
from cmim_kernels.triton_kernels import pack_classes as pack
from cmim_kernels.triton_kernels import patch_labels as patches
from cmim_kernels.triton_kernels import rows, upsampling
from cmim_kernels.triton_kernels import same_class_conv2d as convolution
from cmim_kernels.triton_kernels import scatter_class_tokens as scatter
from cmim_kernels.triton_kernels import upsample_cross_entropy as cross_entropy
from cmim_kernels.triton_kernels import upsample_pseudo_labels as pseudo_labels

FLOATS = [torch.bfloat16, torch.float32, torch.float16]
CL = "channels_last"
LABELS = [torch.uint8, torch.int64, torch.int32]


def meta(*shape, dtype=torch.float32, channels_last=False):
    x = torch.empty(shape, dtype=dtype, device="meta")
    return x.to(memory_format=torch.channels_last) if channels_last else x


def pairwise(**options):
    """Few choices of one value for each option, among which every two values of two options meet. The first has the first
    value of each."""
    names = list(options)
    missing = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in options[a] for y in options[b]}
    chosen = []
    while missing:
        choice = dict(sorted(missing, key=str)[0]) if chosen else {name: options[name][0] for name in names}
        for name in (n for n in names if n not in choice):
            gain = lambda v: sum({p, q} <= {*choice.items(), (name, v)} for p, q in missing)  # noqa: B023, E731
            choice[name] = max(options[name], key=gain)
        chosen.append(choice)
        missing = {(p, q) for p, q in missing if not {p, q} <= set(choice.items())}
    return chosen


def pack_classes(classes, dtype, contiguous, batch=8):
    x = lambda dtype: meta(batch, 6400, dtype=dtype) if contiguous else meta(6400, batch, dtype=dtype).T  # noqa: E731
    pack.pack_classes_forward(x(dtype), x(torch.bool), classes)


def gather_and_scatter(batch, channels, dtype, parameters, mask_token, position, length):
    index, tokens = meta(batch, 196, dtype=torch.int32), meta(batch, 196, channels, dtype=dtype)
    mask_token = meta(channels, dtype=parameters) if mask_token else None
    position = meta(196, channels, dtype=parameters) if position else None
    packed = gather.gather_class_tokens_forward(tokens, index, index, index, mask_token, position, length)
    gather.gather_class_tokens_backward(packed, index, index, mask_token, position)
    scatter.scatter_class_tokens_forward(packed, index, mask_token, position)
    scatter.scatter_class_tokens_backward(tokens, index, index, mask_token, position, length)


def masked_patch_loss(
    size, classes, layout, image_channels_last, dtype, image_dtype, labels, distance, normalize, balance, batch=8
):
    image = meta(batch, 3, 14 * size, 14 * size, dtype=image_dtype, channels_last=image_channels_last)
    pred = meta(batch, 196, 3 * size * size, dtype=dtype)
    if layout != "tokens":
        pred = meta(*image.shape, dtype=dtype, channels_last=layout == "channels_last")
    masked = meta(batch, 196, dtype=torch.bool)
    labels, classes = (None, 1) if labels is None else (meta(batch, 196, dtype=labels), classes)
    numbers = [[0.4, 0.5, 0.6], [0.2, 0.2, 0.3]] if image_dtype == torch.uint8 else [None, None]
    options = (classes, size, distance, normalize, balance, *numbers)
    sums = loss.masked_patch_loss_forward(pred, image, masked, labels, *options)
    loss.masked_patch_loss_backward(*sums, pred, image, masked, labels, *options)


def class_centroids(classes, channels, layout, dtype, label_dtype, packed, batch=8):
    width = 80 if layout == "slice" else 82
    features = meta(batch, channels, 80, 82, dtype=dtype, channels_last=layout == "channels_last")[..., :width]
    if layout == "tokens":
        features = meta(batch, 80 * width, channels, dtype=dtype)
    tokens = 80 * width
    labels, masked = meta(batch, tokens, dtype=label_dtype), meta(batch, tokens, dtype=torch.bool)
    layout = (None, None)
    if packed:
        layout = meta(batch, tokens, dtype=torch.int32), meta(batch, 2 * classes + 2, dtype=torch.int32)
    mean, count = centroids.class_centroids_forward(features, labels, masked, classes, *layout)
    centroids.class_centroids_backward(mean, count, features, labels, masked, classes)


def patch_labels(size, classes, dtype, contiguous, batch=8):
    labels = meta(batch, 40 * size, 40 * size, dtype=dtype)
    patches.patch_labels_forward(labels if contiguous else labels.mT, size, classes, 0.5)


def same_class_conv2d(size, features, dtype, weight_dtype, label_dtype, bias, batch=8):
    channels, layout = features
    x = meta(batch, channels, 80, 82, dtype=dtype, channels_last=layout == CL)
    x = x[..., :80] if layout == "slice" else x
    labels, weight = meta(batch, *x.shape[2:], dtype=label_dtype), meta(channels, size, size, dtype=weight_dtype)
    bias = meta(channels, dtype=weight_dtype) if bias else None
    grad = convolution.same_class_conv2d_forward(x, labels, weight, bias, 21)
    convolution.same_class_conv2d_backward(grad, x, labels, weight, bias, 21)


def upsampled_logits(classes, size, layout, dtype, align_corners, batch):
    source, size = size
    logits = meta(batch, classes, source, source, dtype=dtype, channels_last=layout == "channels_last")
    return (logits.mT if layout == "strided" else logits), (size, size), align_corners


def upsample_cross_entropy(label_dtype, batch=4, **options):
    logits, size, align_corners = upsampled_logits(batch=batch, **options)
    target = meta(batch, *size, dtype=label_dtype)
    loss, logsumexp = cross_entropy.upsample_cross_entropy_forward(logits, target, align_corners)
    cross_entropy.upsample_cross_entropy_backward(loss, logits, target, logsumexp, align_corners)


def upsample_pseudo_labels(batch=4, **options):
    pseudo_labels.upsample_pseudo_labels_forward(*upsampled_logits(batch=batch, **options))


UPSAMPLING = dict(
    classes=[21, 1, 4, 16, 150], size=[(80, 320), (36, 504), (80, 80), (80, 160), (16, 257), (15, 2)],
    layout=["contiguous", "channels_last", "strided"], dtype=FLOATS, align_corners=[False, True],
)  # fmt: skip


def class_attention(dim, dtypes, layout, batch=8):
    shape = {"contiguous": (batch, 8, 1296, dim), "by token": (batch, 1296, 8, dim), "strided": (batch, 8, dim, 1296)}[
        layout
    ]
    x = [meta(*shape, dtype=dtype) for dtype in (*dtypes, dtypes[0])]
    q, k, v, grad = (t.transpose(*{"contiguous": (0, 0), "by token": (1, 2), "strided": (2, 3)}[layout]) for t in x)
    index = meta(batch, 1296, dtype=torch.int32), meta(batch, 44, dtype=torch.int32)
    out, logsumexp = attention.class_attention_forward(q, k, v, *index)
    attention.class_attention_backward(grad, q, k, v, out, logsumexp, *index)


CASES = {
    pack_classes: pairwise(classes=[21, 1, 31, 63, 127, 255, 511, 1023, 2047], dtype=LABELS, contiguous=[True, False]),
    gather_and_scatter: pairwise(
        batch=[8, 1, 2, 3], channels=[256, 7, 64, 128, 768], dtype=FLOATS, parameters=FLOATS,
        mask_token=[True, False], position=[True, False], length=[49, 196],
    ),
    masked_patch_loss: pairwise(
        size=[16, 1, 3, 4, 6, 8, 11, 27], classes=[21, 7, 300], layout=["tokens", "channels_last", "contiguous"],
        image_channels_last=[True, False], dtype=FLOATS, image_dtype=[torch.uint8, *FLOATS], labels=[None, *LABELS],
        distance=["l1", "mse", "smooth_l1"], normalize=[True, False], balance=["token", "class"],
    ),
    class_attention: [
        *pairwise(dim=[64, 16, 32], dtypes=[(dtype,) * 3 for dtype in FLOATS], layout=["by token"]),
        *pairwise(dim=[128], dtypes=[(torch.bfloat16,) * 3, (torch.float16,) * 3], layout=["by token"]),
        *pairwise(dim=[40, 5, 24], dtypes=[(torch.bfloat16,) * 3, tuple(FLOATS)], layout=["contiguous", "strided"]),
        *pairwise(dim=[100], dtypes=[(torch.bfloat16,) * 3], layout=["contiguous", "strided"]),
    ],
    class_centroids: pairwise(
        classes=[21, 8, 16, 150], channels=[256, 20, 64], layout=["channels_last", "contiguous", "slice", "tokens"],
        dtype=FLOATS, label_dtype=LABELS, packed=[False, True],
    ),
    patch_labels: pairwise(
        size=[4, 1, 2, 14, 8, 32, 64], classes=[21, 60, 100, 1000], dtype=LABELS, contiguous=[True, False],
    ),
    same_class_conv2d: pairwise(
        size=[7, 1, 3, 9, 17], features=[(256, CL), (48, CL), (20, CL), (256, "contiguous"), (20, "slice")],
        dtype=FLOATS, weight_dtype=[torch.float32, torch.bfloat16], label_dtype=LABELS, bias=[True, False],
    ),
    upsample_cross_entropy: pairwise(label_dtype=LABELS, **UPSAMPLING),
    upsample_pseudo_labels: pairwise(**UPSAMPLING),
}  # fmt: skip
"""For each op the choices of arguments; the first is a common one."""

CONFIGURATIONS = {
    "pack_classes": {pack.pack_launch(k) for k in range(1, pack.MAX_CLASSES + 1)},
    "gather_and_scatter": {
        launch(b, c) for launch in (rows.forward_launch, rows.backward_launch) for b in range(1, 40) for c in range(1, 1000)
    },
    "masked_patch_loss": {loss.patch_launch(e) for e in range(1, 5000)} | {loss.sum_launch(k) for k in range(1, 1000)},
    "class_attention": {
        launch(dim, short)
        for launch in (attention.forward_launch, attention.backward_launch)
        for dim in range(1, attention.MAX_DIM + 1)
        for short in (True, False)
    },
    "class_centroids": {centroids.one_hot_launch(s, size) for s in range(2, centroids.MAX_ONE_HOT + 1, 2) for size in (2, 4)}
    | {centroids.run_launch(c) for c in range(1, 1000)},
    "patch_labels": {
        patches.patch_labels_launch(p, k) for p in range(1, patches.MAX_PATCH_SIZE + 1) for k in range(1, 1000)
    },
    "same_class_conv2d": {convolution.convolve_launch(c, last) for c in range(1, 1000) for last in (False, True)}
    | {
        convolution.weight_launch(k, c, last)
        for k in range(1, convolution.MAX_SIZE + 1, 2)
        for c in range(1, 200)
        for last in (False, True)
    },
    "upsample_cross_entropy": {upsampling.tile_launch(rows) for rows in range(1, 1000)}
    | {cross_entropy.cell_launch(k, width) for k in range(1, 1000) for width in range(1, 300)},
    "upsample_pseudo_labels": {upsampling.tile_launch(rows) for rows in range(1, 1000)},
}
"""For each op all that its configuration functions return."""


def cases(*, few=False):
    """Name of each op -> calls without arguments."""
    return {
        op.__name__: [functools.partial(op, **c) for c in (chosen[:1] if few else chosen)] for op, chosen in CASES.items()
    }
