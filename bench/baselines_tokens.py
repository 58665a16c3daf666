"""Packing, gathering, scattering, centroids and attention, as a user would write them without `cmim_kernels`."""

import functools
import importlib.util

import torch
import torch.nn.functional as F

from bench.comparison import Comparison, compiled, ours, size_of
from bench.inputs import DEVICE, DTYPE, class_map, normal, token_mask
from cmim.models import attention as attentions
from cmim_kernels import (
    ClassLayout,
    class_attention,
    class_centroids,
    gather_class_tokens,
    pack_classes,
    scatter_class_tokens,
)
from cmim_kernels.reference import class_centroids as centroids_reference


def _labels(shape, **options):
    masked = token_mask(shape.batch, shape.side, ratio=0.75 if shape.classes == 1 else 0.5).flatten(1)
    return class_map(shape.batch, shape.side, shape.classes, **options).flatten(1), masked


def packing(shape):
    labels, masked = _labels(shape)
    classes = shape.classes
    bounds = torch.arange(2 * classes + 1, device=DEVICE, dtype=torch.int32).expand(shape.batch, -1).contiguous()

    def pack(labels, masked):
        layout = pack_classes(labels, masked, classes)
        return layout.order, layout.inverse, layout.segment, layout.offsets

    def sort(labels, masked):
        """Two sorts, as masked autoencoders shuffle and restore."""
        key = torch.where((labels >= 0) & (labels < classes), 2 * labels + masked, 2 * classes)
        segment, order = key.sort(dim=1, stable=True)
        starts = torch.searchsorted(segment, bounds)
        return order, order.argsort(dim=1), segment, F.pad(starts, (0, 1), value=labels.shape[1])

    moved = size_of(labels, masked) + 3 * 4 * labels.numel()
    return Comparison(
        [labels, masked],
        ours(pack, csrc=True) | {"two sorts": sort, "two sorts, compiled": compiled(sort)},
        moved=(moved, moved), launches=(3, 3),
    )  # fmt: skip


def gathering(shape):
    labels, masked = _labels(shape)
    layout = pack_classes(labels, masked, shape.classes)
    tokens, mask_token = normal(shape.batch, shape.side**2, shape.channels), normal(shape.channels, seed=1)
    position = normal(shape.side**2, shape.channels, seed=2)

    def gather(tokens, mask_token, position, *layout):
        return gather_class_tokens(tokens, ClassLayout(*layout), mask_token=mask_token, position=position)

    def index(tokens, mask_token, position, order, inverse, segment, *_):
        order = order.long()
        picked = tokens.gather(1, order[..., None].expand(-1, -1, tokens.shape[2]))
        return torch.where((segment % 2 == 1)[..., None], mask_token, picked) + position[order]

    hidden = layout.segment % 2 == 1
    visible = size_of(tokens) * (~hidden).sum().item() // hidden.numel()
    forward = visible + size_of(tokens) + size_of(position, layout.inverse, layout.segment)
    backward = 2 * size_of(tokens) + size_of(position, layout.inverse, layout.segment)
    return Comparison(
        [tokens, mask_token, position],
        ours(gather, csrc=True) | {"index": index, "index, compiled": compiled(index)},
        constants=[*layout], moved=(forward, forward + backward), launches=(1, 3),
        tolerance=0.02 if torch.bfloat16 == DTYPE else None,
    )  # fmt: skip


def scattering(shape):
    labels, masked = _labels(shape)
    layout = pack_classes(torch.zeros_like(labels), masked, 1)
    kept = shape.side**2 - int(masked[0].sum())
    packed, mask_token = normal(shape.batch, kept, shape.channels), normal(shape.channels, seed=1)
    position = normal(shape.side**2, shape.channels, seed=2)

    def scatter(packed, mask_token, position, *layout):
        return scatter_class_tokens(packed, ClassLayout(*layout), mask_token=mask_token, position=position)

    def restore(packed, mask_token, position, order, inverse, *_):
        """Mask tokens appended, then all rows put back, as in masked autoencoders."""
        rest = mask_token.expand(len(packed), position.shape[0] - packed.shape[1], -1)
        everything = torch.cat([packed, rest], dim=1)
        return everything.gather(1, inverse.long()[..., None].expand(-1, -1, packed.shape[2])) + position

    out = shape.batch * shape.side**2 * shape.channels * packed.element_size()
    forward = size_of(packed, position, layout.inverse) + out
    return Comparison(
        [packed, mask_token, position],
        ours(scatter, csrc=True) | {"append and gather": restore, "append and gather, compiled": compiled(restore)},
        constants=[*layout], moved=(forward, 2 * forward), launches=(1, 3),
        tolerance=0.02 if torch.bfloat16 == DTYPE else None,
    )  # fmt: skip


def centroids(shape):
    """Rivals get what they need of the labels ready-made: the segment of each token over the whole batch, and its size."""
    labels, masked = _labels(shape)
    features, classes = normal(shape.batch, shape.side**2, shape.channels), shape.classes
    rows = 2 * classes + 1
    segment = torch.where(labels >= 0, 2 * labels + masked, 2 * classes).long()
    flat = (segment + rows * torch.arange(shape.batch, device=DEVICE)[:, None]).flatten()
    lengths = torch.zeros(shape.batch * rows, device=DEVICE).index_add_(0, flat, torch.ones_like(flat, dtype=torch.float32))
    one_hot = F.one_hot(segment, rows)[..., :-1].to(features.dtype)

    def mean_of(total, lengths):
        mean = total / lengths.clamp(min=1)[:, None]
        return mean.view(shape.batch, rows, -1)[:, :-1].unflatten(1, (classes, 2))

    def zeros(wide):
        return wide.new_zeros(shape.batch * rows, wide.shape[1])

    def index_add(features, labels, masked, flat, lengths, one_hot):
        wide = features.float().flatten(0, 1)
        return mean_of(zeros(wide).index_add(0, flat, wide), lengths)

    def scatter_add(features, labels, masked, flat, lengths, one_hot):
        wide = features.float().flatten(0, 1)
        return mean_of(zeros(wide).scatter_add(0, flat[:, None].expand_as(wide), wide), lengths)

    def scatter_reduce(features, labels, masked, flat, lengths, one_hot):
        wide = features.float().flatten(0, 1)
        return mean_of(zeros(wide).scatter_reduce(0, flat[:, None].expand_as(wide), wide, "sum"), lengths)

    def matmul(features, labels, masked, flat, lengths, one_hot):
        total = F.pad((one_hot.mT @ features).float(), (0, 0, 0, 1))
        return mean_of(total.flatten(0, 1), lengths)

    def sort_and_reduce(features, labels, masked, flat, lengths, one_hot):
        _, order = flat.sort(stable=True)
        rows = features.float().flatten(0, 1)[order]
        return mean_of(torch.segment_reduce(rows, "sum", lengths=lengths.long(), axis=0, unsafe=True), lengths)

    def definition(features, labels, masked, *_):
        return centroids_reference.class_centroids(features, labels, masked, classes)[0]

    def fused(features, labels, masked, *_):
        return class_centroids(features, labels, masked, classes).mean

    moved = size_of(features, labels, masked)
    baselines = ours(fused, csrc=True) | {"index_add": index_add, "one-hot matmul": matmul}
    baselines |= {"scatter_add": scatter_add, "scatter_reduce": scatter_reduce, "segment_reduce": sort_and_reduce}
    baselines |= {f"{name}, compiled": compiled(baselines[name]) for name in ("index_add", "scatter_add", "one-hot matmul")}
    try:
        from torch_scatter import scatter

        baselines["torch_scatter"] = lambda x, labels, masked, flat, lengths, one_hot: mean_of(
            scatter(x.float().flatten(0, 1), flat, dim=0, dim_size=shape.batch * rows, reduce="sum"), lengths
        )
    except ImportError:
        pass
    if classes <= 21:  # one class after the other: minutes of compilation for 150
        baselines["class by class, compiled"] = compiled(definition)
    constants = [labels, masked, flat, lengths, one_hot]
    return Comparison([features], baselines, constants=constants, moved=(moved, 2 * moved), launches=(2, 3))


def attention(shape):
    """All tokens with a class; `width` channels, heads of 64 or fewer."""
    labels, masked = _labels(shape, ignored=0)
    layout = pack_classes(labels, masked, shape.classes)
    width = min(shape.channels, 256)
    heads = max(1, width // 64)
    tokens = shape.side**2
    q, k, v = (normal(shape.batch, heads, tokens, width // heads, seed=i) for i in range(3))

    def attend(q, k, v, *layout):
        return class_attention(q, k, v, ClassLayout(*layout))

    def dense(q, k, v, *layout):
        return attentions.sdpa(ClassLayout(*layout))(q, k, v)

    baselines = ours(attend)
    if tokens <= 10_000:  # the mask of more does not fit
        baselines |= {"SDPA with a mask": dense, "SDPA with a mask, compiled": compiled(dense)}
    if DEVICE.type == "cuda":
        baselines |= _attention_on_cuda(layout, shape, tokens)
    moved = 4 * size_of(q) + size_of(layout.segment)
    starts = layout.cu_seqlens.long()
    pairs = heads * int((starts[1:] - starts[:-1]).square().sum())
    return Comparison(
        [q, k, v], baselines, constants=[*layout], moved=(moved, moved + 8 * size_of(q)), launches=(1, 3), tolerance=0.03,
        exponentials=(pairs, 2 * pairs), products=(2 * pairs * (width // heads), 7 * pairs * (width // heads)),
    )  # fmt: skip


def _attention_on_cuda(layout, shape, tokens):
    """Those of `cmim.models.attention` get the length of the longest segment, and xformers its mask, ready-made."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    classes = layout.segment // 2

    def same(batch, head, i, j):
        return classes[batch, i] == classes[batch, j]

    block_mask = create_block_mask(same, shape.batch, None, tokens, tokens, DEVICE)
    flex = torch.compile(lambda q, k, v, *_: flex_attention(q, k, v, block_mask=block_mask), dynamic=False)
    longest = int(layout.cu_seqlens.diff().max())

    def variable(q, k, v, *layout, full_window=False):
        return attentions.varlen(ClassLayout(*layout), longest=longest, full_window=full_window)(q, k, v)

    baselines = {
        "flex_attention": flex,
        "varlen_attn": variable,
        "varlen_attn, full window": functools.partial(variable, full_window=True),
    }
    if importlib.util.find_spec("xformers"):
        attend = attentions.xformers(layout)
        baselines["xformers, block-diagonal"] = lambda q, k, v, *_: attend(q, k, v)
    return baselines
