"""evaluate, predict and compare on runs of a few steps."""

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from cmim import compare, evaluate, predict, train
from cmim.data.folder import colour_map
from cmim.engine import checkpoint
from cmim.engine.run import Run, load_trained
from cmim.errors import UserError, run_command
from tests.tiny_runs import FOLDER, TINY, read_metrics, run_tiny, words, write_folder

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
    monkeypatch.setattr(evaluate, "print_table", lambda *table: printed.append(table))
    evaluate.main([str(a) for a in arguments])
    (table,) = printed
    return table


def test_evaluate_gives_the_result_again(run, monkeypatch):
    result = json.loads(run.result.read_text())
    scores, names, title = evaluated(monkeypatch, run.folder)
    assert scores.miou == result["miou"] and dict(zip(names, scores.iou, strict=True)) == result["iou"]
    assert title == f"{run.folder}, last, step 3, test"


def test_evaluate_on_val_and_of_the_best_checkpoint(run, monkeypatch):
    val = [line for line in read_metrics(run) if line.get("split") == "val"]
    assert evaluated(monkeypatch, run.folder, "--split", "val")[0].miou == val[-1]["miou"]
    scores, _, title = evaluated(monkeypatch, run.folder, "--split", "val", "--checkpoint", "best", "--data.workers", "0")
    assert scores.miou == json.loads(run.result.read_text())["best_miou"] == max(line["miou"] for line in val)
    best = max(val, key=lambda line: (line["miou"], line["step"]))
    assert title == f"{run.folder}, best, step {best['step']}, val"


def test_evaluate_prints_a_table(run, capsys):
    evaluate.main([str(run.folder)])
    printed = capsys.readouterr().out
    result = json.loads(run.result.read_text())
    rows = [line.split("│") for line in printed.splitlines() if "│" in line]
    shown = {name.strip(): value.strip() for name, value in rows}
    expected = result["iou"] | {"mIoU": result["miou"]}
    assert shown == {name: "-" if value is None else f"{100 * value:.2f}" for name, value in expected.items()}


def test_evaluate_elsewhere(run, monkeypatch, tmp_path):
    root = write_folder(tmp_path / "data", test=0)
    assert evaluated(monkeypatch, run.folder, "--data.root", root)[2].endswith("step 3, val")
    with pytest.raises(UserError, match="there are no test images; use --split val"):
        evaluate.main([str(run.folder), "--data.root", str(root), "--split", "test"])
    (root / "classes.txt").write_text("sky\ntree\nroad\n")
    with pytest.raises(UserError, match=r"classes .* are not those of the run"):
        evaluate.main([str(run.folder), "--data.root", str(root)])


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
        full = torch.nn.functional.interpolate(
            logits, (image.height, image.width), mode="bilinear", align_corners=net.align_corners
        )
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


def test_predict_of_one_image(run, tmp_path):
    path = tmp_path / "one.png"
    Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(path)
    predict.main([str(run.folder), str(path), "--output", str(tmp_path / "out"), "--checkpoint", "best"])
    assert sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.png")) == [
        "masks/one.png",
        "overlays/one.png",
    ]
    assert Image.open(tmp_path / "out/masks/one.png").size == (30, 20)


def compared(output, *more, **settings):
    settings = TINY | {"train.picture_every": 9} | {key.replace("__", "."): value for key, value in settings.items()}
    compare.main(["--output", str(output), *words(settings), *more])


def in_this_process(started):
    """A stand-in for subprocess.run that spares each run the start of Python."""

    def call(command, stdout, stderr, env):
        assert command[:3] == [sys.executable, "-m", "cmim.train"] and stderr is stdout and env == os.environ
        started.append(command[command.index("--output") + 1])
        code = 0
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stdout):
            try:
                run_command(lambda: train.main(command[3:]))
            except SystemExit as stop:
                code = stop.code
        return SimpleNamespace(returncode=code)

    return call


def test_compare_makes_a_table_and_keeps_what_is_finished(tmp_path, monkeypatch, capsys):
    started, wanted = [], ["--presets", "supervised", "fixmatch", "--seeds", "0", "7"]
    monkeypatch.setattr(compare.subprocess, "run", in_this_process(started))
    compared(tmp_path / "table", *wanted)
    folders = [str(tmp_path / "table" / name) for name in ("supervised-0", "fixmatch-0", "supervised-7", "fixmatch-7")]
    assert started == folders
    rows = [line.split("|")[1:-1] for line in (tmp_path / "table/table.md").read_text().splitlines()]
    assert [cell.strip() for cell in rows[0]] == ["preset", "seed 0", "seed 7", "mean ± sd"]
    for row, preset in zip(rows[2:], ("supervised", "fixmatch"), strict=True):
        runs = [Run(tmp_path / "table" / f"{preset}-{seed}") for seed in (0, 7)]
        values = [100 * json.loads(run.result.read_text())["miou"] for run in runs]
        mean, spread = statistics.mean(values), abs(values[0] - values[1]) / 2**0.5
        expected = [preset, *(f"{v:.2f}" for v in values), f"{mean:.2f} ± {spread:.2f}"]
        assert [cell.strip() for cell in row] == expected
        assert {checkpoint.load(run.last)["step"] for run in runs} == {2}
    assert (tmp_path / "table/table.md").read_text() in capsys.readouterr().out

    before = (tmp_path / "table/table.md").read_text()
    compared(tmp_path / "table", *wanted)
    assert started == folders and (tmp_path / "table/table.md").read_text() == before

    # What was interrupted is run again; more steps continue; other settings are refused, not taken for the old ones.
    Run(folders[1]).result.unlink()
    compared(tmp_path / "table", *wanted)
    assert started[4:] == [folders[1]] and (tmp_path / "table/table.md").read_text() == before
    compared(tmp_path / "table", "--presets", "supervised", "--seeds", "0", train__steps=3)
    assert started[5:] == [folders[0]] and json.loads(Run(folders[0]).result.read_text())["step"] == 3
    with pytest.raises(UserError, match=r"fixmatch, seed 7 stopped with exit code 2: error: optimizer.lr differs"):
        compared(tmp_path / "table", "--presets", "fixmatch", "--seeds", "7", optimizer__lr=0.5)


def test_compare_starts_real_processes(tmp_path, monkeypatch):
    real, codes = subprocess.run, []

    def call(*arguments, **options):
        done = real(*arguments, **options)
        codes.append(done.returncode)
        return done

    monkeypatch.setattr(compare.subprocess, "run", call)
    compared(tmp_path, "--presets", "supervised", "--seeds", "3", "--jobs", "2", train__steps=1)
    assert codes == [0] and "| supervised |" in (tmp_path / "table.md").read_text()
    assert "seed 3" in (tmp_path / "table.md").read_text() and "±" not in (tmp_path / "table.md").read_text().splitlines()[2]
    assert "supervised, step 1, test" in (tmp_path / "supervised-3.log").read_text()
    assert "seed: 3" in Run(tmp_path / "supervised-3").config.read_text()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--seed", "4"], "--seed is set for each run"),
        (["--method.preset=cmim"], "--method.preset is set for each run"),
        (["--jobs", "0"], "--jobs is 0, expected at least 1"),
        (["--presets", "wrong"], "--presets: invalid choice: 'wrong'"),
        (["--train.stps", "4"], "did you mean train.steps?"),
    ],
)
def test_compare_refuses_before_it_starts(arguments, said, tmp_path):
    with pytest.raises(UserError) as caught:
        compare.main(["--output", str(tmp_path / "table"), *arguments])
    assert said in str(caught.value) and not (tmp_path / "table").exists()
