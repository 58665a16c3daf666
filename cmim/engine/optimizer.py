"""The optimiser: PyTorch's own, fused."""

import torch


def build_optimizer(settings, objective):
    """SGD or AdamW with two groups: the encoder at `lr`, everything else that learns at lr x head_lr_factor.

    Each group carries its `base_lr`, which the schedule multiplies.
    """
    encoder = list(objective.net.encoder.parameters())
    ours = {id(p) for p in encoder}
    rest = [p for p in objective.parameters() if p.requires_grad and id(p) not in ours]
    groups = [
        {"params": parameters, "lr": lr, "base_lr": lr}
        for parameters, lr in ((encoder, settings.lr), (rest, settings.lr * settings.head_lr_factor))
    ]
    if settings.name == "sgd":
        return torch.optim.SGD(groups, momentum=settings.momentum, weight_decay=settings.weight_decay, fused=True)
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay, fused=True)


def set_learning_rate(optimizer, factor):
    """Every group learns at base_lr x factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
