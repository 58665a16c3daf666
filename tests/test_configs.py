"""The files of configs/ and the published splits that they are for."""

import os
import re
from pathlib import Path

import pytest

from cmim.config import check_counts, default_config_path, load_config
from cmim.data import FORMATS, load_splits
from cmim.engine.optimizer import scaled_lr
from cmim.engine.schedule import total_steps
from cmim.errors import UserError
from cmim.models.build import check_sizes
from cmim.settings import PRESETS, OptimizerSettings, TrainSettings
from tests.tiny_runs import tiny

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_config_is_valid_with_every_method(path, preset):
    config = load_config(path, ["--data.root", "x", "--method.preset", preset])
    check_sizes(config)
    assert scaled_lr(config.optimizer, config.train) == config.optimizer.lr  # what the file says is what is used


def test_every_format_has_a_config_and_every_config_its_line_in_the_docs():
    formats = {load_config(path, ["--data.root", "x"]).data.format for path in CONFIGS}
    assert not set(FORMATS) - formats, "configs/ has no recipe for these values of data.format"
    pages = "".join((ROOT / page).read_text() for page in ("README.md", "docs/training.md", "Makefile"))
    named = {path.stem for path in CONFIGS if path.name in pages} | {default_config_path().stem}
    assert not {path.stem for path in CONFIGS} - named, "docs/training.md does not name these files of configs/"


@pytest.mark.parametrize("name, folder", [("voc", "pascal"), ("cityscapes", "cityscapes")])
def test_the_steps_that_a_config_names_for_each_split(name, folder):
    """Epochs times whole batches of the unlabelled images, as counted by the published files."""
    root = os.environ.get("CMIM_TEST_SPLITS")
    if root is None:
        pytest.skip("CMIM_TEST_SPLITS names no folder of UniMatch's splits")
    path = next(path for path in CONFIGS if path.stem == name)
    config = load_config(path, ["--data.root", "x"])
    named = re.findall(r"((?:[\w]+, )*\w+) +(\d+) \+ +(\d+) +(\d+)", path.read_text())
    named = {split: tuple(map(int, counts)) for names, *counts in named for split in names.split(", ")}
    published = {p.parent.name for p in Path(root, folder).glob("*/labeled.txt")}
    assert named.keys() == published
    for split, counts in named.items():
        labelled, unlabelled = (
            len(Path(root, folder, split, f"{kind}.txt").read_text().split("\n")) for kind in ("labeled", "unlabeled")
        )
        blank = [Path(root, folder, split, f"{kind}.txt").read_text().endswith("\n") for kind in ("labeled", "unlabeled")]
        labelled, unlabelled = labelled - blank[0], unlabelled - blank[1]
        assert counts == (labelled, unlabelled, total_steps(config.train, unlabelled)), split
    assert Path(config.data.split).name in published


def test_an_epoch_holds_at_least_one_step(tmp_path):
    words = tiny("x", train__epochs=3, train__steps=None, data__shapes__unlabelled=5, train__unlabelled_batch=6)[2:]
    config = load_config(default_config_path(), [*words, "--method.preset", "supervised"])
    splits = load_splits(config.data)
    with pytest.raises(UserError, match=r"5 are fewer than the 6 of a step; give train.steps"):
        check_counts(config, len(splits.labelled), len(splits.unlabelled), 1)


@pytest.mark.parametrize(
    "settings, images, steps",
    [
        ({}, 100, 40_000),
        ({"steps": 7}, 100, 7),
        ({"epochs": 3, "unlabelled_batch": 8}, 100, 36),  # 12 whole batches an epoch
        ({"epochs": 0.5, "unlabelled_batch": 8}, 100, 6),
        ({"epochs": 2, "unlabelled_batch": 8, "accumulate": 3}, 100, 8),
        ({"epochs": 1, "unlabelled_batch": 8}, 5, 1),
    ],
)
def test_length_of_a_run(settings, images, steps):
    assert total_steps(TrainSettings(**settings), images) == steps


def test_the_learning_rate_follows_the_labelled_images_of_a_step():
    optimizer = OptimizerSettings(lr=0.01, lr_batch=8)
    assert scaled_lr(optimizer, TrainSettings(labelled_batch=8)) == 0.01
    assert scaled_lr(optimizer, TrainSettings(labelled_batch=2)) == 0.0025
    assert scaled_lr(optimizer, TrainSettings(labelled_batch=4, accumulate=4)) == 0.02
