"""Cross-entropy of bilinearly upsampled logits: schema, fake tensors, autograd, public function."""

from torch import Tensor

from cmim_kernels import checks
from cmim_kernels.numerics import accumulation_dtype, empty_like_layout
from cmim_kernels.ops.autograd import Function, differentiable, first_derivative
from cmim_kernels.ops.library import declare
from cmim_kernels.reference import upsample_cross_entropy as reference


def _forward_fake(logits, target, align_corners):
    loss, logsumexp = (logits.new_empty(target.shape, dtype=accumulation_dtype(logits)) for _ in range(2))
    return loss, logsumexp


def _backward_fake(grad, logits, target, logsumexp, align_corners):
    return empty_like_layout(logits)


_forward = declare(
    "upsample_cross_entropy_forward(Tensor logits, Tensor target, bool align_corners) -> (Tensor, Tensor)",
    torch_backend=reference.upsample_cross_entropy_forward,
    kernels=("triton", "cpu"),
    fake=_forward_fake,
)
_backward = declare(
    "upsample_cross_entropy_backward(Tensor grad, Tensor logits, Tensor target, Tensor logsumexp, bool align_corners) "
    "-> Tensor",
    torch_backend=reference.upsample_cross_entropy_backward,
    kernels=("triton", "cpu"),
    fake=_backward_fake,
)


class _UpsampleCrossEntropy(Function):
    @staticmethod
    def forward(logits, target, align_corners):
        return _forward(logits, target, align_corners)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, target, ctx.align_corners = inputs
        logsumexp = output[1]
        ctx.mark_non_differentiable(logsumexp)
        ctx.save_for_backward(logits, target, logsumexp)

    @first_derivative
    def backward(ctx, grad, _):
        return _backward(grad, *ctx.saved_tensors, ctx.align_corners), None, None


def upsample_cross_entropy(logits: Tensor, target: Tensor, *, align_corners: bool = False) -> Tensor:
    """Cross-entropy at each pixel of `target`, for logits that are upsampled to the size of `target`.

    Equal to `F.cross_entropy(F.interpolate(logits, (H, W), mode="bilinear"), target, reduction="none")`, but the
    full-resolution logits are never stored, forward or backward. One log-sum-exp for each pixel is kept for backward.

    This holds for finite logits; a logit that is not finite may turn all losses and the whole gradient of its image to NaN.
    To switch a class off, use a large negative number: -inf gives NaN in `F.interpolate` too, where a weight is zero.

    Args:
        logits: (B, K, h, w), contiguous or channels-last; float16, bfloat16, float32 or float64.
        target: (B, H, W) uint8, int32 or int64; values outside [0, K) are ignored. H and W need not exceed h and w.
        align_corners: as in `F.interpolate`.

    Returns:
        (B, H, W) float32 (float64 for float64 logits), in nats; 0 and without gradient where the target is ignored.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape or device (the message names it).
    """
    if checks.enabled():
        op = "upsample_cross_entropy"
        checks.tensor(op, "logits", logits, dtypes=checks.FLOATS, shape=("B", "K", "h", "w"))
        checks.tensor(op, "target", target, dtypes=checks.LABELS, shape=(logits.shape[0], "H", "W"), like=logits)
        checks.flag(op, "align_corners", align_corners)
        checks.upsampling(op, logits, target.shape[1:])
    return differentiable(_UpsampleCrossEntropy, logits, target, align_corners)[0]
