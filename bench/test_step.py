"""A whole training step: forward, backward and optimiser, on a batch that lies on the device.

The `unimatch` preset against the field's usual loop (`unimatch_baseline.py`) on the same network, batch and crop, after
their losses have been found equal; and the `cmim` preset against `unimatch`. Ours run as the trainer runs them:
channels-last, and on CUDA compiled in bfloat16; the usual loop in float32 (TF32 as PyTorch has it: off for products, on
for cuDNN's convolutions). `--profile-steps FOLDER` writes a profiler trace of a step of each.
"""

import copy
from pathlib import Path

import pytest
import torch

from bench import inputs
from bench.comparison import OURS
from bench.inputs import DEVICE, DRY_RUN, ON_GPU, class_map, generator, token_mask
from bench.unimatch_baseline import IGNORED, UsualLoop

pytest.importorskip("pydantic", reason="the step is the trainer's, whose settings need pydantic")
from cmim.config import config_from
from cmim.engine.device import autocast, to_device
from cmim.engine.optimizer import build_optimizer
from cmim.method.objective import Objective
from cmim.method.perturbations import drop_channels

CLASSES = 21
if DRY_RUN and not ON_GPU:
    CROP, ENCODER, BATCHES = 64, "test_resnet.r160_in1k", ((2, 2),)
    MASK, RECONSTRUCTION = {"block": 16}, {"width": 32, "depth": 2}
elif ON_GPU:
    CROP, ENCODER, BATCHES = 320, "resnet101s.gluon_in1k", ((8, 8), (4, 4))
    MASK, RECONSTRUCTION = {}, {}
else:
    CROP, ENCODER, BATCHES = 160, "tf_efficientnet_lite0.in1k", ((4, 4),)
    MASK, RECONSTRUCTION = {}, {"width": 128, "depth": 4}
DTYPE = inputs.DTYPE if torch.bfloat16 == inputs.DTYPE else None
USUAL = "the usual loop"


def config_of(preset):
    values = {
        "data": {"format": "voc", "root": ".", "split": ".", "crop": CROP},
        "model": {"encoder": ENCODER, "weights": "none"},
        "method": {"preset": preset, "tau": 0.3},  # low enough that pixels of an untrained network pass
        "mask": MASK,
        "reconstruction": RECONSTRUCTION,
    }
    return config_from(values, "the benchmark")


def batch_of(labelled, unlabelled):
    """Random images with maps of blobs, as `cmim.data.batches.TrainBatches` gives them."""
    g = generator()
    pixels = lambda *shape: torch.randint(256, (*shape, CROP, CROP), generator=g, device=DEVICE, dtype=torch.uint8)  # noqa: E731
    label = class_map(labelled, CROP // 16, CLASSES).repeat_interleave(16, 1).repeat_interleave(16, 2)
    corner = torch.randint(CROP // 2, (2, unlabelled, 2), generator=g, device=DEVICE)
    batch = {
        "labelled_image": pixels(labelled, 3),
        "label": torch.where(label < 0, IGNORED, label).to(torch.uint8),
        "weak_image": pixels(unlabelled, 3),
        "valid": torch.ones(unlabelled, CROP, CROP, dtype=torch.bool, device=DEVICE),
        "strong_image": pixels(2, unlabelled, 3),
        "channel_key": torch.arange(unlabelled, device=DEVICE) + 100,
        "box": torch.cat([corner, corner + CROP // 3], dim=2),
    }
    for i, (view, count) in enumerate((("labelled", labelled), ("weak", unlabelled), ("strong", unlabelled))):
        batch[f"{view}_mask"] = token_mask(count, CROP // config_of("cmim").mask.block, seed=i)
    return to_device(batch, DEVICE, channels_last=True)


class Ours:
    """A preset as the trainer runs it."""

    def __init__(self, preset, *, dtype=DTYPE, compile=ON_GPU):
        self.config, self.dtype = config_of(preset), dtype
        torch.manual_seed(0)
        self.objective = Objective(self.config, CLASSES).to(DEVICE, memory_format=torch.channels_last).train()
        self.compute = torch.compile(self.objective, fullgraph=True) if compile else self.objective
        self.optimizer = build_optimizer(self.config.optimizer, self.objective, 1e-6)  # the same work at every step
        self.ramp = torch.ones((), device=DEVICE)

    def loss(self, batch):
        with autocast(DEVICE, self.dtype):
            return self.compute(batch, self.ramp).loss

    def step(self, batch):
        self.loss(batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def usual(batch, *, dropout=None):
    """The usual loop on the same weights, and its batch."""
    ours = Ours("unimatch", dtype=None, compile=False)
    net = copy.deepcopy(ours.objective.net).to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-6, momentum=0.9, weight_decay=1e-4)
    normalise = lambda x: ours.objective.net.normalise(x).contiguous().float()  # noqa: E731
    theirs = {
        "labelled": normalise(batch["labelled_image"]), "label": batch["label"].long(), "valid": batch["valid"],
        "weak": normalise(batch["weak_image"]), "strong": [normalise(x) for x in batch["strong_image"]], "box": batch["box"],
    }  # fmt: skip
    layer = torch.nn.Dropout2d(0.5)
    return UsualLoop(net, optimizer, tau=0.3, dropout=dropout or (lambda maps: [layer(m) for m in maps])), theirs


def beside_of(preset, batch):
    """A step of ours to be timed in turn with another; None on CUDA, where device times do not need it."""
    if ON_GPU:
        return None
    ours = Ours(preset)
    return lambda: ours.step(batch)


def host_waits(step):
    """How often a step reads a value of the device, compiled parts aside."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.number += op.name() in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")
            return op(*args, **(kwargs or {}))

    with Count() as count:
        step()
    return count.number


@pytest.mark.parametrize("labelled, unlabelled", BATCHES)
def test_losses_are_equal(labelled, unlabelled):
    batch = batch_of(labelled, unlabelled)
    loop, theirs = usual(batch, dropout=lambda maps: drop_channels(maps, batch["channel_key"], 0.5))
    ours = Ours("unimatch", dtype=None, compile=False)
    with torch.no_grad():
        torch.testing.assert_close(loop.loss(theirs), ours.loss(batch), rtol=1e-2 if DTYPE else 1e-4, atol=1e-4)


@pytest.mark.parametrize("labelled, unlabelled", BATCHES)
@pytest.mark.parametrize("name", [OURS, USUAL])
def test_unimatch(labelled, unlabelled, name, timed, request):
    batch, beside = batch_of(labelled, unlabelled), None
    if name == USUAL:
        loop, theirs = usual(batch)
        step, beside = lambda: loop.step(theirs), beside_of("unimatch", batch)
        waits = host_waits(step)
    else:
        uncompiled = Ours("unimatch", compile=False)
        waits = host_waits(lambda: uncompiled.step(batch))
        ours = Ours("unimatch")
        step = lambda: ours.step(batch)  # noqa: E731
    group = f"step, unimatch; batch {labelled} + {unlabelled}, crop {CROP}"
    timed(group, name, step, [], capture=False, ours=beside, host_waits=waits, images=labelled + unlabelled)
    trace(step, f"unimatch {name} {labelled}", request)


@pytest.mark.parametrize("labelled, unlabelled", BATCHES)
@pytest.mark.parametrize("preset", ["cmim", "unimatch"])
def test_presets(labelled, unlabelled, preset, timed, request):
    batch, ours = batch_of(labelled, unlabelled), Ours(preset)
    step = lambda: ours.step(batch)  # noqa: E731
    group = f"step, cmim; batch {labelled} + {unlabelled}, crop {CROP}"
    name, beside = (OURS, None) if preset == "cmim" else ("the unimatch preset", beside_of("cmim", batch))
    about = dict(images=labelled + unlabelled, comparable=preset == "cmim")
    timed(group, name, step, [], capture=False, ours=beside, **about)
    trace(step, f"{preset} {labelled}", request)


def trace(step, name, request):
    """A profile of a step: on CUDA its largest parts go into the recorder's line; `--profile-steps` keeps all of it."""
    folder = request.config.getoption("--profile-steps")
    if not (folder or ON_GPU):
        return
    with torch.profiler.profile() as profile:
        step()
        if ON_GPU:
            torch.cuda.synchronize()
    if ON_GPU:
        request.node.user_properties.append(("parts", largest_parts(profile)))
    if folder:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(path / f"{name}.json"))
        order = "device_time_total" if ON_GPU else "self_cpu_time_total"
        (path / f"{name}.txt").write_text(profile.key_averages().table(sort_by=order, row_limit=40))


def largest_parts(profile, most=40):
    """[kernel, microseconds, launches] of a profile on CUDA, the longest first, and their total."""
    kernels = [e for e in profile.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels.sort(key=lambda e: -e.self_device_time_total)
    total = ["all kernels", sum(e.self_device_time_total for e in kernels), sum(e.count for e in kernels)]
    return [total] + [[e.key[:100], e.self_device_time_total, e.count] for e in kernels[:most]]
