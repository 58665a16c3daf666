"""Every option of the method changes what it should, and nothing else."""

import pytest
import torch

from cmim import settings
from tests.plain_objective import BASE_TERMS, OHEM, UNLABELLED_SEM, make_batch, make_config, make_objective, ramp

MASKED_TERMS = {"pix", "feat", "sem_labelled"} | UNLABELLED_SEM
# (option, other value, what both sides have in common, the terms whose value changes). "gradient": the values stay.
EFFECTS = [
    ("method__tau", 0.5, {}, {"strong", "fp"}),
    # The dropped features share the batch statistics of the decoder with the clean ones, and so change pseudo-labels.
    ("method__dropout", 0.2, {}, {"sup", "strong", "fp", "pix", "feat"} | UNLABELLED_SEM),
    ("method__ohem", OHEM, {}, {"sup"}),
    ("method__ohem", {**OHEM, "threshold": 0.5}, {"method__ohem": OHEM}, {"sup"}),
    ("method__ohem", {**OHEM, "min_kept": 1000}, {"method__ohem": OHEM}, {"sup"}),
    ("method__class_weights", [1, 2, 3], {}, {"sup"}),
    ("method__class_weights", [1, 2, 3], {"method__class_weights": [1, 2, 0]}, {"sup"}),
    ("method__dice", 2.0, {"method__dice": 1.0}, {"dice"}),
    ("method__w_unlabelled", 0.5, {}, {"strong", "fp"}),
    ("method__class_balance", True, {}, {"strong", "fp"}),
    ("method__logit_adjustment", True, {}, {"strong", "fp"} | UNLABELLED_SEM),
    ("method__align", True, {}, {"strong", "fp", "pix", "feat"} | UNLABELLED_SEM),
    ("method__class_thresholds", True, {"method__tau": 0.7}, {"strong", "fp", "pix", "feat"} | UNLABELLED_SEM),
    ("method__batch_norm", "running", {}, {"strong"}),
    ("method__batch_norm", "batch", {}, "buffers"),
    ("mim__tau", 0.7, {}, {"pix", "feat"} | UNLABELLED_SEM),
    ("mim__w_pix", 1.0, {}, {"pix"}),
    ("method__complementary", False, {"method__preset": "unimatch_v2"}, {"strong1", "strong2"}),
    ("mim__w_feat", 1.0, {}, {"feat"}),
    ("mim__w_sem", 3.0, {}, {"sem_labelled"} | UNLABELLED_SEM),
    ("mim__isolate", "input", {}, MASKED_TERMS),
    ("mim__batch_norm", "running", {}, MASKED_TERMS),
    ("mim__batch_norm", "shared", {}, "buffers"),
    ("mask__fill", "black", {}, MASKED_TERMS),
    ("mask__fill", "learned", {}, "gradient"),  # begins at the mean colour
    ("mask__per_class", True, {}, MASKED_TERMS),
    ("mask__ratio", 0.7, {"mask__per_class": True}, MASKED_TERMS),
    ("mask__block", 16, {"mask__per_class": True}, MASKED_TERMS),
    ("reconstruction__decoder", "attention", {}, {"pix"}),
    ("reconstruction__width", 16, {}, {"pix"}),
    ("reconstruction__depth", 2, {}, {"pix"}),
    ("reconstruction__kernel_size", 5, {}, {"pix"}),
    ("reconstruction__num_heads", 1, {"reconstruction__decoder": "attention"}, {"pix"}),
    ("reconstruction__mask_token", False, {}, {"pix"}),
    ("reconstruction__distance", "mse", {}, {"pix"}),
    ("reconstruction__normalize", True, {}, {"pix"}),
    ("reconstruction__balance", "class", {}, {"pix"}),
    ("reconstruction__min_share", 0.95, {}, {"pix", "feat"}),
    ("centroids__features", "encoder", {}, {"feat"}),
    ("centroids__distance", "l2", {}, {"feat"}),
    ("centroids__detach", "masked", {}, "gradient"),
    ("centroids__detach", "none", {}, "gradient"),
    ("centroids__min_tokens", 6, {}, {"feat"}),
    ("teacher__kind", "ema", {}, {"strong", "fp", "pix", "feat"} | UNLABELLED_SEM),
]


@pytest.mark.parametrize(("option", "value", "common", "changed"), EFFECTS, ids=[f"{e[0]}={e[1]}" for e in EFFECTS])
def test_an_option_changes_what_it_should_and_nothing_else(monkeypatch, option, value, common, changed):
    sides = []
    for options in (common, {**common, option: value}):
        preset = options.get("method__preset", "cmim")
        config = make_config(preset, **{name: v for name, v in options.items() if name != "method__preset"})
        objective = make_objective(monkeypatch, config)
        if sides:  # the same weights wherever both have them
            theirs, ours = sides[0][0].state_dict(), objective.state_dict()
            shared = {name for name, v in ours.items() if name in theirs and theirs[name].shape == v.shape}
            objective.load_state_dict(ours | {name: theirs[name] for name in shared})
        # The mask of the batch belongs to the batch: both sides get one.
        output = objective(make_batch(make_config(preset)), ramp())
        output.loss.backward()
        sides.append((objective, output.terms))
    (before, old), (after, new) = sides
    assert {name for name in old if old[name] != new[name]} == (changed if isinstance(changed, set) else set())
    if changed == "buffers":
        buffers = dict(before.named_buffers())
        assert any(not torch.equal(b, buffers[name]) for name, b in after.named_buffers())
    if changed == "gradient":
        gradients = {name: p.grad for name, p in before.named_parameters()}
        for name, p in after.named_parameters():
            if p.grad.any() and not torch.equal(p.grad, gradients.get(name, torch.zeros_like(p))):
                break
        else:
            pytest.fail("no gradient changed")


def test_the_remaining_options_change_what_they_should(monkeypatch):
    views = {}
    for names in (["labelled"], ["weak", "strong"]):
        config = make_config("cmim", mim__views=names)
        output = make_objective(monkeypatch, config)(make_batch(config), ramp())
        views[tuple(names)] = set(output.terms) - BASE_TERMS
    assert views == {("labelled",): {"pix", "feat", "sem_labelled"}, ("weak", "strong"): {"pix", "feat"} | UNLABELLED_SEM}

    tokens = []
    for kind in ("decoder", "encoder", "pixel"):
        config = make_config("cmim", reconstruction__tokens=kind)
        objective = make_objective(monkeypatch, config)
        objective(make_batch(config), ramp())
        tokens.append((objective.reconstruction.project.in_features, objective.reconstruction.predict.out_features))
    assert tokens == [(8, 4 * 4 * 3), (10, 8 * 8 * 3), (8, 4 * 4 * 3)]


def test_no_option_is_left_untested():
    tested = {e[0] for e in EFFECTS} | {
        "method__preset",
        "method__base",
        "mim__views",
        "reconstruction__tokens",
        "teacher__decay",
        "teacher__run",
    }
    elsewhere = {"method__cutmix"}  # the box of the batch
    elsewhere |= {"reconstruction__attention", "reconstruction__checkpointing"}  # the results are equal
    elsewhere |= {"method__start", "method__ramp", "mim__start", "mim__ramp"}  # the schedule
    sections = {
        "method": settings.MethodSettings, "mim": settings.MimSettings, "mask": settings.MaskSettings,
        "reconstruction": settings.ReconstructionSettings, "centroids": settings.CentroidSettings,
        "teacher": settings.TeacherSettings,
    }  # fmt: skip
    every = {f"{name}__{key}" for name, section in sections.items() for key in section.model_fields}
    assert not every - tested - elsewhere, "EFFECTS above has no line for these settings"
    assert not (tested | elsewhere) - every, "these are no settings"
