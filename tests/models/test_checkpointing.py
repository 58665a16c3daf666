"""Activation checkpointing: the same numbers to the bit, in less memory."""

from contextlib import contextmanager
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from cmim import distributed
from cmim.config import config_from
from cmim.errors import UserError
from cmim.method.objective import Objective
from cmim.models import build
from cmim.models.batch_norm import synchronise_batch_norm
from cmim.models.checkpointing import checkpoint_encoder
from cmim.models.reconstruction import build_reconstruction
from cmim.settings import ReconstructionSettings
from tests.plain_objective import CLASSES, make_batch, make_config, ramp
from tests.ranks import run_on_ranks
from tests.tiny_runs import read_metrics, run_tiny

MODELS = {
    "resnet": {"encoder": "test_resnet"},
    "efficientnet": {"encoder": "test_efficientnet"},
    "convnext": {"encoder": "test_convnext"},
    "vit": {"arch": "dpt", "encoder": "test_vit"},
    "smp": {"arch": "smp:unet/mobilenet_v2"},
    "smp-timm": {"arch": "smp:unet/tu-test_resnet"},
}


def network(checkpointing, **model):
    torch.manual_seed(0)
    settings = config_from(
        {"data": {"root": "unused"}, "model": {"weights": "none", "checkpointing": checkpointing} | model}, "test"
    ).model
    return build.build_segmenter(settings, CLASSES, (0.5,) * 3, (0.2,) * 3).train()


@contextmanager
def keeping():
    """The bytes of each memory, by its address, that is kept for the backward pass of what is computed inside."""
    kept = {}

    def keep(tensor):
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def gradients(net, seed=1):
    """Gradients and buffers after a pass through the encoder, and the bytes that it kept for the backward pass."""
    side = 8 * net.encoder_stride if net.size_multiple == 1 else 7 * net.size_multiple
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(seed)
    with keeping() as kept:
        maps = net.encode(images)
    sum(m.square().mean() for m in maps).backward()
    found = {name: p.grad for name, p in net.encoder.named_parameters()}
    return found, dict(net.named_buffers()), sum(kept.values())


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert (value is None) == (theirs[name] is None) and (value is None or torch.equal(value, theirs[name])), name


@pytest.mark.parametrize("name", MODELS)
def test_gradients_and_buffers_are_equal_to_the_bit_and_less_is_kept(name):
    plain, checkpointed = (network(c, **MODELS[name]) for c in (False, True))
    assert_equal(dict(checkpointed.state_dict()), dict(plain.state_dict()))
    (expected, buffers, much), (found, after, little) = gradients(plain), gradients(checkpointed)
    assert_equal(found, expected)
    assert_equal(after, buffers)
    assert little < 0.5 * much


class Stage(nn.Module):
    def __init__(self, overwrites=False):
        super().__init__()
        self.convolution, self.norm, self.dropout = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.5)
        self.overwrites, self.calls = overwrites, 0

    def forward(self, x):
        self.calls += 1
        x = x.relu_() if self.overwrites else x
        return self.dropout(self.norm(self.convolution(x)).sigmoid())


def test_dropout_repeats_and_running_statistics_are_updated_once():
    torch.manual_seed(0)
    plain = nn.Sequential(Stage(), nn.ModuleList([Stage()])[0]).train()
    checkpointed = deepcopy(plain)
    checkpoint_encoder(checkpointed, "it")
    x, found = torch.randn(2, 3, 4, 4), []
    for encoder in (plain, checkpointed):
        torch.manual_seed(1)
        encoder(x).square().sum().backward()
        found.append({name: p.grad for name, p in encoder.named_parameters()} | dict(encoder.named_buffers()))
    assert_equal(*found)
    assert [stage.calls for stage in (*plain, *checkpointed)] == [1, 1, 2, 2]
    assert checkpointed[0].norm.num_batches_tracked == 1


def test_every_backward_pass_begins_at_the_statistics_of_the_forward_pass():
    """Of which a synchronised layer makes use."""
    encoder, seen = nn.Sequential(Stage(), Stage()), []
    encoder[0].norm.register_forward_pre_hook(lambda layer, inputs: seen.append(layer.running_mean.clone()))
    checkpoint_encoder(encoder, "it")
    loss = encoder(torch.randn(2, 3, 4, 4)).square().sum()
    for again in (True, False):
        loss.backward(retain_graph=again)
    assert len(seen) == 3 and torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    assert encoder[0].norm.num_batches_tracked == 1 and encoder[0].norm.running_mean.any()


def test_a_copy_has_stages_of_its_own_and_without_gradients_nothing_is_kept():
    encoder = nn.Sequential(Stage(), Stage())
    checkpoint_encoder(encoder, "it")
    copy = deepcopy(encoder).eval()
    assert copy[0].forward.stage is copy[0]
    copy(torch.zeros(1, 3, 2, 2)).sum().backward()
    with torch.no_grad():
        encoder(torch.zeros(2, 3, 2, 2))
    assert (copy[0].calls, encoder[0].calls) == (1, 1)


def test_an_encoder_that_cannot_be_checkpointed_is_refused():
    with pytest.raises(UserError, match=r"model.checkpointing: it has no stages to checkpoint; leave it out"):
        checkpoint_encoder(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), "it")
    encoder = nn.Sequential(Stage(), Stage(overwrites=True))
    checkpoint_encoder(encoder, "it")
    with pytest.raises(UserError, match=r"Stage of the encoder overwrites its input, which is needed again; leave it out"):
        encoder(torch.zeros(2, 3, 2, 2))


REAL = {"model__encoder": "test_resnet", "model__weights": "none", "model__decoder_width": 8, "model__output_stride": 16}


def step_of(config, ranks=1):
    torch.manual_seed(0)
    objective = Objective(config, CLASSES)
    objective.ranks = ranks
    if ranks > 1:
        synchronise_batch_norm(objective.net)
    batch = make_batch(config, seed=3 + distributed.rank())
    output = objective(batch, ramp(), gradients=True)
    output.loss.backward()
    values = {name: p.grad for name, p in objective.named_parameters()} | dict(objective.named_buffers())
    return values | {"loss": output.loss.detach()} | output.figures


@pytest.mark.parametrize("mode", ["batch", "shared", "running"])
def test_a_step_is_equal_in_every_mode_of_batch_norm(mode):
    """Three passes through the encoder; those of the masked views have other modes, which are gone when backward begins."""
    options = REAL | {"mim__batch_norm": mode, "teacher__kind": "ema"}
    plain, checkpointed = (step_of(make_config("cmim", **options, model__checkpointing=c)) for c in (False, True))
    assert_equal(checkpointed, plain)


@pytest.mark.parametrize("kind", ["conv", "attention"])
@pytest.mark.parametrize("encoder", [False, True])
def test_a_step_is_equal_with_a_checkpointed_reconstruction(kind, encoder):
    options = REAL | {"reconstruction__decoder": kind, "reconstruction__width": 16, "reconstruction__num_heads": 2}
    plain, checkpointed = (
        step_of(make_config("cmim", **options, reconstruction__checkpointing=c, model__checkpointing=c and encoder))
        for c in (False, True)
    )
    assert_equal(checkpointed, plain)


@pytest.mark.parametrize("kind", ["conv", "attention"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_reconstruction_keeps_less(kind, compiled):
    """A block's MLP keeps ten maps without, and one with it."""
    kept, grads = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        settings = ReconstructionSettings(decoder=kind, width=32, num_heads=2, depth=3, checkpointing=checkpointing)
        decoder = build_reconstruction(settings, 8, 2, CLASSES)
        run = torch.compile(decoder, fullgraph=True, backend="aot_eager") if compiled else decoder
        labels = torch.zeros(2, 8, 8, dtype=torch.int32)
        with keeping() as tensors:
            pixels = run(torch.ones(2, 8, 8, 8), labels, labels > 0)
        kept.append(sum(tensors.values()) / (2 * 8 * 8 * 32 * 4 * 3))  # maps of a block
        pixels.square().sum().backward()
        grads.append({name: p.grad for name, p in decoder.named_parameters()})
        assert not torch.equal(pixels, torch.zeros_like(pixels))
    assert_equal(grads[1], grads[0])
    assert kept[0] - kept[1] > 8


def test_a_reconstruction_called_with_other_weights():
    """As torch.func.functional_call does it: they are the module's in the forward pass and no longer in backward."""
    grads = []
    for checkpointing in (False, True):
        settings = ReconstructionSettings(width=16, depth=2, checkpointing=checkpointing)
        decoder = build_reconstruction(settings, 8, 2, CLASSES)
        generator = torch.Generator().manual_seed(0)
        weights = {n: torch.randn(p.shape, generator=generator).requires_grad_() for n, p in decoder.named_parameters()}
        labels = torch.zeros(2, 8, 8, dtype=torch.int32)
        pixels = functional_call(decoder, weights, (torch.ones(2, 8, 8, 8), labels, labels > 0))
        pixels.square().sum().backward()
        grads.append({name: w.grad for name, w in weights.items()})
    assert_equal(grads[1], grads[0])


def test_a_reconstruction_reads_no_random_state(monkeypatch):
    """That of a GPU waits for the device, and in a CUDA graph it is an error."""

    def refuse(*arguments):
        raise AssertionError("the state was read")

    monkeypatch.setattr(torch, "get_rng_state", refuse)
    decoder = build_reconstruction(ReconstructionSettings(width=16, depth=1, checkpointing=True), 8, 2, CLASSES)
    labels = torch.zeros(1, 4, 4, dtype=torch.int32)
    decoder(torch.ones(1, 8, 4, 4), labels, labels > 0).sum().backward()
    assert all(p.grad is not None for p in decoder.blocks.parameters())


def both_steps():
    return [step_of(make_config("cmim", **REAL, model__checkpointing=c), ranks=2) for c in (False, True)]


def test_a_step_is_equal_on_two_processes(tmp_path):
    for plain, checkpointed in run_on_ranks(both_steps, 2, tmp_path):
        assert_equal(checkpointed, plain)


def test_a_run_is_the_same(tmp_path):
    lines = []
    for checkpointing in (False, True):
        run = run_tiny(
            tmp_path / str(checkpointing), train__steps=2, model__checkpointing=checkpointing, train__picture_every=2
        )
        lines.append([(line["step"], line.get("loss"), line.get("miou")) for line in read_metrics(run)])
    assert lines[0] == lines[1]


@pytest.mark.parametrize(
    "options, said",
    [
        ({"train__compile": True}, "model.checkpointing does not work with train.compile; leave one of them away"),
        ({"model__freeze_encoder": True}, "which model.freeze_encoder leaves out; leave one of them away"),
    ],
)
def test_what_does_not_go_with_it_is_refused(options, said):
    with pytest.raises(UserError, match=said):
        make_config("cmim", model__checkpointing=True, **options)
