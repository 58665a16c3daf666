"""The optimiser: PyTorch's own, fused, or one of timm's factory, which also knows those of apex."""

import difflib
import importlib
import importlib.util
import inspect
import math
import warnings
from pathlib import Path

import timm.optim
import torch
from torch import nn

from cmim.errors import UserError
from cmim.settings import Config, OptimizerSettings, TrainSettings

FUSED = ("sgd", "adamw")
"""Names that are PyTorch's classes with `fused=True`; all others are timm's."""


def scaled_lr(optimizer: OptimizerSettings, train: TrainSettings) -> float:
    """The learning rate: `optimizer.lr`, scaled in proportion to the number of labelled images a step (Goyal et al. 2017,
    arXiv 1706.02677)."""
    return optimizer.lr * train.labelled_batch * train.accumulate / optimizer.lr_batch


def build_optimizer(
    settings: OptimizerSettings, objective: nn.Module, lr: float, capturable: bool = False
) -> torch.optim.Optimizer:
    """The optimiser over two parameter groups: the encoder with `lr`, everything else with lr x head_lr_factor. With
    `layer_decay` there is a group for each layer of the encoder. If it is to be `capturable` in a CUDA graph, the learning
    rates are float32 tensors on the device, see `set_learning_rate`; it must then be one of FUSED.

    Each group has a `base_lr`, which the schedule multiplies. Only `train.clip_grad` clips gradients: the clipping that LAMB
    has of its own is off.
    """
    groups = _groups(settings, objective, lr)
    if settings.name in FUSED:
        optimizer = _fused(settings, groups, capturable)
        if capturable:
            warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")  # some steps are eager
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(group["base_lr"], dtype=torch.float32, device=group["params"][0].device)
        return optimizer
    takes = inspect.signature(timm.optim.get_optimizer_class(settings.name, bind_defaults=False)).parameters
    # Infinity, because the kernels of apex divide by this norm. Deterministic: processes draw the same random numbers.
    more = {key: value for key, value in {"max_grad_norm": math.inf, "deterministic": True}.items() if key in takes}
    optimizer = timm.optim.create_optimizer_v2(
        groups, settings.name, lr=lr, weight_decay=settings.weight_decay, momentum=settings.momentum, **more
    )
    for group in optimizer.param_groups:
        if "max_lr_snapshot" in group:  # timm scales a corrected weight decay by the largest learning rate of the group
            group["max_lr_snapshot"] = group["base_lr"]
    return optimizer


def _fused(settings, groups, capturable):
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, weight_decay=settings.weight_decay, fused=True, capturable=capturable)
    sgd = torch.optim.SGD(groups, momentum=settings.momentum, weight_decay=settings.weight_decay, fused=True)
    if settings.momentum > 0:  # the fused step fails if parameters that had no gradient yet have no buffer
        for parameter in (p for group in groups for p in group["params"]):
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def _groups(settings, objective, lr):
    encoder, by_lr = objective.net.encoder, {}
    for name, parameter in encoder.named_parameters():
        above = encoder.layers_above(name) if settings.layer_decay < 1 else 0
        by_lr.setdefault(lr * settings.layer_decay**above, []).append(parameter)
    ours = {id(p) for p in encoder.parameters()}
    rest = [p for p in objective.parameters() if id(p) not in ours]
    groups = [
        {"params": [p for p in parameters if p.requires_grad], "lr": rate, "base_lr": rate}
        for rate, parameters in (*by_lr.items(), (lr * settings.head_lr_factor, rest))
    ]
    return [group for group in groups if group["params"]]


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the learning rate of every group to base_lr x factor; a tensor keeps its place in memory."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(group["base_lr"] * factor)
        else:
            group["lr"] = group["base_lr"] * factor


def check_optimizer(config: Config, on_cuda: bool) -> None:
    """Raise a UserError if a run cannot use its `optimizer.name` here.

    Args:
        config: of the run.
        on_cuda: whether it will train on CUDA.
    """
    name = config.optimizer.name
    if name in FUSED:
        return
    known = timm.optim.list_optimizers()
    if name not in known:
        nearest = difflib.get_close_matches(name.lower(), known, 1, 0)[0]
        raise UserError(f"optimizer.name: timm has no optimiser {name}; did you mean {nearest}?")
    info, nearest = timm.optim.get_optimizer_info(name), _without_package(name, known)
    if info.second_order or hasattr(info.opt_class, "eval"):
        raise UserError(
            f"optimizer.name {name} needs more than gradients (second derivatives, or a mode for evaluation), which it "
            "would not get here; use adamw"
        )
    if not isinstance(info.opt_class, str):
        return
    # One of a package, which timm imports when it is asked for.
    package = info.opt_class.partition(".")[0]
    problems = [_problem_of_apex() if package == "apex" else _problem_of(package)]
    if not on_cuda:
        problems.append("it runs on CUDA only, and this run is on the CPU")
    if name == "fusednovograd" and config.gains_parameters:
        problems.append("it needs every gradient from the first step: set mim.start and method.start to 0")
    problems = [problem for problem in problems if problem]
    if problems:
        raise UserError(f"optimizer.name {name}: {'; '.join(problems)}; {nearest} needs PyTorch alone")


def _without_package(name, known):
    """The nearest optimiser that needs PyTorch alone: fusedlamb -> lamb, bnbadamw8bit -> adamw."""
    plain = name.removeprefix("fused").removeprefix("bnb").removesuffix("8bit")
    return plain if plain in known else "adamw"


def _problem_of(package):
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed: pip install {package}"
    return None


def _problem_of_apex():
    """Why the optimisers of apex cannot be used, and what to do; None if they can. A package that is not NVIDIA's is not
    imported."""
    build = "build NVIDIA's from github.com/NVIDIA/apex with its CUDA extensions"
    found = importlib.util.find_spec("apex")
    if found is None:
        return f"apex is not installed: {build} (PyPI's apex is another package)"
    if not any((Path(place) / "optimizers").is_dir() for place in found.submodule_search_locations or ()):
        return f"the installed apex is another package of that name: pip uninstall apex, and {build}"
    try:
        available = importlib.import_module("apex.multi_tensor_apply").multi_tensor_applier.available
    except (ImportError, RuntimeError):
        available = False
    return None if available else f"apex is installed without its extensions: {build}"
