"""The optimiser: PyTorch's own, fused."""

import torch
from torch import nn

from cmim.settings import OptimizerSettings, TrainSettings


def scaled_lr(optimizer: OptimizerSettings, train: TrainSettings) -> float:
    """The learning rate: `optimizer.lr`, scaled in proportion to the number of labelled images a step (Goyal et al. 2017,
    arXiv 1706.02677)."""
    return optimizer.lr * train.labelled_batch * train.accumulate / optimizer.lr_batch


def build_optimizer(settings: OptimizerSettings, objective: nn.Module, lr: float) -> torch.optim.Optimizer:
    """SGD or AdamW with two parameter groups: the encoder with `lr`, everything else with lr x head_lr_factor.

    Each group has a `base_lr`, which the schedule multiplies.
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
        if settings.momentum > 0:  # the fused step fails if parameters that had no gradient yet have no buffer
            for parameter in (p for group in groups for p in group["params"]):
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the learning rate of every group to base_lr x factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
