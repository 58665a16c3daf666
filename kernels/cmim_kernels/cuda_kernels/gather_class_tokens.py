"""Tokens to packed order: see csrc/rows.cu."""

from cmim_kernels.cuda_kernels import launch
from cmim_kernels.cuda_kernels.rows import backward_blocks, parameter_gradients


def gather_class_tokens_forward(tokens, order, inverse, segment, mask_token, position, length):
    batch, _, channels = tokens.shape
    out = tokens.new_empty((batch, length, channels))
    if out.numel():
        launch("gather_forward", tokens, inverse.contiguous(), segment.contiguous(), mask_token, position, out)
    return out


def gather_class_tokens_backward(grad, inverse, segment, mask_token, position):
    batch, channels = grad.shape[0], grad.shape[2]
    grad_tokens = grad.new_empty((batch, inverse.shape[1], channels))
    blocks = backward_blocks(grad, inverse.shape[1])

    def run(groups, grad_position):
        inputs = (grad, inverse.contiguous(), segment.contiguous())
        launch("gather_backward", *inputs, grad_tokens, groups, grad_position, blocks)

    return grad_tokens, *parameter_gradients(run, grad, mask_token, position, blocks, empty=grad_tokens.numel() == 0)
