import copy

import pytest
import torch
from torch import nn

from cmim.models.batch_norm import batch_norm_mode
from cmim.models.build import build_segmenter
from cmim.settings import IMAGENET_MEAN, IMAGENET_STD, ModelSettings

TINY = ModelSettings(encoder="test_byobnet", weights="none", decoder_width=8, low_level_width=4, atrous_rates=(1, 2))


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


class Stack(nn.Module):
    """BatchNorm of PyTorch and of timm, and a normalisation that no mode concerns."""

    def __init__(self):
        super().__init__()
        from timm.layers import BatchNormAct2d

        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 3),
            BatchNormAct2d(4),
            nn.GroupNorm(2, 4),
            nn.Conv2d(4, 2, 1),
        )
        self.double().train()

    def forward(self, x):
        return self.layers(x).sin()


def batches():
    g = torch.Generator().manual_seed(1)
    return [torch.randn(3, 3, 9, 9, generator=g, dtype=torch.float64) * s + s for s in (1, 2, 3)]


def step(net, mode, order="clean first"):
    """One clean and one masked pass before a single backward."""
    clean, masked, _ = batches()

    def loss():
        if order == "clean first":
            total = net(clean).square().mean()
            with batch_norm_mode(net, mode):
                return total + net(masked).mean()
        with batch_norm_mode(net, mode):
            total = net(masked).mean()
        return total + net(clean).square().mean()

    return loss


def trained(net):
    """A copy whose running statistics are not the initial ones."""
    net = copy.deepcopy(net)
    with torch.no_grad():
        net(batches()[2])
    return net


def norms(net):
    return [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]


def buffers(net):
    return {k: v.clone() for k, v in net.named_buffers()}


def test_parts_compose(images):
    net = build_segmenter(TINY, 5, IMAGENET_MEAN, IMAGENET_STD).eval()
    assert [n for n, _ in net.named_children()] == ["encoder", "decoder", "head"]
    maps = net.encode(images)
    assert isinstance(maps, tuple) and maps[-1].shape == (2, net.encoder_channels, 4, 4)
    feature = net.decode(maps)
    assert feature.shape == (2, net.feature_channels, 16, 16)
    assert (net.feature_channels, net.feature_stride, net.encoder_stride, net.align_corners) == (8, 4, 16, True)
    logits = net.classify(feature)
    assert logits.shape == (2, 5, 16, 16)
    assert torch.equal(net(images), logits)


def test_batch_mode_is_the_train_mode_without_its_updates():
    net = trained(Stack())
    reference = copy.deepcopy(net)
    _, masked, _ = batches()
    before = buffers(net)
    with batch_norm_mode(net, "batch"):
        out = net(masked)
    assert torch.equal(out, reference(masked))  # batch statistics ...
    assert all(torch.equal(before[k], v) for k, v in net.named_buffers())  # ... and nothing counted


def test_shared_mode_changes_nothing():
    net = trained(Stack())
    reference = copy.deepcopy(net)
    _, masked, _ = batches()
    with batch_norm_mode(net, "shared"):
        out = net(masked)
    assert torch.equal(out, reference(masked))
    assert all(torch.equal(v, reference.get_buffer(k)) for k, v in net.named_buffers())
    assert not torch.equal(net.layers[1].running_mean, trained(Stack()).layers[1].running_mean)


def test_running_mode_is_the_eval_mode_of_batch_norm_only():
    net = trained(Stack())
    net.layers.append(nn.Dropout(1.0))
    _, masked, _ = batches()
    before = buffers(net)
    with batch_norm_mode(net, "running"):
        assert net.training and net.layers[-1].training
        assert not net(masked).any()
    assert all(torch.equal(before[k], v) for k, v in net.named_buffers())
    net.layers[-1].p = 0.0
    with batch_norm_mode(net, "running"):
        out = net(masked)
    assert torch.equal(out, net.eval()(masked))


@pytest.mark.parametrize("mode", ["batch", "shared", "running"])
def test_everything_is_restored_even_after_an_error(mode):
    net = Stack()
    norms(net)[1].eval()  # a frozen layer stays frozen
    state = [(m.training, m.track_running_stats, m.momentum, m.running_mean, m.running_var) for m in norms(net)]
    names = list(net.state_dict())
    with pytest.raises(RuntimeError, match="stop"), batch_norm_mode(net, mode):
        raise RuntimeError("stop")
    for m, (*flags, mean, variance) in zip(norms(net), state, strict=True):
        assert [m.training, m.track_running_stats, m.momentum] == flags
        assert m.running_mean is mean and m.running_var is variance
    assert list(net.state_dict()) == names


def test_frozen_layers_keep_their_running_statistics():
    net = trained(Stack())
    for m in norms(net):
        m.eval()
    _, masked, _ = batches()
    expected = net(masked)
    for mode in ("batch", "shared", "running"):
        with batch_norm_mode(net, mode):
            assert torch.equal(net(masked), expected)


def test_unknown_mode():
    with (
        pytest.raises(ValueError, match="'frozen', expected 'batch', 'shared' or 'running'"),
        batch_norm_mode(Stack(), "frozen"),
    ):
        pass


@pytest.mark.parametrize("order", ["clean first", "masked first"])
@pytest.mark.parametrize("mode", ["batch", "shared", "running"])
def test_two_passes_before_one_backward(mode, order):
    """Gradients are those of the two passes apart, each on a copy of its own: neither pass spoils the other's."""
    clean, masked, _ = batches()
    net = trained(Stack())
    step(net, mode, order)().backward()
    net_of_clean, net_of_masked = trained(Stack()), trained(Stack())
    if mode == "running":
        for m in norms(net_of_masked):
            m.eval()
        if order == "clean first":  # the masked pass sees the statistics that the clean pass has just updated
            for m, updated in zip(norms(net_of_masked), norms(net), strict=True):
                m.load_state_dict(updated.state_dict())
    net_of_clean(clean).square().mean().backward()
    net_of_masked(masked).mean().backward()
    for p, q, r in zip(net.parameters(), net_of_clean.parameters(), net_of_masked.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad + r.grad)


def all_modes(net):
    """Every mode between two clean passes, before a single backward."""
    clean, masked, other = batches()

    def loss():
        total = net(clean).square().mean()
        for mode in ("running", "batch", "shared"):
            with batch_norm_mode(net, mode):
                total = total + net(masked).mean()
        return total + net(other).square().mean()

    return loss


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_modes_inside_a_compiled_graph(backend):
    torch._dynamo.reset()
    eager, net = trained(Stack()), trained(Stack())
    compiled = torch.compile(all_modes(net), fullgraph=True, backend=backend)
    for _ in range(2):  # the second call must find the layers as the first did
        loss, expected = compiled(), all_modes(eager)()
        loss.backward()
        expected.backward()
        torch.testing.assert_close(loss, expected)
    for p, q in zip(net.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    for name, buffer in net.named_buffers():
        torch.testing.assert_close(buffer, eager.get_buffer(name))
    assert all(m.training and m.track_running_stats for m in norms(net))


def test_the_whole_segmenter_compiles(images):
    torch._dynamo.reset()
    net = build_segmenter(TINY, 3, IMAGENET_MEAN, IMAGENET_STD).double()
    eager = copy.deepcopy(net)
    images = images.double()

    def loss(net):
        with batch_norm_mode(net, "batch"):
            return net(images).square().mean()

    got, want = torch.compile(loss, fullgraph=True, backend="aot_eager")(net), loss(eager)
    got.backward()
    want.backward()
    torch.testing.assert_close(got, want)
    for p, q in zip(net.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
