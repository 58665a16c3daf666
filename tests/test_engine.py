"""The parts of the engine one by one, against plain loops."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from cmim import checkpoint
from cmim.config import config_from, default_config_path, load_config
from cmim.data import load_splits
from cmim.data.batches import TrainBatches
from cmim.engine import logging
from cmim.engine.device import choose_device, to_device
from cmim.engine.evaluation import evaluate
from cmim.engine.metrics import Scores, confusion_matrix, mean_iou, scores
from cmim.engine.optimizer import build_optimizer, set_learning_rate
from cmim.engine.records import cut_metrics
from cmim.engine.schedule import lr_factor, ramp
from cmim.method.objective import Objective
from tests.tiny_runs import read_metrics, run_tiny, tiny, write_folder


def tiny_config(**settings):
    return load_config(default_config_path(), tiny("unused", **settings)[2:])


def plain_scores(images, size):
    """The `Scores` of (predictions, truths) of each image, flat lists, one pixel after another."""
    images = [[(p, t) for p, t in zip(*image, strict=True) if 0 <= t < size] for image in images]
    pixels = [pixel for image in images for pixel in image]
    ratio = lambda a, b: a / b if b else None  # noqa: E731
    every = [k for k in range(size)]

    def of_classes(score, pixels=pixels):
        found = []
        for k in every:
            in_truth, predicted = sum(t == k for _, t in pixels), sum(p == k for p, _ in pixels)
            found.append(score(sum(p == k and t == k for p, t in pixels), in_truth, predicted))
        return found

    def mean(values):
        known = [v for v in values if v is not None]
        return sum(known) / len(known) if known else 0.0

    iou = lambda hit, truth, predicted: ratio(hit, truth + predicted - hit)  # noqa: E731
    dice = of_classes(lambda hit, truth, predicted: ratio(2 * hit, truth + predicted))
    precision = of_classes(lambda hit, truth, predicted: ratio(hit, predicted))
    recall = of_classes(lambda hit, truth, predicted: ratio(hit, truth))
    return Scores(
        miou=mean(of_classes(iou)), iou=of_classes(iou), dice=dice, precision=precision, recall=recall,
        mean_dice=mean(dice), mean_precision=mean(precision), mean_accuracy=mean(recall),
        pixel_accuracy=mean([p == t for p, t in pixels]),
        image_miou=mean([mean(of_classes(iou, image)) for image in images if image]),
    )  # fmt: skip


def assert_scores(found, expected):
    for name, value, wanted in zip(Scores._fields, found, expected, strict=True):
        assert value == pytest.approx(wanted), name


PIXELS = st.lists(st.tuples(st.integers(0, 4), st.sampled_from([-1, 0, 1, 2, 3, 4, 5, 255])), max_size=40)


@given(st.integers(2, 5), st.lists(PIXELS, max_size=4))
def test_scores_equal_a_plain_count(size, images):
    images = [([p % size for p, _ in pixels], [t for _, t in pixels]) for pixels in images]
    matrices = [confusion_matrix(*(torch.tensor(v, dtype=torch.int64) for v in image), size) for image in images]
    total = sum(matrices, torch.zeros(size, size, dtype=torch.int64))
    found = scores(total, torch.tensor([float(mean_iou(m)) for m in matrices], dtype=torch.float64))
    assert_scores(found, plain_scores(images, size))


def test_dice_is_the_harmonic_mean_of_precision_and_recall():
    """By hand: class 0 is found half and never claimed wrongly, class 1 is never predicted, class 2 does not occur."""
    found = scores(
        torch.tensor([[4, 0, 4, 0], [2, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]), torch.tensor([0.25, torch.nan, 0.75])
    )
    assert found.precision == [4 / 6, None, 0, None] and found.recall == [1 / 2, 0, None, None]
    assert found.dice == pytest.approx([2 / (6 / 4 + 2), 0, 0, None]) and found.iou == [4 / 10, 0, 0, None]
    assert (found.mean_precision, found.mean_accuracy) == (pytest.approx(1 / 3), 0.25)
    assert found.mean_dice == pytest.approx(found.dice[0] / 3) and found.image_miou == 0.5


def test_schedules():
    assert [lr_factor(s, 4, 0.9) for s in (0, 2)] == [1.0, pytest.approx(0.5**0.9)]
    assert lr_factor(3, 4, 0) == 1.0
    assert [lr_factor(s, 10, 2, 0.2) for s in (0, 1, 2, 6, 9)] == pytest.approx([1 / 2, 1, 1, 1 / 4, 1 / 64])
    assert [lr_factor(s, 2, 0.9, 1) for s in (0, 1)] == [1 / 2, 1]
    assert [ramp(s, 10, 0.2, 0.4) for s in (0, 1)] == [None, None]
    assert [ramp(s, 10, 0.2, 0.4) for s in (2, 3, 4, 6, 9)] == pytest.approx([0, 0.25, 0.5, 1, 1])
    assert ramp(0, 10, 0, 0) == 1.0 and ramp(9, 10, 1, 0) is None


def test_optimizer_groups():
    config = tiny_config(teacher__kind="ema", mask__fill="learned", optimizer__head_lr_factor=3)
    objective = Objective(config, 5)
    optimizer = build_optimizer(config.optimizer, objective, 0.5)
    names = {id(p): name for name, p in objective.named_parameters()}
    encoder, rest = [{names[id(p)] for p in group["params"]} for group in optimizer.param_groups]
    assert encoder == {n for n in names.values() if n.startswith("net.encoder.")}
    assert rest == {n for n in names.values() if not n.startswith(("net.encoder.", "teacher."))}
    assert {"fill.colour", "net.head.weight"} < rest and any(n.startswith("reconstruction.") for n in rest)
    set_learning_rate(optimizer, 0.1)
    set_learning_rate(optimizer, 0.5)
    assert [g["lr"] for g in optimizer.param_groups] == [0.25, 0.75]


def test_accumulation_takes_the_mean_of_the_gradients(tmp_path, monkeypatch):
    logged = []

    class Log(logging.RunLog):
        def __init__(self, run, first_step, steps, images, *more):
            super().__init__(run, first_step, steps, images, *more)
            logged.append(images)

        def add(self, figures):
            logged.append(figures["loss"].item())
            super().add(figures)

    monkeypatch.setattr("cmim.engine.trainer.RunLog", Log)
    settings = dict(
        train__steps=1, train__accumulate=2, teacher__kind="student", optimizer__name="sgd", optimizer__momentum=0,
        optimizer__weight_decay=0, optimizer__lr=0.25, optimizer__lr_batch=8, optimizer__head_lr_factor=2,
    )  # fmt: skip
    run = run_tiny(tmp_path / "run", **settings)
    config = tiny_config(**settings)
    batches = TrainBatches(load_splits(config.data), config)
    torch.manual_seed(config.seed)
    objective = Objective(config, 5).to(memory_format=torch.channels_last).train()
    expected = {name: p.detach().clone() for name, p in objective.named_parameters()}
    losses = []
    for m in (0, 1):
        batch = {
            k: v.contiguous(memory_format=torch.channels_last) if k in ("labelled_image", "weak_image") else v
            for k, v in batches[m].items()
        }
        objective.zero_grad()
        loss = objective(batch, torch.tensor(1.0)).loss
        loss.backward()
        losses.append(loss.item())
        for name, p in objective.named_parameters():
            if p.grad is not None:
                # lr 0.25 is meant for 8 labelled images, here are 2 x 2
                expected[name] -= (0.125 if name.startswith("net.encoder.") else 0.25) * p.grad / 2
    trained = checkpoint.load(run.last)["objective"]
    for name, value in expected.items():
        torch.testing.assert_close(trained[name], value, rtol=1e-4, atol=1e-6)
    assert logged == [4, *losses]  # images of a micro-batch, then one call for each
    assert read_metrics(run)[0]["loss"] == pytest.approx(sum(losses) / 2, rel=1e-6)


class ColourNet(nn.Module):
    """Logits on a grid of 4 pixels that follow the colour."""

    align_corners, size_multiple = True, 1

    def accepted_size(self, height, width):
        return round(height), round(width)

    def normalise(self, images):
        return images.float() / 64 - 2

    def forward(self, images):
        return nn.functional.avg_pool2d(images, 4, ceil_mode=True)


@pytest.mark.parametrize("size", [None, (24, 20)])
@pytest.mark.parametrize("background", [None, 1])
def test_evaluation_compares_at_the_original_resolution(tmp_path, size, background):
    root = write_folder(tmp_path / "data", sizes=((40, 48), (33, 29), (33, 29), (52, 31)), train=1, val=6)
    config = config_from(
        {"data": {"root": root, "labelled": 1, "size": size, "workers": 0, "background": background},
         "evaluation": {"batch": 4}, "method": {"tau": 0.6}}, "test",
    )  # fmt: skip
    image_set = load_splits(config.data).val
    result = evaluate(ColourNet(), image_set, config, 3, torch.device("cpu"), None, "val")
    images, sure = [], []
    for path in sorted((root / "val" / "images").iterdir()):
        image, truth = Image.open(path), np.asarray(Image.open(root / "val" / "masks" / path.name))
        shown = image if size is None else image.resize((size[1], size[0]), Image.BILINEAR)
        logits = ColourNet()(torch.from_numpy(np.array(shown)).permute(2, 0, 1)[None] / 64 - 2)
        full = nn.functional.interpolate(logits, truth.shape, mode="bilinear", align_corners=True)[0]
        images.append((full.argmax(0).flatten().tolist(), truth.flatten().tolist()))
        sure += (full.softmax(0).amax(0) >= 0.6).flatten().tolist()
    assert_scores(result.scores, plain_scores(images, 3))
    predictions, truths = ([v for part in parts for v in part] for parts in zip(*images, strict=True))
    figures = {}
    for name, skipped in [("", 255)] + [("_foreground", 1)] * (background is not None):
        area = [(p, t, s) for p, t, s in zip(predictions, truths, sure, strict=True) if t not in (255, skipped)]
        right = [p == t for p, t, s in area if s]
        figures[f"pseudo_label_coverage{name}"] = len(right) / len(area)
        figures[f"pseudo_label_accuracy{name}"] = sum(right) / len(right)
    assert result.pseudo_labels == pytest.approx(figures)
    assert 0 < figures["pseudo_label_coverage"] < 1


def test_cut_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    cut_metrics(path, 3)
    assert not path.exists()
    val, test = {"step": 3, "split": "val", "miou": 0.5}, {"step": 3, "split": "test", "miou": 0.5}
    lines = [{"step": 2}, {"step": 3, "a": 1}, val, test, {"step": 4}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1, "los')
    cut_metrics(path, 3)
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines[:3]


@pytest.mark.parametrize("channels_last", [False, True])
def test_images_become_channels_last_and_nothing_else(channels_last):
    config = tiny_config(method__preset="unimatch")
    batch = TrainBatches(load_splits(config.data), config)[0]
    moved = to_device(batch, torch.device("cpu"), channels_last)
    assert moved.keys() == batch.keys() and all(torch.equal(moved[name], batch[name]) for name in batch)
    images = [moved["labelled_image"], moved["weak_image"], *moved["strong_image"]]
    assert len(images) == 4
    for image in images:
        assert image.is_contiguous(memory_format=torch.channels_last) == channels_last
    others = moved.keys() - {"labelled_image", "weak_image", "strong_image"}
    assert all(moved[name].is_contiguous() for name in others)


@pytest.mark.parametrize("micro", [1, 2])
def test_the_teacher_follows_the_last_update_of_each_step(micro, tmp_path):
    run = run_tiny(tmp_path / "run", teacher__kind="ema", teacher__decay=0, train__accumulate=micro)
    weights = checkpoint.load(run.last)["objective"]
    names = [name.removeprefix("teacher.") for name in weights if name.startswith("teacher.")]
    assert names and all(torch.equal(weights[f"teacher.{name}"], weights[f"net.{name}"]) for name in names)


def test_workers_change_nothing(tmp_path):
    runs = [run_tiny(tmp_path / str(n), data__workers=n, train__picture_every=9) for n in (0, 1)]
    first, second = (checkpoint.load(run.last)["objective"] for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert json.loads(runs[0].result.read_text()) == json.loads(runs[1].result.read_text())


def test_the_cpu_leaves_a_core_to_the_loader(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr("cmim.engine.device.available_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    choose_device("cpu")
    monkeypatch.setattr("cmim.engine.device.available_cores", lambda: 1)
    choose_device("cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    choose_device("cpu")
    assert asked == [7, 1]


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer__name": "sgd", "optimizer__momentum": 0.9, "mim__start": 0.5},
        {"model__freeze_encoder": True, "reconstruction__tokens": "encoder", "mask__block": 16},
    ],
)
def test_parameters_and_features_without_gradients(options, tmp_path):
    """A decoder that joins later, and an encoder that never learns; the last step draws a picture."""
    assert run_tiny(tmp_path / "run", train__steps=4, **options).result.exists()
