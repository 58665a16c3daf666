"""Class-wise decoding and its loss: one pass against a pass per class, against a decoder that knows no classes, and, for the
attention decoder, against the same pass with each other value of `reconstruction.attention`; also what activation
checkpointing costs, and what it saves.

Time and peak memory, forward and backward, for growing numbers of classes and of tokens. The decoders are the trainer's,
with its default width and depth (on a CPU 128 and 4), on their own features.
"""

import copy
import functools
import importlib.util
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from bench.comparison import OURS, Comparison, prepared
from bench.inputs import DEVICE, DRY_RUN, DTYPE, ON_GPU, class_map, generator, normal, token_mask

pytest.importorskip("pydantic", reason="the decoders are the trainer's, whose settings need pydantic")
from cmim.models.attention import ATTENTIONS
from cmim.models.reconstruction import build_reconstruction, decode_per_class
from cmim.settings import ReconstructionSettings
from cmim_kernels import masked_patch_loss

PATCH = 4
if DRY_RUN and not ON_GPU:
    BATCH, CHANNELS, SIDE, SIDES, CLASSES = 1, 32, 12, (12, 20), (2, 21)
    SETTINGS = dict(width=32, depth=2, num_heads=2)
elif ON_GPU:
    BATCH, CHANNELS, SIDE, SIDES, CLASSES = 8, 256, 80, (40, 80, 160), (2, 21, 150, 1000)
    SETTINGS = {}
else:
    BATCH, CHANNELS, SIDE, SIDES, CLASSES = 2, 256, 40, (20, 40), (2, 21, 150, 1000)
    SETTINGS = dict(width=128, depth=4, num_heads=4)
LOW_PRECISION = torch.bfloat16 == DTYPE
BLIND, CHECKPOINTED = "a decoder without classes", "the same with checkpointing"
EVERY, PRESENT = "a pass for every class", "a pass for each class present"
BY_OTHERS = {f"attention by {name}": name for name in ATTENTIONS if name != "class_attention"}
MOST_PASSES = 30  # a batch of the large shapes with more does not fit in memory


def cases():
    for decoder in ("conv", "attention"):
        for classes in CLASSES:
            yield decoder, classes, SIDE
        for side in SIDES:
            if side != SIDE:
                yield decoder, 21, side


class _PerClass(nn.Module):
    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, features, labels, masked):
        return decode_per_class(self.decoder, features, labels, masked)


class _PerClassPresent(_PerClass):
    """Looks at the labels first, which waits for the device."""

    def forward(self, features, labels, masked):
        present, index = labels.clamp(min=-1).unique(return_inverse=True)
        first = int((present < 0).sum())  # the ignored ones come first
        decoder = copy.copy(self.decoder)
        decoder.num_classes = len(present) - first
        return decode_per_class(decoder, features, index - first, masked)


def is_usable(attention):
    """Whether a value of `reconstruction.attention` computes here what is compared."""
    if attention == "xformers":
        return ON_GPU and importlib.util.find_spec("xformers") is not None
    return attention == "sdpa" or (ON_GPU and LOW_PRECISION)


@functools.lru_cache(maxsize=1)
def comparison_of(decoder, classes, side):
    torch._dynamo.reset()
    torch.manual_seed(0)
    settings = ReconstructionSettings(decoder=decoder, **SETTINGS)
    net = build_reconstruction(settings, CHANNELS, PATCH, classes).to(DEVICE)
    blind = copy.copy(net)
    blind.num_classes = 1
    checkpointed = build_reconstruction(settings.model_copy(update={"checkpointing": True}), CHANNELS, PATCH, classes)
    features = normal(BATCH, CHANNELS, side, side).to(memory_format=torch.channels_last)
    labels, masked = class_map(BATCH, side, classes), token_mask(BATCH, side)
    image = torch.randint(
        256, (BATCH, 3, side * PATCH, side * PATCH), generator=generator(3), device=DEVICE, dtype=torch.uint8
    ).to(memory_format=torch.channels_last)
    names, parameters = zip(*net.named_parameters(), strict=True)

    def with_loss(module, num_classes, prefix="", *, blind=False):
        def run(features, *rest):
            *values, labels, one_class, masked, image = rest
            labels = one_class if blind else labels
            inputs = dict(zip((prefix + name for name in names), values, strict=True))
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=LOW_PRECISION):
                pred = functional_call(module, inputs, (features, labels, masked))
            return masked_patch_loss(
                pred, image, masked.flatten(1), labels.flatten(1), num_classes,
                patch_size=PATCH, mean=[0.5] * 3, std=[0.25] * 3,
            ).loss  # fmt: skip

        return run

    one_class = torch.where(labels >= 0, 0, -1).int()
    baselines = {
        OURS: with_loss(net, classes),
        PRESENT: with_loss(_PerClassPresent(net), classes, "decoder."),
        EVERY: with_loss(_PerClass(net), classes, "decoder."),
        BLIND: with_loss(blind, 1, blind=True),
        CHECKPOINTED: with_loss(checkpointed.to(DEVICE), classes),
    }
    for title, name in BY_OTHERS.items():
        if decoder == "attention" and is_usable(name):
            other = copy.copy(net)
            other.attention = name
            baselines[title] = with_loss(other, classes)
    return Comparison(
        [features, *(p.detach() for p in parameters)], baselines, constants=[labels, one_class, masked, image],
        tolerance=0.1 if LOW_PRECISION else 1e-3, unchecked={BLIND}, eager={PRESENT, "attention by xformers"},
    )  # fmt: skip


@pytest.mark.parametrize("decoder, classes, side", list(cases()))
@pytest.mark.parametrize("name", [OURS, EVERY, BLIND, PRESENT, CHECKPOINTED, *BY_OTHERS])
def test_decoder(decoder, classes, side, name, timed):
    if name == EVERY and classes > MOST_PASSES:
        pytest.skip("does not fit in memory")
    if name == CHECKPOINTED and (classes, side) != (21, SIDE):
        pytest.skip("measured at one shape")
    if name in BY_OTHERS and (decoder != "attention" or not is_usable(BY_OTHERS[name])):
        pytest.skip("not for this decoder, or not here")
    if name in (EVERY, PRESENT, "attention by sdpa") and decoder == "attention" and side > 80:
        pytest.skip("attention between all pairs of tokens does not fit in memory")
    comparison = comparison_of(decoder, classes, side)
    rival = name not in (BLIND, CHECKPOINTED)
    in_turn = not rival and not ON_GPU  # with these the ratio is near 1
    beside = prepared(comparison, OURS, backward=True) if in_turn else nullcontext()
    with beside as ours, prepared(comparison, name, backward=True) as function:
        group = f"decode and loss, {decoder}; K {classes}, {side} x {side} tokens; forward and backward"
        capture, about = (
            name not in comparison.eager,
            dict(comparable=rival, decoder=decoder, classes=classes, tokens=side * side),
        )
        timed(group, name, function, comparison.arguments, capture=capture, ours=ours, **about)


@pytest.mark.parametrize("decoder", ["conv", "attention"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_for_backward(decoder, checkpointing, record_property):
    """What the default decoder keeps of 24 views of the VOC shape in bf16, counted without computing it, on any machine."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # which also keeps its address from being used again
        return tensor

    with FakeTensorMode(), torch.device(DEVICE), torch.autocast(DEVICE.type, torch.bfloat16):
        net = build_reconstruction(ReconstructionSettings(decoder=decoder, checkpointing=checkpointing), 256, PATCH, 21)
        features = torch.empty(24, 256, 80, 80, dtype=torch.bfloat16).to(memory_format=torch.channels_last).requires_grad_()
        labels = torch.empty(24, 80, 80, dtype=torch.int32)
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            net(features, labels, torch.empty(24, 80, 80, dtype=torch.bool))
        of_net = {p.untyped_storage()._cdata for p in net.parameters()}
    record_property("decoder", decoder)
    record_property("checkpointing", checkpointing)
    record_property("kept_mib", round(sum(s.nbytes() for key, s in kept.items() if key not in of_net) / 2**20))
