"""Batch statistics over several processes equal those of one process with all images."""

import pytest
import torch
from torch import nn

from cmim import distributed
from cmim.models.batch_norm import SyncBatchNorm2d, synchronise_batch_norm
from tests.ranks import run_on_ranks

COUNTS = {1: [5], 2: [2, 3], 3: [1, 3, 1]}  # images of each process


def make_net():
    from timm.layers import BatchNormAct2d

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 1),
        BatchNormAct2d(6, act_layer=nn.GELU),
        nn.BatchNorm2d(6, momentum=None, affine=False),
        nn.Conv2d(6, 2, 1),
        nn.BatchNorm2d(2, track_running_stats=False),
    )
    for layer in (net[1], net[4]):
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        nn.init.uniform_(layer.bias, -1, 1)
    return net.double()


def make_data():
    g = torch.Generator().manual_seed(1)
    images = torch.randn(5, 3, 6, 5, generator=g, dtype=torch.float64) + 100  # far from zero
    return images, torch.randn(5, 2, 4, 3, generator=g, dtype=torch.float64)


def two_steps(net, images, weight):
    """Outputs and gradients of two steps, then the state; the loss is a sum over images."""
    outputs = []
    for scale in (1.0, 3.0):
        images = images.detach().requires_grad_()
        output = net(images * scale)
        (output.sin() * weight).sum().backward()
        outputs += [output.detach(), images.grad]
    return outputs, [p.grad for p in net.parameters()], net.state_dict()


def share(compiled):
    net, (images, weight) = make_net(), make_data()
    names = list(net.state_dict())
    synchronise_batch_norm(net)
    assert list(net.state_dict()) == names
    assert sum(isinstance(m, SyncBatchNorm2d) for m in net.modules()) == 4
    counts = COUNTS[distributed.size()]
    if compiled:
        net = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=False)
    outputs, gradients, state = two_steps(
        net, images.split(counts)[distributed.rank()], weight.split(counts)[distributed.rank()]
    )
    for gradient in gradients:
        distributed.sum_over_ranks(gradient)
    return outputs, gradients, {name.removeprefix("_orig_mod."): value for name, value in state.items()}


@pytest.mark.parametrize("ranks, compiled", [(1, False), (2, False), (2, True), (3, False)])
def test_equals_batch_norm_of_the_whole_batch(ranks, compiled, tmp_path):
    outputs, gradients, state = two_steps(make_net(), *make_data())
    answers = run_on_ranks(share, ranks, tmp_path, compiled)
    for i, whole in enumerate(outputs):
        torch.testing.assert_close(torch.cat([answer[0][i] for answer in answers]), whole)
    for _, theirs, their_state in answers:
        for ours, theirs_too in zip(gradients, theirs, strict=True):
            torch.testing.assert_close(theirs_too, ours)
        assert their_state.keys() == state.keys()
        for name, value in state.items():
            torch.testing.assert_close(their_state[name], value, msg=name)


def low_precision():
    layer = SyncBatchNorm2d(nn.BatchNorm2d(3)).to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = x.contiguous(memory_format=torch.channels_last)
    before = layer.running_mean.clone()
    layer.eval()
    still = layer(x.float())
    same = torch.equal(layer.running_mean, before)
    layer.train()
    return layer(x), still, same


def test_bfloat16_channels_last_and_eval_mode(tmp_path):
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    for y, still, same in run_on_ranks(low_precision, 2, tmp_path):
        assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y, nn.BatchNorm2d(3)(x))
        torch.testing.assert_close(still, nn.BatchNorm2d(3).eval()(x.float()))
        assert same


SHAPES = {1: (3, 4), 2: (3, 4, 2, 5), 3: (3, 4, 2, 3, 2), "1, with a length": (3, 4, 6)}


def of_any_dimensions():
    found = []
    for kind, shape in SHAPES.items():
        torch.manual_seed(0)
        net = nn.Sequential({1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[int(str(kind)[0])](4)).double()
        synchronise_batch_norm(net)
        g = torch.Generator().manual_seed(distributed.rank())
        found.append((net(torch.randn(shape, generator=g, dtype=torch.float64)).detach(), net[0].running_var))
    return found


def test_layers_of_one_and_three_dimensions(tmp_path):
    answers = run_on_ranks(of_any_dimensions, 2, tmp_path)
    for i, (kind, shape) in enumerate(SHAPES.items()):
        x = [torch.randn(shape, generator=torch.Generator().manual_seed(r), dtype=torch.float64) for r in range(2)]
        layer = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[int(str(kind)[0])](4).double()
        whole = layer(torch.cat(x))
        torch.testing.assert_close(torch.cat([answer[i][0] for answer in answers]), whole)
        torch.testing.assert_close(answers[0][i][1], layer.running_var)
