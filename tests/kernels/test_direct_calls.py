"""Ops skip PyTorch's dispatcher only where it has nothing to do."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cmim_kernels.ops.library import _directly


class Watcher(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return op(*args, **(kwargs or {}))


class Own(torch.Tensor):
    pass


def taken(*arguments):
    def implementation(*_):
        return "directly"

    return _directly(lambda *_: "by the dispatcher", implementation)(*arguments)


def test_ordinary_tensors_in_eager_mode_skip_the_dispatcher():
    assert taken(torch.ones(1), None, 3, [0.5], torch.nn.Parameter(torch.ones(1))) == "directly"


@pytest.mark.parametrize("argument", [torch.ones(1).as_subclass(Own), torch.ones(1, device="meta")], ids=["class", "meta"])
def test_other_tensors_do_not(argument):
    assert taken(torch.ones(1), argument) == "by the dispatcher"


@pytest.mark.parametrize("watch", [Watcher, torch.profiler.profile])
def test_nor_does_anything_that_is_watched(watch):
    x = torch.ones(1)
    with watch():
        assert taken(x) == "by the dispatcher"
    assert taken(x) == "directly"


def test_nor_do_transforms():
    seen = []
    with contextlib.suppress(Exception):  # the result is no tensor
        torch.func.vmap(lambda x: seen.append(taken(torch.ones(1))))(torch.ones(2))
    assert seen == ["by the dispatcher"]
