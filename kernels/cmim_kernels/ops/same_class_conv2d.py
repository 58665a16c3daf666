"""Class-gated depthwise convolution: schema, fake tensors, autograd, public function."""

from torch import Tensor

from cmim_kernels import checks
from cmim_kernels.numerics import empty_like_layout
from cmim_kernels.ops.autograd import Function, differentiable, first_derivative
from cmim_kernels.ops.library import declare
from cmim_kernels.reference import same_class_conv2d as reference


def _forward_fake(x, labels, weight, bias, num_classes):
    return empty_like_layout(x)


def _backward_fake(grad, x, labels, weight, bias, num_classes):
    grad_bias = weight.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return empty_like_layout(x), weight.new_empty(weight.shape), grad_bias


_forward = declare(
    "same_class_conv2d_forward(Tensor x, Tensor labels, Tensor weight, Tensor? bias, SymInt num_classes) -> Tensor",
    torch_backend=reference.same_class_conv2d_forward,
    kernels=("triton", "cuda", "cpu"),
    fake=_forward_fake,
)
_backward = declare(
    "same_class_conv2d_backward(Tensor grad, Tensor x, Tensor labels, Tensor weight, Tensor? bias, "
    "SymInt num_classes) -> (Tensor, Tensor, Tensor)",
    torch_backend=reference.same_class_conv2d_backward,
    kernels=("triton", "cuda", "cpu"),
    fake=_backward_fake,
)


class _SameClassConv2d(Function):
    @staticmethod
    def forward(x, labels, weight, bias, num_classes):
        return _forward(x, labels, weight, bias, num_classes)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, labels, weight, bias, ctx.num_classes = inputs
        ctx.save_for_backward(x, labels, weight, bias)

    @first_derivative
    def backward(ctx, grad):
        x, labels, weight, bias = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = _backward(grad, x, labels, weight, bias, ctx.num_classes)
        return grad_x, None, grad_weight, None if bias is None else grad_bias, None


def same_class_conv2d(x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None = None, *, num_classes: int) -> Tensor:
    """Depthwise cross-correlation in which a neighbour counts only if its label equals the centre's.

    Zero padding, stride 1. Where the label of the centre is outside [0, num_classes), the output is zero, without bias.

    Args:
        x: (B, C, h, w) float16, bfloat16, float32 or float64; contiguous or channels-last.
        labels: (B, h, w) uint8, int32 or int64. Values outside [0, num_classes) are ignored.
        weight: (C, k, k), k odd; float, not necessarily of the dtype of x.
        bias: (C,) or None.
        num_classes: number of classes K.

    Returns:
        (B, C, h, w) in the dtype and memory layout of x. Sums accumulate in float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape or device (the message names it).
    """
    if checks.enabled():
        op = "same_class_conv2d"
        checks.tensor(op, "x", x, dtypes=checks.FLOATS, shape=("B", "C", "h", "w"))
        batch, channels, height, width = x.shape
        checks.tensor(op, "labels", labels, dtypes=checks.LABELS, shape=(batch, height, width), like=x)
        checks.tensor(op, "weight", weight, dtypes=checks.FLOATS, shape=(channels, "k", "k"), like=x)
        if weight.shape[1] != weight.shape[2] or weight.shape[1] % 2 == 0:
            raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}, expected (C, k, k) with odd k")
        if bias is not None:
            checks.tensor(op, "bias", bias, dtypes=checks.FLOATS, shape=(channels,), like=x)
        checks.integer(op, "num_classes", num_classes)
    return differentiable(_SameClassConv2d, x, labels, weight, bias, num_classes)
