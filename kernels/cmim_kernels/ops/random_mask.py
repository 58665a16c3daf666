"""Random block masks: schema, fake tensors, public function."""

import torch
from torch import Tensor

from cmim_kernels import checks
from cmim_kernels.ops.library import declare
from cmim_kernels.reference import random_mask as reference


def _fake(noise, height, width, ratio, block):
    return noise.new_empty((noise.shape[0], height, width), dtype=torch.bool)


_forward = declare(
    "random_mask_forward(Tensor noise, SymInt height, SymInt width, float ratio, SymInt block) -> Tensor",
    torch_backend=reference.random_mask_forward,
    fake=_fake,
)


def random_mask(
    batch: int, height: int, width: int, ratio: float, *,
    block: int = 1, generator: torch.Generator | None = None, device: torch.device | str | None = None,
) -> Tensor:  # fmt: skip
    """Random masks of whole blocks, with the same number of masked blocks in every image.

    The grid has ceil(height / block) x ceil(width / block) blocks; those at the lower and right border are cut to
    height x width. Exactly `round(ratio * blocks)` of them are masked (Python's `round`: halves go to the even
    number); all choices are equally likely.

    Args:
        batch: number of masks B.
        height, width: size h x w of the token grid.
        ratio: share of masked blocks, 0 to 1. Under `torch.compile` with dynamic=True each new value compiles again.
        block: side of a block, in tokens.
        generator: random number generator on `device`; None: PyTorch's default generator. `torch.compile` cannot trace a
            generator, so use None inside a compiled function.
        device: device of the mask; None: that of `generator` if given, else PyTorch's default device.

    Returns:
        (B, h, w) bool, True where masked.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value (the message names it).
    """
    if checks.enabled():
        op = "random_mask"
        for name, value in (("batch", batch), ("height", height), ("width", width)):
            checks.integer(op, name, value, at_least=0)
        checks.number(op, "ratio", ratio, low=0, high=1)
        checks.integer(op, "block", block)
        if device is not None:
            checks.device(op, "device", device)
        if generator is not None:
            if not isinstance(generator, torch.Generator):
                raise TypeError(f"{op}: generator must be a torch.Generator, got {type(generator).__name__}")
            if device is not None and not _on(generator, torch.device(device)):
                raise ValueError(f"{op}: generator is on {generator.device}, expected device {device}")
    if generator is not None:
        device = generator.device
    rows, columns = -(-height // block), -(-width // block)
    noise = torch.empty(batch, rows, columns, device=device, dtype=torch.float32).uniform_(generator=generator)
    return _forward(noise, height, width, ratio, block)


def _on(generator, device):
    """Whether a generator is on a device; a device without an index matches any of its type."""
    indices = {generator.device.index, device.index} - {None}
    return generator.device.type == device.type and len(indices) < 2
