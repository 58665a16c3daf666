"""Packed tokens to the original order: schema, fake tensors, autograd, public function."""

from torch import Tensor

from cmim_kernels import checks
from cmim_kernels.ops.autograd import Function, differentiable, first_derivative
from cmim_kernels.ops.library import declare
from cmim_kernels.ops.pack_classes import ClassLayout, check_layout
from cmim_kernels.reference import scatter_class_tokens as reference


def _forward_fake(packed, inverse, mask_token, position):
    (batch, tokens), channels = inverse.shape, packed.shape[-1]
    return packed.new_empty((batch, tokens, channels))


def _backward_fake(grad, order, inverse, mask_token, position, length):
    batch, _, channels = grad.shape
    grad_mask_token = grad.new_empty(0) if mask_token is None else mask_token.new_empty(mask_token.shape)
    grad_position = grad.new_empty(0) if position is None else position.new_empty(position.shape)
    return grad.new_empty((batch, length, channels)), grad_mask_token, grad_position


_forward = declare(
    "scatter_class_tokens_forward(Tensor packed, Tensor inverse, Tensor? mask_token, Tensor? position) -> Tensor",
    torch_backend=reference.scatter_class_tokens_forward,
    kernels=("triton", "cuda", "cpu"),
    fake=_forward_fake,
)
_backward = declare(
    "scatter_class_tokens_backward(Tensor grad, Tensor order, Tensor inverse, Tensor? mask_token, Tensor? position, "
    "SymInt length) -> (Tensor, Tensor, Tensor)",
    torch_backend=reference.scatter_class_tokens_backward,
    kernels=("triton", "cuda", "cpu"),
    fake=_backward_fake,
)


class _ScatterClassTokens(Function):
    @staticmethod
    def forward(packed, order, inverse, mask_token, position):
        return _forward(packed, inverse, mask_token, position)

    @staticmethod
    def setup_context(ctx, inputs, output):
        packed, order, inverse, mask_token, position = inputs
        ctx.length = packed.shape[1]
        ctx.save_for_backward(order, inverse, mask_token, position)

    @first_derivative
    def backward(ctx, grad):
        order, inverse, mask_token, position = ctx.saved_tensors
        grad_packed, grad_mask_token, grad_position = _backward(grad, order, inverse, mask_token, position, ctx.length)
        return (
            grad_packed, None, None,
            None if mask_token is None else grad_mask_token,
            None if position is None else grad_position,
        )  # fmt: skip


def scatter_class_tokens(
    packed: Tensor, layout: ClassLayout, *, mask_token: Tensor | None = None, position: Tensor | None = None
) -> Tensor:
    """Packed tokens back in their original order: the inverse of `gather_class_tokens`.

    Places whose packed position is L or higher get `mask_token`, or zero if it is None. Then `position` is added at every
    place.

    Args:
        packed: (B, L, C) float16, bfloat16, float32 or float64; the first L <= N packed tokens.
        layout: `ClassLayout` of B images with N tokens each.
        mask_token: (C,) float, not necessarily of the dtype of packed; or None.
        position: (N, C) float, not necessarily of the dtype of packed; or None.

    Returns:
        (B, N, C) in the dtype of packed. Sums, also those over batch and places in the gradients of `mask_token` and
        `position`, accumulate in float32 (float64 if any input is float64).

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape or device (the message names it).
    """
    if checks.enabled():
        op = "scatter_class_tokens"
        checks.tensor(op, "packed", packed, dtypes=checks.FLOATS, shape=("B", "L", "C"))
        batch, length, channels = packed.shape
        check_layout(op, layout, batch=batch, tokens="N", like=packed)
        places = layout.order.shape[1]
        if length > places:
            raise ValueError(f"{op}: packed has {length} tokens an image, expected at most the {places} of layout")
        if mask_token is not None:
            checks.tensor(op, "mask_token", mask_token, dtypes=checks.FLOATS, shape=(channels,), like=packed)
        if position is not None:
            checks.tensor(op, "position", position, dtypes=checks.FLOATS, shape=(places, channels), like=packed)
    return differentiable(_ScatterClassTokens, packed, layout.order, layout.inverse, mask_token, position)
