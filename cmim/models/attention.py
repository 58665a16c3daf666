"""Attention within each (image, class), by `reconstruction.attention`: our own op, or another library's on the same packing.

Each function here takes the `ClassLayout` of `pack_classes` and returns attend(q, k, v), for (B, heads, N, d) in packed
order, which gives the result and the gradients of `cmim_kernels.class_attention` at every token that has a class. Ignored
tokens attend to the ignored ones of their image, and a decoder does not use them. It makes one `attend` for each pass, for
all of its blocks.
"""

import importlib.util
import itertools
import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen as torch_varlen

from cmim.errors import UserError
from cmim_kernels import ClassLayout
from cmim_kernels import class_attention as class_attention_op

if TYPE_CHECKING:  # the benchmarks of ops use this module and need no pydantic
    from cmim.settings import Config

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def class_attention(layout: ClassLayout) -> Attend:
    """`cmim_kernels.class_attention`, for every dtype and device. It does not wait for the device."""
    return partial(class_attention_op, layout=layout)


def sdpa(layout: ClassLayout) -> Attend:
    """PyTorch's scaled_dot_product_attention with a mask (B, 1, N, N), for every dtype and device. It does not wait for the
    device. Values that are not finite spread to the other classes of their image."""
    classes = layout.segment // 2
    mask = (classes[:, :, None] == classes[:, None, :])[:, None]
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def varlen(layout: ClassLayout, *, longest: int | None = None, full_window: bool = False) -> Attend:
    """torch.nn.attention.varlen on CUDA: float16 and bfloat16, d a multiple of 8 up to 256. It does not wait for the device.

    Float32 inputs, which pictures have, are computed in bfloat16.

    Args:
        layout: the packing.
        longest: number of tokens that no (image, class) exceeds; by default N. A smaller one saves idle thread blocks, but
            the host would have to wait for it.
        full_window: give a window that holds everything. Without one, PyTorch may choose cuDNN on compute capability 9 and
            10, which takes no window; with one it always takes FlashAttention.
    """

    def attend(q, k, v):
        tokens = longest or q.shape[2]
        window = {"window_size": (q.shape[2], q.shape[2])} if full_window else {}
        flat = [_flat(x.bfloat16() if x.dtype == torch.float32 else x) for x in (q, k, v)]
        out = torch_varlen.varlen_attn(*flat, layout.cu_seqlens, layout.cu_seqlens, tokens, tokens, **window)
        return _unflat(out, q).to(v.dtype)

    return attend


def xformers(layout: ClassLayout) -> Attend:
    """memory_efficient_attention of xformers with its BlockDiagonalMask, on CUDA: float16, bfloat16 and float32, d a
    multiple of 8. The host *waits for the device*, once for each layout: the mask takes the lengths as Python integers."""
    ops = _xformers_ops()
    starts = layout.cu_seqlens.tolist()
    lengths = [stop - start for start, stop in itertools.pairwise(starts) if stop > start]
    bias = ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens(lengths, device=layout.cu_seqlens.device) if lengths else None

    def attend(q, k, v):
        if bias is None:  # no token at all
            return torch.zeros_like(q)
        out = ops.memory_efficient_attention(*(_flat(x)[None] for x in (q, k, v)), attn_bias=bias)[0]
        return _unflat(out, q)

    return attend


ATTENTIONS: dict[str, Callable[[ClassLayout], Attend]] = {
    "class_attention": class_attention,
    "xformers": xformers,
    "varlen": varlen,
    "sdpa": sdpa,
}
"""By the values of `reconstruction.attention`."""


def check_attention(config: "Config", on_cuda: bool) -> None:
    """Raise a UserError if a run cannot use its `reconstruction.attention` here.

    Args:
        config: of the run.
        on_cuda: whether it will train on CUDA.
    """
    name = config.attention
    if name not in ("varlen", "xformers"):
        return
    remedy = "use --reconstruction.attention class_attention, or sdpa"
    if name == "xformers" and importlib.util.find_spec("xformers") is None:
        raise UserError(f"reconstruction.attention: xformers is not installed: pip install 'cmim[xformers]', or {remedy}")
    if not on_cuda:
        raise UserError(f"reconstruction.attention {name} runs on CUDA only, and this run is on the CPU; {remedy}")
    if name == "varlen" and config.train.precision == "fp32":
        raise UserError(f"reconstruction.attention varlen computes in bf16 or fp16, but train.precision is fp32; {remedy}")


def _xformers_ops():
    """xformers.ops, whose import must not say that attention is not available: where its own library does not fit this
    PyTorch, it calls PyTorch's kernels."""
    logger = logging.getLogger("xformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import xformers.ops

        return xformers.ops
    finally:
        logger.setLevel(level)


def _flat(x):
    """(B, heads, N, d) -> (B N, heads, d)."""
    return x.transpose(1, 2).flatten(0, 1)


def _unflat(x, like):
    batch, heads, tokens, dim = like.shape
    return x.view(batch, tokens, heads, dim).transpose(1, 2)
