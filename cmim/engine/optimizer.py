"""The optimiser: PyTorch's own, fused."""

import torch
from torch import nn

from cmim.settings import OptimizerSettings, TrainSettings


def scaled_lr(optimizer: OptimizerSettings, train: TrainSettings) -> float:
    """`optimizer.lr` of an `OptimizerSettings` in proportion to the labelled images of a step (Goyal et al. 2017, arXiv
    1706.02677), of a `TrainSettings`."""
    return optimizer.lr * train.labelled_batch * train.accumulate / optimizer.lr_batch


def build_optimizer(settings: OptimizerSettings, objective: nn.Module, lr: float) -> torch.optim.Optimizer:
    """SGD or AdamW with two groups: the encoder at `lr`, everything else that learns at lr x head_lr_factor.

    Each group carries its `base_lr`, which the schedule multiplies.
    """
    encoder = [p for p in objective.net.encoder.parameters() if p.requires_grad]
    ours = {id(p) for p in encoder}
    rest = [p for p in objective.parameters() if p.requires_grad and id(p) not in ours]
    groups = [
        {"params": parameters, "lr": rate, "base_lr": rate}
        for parameters, rate in ((encoder, lr), (rest, lr * settings.head_lr_factor))
        if parameters
    ]
    if settings.name == "sgd":
        sgd = torch.optim.SGD(groups, momentum=settings.momentum, weight_decay=settings.weight_decay, fused=True)
        if settings.momentum > 0:  # the fused step fails where parameters that had no gradient yet lack a buffer
            for parameter in (p for group in groups for p in group["params"]):
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group learns at base_lr x factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
