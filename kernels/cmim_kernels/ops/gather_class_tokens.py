"""Tokens to packed order: schema, fake tensors, autograd, public function."""

from torch import Tensor

from cmim_kernels import checks
from cmim_kernels.ops.autograd import Function, differentiable, first_derivative
from cmim_kernels.ops.library import declare
from cmim_kernels.ops.pack_classes import ClassLayout, check_layout
from cmim_kernels.reference import gather_class_tokens as reference


def _forward_fake(tokens, order, inverse, segment, mask_token, position, length):
    batch, _, channels = tokens.shape
    return tokens.new_empty((batch, length, channels))


def _backward_fake(grad, inverse, segment, mask_token, position):
    (batch, tokens), channels = inverse.shape, grad.shape[-1]
    grad_mask_token = grad.new_empty(0) if mask_token is None else mask_token.new_empty(mask_token.shape)
    grad_position = grad.new_empty(0) if position is None else position.new_empty(position.shape)
    return grad.new_empty((batch, tokens, channels)), grad_mask_token, grad_position


_forward = declare(
    "gather_class_tokens_forward(Tensor tokens, Tensor order, Tensor inverse, Tensor segment, Tensor? mask_token, "
    "Tensor? position, SymInt length) -> Tensor",
    torch_backend=reference.gather_class_tokens_forward,
    kernels=("triton", "cuda", "cpu"),
    fake=_forward_fake,
)
_backward = declare(
    "gather_class_tokens_backward(Tensor grad, Tensor inverse, Tensor segment, Tensor? mask_token, Tensor? position) "
    "-> (Tensor, Tensor, Tensor)",
    torch_backend=reference.gather_class_tokens_backward,
    kernels=("triton", "cuda", "cpu"),
    fake=_backward_fake,
)


class _GatherClassTokens(Function):
    @staticmethod
    def forward(tokens, order, inverse, segment, mask_token, position, length):
        return _forward(tokens, order, inverse, segment, mask_token, position, length)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, inverse, segment, mask_token, position, _ = inputs
        ctx.save_for_backward(inverse, segment, mask_token, position)

    @first_derivative
    def backward(ctx, grad):
        inverse, segment, mask_token, position = ctx.saved_tensors
        grad_tokens, grad_mask_token, grad_position = _backward(grad, inverse, segment, mask_token, position)
        return (
            grad_tokens, None, None, None,
            None if mask_token is None else grad_mask_token,
            None if position is None else grad_position,
            None,
        )  # fmt: skip


def gather_class_tokens(
    tokens: Tensor, layout: ClassLayout, *,
    mask_token: Tensor | None = None, position: Tensor | None = None, length: int | None = None,
) -> Tensor:  # fmt: skip
    """The first `length` tokens of each image in packed order, with mask token and positions added in the same pass.

    If `mask_token` is given, it replaces the tokens of masked segments (ignored tokens are copied, masked or not). Then the
    `position` of each token's original place is added.

    Args:
        tokens: (B, N, C) float16, bfloat16, float32 or float64.
        layout: `ClassLayout` of the same B and N.
        mask_token: (C,) float, not necessarily of the dtype of tokens; or None.
        position: (N, C) float, not necessarily of the dtype of tokens; or None.
        length: number L of packed tokens to return, 0 to N; None means N.

    Returns:
        (B, L, C) in the dtype of tokens. Sums, also those over batch and places in the gradients of `mask_token` and
        `position`, accumulate in float32 (float64 if any input is float64).

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape or device (the message names it).
    """
    if checks.enabled():
        op = "gather_class_tokens"
        checks.tensor(op, "tokens", tokens, dtypes=checks.FLOATS, shape=("B", "N", "C"))
        batch, places, channels = tokens.shape
        check_layout(op, layout, batch=batch, tokens=places, like=tokens)
        if mask_token is not None:
            checks.tensor(op, "mask_token", mask_token, dtypes=checks.FLOATS, shape=(channels,), like=tokens)
        if position is not None:
            checks.tensor(op, "position", position, dtypes=checks.FLOATS, shape=(places, channels), like=tokens)
        if length is not None:
            checks.integer(op, "length", length, at_least=0)
            if length > places:
                raise ValueError(f"{op}: length is {length}, expected at most the number of tokens, {places}")
    length = tokens.shape[1] if length is None else length
    return differentiable(
        _GatherClassTokens, tokens, layout.order, layout.inverse, layout.segment, mask_token, position, length
    )
