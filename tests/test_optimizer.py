"""Optimisers: those of PyTorch, of timm's factory and of apex, with groups, schedule, clipping and exact resume."""

import math
import sys
from types import SimpleNamespace

import pytest
import timm.optim
import torch
from torch import nn

from cmim import checkpoint
from cmim.config import config_from
from cmim.engine.optimizer import build_optimizer, check_optimizer, set_learning_rate
from cmim.engine.trainer import Trainer
from cmim.errors import UserError
from cmim.models.build import build_segmenter
from cmim.settings import ModelSettings, OptimizerSettings
from tests.test_resume import assert_same_run, assert_same_state
from tests.tiny_runs import read_metrics, run_tiny

INFO = {name: timm.optim.get_optimizer_info(name) for name in timm.optim.list_optimizers()}
OF_PACKAGES = {name for name, info in INFO.items() if isinstance(info.opt_class, str)}
OF_TORCH = sorted(INFO.keys() - OF_PACKAGES - {"adahessian"})


def config_of(name, **sections):
    return config_from({"data": {"format": "shapes"}, "optimizer": {"name": name}} | sections, "test")


class Small(nn.Module):
    """The parts of an objective that an optimiser sees; `late` gets its first gradient in step 4."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Module()
        self.net.encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.net.head = nn.Conv2d(4, 2, 1)
        self.late = nn.Linear(3, 3)

    def train_step(self, optimizer, step, scale=1.0):
        g = torch.Generator().manual_seed(step)
        loss = self.net.head(self.net.encoder(torch.randn(2, 3, 6, 6, generator=g))).square().mean()
        if step >= 4:
            loss = loss + self.late(torch.randn(2, 3, generator=g)).square().mean()
        (scale * loss).backward()
        torch.manual_seed(step)  # as the trainer does
        set_learning_rate(optimizer, 1 - step / 12)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if "kron" in n else ()) for n in OF_TORCH])
def test_every_optimizer_goes_on_from_a_checkpoint_to_the_bit(name, tmp_path):
    config = config_of(name, train={"device": "cpu"})
    check_optimizer(config, False)
    whole, again = Small(), Small()
    optimizer, other = (build_optimizer(config.optimizer, module, 0.01) for module in (whole, again))
    start = [p.clone() for p in whole.parameters()]
    for step in range(8):
        if step == 3:
            state = {"class_names": [], "net": whole.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoint.save(state, tmp_path / "last.pt")
        whole.train_step(optimizer, step)
    state = checkpoint.load(tmp_path / "last.pt")
    again.load_state_dict(state["net"])
    other.load_state_dict(state["optimizer"])
    for step in range(3, 8):
        again.train_step(other, step)
    assert_same_state(whole.state_dict(), again.state_dict())
    assert_same_state(optimizer.state_dict(), other.state_dict())
    assert all(
        p.isfinite().all() and not torch.equal(p, before) for p, before in zip(whole.parameters(), start, strict=True)
    )


def test_names_are_timms_with_the_settings_and_groups():
    settings = OptimizerSettings(name="nlars", momentum=0.7, weight_decay=0.3, head_lr_factor=4)
    optimizer = build_optimizer(settings, Small(), 0.5)
    assert type(optimizer) is timm.optim.Lars and optimizer.defaults["nesterov"]
    assert [(g["lr"], g["base_lr"], g["momentum"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (0.5, 0.5, 0.7, 0.3), (2.0, 2.0, 0.7, 0.3),
    ]  # fmt: skip


def test_a_corrected_weight_decay_is_relative_to_the_learning_rate_of_its_group():
    optimizer = build_optimizer(OptimizerSettings(name="adamc", weight_decay=0.1, head_lr_factor=10), Small(), 0.01)
    head = optimizer.param_groups[1]["params"][0]
    before, head.grad = head.detach().clone(), torch.zeros_like(head)
    set_learning_rate(optimizer, 0.5)
    optimizer.step()
    torch.testing.assert_close(head.detach(), before * (1 - 0.05**2 / 0.1 * 0.1))


def test_lamb_does_not_clip_by_itself():
    """Its second step depends on the ratio of the gradients, which clipping at 1 would change."""
    weights = []
    for scales in ((1e-3, 1e-1), (1e3, 1e5)):
        module = Small()
        optimizer = build_optimizer(OptimizerSettings(name="lamb"), module, 0.01)
        for step, scale in enumerate(scales):
            module.train_step(optimizer, step, scale)
        weights.append(module.net.head.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "name, said",
    [
        ("lmab", "optimizer.name: timm has no optimiser lmab; did you mean lamb?"),
        ("Lion", "optimizer.name: timm has no optimiser Lion; did you mean lion?"),
        ("?", "optimizer.name: timm has no optimiser ?; did you mean "),
        ("adahessian", "optimizer.name adahessian needs more than gradients (second derivatives"),
        ("bnblion8bit", "optimizer.name bnblion8bit: bitsandbytes is not installed: pip install bitsandbytes; it runs on "
         "CUDA only, and this run is on the CPU; lion needs PyTorch alone"),
    ],
)  # fmt: skip
def test_names_that_cannot_be_used(name, said, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        check_optimizer(config_of(name), False)
    assert str(caught.value).startswith(said)
    with pytest.raises(UserError, match=r"^optimizer\.name"):  # before anything else of a run
        run_tiny(tmp_path / "run", optimizer__name=name, data__format="folder", data__root="nowhere")


class Scheduleless(torch.optim.SGD):
    def eval(self):
        """Switches to the weights for evaluation, as schedule-free optimisers do."""


def test_an_optimizer_with_modes_is_refused(monkeypatch):
    info = SimpleNamespace(second_order=False, opt_class=Scheduleless)
    monkeypatch.setattr(timm.optim, "get_optimizer_info", lambda name: info)
    with pytest.raises(UserError, match="a mode for evaluation"):
        check_optimizer(config_of("lamb"), False)


# The package apex: a stand-in with the interface of NVIDIA's, and what is found in its place.

APPLIER = "class multi_tensor_applier:\n    available = {}\n"
OPTIMIZERS = '''
import torch

class FusedLAMB(torch.optim.Optimizer):
    """Takes the arguments of the one of apex and keeps the number of steps where it does; zero_grad has no option."""

    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, amsgrad=False,
                 adam_w_mode=True, grad_averaging=True, set_grad_none=True, max_grad_norm=1.0, use_nvlamb=False):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, max_grad_norm=max_grad_norm))

    def zero_grad(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is not None:
                    average = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                    average.lerp_(p.grad, 1 / group["step"])
                    p.sub_(average, alpha=group["lr"])

class FusedNovoGrad(FusedLAMB):
    """Keeps norms as tensors in the group."""

    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        super().__init__(params, lr=lr, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            norms = torch.stack([p.grad.norm() for p in group["params"] if p.grad is not None])
            before = group.get("exp_avg_sq", [torch.zeros(0), norms])[1]
            group["exp_avg_sq"] = [torch.zeros(0), 0.9 * before + 0.1 * norms]
            for p, norm in zip([p for p in group["params"] if p.grad is not None], group["exp_avg_sq"][1], strict=True):
                p.sub_(p.grad / norm.clamp(min=1e-8), alpha=group["lr"])
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """package({file: text}): the package apex of these files, in place of any other."""

    def install(files):
        for name, text in {"__init__.py": "", **files}.items():
            path = tmp_path / "packages" / "apex" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path / "packages"))

    for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
        monkeypatch.delitem(sys.modules, name)
    yield install
    for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
        del sys.modules[name]


BUILD = "build NVIDIA's from github.com/NVIDIA/apex with its CUDA extensions"
NVIDIAS = {"optimizers/__init__.py": OPTIMIZERS, "multi_tensor_apply.py": APPLIER.format(True)}


@pytest.mark.parametrize(
    "files, said",
    [
        (None, f"apex is not installed: {BUILD} (PyPI's apex is another package)"),
        (
            {"__init__.py": "raise RuntimeError('it is not imported')", "models.py": ""},
            f"the installed apex is another package of that name: pip uninstall apex, and {BUILD}",
        ),
        (NVIDIAS | {"multi_tensor_apply.py": APPLIER.format(False)}, f"apex is installed without its extensions: {BUILD}"),
        (NVIDIAS | {"multi_tensor_apply.py": "import amp_C"}, f"apex is installed without its extensions: {BUILD}"),
        (NVIDIAS, None),
    ],
)
@pytest.mark.parametrize(
    "name, nearest", [("fusedlamb", "lamb"), ("fusednovograd", "novograd"), ("fusedadamw", "adamw"), ("fusedsgd", "sgd")]
)
def test_what_is_wrong_with_apex_is_one_line(files, said, name, nearest, package, monkeypatch):
    if files is None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    else:
        package(files)
    for on_cuda in (True, False):
        problems = [p for p in (said, None if on_cuda else "it runs on CUDA only, and this run is on the CPU") if p]
        if not problems:
            check_optimizer(config_of(name), on_cuda)
            continue
        with pytest.raises(UserError) as caught:
            check_optimizer(config_of(name), on_cuda)
        assert str(caught.value) == f"optimizer.name {name}: {'; '.join(problems)}; {nearest} needs PyTorch alone"


def test_novograd_of_apex_needs_every_gradient_from_the_start(package):
    package(NVIDIAS)
    with pytest.raises(
        UserError, match=r"it needs every gradient from the first step: set mim.start and method.start to 0; novograd"
    ):
        check_optimizer(config_of("fusednovograd", mim={"start": 0.1}), True)
    check_optimizer(config_of("fusednovograd", mim={"start": 0.1}, method={"preset": "fixmatch"}), True)


def test_arguments_of_the_optimizers_of_apex(package, monkeypatch):
    package(NVIDIAS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # timm asserts it
    optimizer = build_optimizer(OptimizerSettings(name="fusedlamb", weight_decay=0.2, head_lr_factor=3), Small(), 0.5)
    assert type(optimizer).__module__ == "apex.optimizers"
    assert [(g["lr"], g["weight_decay"], g["max_grad_norm"]) for g in optimizer.param_groups] == [
        (0.5, 0.2, math.inf), (1.5, 0.2, math.inf),
    ]  # fmt: skip


def broken_and_whole(tmp_path, monkeypatch, **settings):
    """A run that ends in the middle of step 4 and is resumed, and one that is not disturbed."""
    settings = dict(train__steps=6, train__checkpoint_every=2, train__picture_every=9) | settings
    original = Trainer.update

    def fail(self):
        if self.step == 3:
            raise ZeroDivisionError
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", fail)
        with pytest.raises(ZeroDivisionError):
            run_tiny(tmp_path / "broken", **settings)
    return run_tiny(tmp_path / "broken", "--resume", **settings), run_tiny(tmp_path / "whole", **settings)


@pytest.mark.parametrize("name", ["fusedlamb", "fusednovograd"])
def test_a_run_with_apex_goes_on_to_the_bit(name, package, tmp_path, monkeypatch):
    package(NVIDIAS)

    def build(*arguments, **options):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            return build_optimizer(*arguments, **options)

    monkeypatch.setattr("cmim.engine.start.check_optimizer", lambda *_: None)  # the stand-in runs on the CPU
    monkeypatch.setattr("cmim.engine.trainer.build_optimizer", build)
    runs = broken_and_whole(tmp_path, monkeypatch, optimizer__name=name)
    assert_same_run(*runs)
    groups = checkpoint.load(runs[0].last)["optimizer"]["param_groups"]
    assert ("step" in groups[0]) == (name == "fusedlamb") and ("exp_avg_sq" in groups[0]) == (name == "fusednovograd")


DPT = {
    "model__arch": "dpt", "model__encoder": "test_vit", "model__weights": "none", "method__preset": "supervised",
}  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {
            "optimizer__name": "lamb",
            "optimizer__warmup": 0.5,
            "train__clip_grad": 0.5,
            "train__accumulate": 2,
            "method__preset": "supervised",
        },
        {"optimizer__name": "muon", "mim__start": 0.5, "mim__ramp": 0.1},
        {"optimizer__name": "adamw", "optimizer__layer_decay": 0.6, **DPT},
    ],
)
def test_a_run_goes_on_to_the_bit(options, tmp_path, monkeypatch):
    assert_same_run(*broken_and_whole(tmp_path, monkeypatch, **options))


def test_the_learning_rate_warms_up(tmp_path):
    run = run_tiny(
        tmp_path / "run", method__preset="supervised", train__steps=5, optimizer__warmup=0.4, optimizer__lr=0.1,
        optimizer__poly_power=1,
    )  # fmt: skip
    rates = [line["lr"] for line in read_metrics(run) if "lr" in line]
    assert rates == pytest.approx([0.05, 0.1, 0.1, 0.1 * 2 / 3, 0.1 / 3])


def test_clipping_scales_the_mean_gradient_of_a_step(tmp_path):
    """Plain SGD moves by lr x gradient; `grad_norm` is the norm before."""
    settings = dict(
        method__preset="supervised", optimizer__name="sgd", optimizer__momentum=0, optimizer__weight_decay=0,
        optimizer__lr=0.5, optimizer__head_lr_factor=1, train__accumulate=2, train__steps=1, optimizer__lr_batch=4,
    )  # fmt: skip
    start = Trainer.update
    gradients = {}

    def keep(self):
        gradients.update({n: p.grad.clone() for n, p in self.objective.named_parameters() if p.grad is not None})
        gradients["before"] = {n: p.detach().clone() for n, p in self.objective.named_parameters()}
        return start(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "update", keep)
        run = run_tiny(tmp_path / "run", train__clip_grad=0.01, **settings)
    before = gradients.pop("before")
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
    assert norm > 0.02 and read_metrics(run)[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)
    after = checkpoint.load(run.last)["objective"]
    for name, gradient in gradients.items():
        torch.testing.assert_close(after[name], before[name] - 0.5 * gradient * 0.01 / norm, rtol=1e-5, atol=1e-8)
    other = run_tiny(tmp_path / "other", train__clip_grad=2 * norm, **settings)
    torch.testing.assert_close(
        checkpoint.load(other.last)["objective"]["net.head.bias"], before["net.head.bias"] - 0.5 * gradients["net.head.bias"]
    )
    assert "grad_norm" not in read_metrics(run_tiny(tmp_path / "none", **settings))[0]


class Scaler:
    """Stands in for a GradScaler of fp16: gradients are 8 times as large until they are unscaled."""

    def __init__(self, *_, **__):
        self.unscaled = False

    def scale(self, loss):
        return 8 * loss

    def unscale_(self, optimizer):
        assert not self.unscaled
        self.unscaled = True
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if p.grad is not None:
                p.grad /= 8

    def step(self, optimizer):
        if not self.unscaled:
            self.unscale_(optimizer)
        optimizer.step()

    def update(self):
        self.unscaled = False

    def state_dict(self):
        return {}


def test_clipping_sees_gradients_without_the_scale_of_fp16(tmp_path, monkeypatch):
    settings = dict(method__preset="supervised", train__steps=2, train__clip_grad=0.01)
    plain = run_tiny(tmp_path / "plain", **settings)
    monkeypatch.setattr(torch.amp, "GradScaler", Scaler)
    scaled = run_tiny(tmp_path / "scaled", **settings)
    assert read_metrics(plain)[0]["grad_norm"] == read_metrics(scaled)[0]["grad_norm"]
    assert_same_state(checkpoint.load(plain.last)["objective"], checkpoint.load(scaled.last)["objective"])


@pytest.mark.parametrize("encoder", ["test_vit", "eva02_tiny_patch14_224"])
def test_layer_decay_lowers_the_learning_rate_block_by_block(encoder):
    settings = ModelSettings(arch="dpt", encoder=encoder, weights="none")
    objective = nn.Module()
    objective.net = build_segmenter(settings, 3, [0.5] * 3, [0.25] * 3)
    objective.more = nn.Linear(2, 2)
    optimizer = build_optimizer(OptimizerSettings(name="adamw", layer_decay=0.5, head_lr_factor=4), objective, 1.0)
    rates = {id(p): group["base_lr"] for group in optimizer.param_groups for p in group["params"]}
    blocks = len(objective.net.encoder.model.blocks)
    for name, parameter in objective.named_parameters():
        if not name.startswith("net.encoder."):
            expected = 4.0
        elif ".blocks." in name:
            expected = 0.5 ** (blocks - int(name.split(".blocks.")[1].split(".")[0]))
        else:
            expected = 1.0 if name.startswith("net.encoder.model.norm.") else 0.5 ** (blocks + 1)
        assert rates.pop(id(parameter)) == expected, name
    assert not rates


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_lamb_of_apex_equals_that_of_timm():
    problem = None
    try:
        check_optimizer(config_of("fusedlamb"), True)
    except UserError as error:
        problem = str(error)
    if problem:
        pytest.skip(problem)
    weights = []
    for name in ("fusedlamb", "lamb"):
        module = Small().cuda()
        optimizer = build_optimizer(OptimizerSettings(name=name, weight_decay=0.01), module, 0.01)
        for step in range(5):
            torch.manual_seed(step)
            module.net.head(module.net.encoder(torch.randn(2, 3, 6, 6).cuda())).square().mean().mul(100).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append([p.detach() for p in module.net.parameters()])
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
