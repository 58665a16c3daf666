"""Packed tokens to the original order: see csrc/rows.cu."""

from cmim_kernels.cuda_kernels import launch
from cmim_kernels.cuda_kernels.rows import backward_blocks, parameter_gradients


def scatter_class_tokens_forward(packed, inverse, mask_token, position):
    (batch, _, channels), places = packed.shape, inverse.shape[1]
    out = packed.new_empty((batch, places, channels))
    if out.numel():
        launch("scatter_forward", packed, inverse.contiguous(), mask_token, position, out)
    return out


def scatter_class_tokens_backward(grad, order, inverse, mask_token, position, length):
    batch, places, channels = grad.shape
    grad_packed = grad.new_empty((batch, length, channels))
    blocks = backward_blocks(grad, places)

    def run(groups, grad_position):
        launch("scatter_backward", grad, inverse.contiguous(), grad_packed, groups, grad_position, blocks)

    return grad_packed, *parameter_gradients(run, grad, mask_token, position, blocks, empty=grad.numel() == 0)
