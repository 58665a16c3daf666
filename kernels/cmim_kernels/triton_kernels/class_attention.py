"""Softmax attention of each token over the tokens of its own (image, class): kernels and launchers. See
`reference/class_attention.py` for the formulas.

In packed order the tokens of a class are contiguous. A program takes a block of packed tokens of one head of one image, its
rows. `offsets` says where the class of the first row starts and where the class of the last row ends. The program loops over
the tokens in this range in blocks, its columns (flash attention, arXiv 2205.14135), and selects the pairs of equal class;
where all rows have one class, every pair of a whole block is such a pair, and the comparisons are skipped. Each value is
written by one program, so nothing is added up across programs. The products of pairs run on tensor cores: in float16 or
bfloat16 if q, k and v all have that dtype, else in float32 as three TF32 products ("tf32x3"), which keeps float32
accuracy.

A weight of zero excludes a class from the sums of the others, but zero times NaN is NaN. If a sum is not finite, the program
therefore runs again, one class at a time, over blocks with the same starts as before, so that the sums of finite classes
keep their bits.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from cmim_kernels.reference import class_attention as reference
from cmim_kernels.triton_kernels.common import INTERPRETED, cdiv, power_of_two

MAX_DIM, MAX_DIM_FLOAT32 = 128, 64
"""Largest d for 16-bit and for 32-bit operands. A program holds whole rows; longer rows do not fit in registers and use
PyTorch."""

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))
PRECISION = tl.constexpr("tf32x3")


class AttentionLaunch(NamedTuple):
    BLOCK_Q: int
    BLOCK_KV: int
    DIM: int
    num_warps: int
    num_stages: int
    maxnreg: int = 255


@functools.cache
def forward_launch(dim, short):
    """`short`: the operands have 16 bits and are read in vectors. Others need more registers, for values or addresses."""
    return _launch(dim, short, columns=64 if dim <= 64 else 32)


@functools.cache
def backward_launch(dim, short):
    return _launch(dim, short, columns=32)


def _launch(dim, short, columns):
    dim = power_of_two(dim, low=16, high=MAX_DIM)
    if short:
        return AttentionLaunch(64, columns, dim, num_warps=4 if dim <= 64 else 8, num_stages=2)
    rows, num_warps = {16: (64, 4), 32: (32, 4), 64: (16, 4), 128: (16, 8)}[dim]
    return AttentionLaunch(rows, 16, dim, num_warps, num_stages=1)


@triton.jit(do_not_specialize=["num_heads", "num_tokens", "num_classes"])
def _class_attention_forward_kernel(
    q, k, v,  # (B, heads, N, d)
    segment,  # (B, N) int32, contiguous
    offsets,  # (B, 2K + 2) int32, contiguous
    out,  # (B, heads, N, d), contiguous
    logsumexp,  # (B, heads, N) float32, contiguous
    q_strides, k_strides, v_strides, num_heads, num_tokens, dim, num_classes, scale,
    DOT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Memory traffic (minimum): q, k, v, the segments of the image, and the outputs. q is read and the outputs are
    written once; each block of BLOCK_Q queries reads k and v of its classes, after the first time from the cache."""
    image, head, row, channel = _place(num_heads, num_tokens, BLOCK_Q, DIM)
    row_begin, row_end, first, last = _classes(segment, offsets, image, row, num_tokens, num_classes)
    whole = _end_of_whole_blocks(row_begin, first, last, BLOCK_KV)
    place = (image * num_heads + head) * num_tokens + row
    k += image * k_strides[0] + head * k_strides[1]
    v += image * v_strides[0] + head * v_strides[1]
    q_rows = _load(q + image * q_strides[0] + head * q_strides[1], row, channel, q_strides, 0, num_tokens, dim, DOT)
    ignored = (row < num_tokens) & (row_begin == row_end)
    tl.store(logsumexp + place, float("-inf"), mask=ignored)
    _store(out, place, channel, tl.zeros((BLOCK_Q, DIM), tl.float32), ignored, dim)
    begin, end = first, last
    while begin < end:
        largest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
        shift = tl.zeros((BLOCK_Q,), tl.float32)
        total = tl.zeros((BLOCK_Q,), tl.float32)
        result = tl.zeros((BLOCK_Q, DIM), tl.float32)
        for start in range(_block_start(first, begin, BLOCK_KV), end, BLOCK_KV):
            column = start + tl.arange(0, BLOCK_KV)
            k_columns = _load(k, column, channel, k_strides, begin, end, dim, DOT)
            v_columns = _load(v, column, channel, v_strides, begin, end, dim, DOT)
            score = tl.dot(q_rows, tl.trans(k_columns), input_precision=PRECISION) * (scale * LOG2_E)
            if start >= whole:
                score = tl.where(_same_class(row_begin, row_end, column), score, float("-inf"))
            larger = tl.maximum(largest, tl.max(score, axis=1))
            shift = tl.where(larger == float("-inf"), 0.0, larger)
            weight = tl.exp2(score - shift[:, None])
            decay = tl.exp2(largest - shift)
            total = total * decay + tl.sum(weight, axis=1)
            result = tl.dot(weight.to(DOT), v_columns, result * decay[:, None], input_precision=PRECISION)
            largest = larger
        own = _own(row_begin, row_end, begin, end)
        tl.store(logsumexp + place, (shift + tl.log2(total)) * LN_2, mask=own)
        _store(out, place, channel, result / total[:, None], own, dim)
        begin, end = _next(row_end, begin, end, last, _any_not_finite(result))


@triton.jit(do_not_specialize=["num_heads", "num_tokens", "num_classes"])
def _class_attention_backward_queries_kernel(
    grad,  # (B, heads, N, d)
    q, k, v, segment, offsets, out, logsumexp,  # as above
    delta,  # (B, heads, N) float32, contiguous: sum over d of grad * out, for the kernel of k and v
    grad_q,  # (B, heads, N, d), contiguous
    grad_strides, q_strides, k_strides, v_strides, num_heads, num_tokens, dim, num_classes, scale,
    DOT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Rows are queries. Memory traffic (minimum): grad, q, k, v, out, logsumexp, the segments, and the outputs; k and v are
    read as in the forward pass."""
    image, head, row, channel = _place(num_heads, num_tokens, BLOCK_Q, DIM)
    row_begin, row_end, first, last = _classes(segment, offsets, image, row, num_tokens, num_classes)
    whole = _end_of_whole_blocks(row_begin, first, last, BLOCK_KV)
    place = (image * num_heads + head) * num_tokens + row
    k += image * k_strides[0] + head * k_strides[1]
    v += image * v_strides[0] + head * v_strides[1]
    grad += image * grad_strides[0] + head * grad_strides[1]
    q_rows = _load(q + image * q_strides[0] + head * q_strides[1], row, channel, q_strides, 0, num_tokens, dim, DOT)
    grad_rows = _load(grad, row, channel, grad_strides, 0, num_tokens, dim, DOT)
    inside = row < num_tokens
    out_mask = inside[:, None] & (channel < dim)[None, :]
    out_rows = tl.load(out + place[:, None] * dim + channel[None, :], mask=out_mask, other=0.0).to(tl.float32)
    row_delta = tl.sum(grad_rows.to(tl.float32) * out_rows, axis=1)
    tl.store(delta + place, row_delta, mask=inside)
    row_shift = tl.load(logsumexp + place, mask=inside, other=0.0) * LOG2_E
    _store(grad_q, place, channel, tl.zeros((BLOCK_Q, DIM), tl.float32), inside & (row_begin == row_end), dim)
    begin, end = first, last
    while begin < end:
        result = tl.zeros((BLOCK_Q, DIM), tl.float32)
        for start in range(_block_start(first, begin, BLOCK_KV), end, BLOCK_KV):
            column = start + tl.arange(0, BLOCK_KV)
            k_columns = _load(k, column, channel, k_strides, begin, end, dim, DOT)
            v_columns = _load(v, column, channel, v_strides, begin, end, dim, DOT)
            score = tl.dot(q_rows, tl.trans(k_columns), input_precision=PRECISION) * (scale * LOG2_E)
            weight = tl.exp2(score - row_shift[:, None])
            grad_weight = tl.dot(grad_rows, tl.trans(v_columns), input_precision=PRECISION)
            grad_score = weight * (grad_weight - row_delta[:, None])
            if start >= whole:
                grad_score = tl.where(_same_class(row_begin, row_end, column), grad_score, 0.0)
            result = tl.dot(grad_score.to(DOT), k_columns, result, input_precision=PRECISION)
        _store(grad_q, place, channel, result * scale, _own(row_begin, row_end, begin, end), dim)
        begin, end = _next(row_end, begin, end, last, _any_not_finite(result))


@triton.jit(do_not_specialize=["num_heads", "num_tokens", "num_classes"])
def _class_attention_backward_keys_kernel(
    grad, q, k, v, segment, offsets, logsumexp, delta,  # as above
    grad_k, grad_v,  # (B, heads, N, d), contiguous
    grad_strides, q_strides, k_strides, v_strides, num_heads, num_tokens, dim, num_classes, scale,
    DOT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Rows are keys and values, columns are queries. Memory traffic (minimum): grad, q, k, v, logsumexp, delta, the
    segments, and the outputs. k and v are read once; each block of BLOCK_Q keys reads the other tensors for its classes,
    after the first time from the cache."""
    image, head, row, channel = _place(num_heads, num_tokens, BLOCK_Q, DIM)
    row_begin, row_end, first, last = _classes(segment, offsets, image, row, num_tokens, num_classes)
    whole = _end_of_whole_blocks(row_begin, first, last, BLOCK_KV)
    first_place = (image * num_heads + head) * num_tokens
    place = first_place + row
    q += image * q_strides[0] + head * q_strides[1]
    grad += image * grad_strides[0] + head * grad_strides[1]
    k_rows = _load(k + image * k_strides[0] + head * k_strides[1], row, channel, k_strides, 0, num_tokens, dim, DOT)
    v_rows = _load(v + image * v_strides[0] + head * v_strides[1], row, channel, v_strides, 0, num_tokens, dim, DOT)
    ignored = (row < num_tokens) & (row_begin == row_end)
    _store(grad_k, place, channel, tl.zeros((BLOCK_Q, DIM), tl.float32), ignored, dim)
    _store(grad_v, place, channel, tl.zeros((BLOCK_Q, DIM), tl.float32), ignored, dim)
    begin, end = first, last
    while begin < end:
        k_result = tl.zeros((BLOCK_Q, DIM), tl.float32)
        v_result = tl.zeros((BLOCK_Q, DIM), tl.float32)
        for start in range(_block_start(first, begin, BLOCK_KV), end, BLOCK_KV):
            column = start + tl.arange(0, BLOCK_KV)
            inside = (column >= begin) & (column < end)
            q_columns = _load(q, column, channel, q_strides, begin, end, dim, DOT)
            grad_columns = _load(grad, column, channel, grad_strides, begin, end, dim, DOT)
            shift = tl.load(logsumexp + first_place + column, mask=inside, other=0.0) * LOG2_E
            column_delta = tl.load(delta + first_place + column, mask=inside, other=0.0)
            score = tl.dot(k_rows, tl.trans(q_columns), input_precision=PRECISION) * (scale * LOG2_E)
            weight = tl.exp2(score - shift[None, :])
            grad_weight = tl.dot(v_rows, tl.trans(grad_columns), input_precision=PRECISION)
            grad_score = weight * (grad_weight - column_delta[None, :])
            if start >= whole:
                same = _same_class(row_begin, row_end, column)
                weight = tl.where(same, weight, 0.0)
                grad_score = tl.where(same, grad_score, 0.0)
            v_result = tl.dot(weight.to(DOT), grad_columns, v_result, input_precision=PRECISION)
            k_result = tl.dot(grad_score.to(DOT), q_columns, k_result, input_precision=PRECISION)
        own = _own(row_begin, row_end, begin, end)
        _store(grad_k, place, channel, k_result * scale, own, dim)
        _store(grad_v, place, channel, v_result, own, dim)
        begin, end = _next(row_end, begin, end, last, _any_not_finite(k_result) | _any_not_finite(v_result))


@triton.jit
def _place(num_heads, num_tokens, BLOCK_Q: tl.constexpr, DIM: tl.constexpr):
    """int64 image and head, packed positions and channels of this program."""
    blocks = tl.cdiv(num_tokens, BLOCK_Q)
    block, head = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    image, head = (head // num_heads).to(tl.int64), (head % num_heads).to(tl.int64)
    return image, head, block * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, DIM)


@triton.jit
def _classes(segment, offsets, image, row, num_tokens, num_classes):
    """The begin and end of the class of each row, the smallest begin and the largest end. A row that is ignored or past the
    last token has no class; its begin and end are 0."""
    row_class = tl.load(segment + image * num_tokens + row, mask=row < num_tokens, other=2 * num_classes) // 2
    valid = row_class < num_classes
    begin = offsets + image * (2 * num_classes + 2) + 2 * row_class
    row_begin, row_end = tl.load(begin, mask=valid, other=0), tl.load(begin + 2, mask=valid, other=0)
    first = tl.min(tl.where(valid, row_begin, num_tokens), axis=0)
    return row_begin, row_end, first, tl.max(row_end, axis=0)


@triton.jit
def _block_start(first, begin, BLOCK_KV: tl.constexpr):
    """The start of the block of columns that contains `begin`."""
    return first + (begin - first) // BLOCK_KV * BLOCK_KV


@triton.jit
def _end_of_whole_blocks(row_begin, first, last, BLOCK_KV: tl.constexpr):
    """The end of the blocks of columns that lie wholly in the class of all rows; `first` if rows have several classes."""
    whole = first + (last - first) // BLOCK_KV * BLOCK_KV
    return tl.where(tl.max(row_begin, axis=0) == first, whole, first)


@triton.jit
def _same_class(row_begin, row_end, column):
    return (column[None, :] >= row_begin[:, None]) & (column[None, :] < row_end[:, None])


@triton.jit
def _own(row_begin, row_end, begin, end):
    """Whether the class of each row lies between the positions `begin` and `end`."""
    return (row_begin < row_end) & (row_begin >= begin) & (row_end <= end)


@triton.jit
def _next(row_end, begin, end, last, spoilt):
    """The next range after the one from `begin` to `end`: the first class of that range, if the range has several classes
    and is `spoilt` (has a sum that is not finite), else the class that follows the range."""
    again = spoilt & (_end_of_class(row_end, begin, last) < end)
    begin = tl.where(again, begin, end)
    return begin, _end_of_class(row_end, begin, last)


@triton.jit
def _end_of_class(row_end, begin, last):
    """The end of the class that begins at `begin`; `last` if there is none."""
    return tl.min(tl.where(row_end > begin, row_end, last), axis=0)


@triton.jit
def _any_not_finite(x):
    return tl.max(tl.max((~(tl.abs(x) < float("inf"))).to(tl.int32), axis=1), axis=0) > 0


@triton.jit
def _load(x, position, channel, strides, begin, end, dim, DOT: tl.constexpr):
    mask = ((position >= begin) & (position < end))[:, None] & (channel < dim)[None, :]
    place = position.to(tl.int64)[:, None] * strides[2] + channel.to(tl.int64)[None, :] * strides[3]
    return tl.load(x + place, mask=mask, other=0.0).to(tl.float32).to(DOT)


@triton.jit
def _store(x, place, channel, value, inside, dim):
    mask = inside[:, None] & (channel < dim)[None, :]
    first = tl.min(place, axis=0)  # 32-bit offsets from here, so that the addresses stay in registers
    offset = (place - first).to(tl.int32)[:, None] * dim + channel[None, :]
    tl.store(x + first * dim + offset, value.to(x.dtype.element_ty), mask=mask)


def class_attention_forward(q, k, v, segment, offsets):
    if q.shape[-1] > max_dim(q, k, v):
        return reference.class_attention_forward(q, k, v, segment, offsets)
    out, logsumexp = q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)
    if q.numel():
        launch = forward_launch(q.shape[-1], _short(q, k, v))
        _class_attention_forward_kernel[_grid(q, launch)](
            q, k, v, segment.contiguous(), offsets.contiguous(), out, logsumexp,
            q.stride(), k.stride(), v.stride(), *_sizes(q, offsets), DOT=_dot_dtype(q, k, v), **launch._asdict(),
        )  # fmt: skip
    return out, logsumexp


def class_attention_backward(grad, q, k, v, out, logsumexp, segment, offsets):
    if q.shape[-1] > max_dim(q, k, v):
        return reference.class_attention_backward(grad, q, k, v, out, logsumexp, segment, offsets)
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    if q.numel():
        launch = backward_launch(q.shape[-1], _short(grad, q, k, v))
        segment, offsets, out, logsumexp = (x.contiguous() for x in (segment, offsets, out, logsumexp))
        delta = torch.empty_like(logsumexp)
        sizes = (grad.stride(), q.stride(), k.stride(), v.stride(), *_sizes(q, offsets))
        options = dict(DOT=_dot_dtype(q, k, v), **launch._asdict())
        _class_attention_backward_queries_kernel[_grid(q, launch)](
            grad, q, k, v, segment, offsets, out, logsumexp, delta, grad_q, *sizes, **options
        )
        _class_attention_backward_keys_kernel[_grid(q, launch)](
            grad, q, k, v, segment, offsets, logsumexp, delta, grad_k, grad_v, *sizes, **options
        )
    return grad_q, grad_k, grad_v


def max_dim(q, k, v):
    """The largest d that the kernels support."""
    return MAX_DIM if q.dtype == k.dtype == v.dtype != torch.float32 else MAX_DIM_FLOAT32


def _short(*tensors):
    """Whether the operands have 16 bits and are read in vectors: same dtype, all rows contiguous and aligned."""
    first = tensors[0]
    return first.dtype != torch.float32 and all(
        x.dtype == first.dtype and x.stride(3) == 1 and not any(n % 16 for n in (*x.stride()[:3], x.shape[3]))
        for x in tensors
    )


def _dot_dtype(q, k, v):
    """float16 or bfloat16 if q, k and v all have it, else float32."""
    if INTERPRETED or not q.dtype == k.dtype == v.dtype:
        return tl.float32
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(q.dtype, tl.float32)


def _grid(q, launch):
    batch, heads, tokens, _ = q.shape
    return (batch * heads * cdiv(tokens, launch.BLOCK_Q),)


def _sizes(q, offsets):
    _, heads, tokens, dim = q.shape
    return heads, tokens, dim, offsets.shape[1] // 2 - 1, 1 / math.sqrt(dim)
