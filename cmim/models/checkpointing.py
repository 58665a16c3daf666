"""Activation checkpointing (Chen et al. 2016, arXiv 1604.06174): the forward pass keeps only the inputs of the encoder's
stages, and the backward pass computes a stage again when it needs what is inside.

The second computation repeats the first to the bit: PyTorch restores the random numbers of dropout, and BatchNorm layers get
the mode and the running statistics that they had; what they then add to these statistics is thrown away.
"""

import threading
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from cmim.errors import UserError

_thread = threading.local()


def checkpoint_encoder(encoder: nn.Module, name: str) -> None:
    """Make the stages of an encoder checkpoint their activations in train mode.

    Stages are the encoder's children that have children themselves, such as `layer1` to `layer4` of a ResNet. An encoder may
    call a container of blocks, or the blocks one after another: whichever is called is the stage.

    Args:
        encoder: the module; names and shapes of its parameters do not change.
        name: what a message calls it.

    Raises:
        UserError: it has no stages.
    """
    while len(children := _children(encoder)) == 1:  # a wrapper
        encoder = children[0]
    stages = list(_stages(encoder))
    if not stages:
        raise UserError(f"model.checkpointing: {name} has no stages to checkpoint; leave it out, or choose another encoder")
    for stage in stages:
        stage.forward = _Checkpointed(stage)


def _children(module):
    return [child for child in module.children() if any(True for _ in child.parameters())]


def _stages(module):
    for child in _children(module):
        forward = type(child).forward
        if _children(child) and forward is not nn.Module.forward:  # else it is a list of modules, which nothing calls
            yield child
        if forward in (nn.Module.forward, nn.Sequential.forward):
            yield from _stages(child)


class _Checkpointed:
    """The `forward` of a stage."""

    def __init__(self, stage: nn.Module):
        self.stage = stage

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        stage = self.stage
        if not (stage.training and torch.is_grad_enabled()) or getattr(_thread, "inside", False):
            return type(stage).forward(stage, *inputs, **options)
        before = [_State(layer) for layer in stage.modules() if isinstance(layer, _BatchNorm)]
        given = [x for x in inputs if isinstance(x, Tensor)]
        versions = [x._version for x in given]
        outputs = checkpoint(
            self._compute, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), _Restored(before)), **options
        )
        if [x._version for x in given] != versions:
            raise UserError(
                f"model.checkpointing: {type(stage).__name__} of the encoder overwrites its input, which is needed again; "
                "leave it out, or choose another encoder"
            )
        return outputs

    def _compute(self, *inputs, **options):
        outer, _thread.inside = getattr(_thread, "inside", False), True
        try:
            return type(self.stage).forward(self.stage, *inputs, **options)
        finally:
            _thread.inside = outer


class _State:
    """The mode and the running statistics of a BatchNorm layer."""

    NAMES = ("training", "track_running_stats", "running_mean", "running_var", "num_batches_tracked")

    def __init__(self, layer: _BatchNorm, copy: bool = True):
        self.layer = layer
        self.values = [getattr(layer, name) for name in self.NAMES]
        if copy:
            self.values = _copies(self.values)

    def restore(self, copy: bool = False) -> None:
        for name, value in zip(self.NAMES, _copies(self.values) if copy else self.values, strict=True):
            setattr(self.layer, name, value)


def _copies(values):
    return [value.clone() if isinstance(value, Tensor) else value for value in values]


class _Restored:
    """Inside the `with` block the layers work on copies of these states. It is entered once for each backward pass."""

    def __init__(self, states: list[_State]):
        self.states, self.now = states, []

    def __enter__(self) -> None:
        self.now = [_State(state.layer, copy=False) for state in self.states]
        for state in self.states:
            state.restore(copy=True)

    def __exit__(self, *error: object) -> None:
        for state in self.now:
            state.restore()
