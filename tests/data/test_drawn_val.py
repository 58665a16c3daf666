"""data.val as a share or a number: which images it takes, and that a run keeps them."""

import shutil

import pytest
from PIL import Image

from cmim import evaluate
from cmim.config import config_from, load_config
from cmim.data import load_splits
from cmim.errors import UserError
from tests.tiny_runs import FOLDER, run_tiny, write_folder


@pytest.fixture
def root(tmp_path):
    """20 training images with a mask, one without; no val."""
    folder = write_folder(tmp_path / "data", train=20)
    shutil.rmtree(folder / "val")
    Image.new("RGB", (48, 40)).save(folder / "train/images/plain.png")
    return folder


def load(folder, **data):
    return load_splits(config_from({"data": {"format": "folder", "root": str(folder)} | data}, "test").data)


def names(image_set):
    return [image_set.name(i) for i in range(len(image_set))]


def test_a_share_or_a_number_of_the_images_that_have_a_mask(root):
    every = {f"train{i}" for i in range(20)}
    for val, count in ((0.25, 5), (7, 7), (0.001, 1), (19, 19)):
        splits = load(root, val=val)
        drawn, labelled = names(splits.val), names(splits.labelled)
        assert len(drawn) == count and sorted(drawn + labelled) == sorted(every) and not set(drawn) & set(labelled)
        assert names(splits.unlabelled) == ["plain"]
        assert f"takes {count} of the 20 training images that have a mask" in " ".join(splits.notes)
    splits = load(root, val=5, labelled=0.2)  # a share of the others
    assert len(splits.labelled) == 3 and len(splits.unlabelled) == 13
    assert sorted(names(splits.val) + names(splits.labelled) + names(splits.unlabelled)) == sorted([*every, "plain"])
    label, mask = splits.val.label(0), root / "train/masks" / f"{names(splits.val)[0]}.png"
    assert (label == Image.open(mask)).all()


def test_what_is_drawn_depends_on_the_split_seed_alone(root):
    draw = lambda **more: names(load(root, **more).val)  # noqa: E731
    assert draw(val=6) == draw(val=6, labelled=3) == draw(val=0.3, labelled=0.5) != draw(val=6, split_seed=1)
    assert set(draw(val=3)) < set(draw(val=9))
    assert draw(val=6) != names(load(root, val="test", test=None, labelled=6).labelled)  # draws of their own
    chosen = [name for seed in range(60) for name in draw(val=5, split_seed=seed)]
    assert all(4 <= chosen.count(f"train{i}") <= 28 for i in range(20))  # 15 expected


def test_images_of_a_list_stay_labelled(root):
    (root / "list.txt").write_text("\n".join(f"train{i}" for i in range(17)))
    splits = load(root, val=0.5, labelled=str(root / "list.txt"))
    assert len(splits.labelled) == 17 and len(splits.val) == 2
    assert sorted(names(splits.val) + names(splits.unlabelled)) == ["plain", "train17", "train18", "train19"]
    with pytest.raises(
        UserError, match=r"data.val is 4, but 3 training images with a mask are not in data.labelled; lower it"
    ):
        load(root, val=4, labelled=str(root / "list.txt"))


MISTAKES = {
    "no val": ({}, "data.val: there is no folder or text file val: give --data.val 0.1 to take a tenth of the training"),
    "all": ({"val": 20}, "data.val is 20, but 20 training images with a mask are there, and one must be labelled; lower it"),
    "more labelled than left": ({"val": 10, "labelled": 11}, "data.labelled is 11, but only 10 training images"),
    "a share of 1": ({"val": 1.0}, "data.val: got 1.0, expected: .*A share below 1"),
    "nothing": ({"val": 0}, "data.val: got 0, expected: "),
    "drawn images": (
        {"format": "shapes", "root": None, "val": 0.1},
        "data.format shapes draws its own; give data.shapes.val",
    ),
    "a split": ({"split": "s", "val": 0.1}, "data.split names the training images; list those of val in s/val.txt"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case, root):
    settings, message = MISTAKES[case]
    with pytest.raises(UserError, match=message):
        load(root, **settings)


def test_val_images_that_are_there_are_not_passed_over(root):
    shutil.copytree(root / "test", root / "val")
    with pytest.raises(UserError, match=r"data.val is 0.1, but this data set has val images of its own"):
        load(root, val=0.1)
    (root / "test").rename(root / "7")
    with pytest.raises(UserError, match=r"data.val 7 is a number, but .*/7 is a folder: give --data.val \"'7'\""):
        load(root, val=7)
    assert names(load(root, val="7").val) == ["test0", "test1"]
    splits = load(root, val=0.1, test="val")
    assert names(splits.test) == ["test0", "test1"] and len(splits.val) == 2


@pytest.mark.parametrize("text, value", [("0.1", 0.1), ("12", 12), ("val", "val"), ("run #2", "run #2"), ("'3'", "3")])
def test_the_command_line(text, value, tmp_path):
    (tmp_path / "c.yaml").write_text("data: {root: x}")
    found = load_config(tmp_path / "c.yaml", ["--data.val", text]).data.val
    assert found == value and type(found) is type(value)


def test_a_run_keeps_its_val_images(root, tmp_path, capsys):
    """Also where new images would change what is drawn; and evaluate reads the same ones."""
    settings = FOLDER | {"data__root": str(root), "data__val": 0.2, "data__labelled": 8, "data__test": "null"}
    run = run_tiny(tmp_path / "run", **settings)
    kept, labelled = run.val.read_text(), run.labelled.read_text()
    assert kept.split() == names(load(root, val=4).val) and not set(kept.split()) & set(labelled.split())
    for i in range(4):
        for kind in ("images", "masks"):
            shutil.copy(root / f"train/{kind}/train{i}.png", root / f"train/{kind}/a{i}.png")
        with Image.open(root / f"train/images/a{i}.png") as image:
            image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(root / f"train/images/a{i}.png")
    assert names(load(root, val=0.2).val) != kept.split()
    run_tiny(run.folder, "--resume", **settings, train__steps=3)
    assert run.val.read_text() == kept and run.labelled.read_text() == labelled
    capsys.readouterr()
    evaluate.main([str(run.folder)])
    first = capsys.readouterr().out
    evaluate.main([str(run.folder), "--split", "val"])
    assert capsys.readouterr().out == first and "step 3, val" in first
    with pytest.raises(UserError, match="would draw images that the run was trained on; leave it away"):
        evaluate.main([str(run.folder), "--data.val", "0.5"])
    with pytest.raises(UserError, match=r"data.val differs from .*config.yaml"):
        run_tiny(run.folder, "--resume", **settings | {"data__val": 0.3})
    (root / "train/images" / f"{kept.split()[0]}.png").unlink()
    for go_on in (lambda: run_tiny(run.folder, "--resume", **settings), lambda: evaluate.main([str(run.folder)])):
        with pytest.raises(UserError, match=r"val images are not those of .*val.txt: .*; restore the data"):
            go_on()
    run.val.unlink()
    with pytest.raises(UserError, match=r"val.txt is gone, which lists the val images of the run; put it back"):
        evaluate.main([str(run.folder)])


def test_a_run_that_starts_anew_leaves_no_old_list(root, tmp_path):
    settings = FOLDER | {"data__root": str(root), "data__test": "null"}
    run = run_tiny(tmp_path / "run", **settings, data__val=0.2)
    shutil.rmtree(run.folder / "checkpoints")
    run.result.unlink()
    shutil.copytree(root / "test", root / "val")
    run_tiny(run.folder, **settings)
    assert not run.val.exists()
