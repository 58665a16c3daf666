"""Class weights from the pixels of the labelled images."""

import numpy as np
import pytest
import torch

from cmim import checkpoint, train
from cmim.config import config_from
from cmim.data import load_splits
from cmim.data.class_weights import class_weights
from cmim.data.survey import Counts, count_labels
from cmim.engine.run import Run, read_class_weights
from cmim.errors import UserError
from tests.tiny_runs import FOLDER, TINY, run_tiny, words, write_folder


def counts_of(masks):
    counts = Counts(len(masks[0]))
    for pixels in masks:
        counts.add(np.array(pixels))
    return counts


def test_weights_by_hand():
    """The third class has no pixel; the second occurs in one image of two."""
    counts = counts_of([[60, 20, 0], [100, 0, 0]])
    assert class_weights("inverse", counts).tolist() == [90 / 160, 90 / 20, 1]
    first, second = 160 / 180, 20 / 80
    middle = (first + second) / 2
    assert class_weights("median", counts).tolist() == pytest.approx([middle / first, middle / second, 1])


@pytest.mark.parametrize("kind", ["inverse", "median"])
def test_weights_are_finite_and_larger_for_rarer_classes(kind):
    weights = class_weights(kind, counts_of([[10**12, 1, 50, 0]]))
    assert np.isfinite(weights).all() and weights[1] > weights[2] > weights[0] > 0
    assert class_weights(kind, counts_of([[7, 7, 7]])).tolist() == [1, 1, 1]


def test_files_and_drawn_images_are_counted(tmp_path):
    root = write_folder(tmp_path / "data", sizes=((40, 48), (31, 52)))
    for settings in (dict(format="folder", root=root, labelled=1.0, val="val"), {"format": "shapes"}):
        labelled = load_splits(config_from({"data": settings}, "test").data).labelled
        counts = count_labels(labelled, 3)
        pixels = [[int((labelled.label(i) == k).sum()) for k in range(3)] for i in range(len(labelled))]
        assert counts.classes.tolist() == np.sum(pixels, 0).tolist()
        assert counts.around.tolist() == [sum(sum(own) for own in pixels if own[k]) for k in range(3)]


def weighted(folder, data, *more, **settings):
    settings = (
        FOLDER | {"data__root": str(data), "method__preset": "supervised", "method__class_weights": "inverse"} | settings
    )
    return run_tiny(folder, *more, **settings)


def test_a_run_says_and_keeps_its_weights_and_a_resumed_run_reads_them(tmp_path, capsys):
    data = write_folder(tmp_path / "data")
    whole = weighted(tmp_path / "whole", data)
    lines = whole.class_weights.read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["sky", "road", "tree"]
    counts = count_labels(load_splits(train.load_config(whole.config).data, whole.labelled).labelled, 3)
    assert [float(line.split()[0]) for line in lines] == class_weights("inverse", counts).tolist()
    assert capsys.readouterr().out.count("class weights (inverse): sky ") == 1

    # The kept weights count, not those of the data: with others the run ends elsewhere.
    ends = []
    for name in ("same", "other"):
        run = weighted(tmp_path / name, data, train__steps=2)
        assert run.class_weights.read_text() == whole.class_weights.read_text()
        if name == "other":
            run.class_weights.write_text("30.0 sky\n0.1 road\n1.0 tree\n")
        weighted(run.folder, data, "--resume", train__steps=4)
        ends.append(checkpoint.load(run.last)["objective"])
    assert not any("class_weights" in name for name in ends[0])
    assert not torch.equal(ends[0]["net.head.weight"], ends[1]["net.head.weight"])
    assert run.class_weights.read_text().startswith("30.0 sky")


def test_a_run_without_weights_has_no_file_of_them(tmp_path):
    data = write_folder(tmp_path / "data")
    run = weighted(tmp_path / "run", data)
    for path in (run.last, run.best, run.result):
        path.unlink()
    run = weighted(tmp_path / "run", data, "--resume", method__class_weights=[1, 2, 3])
    assert not run.class_weights.exists() and "class_weights:\n  - 1.0\n" in run.config.read_text()


@pytest.mark.parametrize(
    "text", ["", "1.0 sky\n2.0 road\n", "1.0 sky\nx road\n1.0 tree\n", "1.0 sky\nnan road\n1 tree\n", "1.0"]
)
def test_a_damaged_file_of_weights(text, tmp_path):
    run = Run(tmp_path)
    assert read_class_weights(run, ["sky", "road", "tree"]) is None
    run.class_weights.write_text(text)
    with pytest.raises(UserError, match=r"class_weights.txt has not one weight for each class; restore it"):
        read_class_weights(run, ["sky", "road", "tree"])


@pytest.mark.parametrize(
    "value, said",
    [
        ([1, 2], "method.class_weights has 2 numbers, but there are 5 classes; give one for each"),
        ([0, 0, 0, 0, 0], "method.class_weights has no number above 0"),
        ([1, -1, 1, 1, 1], "method.class_weights: got [1, -1, 1, 1, 1], expected: Weights of the classes"),
        ("medium", "method.class_weights: got 'medium', expected: Weights of the classes"),
    ],
)
def test_weights_that_do_not_fit_are_refused(value, said, tmp_path):
    with pytest.raises(UserError) as caught:
        train.main(["--output", str(tmp_path / "run"), *words(TINY | {"method.class_weights": value})])
    assert str(caught.value).removeprefix("command line: ").startswith(said) and not (tmp_path / "run").exists()
