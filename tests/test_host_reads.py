"""In a training step the host reads nothing from the device and copies nothing to it, so that a CUDA graph can hold it."""

import os

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cmim.data import load_splits
from cmim.engine.run import Run
from cmim.engine.start import build_objective
from cmim.engine.trainer import Trainer
from cmim.settings import PRESETS
from cmim_kernels.backends import use_backend
from cmim_kernels.ops import library
from cmim_kernels.reference import class_attention, same_class_conv2d
from tests.test_engine import tiny_config

READS = {
    "aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::allclose", "aten::nonzero",
    "aten::argwhere", "aten::masked_select", "aten::bincount", "aten::_unique", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::unique_dim_consecutive", "aten::repeat_interleave", "aten::lift_fresh",
}  # fmt: skip
"""Operators whose result, or its shape, the host must know; `lift_fresh` makes a tensor from Python numbers."""
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
"""Operators that read their indices on the host if these are masks."""


class HostRead(AssertionError):
    pass


class NoHostReads(TorchDispatchMode):
    """Operators that would make the host wait for a GPU raise `HostRead`, on any device; so do tensors of several devices in
    one call. What compiled kernels and PyTorch's own C++ do inside an operator is not seen."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, op._schema.name
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        masks = (torch.bool, torch.uint8)
        by_mask = name in INDEXING and any(i is not None and i.dtype in masks for i in args[1])
        to = kwargs.get("device")
        copies = to is not None and any(x.device.type != torch.device(to).type for x in tensors)
        if name in READS or by_mask or copies or len({x.device for x in tensors}) > 1:
            raise HostRead(str(op))
        return op(*args, **kwargs)


OPTIONS = dict(
    teacher__kind="ema", method__ohem={}, method__class_thresholds=True, method__align=True, method__class_balance=True,
    method__logit_adjustment=True, method__dice=1, method__class_weights=[1, 2, 1, 1, 1], train__clip_grad=1,
)  # fmt: skip
MASKED = dict(method__preset="cmim", mim__views=["labelled", "weak", "strong"])
ATTENTION = MASKED | dict(reconstruction__decoder="attention", reconstruction__num_heads=2)
CASES = {
    **{preset: dict(method__preset=preset) for preset in PRESETS},
    "options": OPTIONS,
    "checkpointing": MASKED | dict(reconstruction__checkpointing=True),
    "labelled only": dict(method__start=0.9),
    "adamw": dict(optimizer__name="adamw"),
    "per class": MASKED | dict(mask__per_class=True, mim__isolate="input", mask__fill="learned"),
    "attention": ATTENTION,
    "sdpa": ATTENTION | dict(reconstruction__attention="sdpa"),
    "pixel": MASKED | dict(reconstruction__tokens="pixel", reconstruction__balance="token"),
    "dpt": MASKED | dict(model__arch="dpt", model__encoder="test_vit", model__decoder_width=None),
}


def trainer_of(**settings):
    config = tiny_config(**(dict(model__encoder="test_resnet.r160_in1k", model__weights="none") | settings))
    splits = load_splits(config.data)
    objective = build_objective(config, len(splits.class_names), Run(os.devnull))
    return Trainer(config, splits, Run(os.devnull), objective, torch.device("cpu"))


@pytest.mark.parametrize("name", CASES)
def test_no_step_reads_anything(name, monkeypatch):
    monkeypatch.setattr(library, "_is_watched", lambda: False)  # the explicit formulas run under the mode, too
    # The paths that are for the CPU only.
    monkeypatch.setattr(same_class_conv2d, "_class_by_class", lambda x: False)
    monkeypatch.setattr(class_attention, "_parts", lambda q, *layout: [(..., class_attention.same_class(*layout))])
    trainer = trainer_of(**CASES[name])
    step, calls = trainer.compute_step, []

    def watched(*arguments, **options):
        calls.append(1)
        with NoHostReads():
            return step(*arguments, **options)

    monkeypatch.setattr(trainer, "graph", None)
    monkeypatch.setattr(trainer, "compute_step", watched)
    loader = trainer.loader(0, 2)
    with use_backend("torch"):
        for _ in range(2):
            trainer.train_step(lambda: next(loader), lambda figures: None)
    assert len(calls) == 2


READING = {
    "item": lambda x: x.sum().item(),
    "if": lambda x: 1 if (x > 0).any() else 0,
    "mask": lambda x: x[x > 0],
    "set by mask": lambda x: x.index_put((x > 0,), x.sum()),
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "new tensor": lambda x: x + torch.tensor([1.0, 2.0]),
    "repeat": lambda x: x.repeat_interleave(torch.ones_like(x, dtype=torch.long)),
}


@pytest.mark.parametrize("what", READING)
def test_what_reads_is_found(what):
    with pytest.raises(HostRead), NoHostReads():
        READING[what](torch.ones(2))


def on_fake_cuda(mode, tensor):
    moved = mode.from_tensor(tensor).cuda()
    return torch.nn.Parameter(moved, False) if isinstance(tensor, torch.nn.Parameter) else moved


@pytest.mark.parametrize("name", CASES)
def test_forward_stays_on_the_device(name):
    """With fake CUDA tensors, which have no values to read and show a tensor that is made on the CPU. PyTorch cannot compute
    backward with them without a GPU."""
    trainer = trainer_of(**CASES[name])
    batch, objective = next(trainer.loader(0, 1)), trainer.objective.train()
    with FakeTensorMode() as mode, torch.no_grad():
        for module in objective.modules():
            for tensors in (module._parameters, module._buffers):
                tensors |= {key: on_fake_cuda(mode, value) for key, value in tensors.items() if value is not None}
        ramp = torch.ones((), device="cuda")
        batch = {key: on_fake_cuda(mode, value) for key, value in batch.items()}
        with NoHostReads():
            output = objective(batch, ramp, ramp)
    assert output.loss.is_cuda and all(term.is_cuda for term in output.terms.values())
