"""The objective against its plain rendering, and the edges."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from cmim.method import masking, perturbations
from cmim.method import objective as objective_module
from cmim.method.diagnostics import gradient_norms
from cmim.method.dice import dice_loss
from cmim.method.objective import Objective
from cmim.settings import PRESETS
from tests.plain_objective import (
    BASE_TERMS,
    BASES,
    CLASSES,
    OHEM,
    STD,
    UNLABELLED_SEM,
    make_batch,
    make_config,
    make_objective,
    plain_terms,
    ramp,
    soft_dice,
    tiny_segmenter,
)

CASES = [
    *((preset, {}) for preset in PRESETS),
    ("supervised", {"method__ohem": OHEM}),
    ("supervised", {"method__ohem": {"threshold": 0.4, "min_kept": 10}}),
    ("supervised", {"method__ohem": {"threshold": 0.1, "min_kept": 5000}}),
    ("supervised", {"method__class_weights": [0.1, 3, 7], "method__dice": 0.5}),
    ("supervised", {"method__class_weights": [1e-5, 0, 1e-4], "method__ohem": OHEM}),
    ("unimatch", {"method__class_weights": [0.1, 3, 7], "method__dice": 2.0, "method__w_unlabelled": 0.5}),
    ("fixmatch", {"teacher__kind": "ema", "method__ohem": OHEM}),
    ("fixmatch", {"method__align": True}),
    ("fixmatch_fp", {"method__class_balance": True, "method__align": True}),
    ("fixmatch_fp", {"method__class_balance": True, "method__logit_adjustment": True}),
    ("cmim", {"method__logit_adjustment": True}),
    ("fixmatch", {"teacher__kind": "ema", "method__class_thresholds": True, "method__tau": 0.7}),
    ("cmim", {"method__align": True, "method__class_thresholds": True, "method__tau": 0.7, "mim__tau": 0.8}),
    ("fixmatch_fp", {"teacher__kind": "ema"}),
    ("unimatch", {"teacher__kind": "ema", "method__dropout": 0.2}),
    ("unimatch_v2", {"teacher__kind": "ema"}),
    ("unimatch_v2", {"method__complementary": False}),
    ("semantic", {"mim__views": ["strong"], "mask__per_class": True, "mim__isolate": "input"}),
    ("mim", {"reconstruction__balance": "class", "centroids__distance": "l2", "mask__per_class": True}),
    ("mim", {"reconstruction__tokens": "encoder", "reconstruction__decoder": "attention"}),
    ("cmim", {"mim__views": ["strong"]}),
    ("cmim", {"method__w_unlabelled": 0.5}),
    ("cmim", {"mim__views": ["weak", "labelled"], "mim__w_pix": 2.0, "mim__w_feat": 3.0, "mim__w_sem": 5.0}),
    ("cmim", {"reconstruction__balance": "class", "reconstruction__min_share": 0.95}),
    ("cmim", {"reconstruction__normalize": True, "reconstruction__distance": "mse"}),
    ("cmim", {"reconstruction__distance": "smooth_l1", "reconstruction__mask_token": False, "mim__tau": 0.7}),
    ("cmim", {"reconstruction__decoder": "attention"}),
    ("cmim", {"reconstruction__tokens": "encoder", "centroids__min_tokens": 1}),
    ("cmim", {"reconstruction__tokens": "pixel"}),
    ("mim", {"reconstruction__tokens": "pixel", "centroids__features": "pixel", "mim__views": ["strong"]}),
    ("cmim", {"reconstruction__tokens": "encoder", "centroids__features": "decoder"}),
    ("cmim", {"centroids__features": "encoder", "mask__per_class": True, "centroids__min_tokens": 1}),
    ("cmim", {"mim__isolate": "input", "mask__per_class": True, "mask__fill": "black", "centroids__min_tokens": 1}),
    ("cmim", {"mask__fill": "learned", "mim__isolate": "input"}),
    ("cmim", {"mask__per_class": True, "mask__ratio": 0.75, "mask__block": 16}),
    ("cmim", {"teacher__kind": "ema", "mim__batch_norm": "running"}),
    ("cmim", {"centroids__distance": "l2", "centroids__detach": "none", "mim__batch_norm": "shared"}),
    ("cmim", {"centroids__detach": "masked", "centroids__min_tokens": 6}),
]


def name_of(case):
    preset, options = case
    return "-".join([preset, *(f"{k.split('__')[1]}={v}" for k, v in options.items())])


@pytest.mark.parametrize(("preset", "options"), CASES, ids=map(name_of, CASES))
def test_equals_the_plain_rendering(monkeypatch, preset, options):
    config = make_config(preset, **options)
    objective, batch = make_objective(monkeypatch, config), make_batch(config)
    if config.teacher.kind == "ema":
        with torch.no_grad():
            objective.teacher.head.weight.mul_(-6)  # a sure teacher that disagrees with the student
    plain = deepcopy(objective)

    output = objective(batch, ramp())
    output.loss.backward()
    expected = plain_terms(plain, batch, ramp())
    sum(expected.values()).backward()

    assert output.terms.keys() == expected.keys()
    for name, term in expected.items():
        assert term > 0, f"{name} is empty: the comparison would be void"
        torch.testing.assert_close(
            output.terms[name], term.detach(), rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )
    torch.testing.assert_close(output.loss, sum(expected.values()), rtol=1e-5, atol=0)
    for (name, ours), theirs in zip(objective.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None or not ours.grad.any(), name
        else:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    for (name, ours), theirs in zip(objective.named_buffers(), plain.buffers(), strict=True):
        if not name.startswith("classes."):  # statistics, of which the plain rendering keeps none
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("preset", ["semantic", "cmim"])
def test_masked_terms_stand_on_any_base(monkeypatch, base, preset):
    views = {"mim__views": ["labelled"]} if base == "supervised" else {}
    options = {"method__base": base, **views}
    test_equals_the_plain_rendering(monkeypatch, preset, options)
    config = make_config(preset, **options)
    assert set(make_objective(monkeypatch, config)(make_batch(config), ramp()).terms) & BASE_TERMS == set(BASES[base])


def test_a_base_counts_under_masked_terms_alone():
    assert make_config("supervised", method__base="unimatch").preset == PRESETS["supervised"]
    assert make_config("cmim", method__base="fixmatch_fp").preset == PRESETS["cmim"]


@pytest.mark.parametrize("zero", ["pix", "feat", "sem"])
def test_a_masked_term_of_weight_0_is_left_out(monkeypatch, zero):
    options = {f"mim__w_{zero}": 0}
    test_equals_the_plain_rendering(monkeypatch, "cmim", options)
    config = make_config("cmim", **options)
    objective = make_objective(monkeypatch, config)
    assert hasattr(objective, "reconstruction") == (zero != "pix")
    assert not any(name.startswith(zero) for name in objective(make_batch(config), ramp()).terms)


def test_without_any_masked_term_the_base_remains(monkeypatch):
    config = make_config("cmim", mim__w_pix=0, mim__w_feat=0, mim__w_sem=0)
    objective = make_objective(monkeypatch, config)
    assert set(objective(make_batch(config), ramp()).terms) == set(BASES["fixmatch_fp"])


def test_the_box_reaches_the_strong_view_alone(monkeypatch):
    config = make_config("cmim")
    batch = make_batch(config)
    objective = make_objective(monkeypatch, config)
    old = objective(batch, ramp()).terms
    new = objective(batch | {"box": torch.zeros_like(batch["box"])}, ramp()).terms
    assert {name for name in old if old[name] != new[name]} == {"strong", "pix", "feat", "sem_labelled"} | UNLABELLED_SEM


class Recorder(dict):
    """A batch that knows which of its entries were read."""

    def __init__(self, *args):
        super().__init__(*args)
        self.read = set()

    def __getitem__(self, name):
        self.read.add(name)
        return super().__getitem__(name)


LABELLED = {"labelled_image", "label"}
UNLABELLED = {"weak_image", "strong_image", "box", "valid"}
MASKS = {"labelled_mask", "weak_mask", "strong_mask"}


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("supervised", LABELLED),
        ("fixmatch", LABELLED | UNLABELLED),
        ("unimatch", LABELLED | UNLABELLED | {"channel_key"}),
        ("unimatch_v2", LABELLED | UNLABELLED | {"channel_key"}),
        ("fixmatch_fp", LABELLED | UNLABELLED | {"channel_key"}),
        ("semantic", LABELLED | UNLABELLED | {"channel_key"} | MASKS),
        ("mim", LABELLED | UNLABELLED | {"channel_key"} | MASKS),
    ],
)
def test_what_is_read(monkeypatch, preset, expected):
    config = make_config(preset)
    batch = Recorder(make_batch(config))
    make_objective(monkeypatch, config)(batch, ramp())
    assert batch.read == expected  # no truth of an unlabelled image


def test_every_draw_has_its_own_keys(monkeypatch):
    drawn = []

    def record(keys, count):
        drawn.extend(keys.tolist())
        return original(keys, count)

    original = masking.uniform
    monkeypatch.setattr(masking, "uniform", record)
    monkeypatch.setattr(perturbations, "uniform", record)
    config = make_config("cmim", mim__isolate="input", mask__per_class=True)
    make_objective(monkeypatch, config)(make_batch(config), ramp())
    assert len(drawn) == 2 + 6 + 6 and len(set(drawn)) == len(drawn)


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("unimatch", {}),
        ("cmim", {}),
        ("cmim", {"mim__isolate": "input", "mask__per_class": True, "reconstruction__balance": "class"}),
        ("cmim", {"reconstruction__decoder": "attention", "reconstruction__normalize": True, "method__ohem": OHEM}),
        ("cmim", {"method__class_weights": [0.1, 3, 7], "method__dice": 1.0, "method__ohem": OHEM}),
    ],
)
@pytest.mark.parametrize("empty", ["confidence", "labels", "padding", "everything"])
def test_empty_terms_are_connected_zeros(monkeypatch, preset, empty, options):
    tau = {"method__tau": 1.0, "mim__tau": 1.0} if empty == "confidence" else {}
    config = make_config(preset, **options, **tau)
    objective, batch = make_objective(monkeypatch, config), make_batch(config)
    unlabelled = {"strong", "strong1", "strong2", "fp"} | UNLABELLED_SEM
    zero = {"confidence": unlabelled, "labels": {"sup", "dice", "sem_labelled"}, "padding": unlabelled}.get(empty)
    if empty in ("labels", "everything"):
        batch["label"] = torch.full_like(batch["label"], 255)
    if empty in ("padding", "everything"):
        batch["valid"] = torch.zeros_like(batch["valid"])
    terms, _ = see_graph(monkeypatch)
    output = objective(batch, ramp(), diagnostics=True, gradients=True)
    for name, term in terms.items():
        assert term.requires_grad and term.isfinite(), name
        assert (term == 0) == (zero is None or name in zero), name
    assert terms == output.terms and {f"gradient_{name}" for name in terms} < set(output.figures)
    assert all(figure.isfinite() for figure in output.figures.values())
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in objective.parameters() if p.grad is not None)
    trained = [p.grad is not None and bool(p.grad.any()) for p in objective.net.parameters()]
    assert any(trained) == (empty != "everything")


def test_supervised_without_a_label(monkeypatch):
    config = make_config("supervised")
    batch = make_batch(config)
    batch["label"] = torch.full_like(batch["label"], 255)
    output = make_objective(monkeypatch, config)(batch, None)
    assert output.loss == 0 and output.loss.requires_grad


def test_only_the_ratio_of_class_weights_counts(monkeypatch):
    """And a class of weight 0 is as if its pixels had no label, also where its loss is infinite."""
    config = make_config("supervised", method__class_weights=[0.2, 1, 3])
    objective, batch = make_objective(monkeypatch, config), make_batch(config)
    objective.eval()
    few = objective(batch, None).loss
    objective.set_class_weights([20, 100, 300])
    torch.testing.assert_close(objective(batch, None).loss, few)
    objective.set_class_weights([1, 1, 1])
    alike = make_objective(monkeypatch, make_config("supervised"))
    alike.net.load_state_dict(objective.net.state_dict())
    alike.eval()
    torch.testing.assert_close(objective(batch, None).loss, alike(batch, None).loss)
    objective.set_class_weights([1, 1, 0])
    without = batch | {"label": torch.where(batch["label"] == 2, 255, batch["label"])}
    torch.testing.assert_close(objective(batch, None).loss, alike(without, None).loss)


def test_dice_of_half_precision_is_computed_in_float32():
    """Sums over many pixels, which bfloat16 could not count."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, CLASSES, 40, 40, generator=generator).bfloat16()
    y = torch.randint(0, CLASSES, (2, 160, 160), generator=generator).to(torch.uint8)
    full = F.interpolate(logits.double(), size=(160, 160), mode="bilinear", align_corners=True)
    expected = soft_dice(full.softmax(1), y)
    with torch.autocast("cpu", torch.bfloat16):
        loss, occurs = dice_loss(logits.requires_grad_(), y, True)
    assert loss.dtype == torch.float32 and occurs.tolist() == [1] * CLASSES
    torch.testing.assert_close(loss.mean(), expected.float(), rtol=1e-5, atol=0)
    loss.sum().backward()
    assert logits.grad.dtype == torch.bfloat16 and logits.grad.isfinite().all() and logits.grad.any()


def test_dice_by_hand():
    """A perfect prediction loses nothing; absent classes and ignored pixels do not count."""
    y = torch.tensor([[[0, 0], [1, 255]]], dtype=torch.uint8)
    sure = 50 * F.one_hot(torch.tensor([[[0, 0], [1, 2]]]), 3).permute(0, 3, 1, 2).float()
    loss, occurs = dice_loss(sure, y, True)
    assert occurs.tolist() == [1, 1, 0] and loss.tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    loss, _ = dice_loss(sure.flip(1), y, True)  # 2, 2, 1 and 0 instead of 0, 0, 1 and no class
    assert loss.tolist() == pytest.approx([1, 0, 0], abs=1e-6)
    loss, _ = dice_loss(torch.zeros(1, 3, 2, 2), y, True)  # each class has probability 1/3 at three pixels
    assert loss.tolist() == pytest.approx([1 - 2 * (2 / 3) / 3, 1 - 2 * (1 / 3) / 2, 0])


def test_without_dice_there_is_no_such_term(monkeypatch):
    monkeypatch.setattr(objective_module, "dice_loss", lambda *_: pytest.fail("Dice"))
    config = make_config("supervised", method__class_weights="none")
    objective = make_objective(monkeypatch, config)
    assert set(objective(make_batch(config), None).terms) == {"sup"} and objective.class_weights is None


def test_without_ramp_there_is_no_masked_pass(monkeypatch):
    config = make_config("cmim", mask__fill="learned")
    objective, batch = make_objective(monkeypatch, config), make_batch(config)
    before = deepcopy(objective)
    whole = objective(batch, ramp())
    monkeypatch.setattr(Objective, "masked_terms", lambda *_: pytest.fail("masked pass"))
    output = before(batch, None)
    assert output.terms == {name: whole.terms[name] for name in ("sup", "strong", "fp")}
    output.loss.backward()
    assert before.fill.colour.grad is None and before.reconstruction.predict.weight.grad is None
    # Batch statistics of the masked pass leave no trace in the running ones.
    for (name, ours), theirs in zip(objective.named_buffers(), before.buffers(), strict=True):
        assert torch.equal(ours, theirs), name


def test_ramp_scales_the_masked_terms(monkeypatch):
    config = make_config("cmim")
    objective, batch = make_objective(monkeypatch, config), make_batch(config)
    low, high = (objective(batch, torch.tensor(r)) for r in (0.25, 1.0))
    for name in low.terms:
        factor = 1 if name in BASE_TERMS else 0.25
        torch.testing.assert_close(low.terms[name], factor * high.terms[name])


def test_base_ramp_scales_the_terms_of_unlabelled_images(monkeypatch):
    config = make_config("unimatch")
    objective, batch = make_objective(monkeypatch, config), make_batch(config)
    low, high = (objective(batch, None, torch.tensor(r)) for r in (0.25, 1.0))
    for name in low.terms:
        torch.testing.assert_close(low.terms[name], (1 if name == "sup" else 0.25) * high.terms[name])
    assert torch.equal(objective(batch, None).loss, high.loss)


def test_without_base_ramp_training_is_supervised(monkeypatch):
    config = make_config("cmim")
    objective, batch = make_objective(monkeypatch, config), make_batch(config)
    supervised = make_objective(monkeypatch, make_config("supervised"))
    supervised.net.load_state_dict(objective.net.state_dict())
    output, alone = objective(Recorder(batch), ramp(), None), supervised(batch, None)
    assert set(output.terms) == {"sup"}
    torch.testing.assert_close(output.loss, alone.loss / 2)  # the weight of L_sup in the base of cmim
    # A preset without unlabelled images has nothing to wait for.
    assert torch.equal(supervised(batch, None, None).loss, supervised(batch, None).loss)


def see_graph(monkeypatch):
    """The terms, with their graph, and the features that the next objective measures gradients of."""
    terms, features = {}, []

    def record(given_terms, given_features, ranks):
        terms.update(given_terms)
        features.extend(given_features)
        return gradient_norms(given_terms, given_features, ranks)

    monkeypatch.setattr(objective_module, "gradient_norms", record)
    return terms, features


def test_without_classes_more_tokens_are_in_reach(monkeypatch):
    """`mim` reconstructs a hidden token from visible ones of any class."""
    shares = {}
    for preset in ("cmim", "mim"):
        config = make_config(preset)
        objective, batch = make_objective(monkeypatch, config), make_batch(config)
        shares[preset] = objective(batch, ramp(), diagnostics=True).figures["in_reach"]
    assert 0 < shares["cmim"] < shares["mim"]


@pytest.mark.parametrize("preset", ["supervised", "fixmatch", "unimatch", "semantic", "cmim"])
def test_diagnostics_and_gradient_norms(monkeypatch, preset):
    config = make_config(preset, data__background=0)
    objective, batch = make_objective(monkeypatch, config), make_batch(config)
    terms, features = see_graph(monkeypatch)
    short, some = (deepcopy(objective)(batch, ramp(), diagnostics=d) for d in (False, True))
    assert terms == {}
    full = objective(batch, ramp(), diagnostics=True, gradients=True)
    torch.testing.assert_close(short.loss, full.loss, rtol=0, atol=0)
    assert not any(t.requires_grad for output in (short, full) for t in output.terms.values())
    more = {"pix_vs_mean_colour", "in_reach", "separation"} if preset == "cmim" else set()
    more |= {"hidden_accuracy", "token_purity"} if PRESETS[preset].masked else set()
    assert set(some.figures) - set(short.figures) == more
    agreements = {name: full.figures.pop(name) for name in list(full.figures) if name.startswith("agreement_")}
    assert set(agreements) == {f"agreement_{name}" for name in full.terms if name != "sup"}
    assert all(-1 <= figure <= 1 and not figure.requires_grad for figure in agreements.values())
    norms = {name: full.figures.pop(name) for name in set(full.figures) - set(some.figures)}
    assert set(norms) == {f"gradient_{name}" for name in full.terms}
    assert not any(figure.requires_grad or figure.dim() for figure in full.figures.values())
    assert len(features) == {"supervised": 1, "fixmatch": 2, "unimatch": 2, "semantic": 3, "cmim": 3}[preset]

    torch.testing.assert_close(sum(terms.values()), full.loss)
    together = [torch.zeros_like(f) for f in features]
    for name, term in terms.items():
        parts = torch.autograd.grad(term, features, retain_graph=True, materialize_grads=True)
        together = [a + b for a, b in zip(together, parts, strict=True)]
        expected = torch.cat([p.flatten() for p in parts]).norm()
        assert expected > 0, name
        torch.testing.assert_close(norms[f"gradient_{name}"], expected, msg=lambda m, n=name: f"{n}: {m}")
    whole = torch.autograd.grad(full.loss, features)
    for a, b in zip(together, whole, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("preset, options", [("fixmatch", {}), ("unimatch_v2", {}), ("cmim", {"teacher__kind": "ema"})])
def test_a_trained_network_makes_the_pseudo_labels(monkeypatch, preset, options):
    config = make_config(preset, **options)
    monkeypatch.setattr(objective_module, "build_segmenter", tiny_segmenter)
    judge = tiny_segmenter(config.model, CLASSES, objective_module.Objective(config, CLASSES).mean, STD.flatten().tolist())
    with torch.no_grad():
        judge.head.weight.mul_(-6)  # a sure network that disagrees with the student
    objective, batch = Objective(config, CLASSES, judge), make_batch(config)
    plain, before = deepcopy(objective), {name: value.clone() for name, value in judge.state_dict().items()}
    output = objective.train()(batch, ramp())
    output.loss.backward()
    for name, term in plain_terms(plain, batch, ramp()).items():
        assert term > 0
        torch.testing.assert_close(output.terms[name], term.detach(), rtol=1e-5, atol=1e-7)
    assert all(torch.equal(value, before[name]) for name, value in judge.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in judge.parameters())
    assert objective.evaluated() is (objective.teacher if options else objective.net)


def test_teacher(monkeypatch):
    config = make_config("cmim", teacher__kind="ema", teacher__decay=0.6)
    objective, batch = make_objective(monkeypatch, config), make_batch(config)
    assert make_config().evaluation.weights == "teacher" and objective.evaluated() is objective.teacher
    generator = torch.Generator().manual_seed(1)
    expected = None
    for step in range(4):
        objective.train()
        assert objective.net.training and not any(m.training for m in objective.teacher.modules())
        objective(batch, ramp()).loss.backward()
        with torch.no_grad():
            for p in objective.net.parameters():
                p += torch.randn(p.shape, generator=generator)
        now = {k: v.clone() for k, v in objective.net.state_dict().items()}
        decay = [0, 1 / 2, 0.6, 0.6][step]
        if step == 0:
            expected = now
        else:
            expected = {k: decay * expected[k] + (1 - decay) * v if v.is_floating_point() else v for k, v in now.items()}
        objective.update_teacher(step)
        for name, value in objective.teacher.state_dict().items():
            torch.testing.assert_close(value, expected[name], msg=lambda m, n=name: f"{n}: {m}")
    assert all(p.grad is None and not p.requires_grad for p in objective.teacher.parameters())
    assert objective.teacher.encoder.low[1].num_batches_tracked == 8  # two clean passes a step, of the student


@pytest.mark.parametrize("options", [{}, {"teacher__kind": "ema", "evaluation__weights": "student"}])
def test_the_student_is_evaluated(monkeypatch, options):
    objective = make_objective(monkeypatch, make_config("cmim", **options))
    assert objective.evaluated() is objective.net
    assert hasattr(objective, "teacher") == bool(options)


@pytest.mark.parametrize(
    ("masked", "options"),
    [
        (False, {"method__class_weights": [0.1, 3, 7], "method__dice": 1.0}),
        (True, {"mask__per_class": True, "mim__isolate": "input", "method__ohem": OHEM}),
    ],
)
def test_compiled_equals_eager(monkeypatch, masked, options):
    torch._dynamo.reset()
    config = make_config("cmim", **options)
    objective, batch = make_objective(monkeypatch, config), make_batch(config)
    eager = deepcopy(objective)
    weight = ramp() if masked else None
    output = torch.compile(objective, fullgraph=True, backend="aot_eager")(batch, weight)
    output.loss.backward()
    expected = eager(batch, weight)
    expected.loss.backward()
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(output.terms, expected.terms)
    torch.testing.assert_close(output.figures, expected.figures)
    for (name, ours), theirs in zip(objective.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    for ours, theirs in zip(objective.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_real_network():
    config = make_config(
        "cmim", model__encoder="test_efficientnet", model__weights="none", model__decoder_width=16, model__output_stride=16
    )
    torch.manual_seed(0)
    objective, batch = Objective(config, CLASSES), make_batch(config)
    output = objective(batch, ramp())
    output.loss.backward()
    assert output.loss.isfinite() and all(p.grad.isfinite().all() for p in objective.parameters())
