"""cmim.check: what it says of folders with planted faults, and that the config it writes trains."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from cmim import suggest, train
from cmim.check import MARK, main
from cmim.config import check_counts, load_config
from cmim.data import load_splits
from cmim.data.survey import Cache, survey
from cmim.engine.run import Run
from cmim.engine.sheet import choose
from cmim.errors import UserError
from cmim.models.build import check_sizes
from cmim.suggest import Choice, DataFacts, as_yaml, config_of
from tests.tiny_runs import write_folder

SIZES = ((72, 80),)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder to write to, a cache of its own, no installed weights, and no time spent on timing steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CMIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(suggest, "PACKAGE", "a-package-that-nobody-has")
    monkeypatch.setattr(suggest, "seconds_per_step", lambda config, classes: 0.5)


@pytest.fixture
def root(tmp_path):
    return write_folder(tmp_path / "data", SIZES, train=6)


def checked(capsys, *arguments):
    """(exit code, what was printed)."""
    code = main([str(a) for a in arguments])
    return code, capsys.readouterr().out


def repaint(path, change):
    pixels = np.array(Image.open(path))
    change(pixels)
    Image.fromarray(pixels).save(path)


def test_a_good_folder(root, capsys):
    code, said = checked(capsys, root)
    assert code == 0 and "no problem found" in said and "to repair" not in said
    config = load_config("data.yaml")
    assert config.data.root == root and config.data.classes == ["sky", "road", "tree"] and config.data.labelled == 1.0
    assert config.data.crop == 64 and config.data.crop % config.mask.block == 0
    assert config.model.weights == "none" and "without them a result is much worse" in Path("data.yaml").read_text()
    assert config.train.labelled_batch == 4 and config.method.preset == "supervised"
    true = np.concatenate([np.array(Image.open(path)).ravel() for path in (root / "train/masks").iterdir()])
    share = (true == 1).sum() / (true != 255).sum()
    (line,) = (line for line in said.splitlines() if line.startswith("  1 road"))
    assert f"{share:.2%}" in line.split()[2] and line.split()[3] == "6"
    with Image.open("data.png") as picture:
        assert picture.width > 1000 and picture.info["Software"] == "cmim.check"
    colours = {tuple(c) for c in np.array(Image.open("data.png").convert("RGB")).reshape(-1, 3)[::7].tolist()}
    assert len(colours) > 100


FAULTS = {
    "in two splits": (
        lambda root: Image.open(root / "train/images/train0.png").save(root / "val/images/val0.png", compress_level=1),
        "the same picture",
    ),
    "val without a mask": (lambda root: (root / "val/masks/val1.png").unlink(), "val1.png has no mask"),
    "another size": (
        lambda root: Image.new("L", (9, 9)).save(root / "train/masks/train3.png"),
        "is 9 x 9 pixels, its image",
    ),
    "beyond the classes": (
        lambda root: repaint(root / "train/masks/train1.png", lambda p: p.__setitem__((3, 3), 7)),
        "the value 7 in 1 mask",
    ),
    "damaged": (lambda root: (root / "test/images/test0.png").write_bytes(b"PNG"), "cannot read .*test0.png"),
    "no masks": (lambda root: [shutil.rmtree(path) for path in list(root.glob("*/masks"))], "but no mask"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_listed_with_its_remedy(fault, root, capsys):
    plant, expected = FAULTS[fault]
    plant(root)
    code, said = checked(capsys, root)
    assert code == 1 and "\n1 problem:" in said
    assert re.search(expected, said)
    with pytest.raises(UserError, match=expected):
        train.main([str(root)])
    assert not list(Path("runs").glob("*"))


def test_all_faults_are_listed_at_once(root, capsys):
    for fault in ("val without a mask", "another size", "beyond the classes", "damaged"):
        FAULTS[fault][0](root)
    code, said = checked(capsys, root)
    assert (
        code == 1 and "4 problems" in said and all(FAULTS[f][1].split(" ")[0] in said for f in ("another size", "damaged"))
    )


def test_what_is_left_over_is_said(root, capsys):
    path = root / "train/masks/train2.png"
    path.rename(path.with_name("train2_msk.png"))
    code, said = checked(capsys, root)
    assert code == 0 and "rename it, if it is that of train2.png" in said and "serve as unlabelled ones" in said


def test_a_config_that_was_changed_is_not_overwritten(root, capsys):
    checked(capsys, root)
    assert Path("data.yaml").read_text().startswith(MARK)
    checked(capsys, root)  # nobody changed it
    with open("data.yaml", "a") as file:
        file.write("seed: 3\n")
    with pytest.raises(UserError, match=r"data.yaml was changed"):
        main([str(root)])
    assert load_config("data.yaml").seed == 3
    Image.new("RGB", (4, 4)).save("other.png")
    with pytest.raises(UserError, match=r"other.png is there"):
        main([str(root), "--output", "other.yaml"])


def test_no_picture_comes_among_the_images(root, monkeypatch, capsys):
    monkeypatch.chdir(root / "train")
    assert checked(capsys, "..")[0] == 0
    assert (root.parent / "data.png").exists() and not list(root.glob("**/data.*"))
    monkeypatch.chdir(root)
    assert checked(capsys, ".")[0] == 0


def test_an_unlabelled_image_that_cannot_be_read_is_no_problem(root, capsys):
    (root / "unlabeled").mkdir()
    (root / "unlabeled/u.png").write_bytes(b"no image")
    code, said = checked(capsys, root)
    assert code == 0 and "u.png: no image, or damaged" in said and "training takes another one" in said


def test_wrong_calls(root):
    for arguments, said in (
        (["nothing"], "there is no folder nothing"),
        ([str(root), "--data.root", "x"], "goes with a config file"),
        ([str(root), "--output", "no/where.yaml"], "there is no folder .*no; make it"),
        ([str(root), "--convert", str(root)], "it is not empty"),
    ):
        with pytest.raises(UserError, match=said):
            main(arguments)


def test_a_config_is_checked_as_it_reads_the_data(root, capsys):
    Path("own.yaml").write_text(f"data: {{root: {root}, classes: [a, b], crop: 64}}\n")
    code, said = checked(capsys, "own.yaml")
    assert code == 1 and "no class" in said and not Path("data.yaml").exists()
    code, said = checked(capsys, "own.yaml", "--data.label_map", "{2: 1}")
    assert code == 0 and "no problem found" in said and Path("own.png").exists()


def test_the_trainer_need_not_open_the_files_again(root, monkeypatch, capsys):
    checked(capsys, root)
    opened = []
    monkeypatch.setattr("cmim.data.file_set.FileSet.image", lambda self, i: opened.append(i))
    config = load_config("data.yaml")
    splits = load_splits(config.data)
    survey(splits, config.data)
    assert not opened and len(Cache(splits.labelled).kept) == 6


def test_what_the_trainer_would_refuse_is_not_kept_for_it(root, capsys):
    """With four channels it takes no image of three, which cmim.check can open."""
    Path("own.yaml").write_text(f"data: {{root: {root}, channels: 4, crop: 64}}\n")
    code, said = checked(capsys, "own.yaml")
    assert code == 1 and "but data.channels is 4" in said


def test_images_of_unlabeled_beside_images_and_masks_in_the_root(root, capsys):
    for path in sorted((root / "train").rglob("*.png")):
        path.rename(root / f"{path.stem}{'_mask' * (path.parent.name == 'masks')}.png")
    for split in ("train", "val", "test"):
        shutil.rmtree(root / split)
    (root / "unlabeled").mkdir()
    Image.fromarray(np.random.default_rng(5).integers(0, 255, (72, 80, 3), np.uint8)).save(root / "unlabeled/u.png")
    code, said = checked(capsys, root)
    assert code == 0 and said.startswith("images   6 train, 1 unlabelled;")
    splits = load_splits(load_config("data.yaml").data)
    assert len(splits.unlabelled) == 1 and (len(splits.labelled), len(splits.val)) == (5, 1)


def test_a_val_folder_without_masks_is_no_val_set(root, capsys):
    shutil.rmtree(root / "val/masks")
    code, said = checked(capsys, root)
    assert code == 0 and "2 images of val/images have no masks, so that it is no val set" in said
    config = load_config("data.yaml")
    assert config.data.val == 1 and len(load_splits(config.data).val) == 1
    with pytest.raises(UserError, match=r"val0.png has no mask"):
        load_splits(config.data.model_copy(update={"val": "val"}))


def test_training_on_a_folder(root, capsys):
    (root / "train").rename(root / "Training")
    (root / "val").rename(root / "validation")
    for kind in ("images", "masks"):
        for path in root.glob(f"*/{kind}"):
            path.rename(path.with_name({"images": "photos", "masks": "labels"}[kind]))
    train.main([str(root), "--output", "run", "--train.steps", "2", "--data.workers", "0"])
    said = capsys.readouterr().out
    assert said.startswith("images   6 train, 2 val, 2 test") and "step 2" in said
    run = Run("run")
    config = load_config(run.config)
    assert (config.data.train, config.data.val, config.data.image_folder) == ("Training", "validation", "{split}/photos")
    decided = {"exif", "mean", "std", "workers"}
    assert load_config("run/suggested.yaml").data.model_dump(exclude=decided) == config.data.model_dump(exclude=decided)
    assert Image.open("run/images.png").width > 1000 and run.result.exists()
    train.main([str(root), "--output", "run", "--resume", "--data.workers", "0"])


def facts(sizes, labelled=100, unlabelled=0, **data):
    base = [Choice("data", "format", "folder"), Choice("data", "root", "x"), Choice("data", "classes", 3)]
    return DataFacts(np.array(sizes), labelled, unlabelled, 3, 3, [*base, *(Choice("data", k, v) for k, v in data.items())])


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        [(256, 256)],
        [(3000, 4000)],
        [(500, 375), (375, 500)],
        [(2000, 3000), (3000, 2000)],
        [(40, 52)],
        [(17, 300)],
        [(9, 9)],
    ],
)
@pytest.mark.parametrize("labelled, unlabelled", [(1, 0), (1, 50), (2, 0), (7, 50), (400, 3000)])
def test_every_suggestion_is_valid(sizes, labelled, unlabelled, cuda):
    choices = suggest.suggest(facts(sizes, labelled, unlabelled), cuda)
    config = config_of(choices)
    check_sizes(config), check_counts(config, labelled, unlabelled or labelled, 1)
    assert config.train.labelled_batch > 1  # BatchNorm needs two
    shown = yaml.safe_load(as_yaml(choices, ["x"], {}))
    assert shown["data"]["crop"] == config.data.crop and shown["train"]["steps"] == config.train.steps
    side = min(min(size) for size in ([config.data.size] if config.data.size else sizes))
    assert config.data.crop <= max(32, side)
    if max(map(max, sizes)) >= 3000:
        assert config.data.size or (config.data.scale[1] < 1 and len(config.evaluation.scales) == 1)
    assert config.method.preset == ("fixmatch" if unlabelled else "supervised")


def test_from_pretrained_weights_what_won_the_study_is_suggested(monkeypatch, tmp_path):
    """docs/experiments.md; a package of Python's own stands for that of the weights."""
    monkeypatch.setattr(suggest, "PACKAGE", "json")
    chosen = {c.key: c for c in suggest.suggest(facts([(256, 256)], 26, 388), cuda=False) if c.section != "mim"}
    assert chosen["preset"].value == "supervised" and "the 388 images without masks" in chosen["preset"].why
    assert (chosen["dice"].value, chosen["lr"].value, chosen["lr_batch"].value) == (1, 0.001, 4)
    # For the second training, from the weights of the first one:
    assert (chosen["tau"].value, chosen["colour_jitter"].value, chosen["logit_adjustment"].value) == (0.9, 0.0, True)
    assert not {"start", "ramp", "class_thresholds"} & set(chosen)
    few = {c.key for c in suggest.suggest(facts([(256, 256)], 8, 388), cuda=False)}
    assert "colour_jitter" in few and "logit_adjustment" not in few  # eight images do not have the shares of all
    given = words_of_second_training(chosen["preset"].why)
    config = load_config(write_config(tmp_path, suggest.suggest(facts([(256, 256)], 26, 388), cuda=False)), given)
    assert (config.method.preset, config.optimizer.lr, config.model.init_from) == ("fixmatch", 0.0003, Path("RUN"))


def words_of_second_training(why):
    """The command line that a comment names."""
    return why[why.index("--method.preset") : why.index(";")].split()


def write_config(folder, choices):
    (folder / "suggested.yaml").write_text(as_yaml(choices, [], {}))
    return folder / "suggested.yaml"


def test_a_class_name_that_yaml_would_read_otherwise():
    names = ["no", "3", "a: b", "# c", "ü", '"']
    choices = [Choice("data", "classes", names, "why"), Choice("data", "label_map", {255: 1}), Choice("data", "val", None)]
    about = {"classes": {"no": "said of it"}}
    text = as_yaml(choices, ["head"], about)
    assert (
        yaml.safe_load(text) == {"data": {"classes": names, "label_map": {255: 1}, "val": None}} and "# said of it" in text
    )


def test_images_are_chosen_so_that_all_classes_are_seen():
    present = [frozenset({0}), frozenset({0}), frozenset({0, 1}), frozenset({2}), frozenset({0})]
    assert choose(present, 2) == [2, 3] and choose(present, 9) == [0, 1, 2, 3, 4]


def test_the_report_of_a_class_that_is_absent(root, capsys):
    (root / "classes.txt").write_text("sky\nroad\ntree\nsnow\n")
    code, said = checked(capsys, root)
    assert code == 0 and "1 of 4 classes have no training pixel, so that nothing teaches them: snow" in said


def test_a_single_labelled_image_trains(tmp_path, monkeypatch, capsys):
    """Of two masks one becomes val: the config that is suggested for the other one trains, though its network has
    BatchNorm after a global pooling, which takes no single image."""
    monkeypatch.chdir(tmp_path)
    root = write_folder(tmp_path / "data", train=2)
    for name in ("val", "test"):
        shutil.rmtree(root / name)
    code, _ = checked(capsys, root)
    assert code == 0 and yaml.safe_load(Path("data.yaml").read_text())["train"]["labelled_batch"] == 2
    train.main(["data.yaml", "--train.steps", "1", "--output", "run"])
    assert "labelled images are 1: the same image is in a batch several times" in capsys.readouterr().out
    assert Path("run/result.json").exists()


@pytest.mark.parametrize(
    "dtype, mode, shown",
    [(np.uint8, None, "grey\n"), (np.uint16, None, "grey with more than 8 bits\n"), (np.uint8, "1", "black and white\n")],
)
def test_kinds_of_images_are_said_in_words(dtype, mode, shown, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    values = np.random.default_rng(0).integers(0, 250, (3, 40, 40)).astype(dtype)
    for folder in ("images", "masks"):
        Path("data", folder).mkdir(parents=True)
    for i, pixels in enumerate(values):
        image = Image.fromarray(pixels)
        (image.convert(mode) if mode else image).save(f"data/images/{i}.png")
        Image.fromarray((pixels % 2).astype(np.uint8)).save(f"data/masks/{i}.png")
    said = checked(capsys, Path("data"))[1]
    assert said.partition("\n\n")[0].splitlines()[0].endswith("; " + shown.strip())
