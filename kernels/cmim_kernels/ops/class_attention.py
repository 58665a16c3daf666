"""Attention within each (image, class): schema, fake tensors, autograd, public function."""

from torch import Tensor

from cmim_kernels import checks
from cmim_kernels.numerics import accumulation_dtype
from cmim_kernels.ops.autograd import Function, differentiable, first_derivative
from cmim_kernels.ops.library import declare
from cmim_kernels.ops.pack_classes import ClassLayout, check_layout
from cmim_kernels.reference import class_attention as reference


def _forward_fake(q, k, v, segment, offsets):
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=accumulation_dtype(q, k, v))


def _backward_fake(grad, q, k, v, out, logsumexp, segment, offsets):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_forward = declare(
    "class_attention_forward(Tensor q, Tensor k, Tensor v, Tensor segment, Tensor offsets) -> (Tensor, Tensor)",
    torch_backend=reference.class_attention_forward,
    kernels=("triton", "cpu"),
    fake=_forward_fake,
)
_backward = declare(
    "class_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor logsumexp, Tensor segment, "
    "Tensor offsets) -> (Tensor, Tensor, Tensor)",
    torch_backend=reference.class_attention_backward,
    kernels=("triton", "cpu"),
    fake=_backward_fake,
)


class _ClassAttention(Function):
    @staticmethod
    def forward(q, k, v, segment, offsets):
        return _forward(q, k, v, segment, offsets)

    @staticmethod
    def setup_context(ctx, inputs, output):
        out, logsumexp = output
        ctx.mark_non_differentiable(logsumexp)
        ctx.save_for_backward(*inputs[:3], out, logsumexp, *inputs[3:])

    @first_derivative
    def backward(ctx, grad, _):
        return *_backward(grad, *ctx.saved_tensors), None, None


def class_attention(q: Tensor, k: Tensor, v: Tensor, layout: ClassLayout) -> Tensor:
    """Softmax attention of each token over the tokens of its own image and class, visible and masked.

    softmax(q k^T / sqrt(d)) v within each (image, class) (Vaswani et al. 2017, arXiv 1706.03762). Output and
    gradients are zero at ignored tokens. Tokens of another class, even inf or NaN, change no bit of the output.

    Args:
        q, k, v: (B, heads, N, d) float16, bfloat16, float32 or float64, in packed order (`gather_class_tokens`).
        layout: `ClassLayout` of the same B and N.

    Returns:
        (B, heads, N, d) in the dtype of q, in packed order. Sums accumulate in float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape or device (the message names it).
    """
    if checks.enabled():
        op = "class_attention"
        checks.tensor(op, "q", q, dtypes=checks.FLOATS, shape=("B", "heads", "N", "d"))
        if q.shape[-1] == 0:
            raise ValueError(f"{op}: q has shape {tuple(q.shape)}, expected (B, heads, N, d) with d of at least 1")
        shape = tuple(q.shape)
        checks.tensor(op, "k", k, dtypes=checks.FLOATS, shape=shape, like=q)
        checks.tensor(op, "v", v, dtypes=checks.FLOATS, shape=shape, like=q)
        check_layout(op, layout, batch=shape[0], tokens=shape[2], like=q)
    out, _ = differentiable(_ClassAttention, q, k, v, layout.segment, layout.offsets)
    return out
