"""Several processes compute what one process computes with the whole batch."""

import pytest
import torch

from cmim import distributed
from cmim.method import objective as objective_module
from cmim.models.batch_norm import synchronise_batch_norm
from cmim.settings import PRESETS
from tests.plain_objective import BASES, CLASSES, MASKED, OHEM, make_batch, make_config, make_objective, ramp, tiny_segmenter
from tests.ranks import run_on_ranks

CASES = [
    ("supervised", {"method__ohem": OHEM | {"min_kept": 1200}}),
    ("supervised", {"method__class_weights": [0.01, 1, 5], "method__ohem": OHEM, "method__dice": 0.7}),
    ("fixmatch", {"method__class_weights": [1e-6, 1e-4, 2e-4]}),
    ("fixmatch", {"method__align": True, "method__class_thresholds": True, "method__tau": 0.7}),
    ("fixmatch", {"method__class_balance": True, "method__logit_adjustment": True}),
    ("unimatch", {"method__dice": 1.0}),
    ("unimatch_v2", {"teacher__kind": "ema", "method__tau": 0.4}),
    ("mim", {"centroids__distance": "l2"}),
    ("cmim", {"reconstruction__tokens": "pixel", "centroids__features": "encoder"}),
    ("cmim", {"reconstruction__balance": "class", "mask__per_class": True}),
    ("cmim", {"reconstruction__decoder": "attention", "mim__isolate": "input", "mim__batch_norm": "running"}),
]


def cases(compiled):
    return [CASES[1], CASES[-1]] if compiled else CASES  # compiling takes its time


def test_every_term_is_among_the_cases():
    compared = {term for preset, _ in CASES for term in terms_of(preset)}
    missing = {term for preset in PRESETS for term in terms_of(preset)} - compared
    assert not missing, "CASES above has no preset with these terms"


def terms_of(preset):
    return {*BASES.get(PRESETS[preset].base or preset, ()), *MASKED.get(preset, ())}


def uneven_batch(config):
    """Four labelled and four unlabelled images; what counts differs much between the first and the second half."""
    batch = make_batch(config, seed=3, labelled=4, unlabelled=4)
    batch["label"][0] = 255
    batch["label"][1, :20] = 255
    if "valid" in batch:
        batch["valid"][0, 5:] = False
        batch["valid"][1, :, 16:] = False
    return batch


def part_of(batch):
    """This process's half, with images of every view."""
    half = lambda name: name in ("strong_image", "box")  # noqa: E731 - the views come first there
    return {
        name: value.chunk(distributed.size(), dim=1 if half(name) else 0)[distributed.rank()]
        for name, value in batch.items()
    }


def step(objective, batch):
    compiled = hasattr(objective, "_orig_mod")
    output = objective(batch, ramp(), diagnostics=True, gradients=not compiled)
    output.loss.backward()
    gradients = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    # Norms are the same on every process already, so their mean over processes is too.
    norms = {name: value for name, value in output.figures.items() if name.startswith("gradient")}
    return {"loss": output.loss.detach()} | output.terms | norms, gradients


def all_cases_of_a_process(compiled):
    objective_module.build_segmenter = tiny_segmenter
    answers = []
    for preset, options in cases(compiled):
        config = make_config(preset, **options)
        torch.manual_seed(0)
        objective = objective_module.Objective(config, CLASSES)
        objective.ranks = distributed.size()
        synchronise_batch_norm(objective.net)
        run = torch.compile(objective, fullgraph=True, backend="aot_eager") if compiled else objective
        losses, gradients = step(run, part_of(uneven_batch(config)))
        mean = lambda value: distributed.sum_over_ranks(value.clone()) / distributed.size()  # noqa: E731
        answers.append(
            ({k: mean(v) for k, v in losses.items()}, {k.removeprefix("_orig_mod."): mean(v) for k, v in gradients.items()})
        )
    return answers


@pytest.mark.parametrize("ranks, compiled", [(2, False), (2, True)])
def test_losses_and_gradients_equal_those_of_one_process(ranks, compiled, tmp_path, monkeypatch):
    answers = run_on_ranks(all_cases_of_a_process, ranks, tmp_path, compiled)
    for i, (preset, options) in enumerate(cases(compiled)):
        config = make_config(preset, **options)
        torch.manual_seed(0)
        losses, gradients = step(make_objective(monkeypatch, config), uneven_batch(config))
        for answer in answers:
            theirs, their_gradients = answer[i]
            assert compiled or theirs.keys() == losses.keys()
            assert all(value > 0 for value in theirs.values())
            for name, value in theirs.items():
                say = lambda message, at=f"{preset} {name}": f"{at}: {message}"  # noqa: E731
                torch.testing.assert_close(value, losses[name], rtol=1e-5, atol=1e-7, msg=say)
            assert their_gradients.keys() == gradients.keys()
            for name, value in gradients.items():
                say = lambda message, at=f"{preset} {name}": f"{at}: {message}"  # noqa: E731
                torch.testing.assert_close(their_gradients[name], value, rtol=1e-5, atol=1e-5, msg=say)
