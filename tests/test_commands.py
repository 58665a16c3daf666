"""evaluate and predict on runs of a few steps."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cmim import checkpoint, evaluate, predict
from cmim.config import load_config
from cmim.data.labels import colour_map
from cmim.engine.run import Run
from cmim.engine.trained import load_trained
from cmim.errors import UserError
from tests.tiny_runs import FOLDER, read_metrics, run_tiny, write_folder

PALETTE = colour_map(3)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on images of several sizes, which the network sees resized."""
    folder = tmp_path_factory.mktemp("commands")
    root = write_folder(folder / "data", sizes=((40, 48), (31, 52)), val=3, test=3)
    return run_tiny(
        folder / "run", **FOLDER, data__root=str(root), data__size=[36, 44], train__steps=3, train__evaluate_every=1,
        method__preset="supervised", train__picture_every=9,
    )  # fmt: skip


def evaluated(monkeypatch, *arguments):
    """(Scores, class names, title) that a call of evaluate prints."""
    printed = []
    monkeypatch.setattr(evaluate, "print_table", lambda *table: printed.append(table[:3]))
    evaluate.main([str(a) for a in arguments])
    (table,) = printed
    return table


def test_evaluate_gives_the_result_again(run, monkeypatch):
    result = json.loads(run.result.read_text())
    scores, names, title = evaluated(monkeypatch, run.folder)
    assert scores.miou == result["miou"] and dict(zip(names, scores.iou, strict=True)) == result["iou"]
    assert title == f"{run.folder}, last, step 3, test"


def test_the_best_checkpoint_holds_what_was_evaluated(run):
    with pytest.raises(UserError, match=r"best.pt holds the teacher's weights only; use --checkpoint last"):
        evaluate.main([str(run.folder), "--checkpoint", "best", "--evaluation.weights", "student", "--data.workers", "0"])


def test_evaluate_on_val_and_of_the_best_checkpoint(run, monkeypatch):
    val = [line for line in read_metrics(run) if line.get("split") == "val"]
    assert evaluated(monkeypatch, run.folder, "--split", "val")[0].miou == val[-1]["miou"]
    scores, _, title = evaluated(monkeypatch, run.folder, "--split", "val", "--checkpoint", "best", "--data.workers", "0")
    assert scores.miou == json.loads(run.result.read_text())["best_miou"] == max(line["miou"] for line in val)
    best = max(val, key=lambda line: (line["miou"], line["step"]))
    assert title == f"{run.folder}, best, step {best['step']}, val"


@pytest.mark.parametrize("key", ["train.steps", "method.preset", "optimizer.lr", "seed"])
def test_settings_of_training_are_refused_by_other_commands(run, tmp_path, key):
    with pytest.raises(UserError, match=f"--{key} has an effect only in training; leave it out"):
        evaluate.main([str(run.folder), f"--{key}", "5"])
    (tmp_path / "in").mkdir()
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "in/a.png")
    with pytest.raises(UserError, match=f"--{key} has an effect only in training"):
        predict.main([str(run.folder), str(tmp_path / "in"), "-o", str(tmp_path / "out"), f"--{key}=5"])


def test_evaluate_prints_a_table(run, capsys):
    evaluate.main([str(run.folder)])
    printed = capsys.readouterr().out
    result = json.loads(run.result.read_text())
    rows = [line.split("│") for line in printed.splitlines() if "│" in line]
    shown = {name.strip(): value.strip() for name, value in rows}
    expected = result["iou"] | {
        "mIoU": result["miou"], "mean accuracy": result["mean_accuracy"], "pixel accuracy": result["pixel_accuracy"],
    }  # fmt: skip
    assert shown == {name: "-" if value is None else f"{100 * value:.2f}" for name, value in expected.items()}


def test_evaluate_elsewhere(run, monkeypatch, tmp_path):
    root = write_folder(tmp_path / "data", test=0)
    assert evaluated(monkeypatch, run.folder, "--data.root", root)[2].endswith("step 3, val")
    with pytest.raises(UserError, match="there are no test images; use --split val"):
        evaluate.main([str(run.folder), "--data.root", str(root), "--split", "test"])
    for mask in root.glob("val/masks/*"):
        Image.fromarray(np.full((40, 48), 255, np.uint8)).save(mask)
    with pytest.raises(UserError, match="not one pixel of the val masks has a class, so there is nothing to measure"):
        evaluate.main([str(run.folder), "--data.root", str(root)])
    (root / "classes.txt").write_text("sky\ntree\nroad\n")
    with pytest.raises(UserError, match=r"classes .* are not those of the run"):
        evaluate.main([str(run.folder), "--data.root", str(root)])


def test_evaluate_needs_nothing_but_the_images_of_its_split(run, monkeypatch, tmp_path):
    root = write_folder(tmp_path / "data")
    expected = evaluated(monkeypatch, run.folder, "--data.root", root)
    for name in ("train", "val"):
        shutil.rmtree(root / name)
    assert evaluated(monkeypatch, run.folder, "--data.root", root) == expected
    (root / "classes.txt").unlink()  # the run knows its classes
    assert evaluated(monkeypatch, run.folder, "--data.root", root) == expected
    with pytest.raises(UserError, match=r"data.val: there is no folder or text file val"):
        evaluate.main([str(run.folder), "--data.root", str(root), "--split", "val"])


def test_the_paths_of_a_run_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = write_folder(tmp_path / "data")
    (tmp_path / "s").mkdir()
    lines = [f"train/images/train{i}.png train/masks/train{i}.png" for i in range(4)]
    (tmp_path / "s/labeled.txt").write_text("\n".join(lines[:2]))
    (tmp_path / "s/unlabeled.txt").write_text("\n".join(lines[2:]))
    (tmp_path / "v.txt").write_text("val/images/val0.png val/masks/val0.png")
    settings = FOLDER | dict(
        data__root="data", data__split="s", data__val="v.txt", data__test="val", train__steps=1, method__preset="supervised"
    )
    run = run_tiny("run", **settings)
    run_tiny("run", "--resume", **settings)
    data = load_config(run.config).data
    assert (data.root, data.split, data.val, data.test) == (root, tmp_path / "s", str(tmp_path / "v.txt"), "val")
    monkeypatch.chdir("/")
    evaluated(monkeypatch, tmp_path / "run", "--split", "val")


def test_predict_skips_what_it_cannot_read(run, tmp_path, capsys):
    for i in range(4):
        picture(tmp_path / f"in/{i}.png", i)
    for i in (0, 2):
        path = tmp_path / f"in/{i}.png"
        path.write_bytes(path.read_bytes()[:300])
    (tmp_path / "in/link.png").symlink_to("nowhere")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "in/pipe.jpg")
    else:
        (tmp_path / "in/pipe.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"^4 of 6 images got no mask: they are listed above$"):
        predict.main([str(run.folder), str(tmp_path / "in"), "-o", str(tmp_path / "out")])
    said = capsys.readouterr().out
    unread = ("0.png", "2.png", "link.png", "pipe.jpg")
    assert all(f"skipped: cannot read {tmp_path / 'in' / name}" in said for name in unread) and "2 images: " in said
    assert sorted(p.name for p in (tmp_path / "out/masks").iterdir()) == ["1.png", "3.png"]


def test_trained_weights_are_those_that_were_evaluated(tmp_path):
    teacher = run_tiny(tmp_path / "run", method__preset="supervised", teacher__kind="ema", train__picture_every=9)
    state = checkpoint.load(teacher.last)["objective"]
    for override, prefix in (([], "teacher."), (["--evaluation.weights", "student"], "net.")):
        trained = load_trained(teacher.folder, "last", override)
        assert all(torch.equal(v, state[prefix + k]) for k, v in trained.net.state_dict().items())
    # The layout is that of training: another one may round differently.
    kernel = next(p for p in trained.net.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1)
    assert kernel.is_contiguous(memory_format=torch.channels_last)


def logits_of(run, image):
    net = load_trained(run.folder, "last").net.eval()
    shown = torch.from_numpy(np.array(image.resize((44, 36), Image.BILINEAR))).permute(2, 0, 1)[None]
    with torch.inference_mode():
        return net, net(net.normalise(shown)).float()


@pytest.fixture(scope="module")
def undecided(run, tmp_path_factory):
    """A copy of the run whose head prefers no class, so that its predictions vary."""
    copy = Run(shutil.copytree(run.folder, tmp_path_factory.mktemp("undecided") / "run"))
    state = checkpoint.load(copy.last)
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 255, (48, 48, 3), np.uint8))
    state["objective"]["teacher.head.bias"] -= logits_of(run, noise)[1].mean((0, 2, 3))
    checkpoint.save(state, copy.last)
    return copy


def expected_mask(run, image):
    net, logits = logits_of(run, image)
    with torch.inference_mode():
        full = F.interpolate(logits, (image.height, image.width), mode="bilinear", align_corners=net.align_corners)
    return full[0].argmax(0).numpy()


def test_predict_writes_masks_and_overlays(undecided, tmp_path):
    images, rng = tmp_path / "images", np.random.default_rng(3)
    sizes = {"a.jpg": (40, 48), "a.png": (23, 31), "deep/er/b.c.PNG": (64, 33), "grey.bmp": (30, 30)}
    for name, size in sizes.items():
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        shape = size if name == "grey.bmp" else (*size, 3)
        Image.fromarray(rng.integers(0, 255, shape, np.uint8)).save(images / name)
    (images / "notes.txt").write_text("no image")
    (images / "._a.jpg").write_bytes(b"of another system")
    (images / "folder.png").mkdir()
    predict.main([str(undecided.folder), str(images), "-o", str(tmp_path / "out")])
    masks = {str(p.relative_to(tmp_path / "out/masks")) for p in (tmp_path / "out/masks").rglob("*") if p.is_file()}
    targets = {"a.jpg": "a.jpg.png", "a.png": "a.png.png", "deep/er/b.c.PNG": "deep/er/b.c.png", "grey.bmp": "grey.png"}
    assert masks == set(targets.values())
    seen = set()
    for name, target in targets.items():
        image = Image.open(images / name).convert("RGB")
        with Image.open(tmp_path / "out/masks" / target) as mask:
            assert mask.mode == "P" and mask.size == image.size
            classes = np.asarray(mask)
            coloured = np.asarray(mask.convert("RGB"))
        np.testing.assert_array_equal(classes, expected_mask(undecided, image))
        np.testing.assert_array_equal(coloured, PALETTE[classes])
        seen |= set(classes.flat)
        overlay = np.asarray(Image.open(tmp_path / "out/overlays" / target)).astype(int)
        assert np.abs(overlay - (np.asarray(image) / 2 + coloured / 2)).max() <= 1
    assert len(seen) > 1


def picture(path, seed=0, size=(20, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)).save(path)
    return path


def test_predict_never_writes_over_the_ground_truth(run, tmp_path):
    images = [picture(tmp_path / f"data/train/images/{name}.png", i) for i, name in enumerate("ab")]
    truth = tmp_path / "data/train/masks/b.png"
    truth.parent.mkdir()
    Image.fromarray(np.full((20, 30), 2, np.uint8)).save(truth)
    before = truth.read_bytes()
    with pytest.raises(UserError, match=r"masks/b.png would be overwritten, but predict did not write it"):
        predict.main([str(run.folder), str(images[0].parent), "-o", str(tmp_path / "data/train")])
    assert truth.read_bytes() == before and not (truth.parent / "a.png").exists()
    (tmp_path / "out/overlays").mkdir(parents=True)
    (tmp_path / "out/overlays/a.png").write_bytes(b"anything")
    with pytest.raises(UserError, match=r"overlays/a\.png"):
        predict.main([str(run.folder), str(images[0]), "-o", str(tmp_path / "out")])


def test_predict_may_be_repeated_where_it_wrote_before(run, tmp_path, capsys):
    for i, name in enumerate(("a.png", "deep/b.png")):
        picture(tmp_path / name, i)
    found = []
    for _ in range(3):
        predict.main([str(run.folder), str(tmp_path), "-o", str(tmp_path)])
        found.append(sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.p*") if p.is_file()))
    assert found[0] == found[1] == found[2] and len(found[0]) == 6
    said = capsys.readouterr().out
    assert said.count("2 images: ") == 3 and said.count("4 files in ") == 2


def test_predict_obeys_the_decision_on_exif(run, tmp_path, capsys):
    image = Image.open(picture(tmp_path / "plain/a.png"))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    for more, size, notes in (([], (30, 20), 1), (["--data.exif", "apply"], (20, 30), 0)):
        predict.main([str(run.folder), str(tmp_path / "turned.png"), "-o", str(tmp_path / f"out{notes}"), *more])
        assert Image.open(tmp_path / f"out{notes}/masks/turned.png").size == size
        assert Image.open(tmp_path / f"out{notes}/overlays/turned.png").size == size
        assert capsys.readouterr().out.count("1 images have an EXIF orientation") == notes
    assert load_config(run.config).data.exif == "ignore"


def test_overlays_by_option(run, tmp_path):
    path = picture(tmp_path / "a.png")
    predict.main([str(run.folder), str(path), "-o", str(tmp_path / "out"), "--legend", "--clear", "sky"])
    assert Image.open(tmp_path / "out/overlays/a.png").height > 20 == Image.open(tmp_path / "out/masks/a.png").height
    assert [predict.find_class(name, ["sky", "7"]) for name in (None, "sky", "7", "0")] == [None, 0, 1, 0]
    with pytest.raises(UserError, match="--clear sea: the run has no such class; it has sky, road, tree"):
        predict.main([str(run.folder), str(path), "-o", str(tmp_path / "out"), "--clear", "sea"])


def test_images_never_share_a_mask():
    names = [Path(name) for name in ("r/a.jpg", "r/a.png", "r/a.jpg.png", "r/b.png", "r/s/a.jpg")]
    targets = predict.name_targets(names, Path("r"))
    assert [targets[name].as_posix() for name in names] == [
        "a.jpg.png", "a.png.png", "a.jpg.png.png", "b.png", "s/a.png",
    ]  # fmt: skip


def test_predict_of_one_image(run, tmp_path):
    path = tmp_path / "one.png"
    Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(path)
    predict.main([str(run.folder), str(path), "--output", str(tmp_path / "out"), "--checkpoint", "best"])
    assert sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.png")) == [
        "masks/one.png",
        "overlays/one.png",
    ]
    assert Image.open(tmp_path / "out/masks/one.png").size == (30, 20)


def test_predict_obeys_the_settings_of_evaluation(undecided, tmp_path):
    path = tmp_path / "one.png"
    Image.fromarray(np.random.default_rng(5).integers(0, 255, (41, 50, 3), np.uint8)).save(path)

    def mask(name, *settings):
        predict.main([str(undecided.folder), str(path), "-o", str(tmp_path / name), *settings])
        return np.asarray(Image.open(tmp_path / name / "masks/one.png"))

    image = Image.open(path)
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    both = [
        F.interpolate(logits_of(undecided, i)[1], (41, 50), mode="bilinear", align_corners=True) for i in (image, mirrored)
    ]
    mean = both[0].softmax(1) + both[1].softmax(1).flip(-1)
    found = mask("flip", "--evaluation.flip", "true")
    assert (found == mean[0].argmax(0).numpy()).mean() > 0.999
    plain = mask("plain")
    assert (plain != found).any()
    assert (plain != mask("slide", "--evaluation.mode", "slide", "--evaluation.window", "16")).any()


@pytest.mark.parametrize("channels", [1, 5])
def test_images_of_other_channels_from_training_to_overlays(channels, tmp_path):
    """One channel from grey pictures, five from .npy files."""
    root = write_folder(tmp_path / "data", channels=channels)
    run = run_tiny(
        tmp_path / "run", **FOLDER, data__root=str(root), data__channels=channels, data__size=[36, 44], train__steps=1,
        method__preset="supervised",
    )  # fmt: skip
    evaluate.main([str(run.folder)])
    predict.main([str(run.folder), str(root / "test/images"), "-o", str(tmp_path / "out")])
    image = (root / "test/images/test0").with_suffix(".png" if channels == 1 else ".npy")
    pixels = np.asarray(Image.open(image))[:, :, None].repeat(3, 2) if channels == 1 else np.load(image)[:, :, :3]
    colours = np.asarray(Image.open(tmp_path / "out/masks/test0.png").convert("RGB")).astype(int)
    overlay = np.asarray(Image.open(tmp_path / "out/overlays/test0.png")).astype(int)
    assert np.abs(overlay - (pixels / 2 + colours / 2)).max() <= 1


def test_predict_says_why_no_image_can_be_used(run, tmp_path, capsys):
    picture(tmp_path / "in/a.png", 0)
    (tmp_path / "in/b.png").write_bytes(b"PNG")
    (tmp_path / "in/c.npy").write_bytes(b"")
    (tmp_path / "in/a.png").write_bytes(b"no")
    with pytest.raises(UserError, match=r"^none of 3 images can be used: the reasons are listed above$"):
        predict.main([str(run.folder), str(tmp_path / "in"), "-o", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert all(f"{tmp_path / 'in' / name}" in said for name in ("a.png", "b.png", "c.npy"))
    assert not (tmp_path / "out/classes.csv").exists()
    with pytest.raises(UserError, match=r"^cannot read .*b\.png"):
        predict.main([str(run.folder), str(tmp_path / "in/b.png"), "-o", str(tmp_path / "out")])
