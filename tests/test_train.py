"""What a training run leaves in its folder."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cmim import checkpoint, evaluate
from cmim.config import load_config, without_effect
from cmim.engine import start
from cmim.engine.metrics import Scores
from cmim.errors import UserError
from cmim.settings import Config
from tests.test_engine import tiny_config
from tests.tiny_runs import FOLDER, read_metrics, run_tiny, write_folder

CLASSES = ["ground", "square", "triangle", "ring", "cross"]
TERMS = {
    "supervised": {"sup"},
    "fixmatch": {"sup", "strong"},
    "fixmatch_fp": {"sup", "strong", "fp"},
    "unimatch": {"sup", "strong1", "strong2", "fp"},
    "semantic": {"sup", "strong", "fp", "sem_strong"},
    "mim": {"sup", "strong", "fp", "pix", "feat", "sem_strong"},
    "cmim": {"sup", "strong", "fp", "pix", "feat", "sem_labelled", "sem_weak", "sem_strong"},
}
SPEED = {"images_per_second", "data_wait", "seconds"}
MASKED = {"valid_tokens", "pairs", "pix_vs_mean_colour", "separation", "token_purity", "in_reach"}
COVERAGE = {"coverage", "coverage_foreground"}


def terms_of(line):
    return {key.removeprefix("loss_") for key in line if key.startswith("loss_")}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Four steps of cmim with an EMA teacher."""
    views = ["labelled", "weak", "strong"]
    every = dict(train__evaluate_every=2, train__picture_every=2, train__checkpoint_every=3)
    return run_tiny(tmp_path_factory.mktemp("train") / "run", train__steps=4, mim__views=views, **every)


def test_config_and_labelled_images(run):
    config = load_config(run.config)
    assert (config.train.steps, config.method.preset, config.data.crop) == (4, "cmim", 32)
    assert (run.folder / "labelled.txt").read_text().split() == [f"shapes_{i}" for i in range(6)]


def test_every_log_line_has_the_figures_of_the_method(run):
    lines = [line for line in read_metrics(run) if "split" not in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert terms_of(line) == TERMS["cmim"]
        assert MASKED | COVERAGE | SPEED | {"lr", "loss"} <= set(line)
        assert sum(line[f"loss_{name}"] for name in TERMS["cmim"]) == pytest.approx(line["loss"], rel=1e-5)
        assert line["coverage"] == 1 and 0 < line["valid_tokens"] <= 1 and line["pairs"] > 0
        assert min(line["separation"], line["pix_vs_mean_colour"], line["loss_pix"], line["images_per_second"]) > 0
        assert 0.5 <= line["token_purity"] <= 1 and 0 < line["in_reach"] <= 1
        gradients = {key.removeprefix("gradient_") for key in line if key.startswith("gradient_")}
        assert gradients == (TERMS["cmim"] if line["step"] in (2, 4) else set())
        assert all(line[f"gradient_{name}"] > 0 for name in gradients)
    lr = [0.003 * (1 - step / 4) ** 0.9 for step in range(4)]
    assert [line["lr"] for line in lines] == pytest.approx(lr)


def test_evaluations_and_the_result(run):
    evaluations = [line for line in read_metrics(run) if "split" in line]
    assert [(line["step"], line["split"]) for line in evaluations] == [(2, "val"), (4, "val"), (4, "test")]
    for line in evaluations:
        assert list(line["iou"]) == CLASSES
        known = [v for v in line["iou"].values() if v is not None]
        assert line["miou"] == pytest.approx(sum(known) / len(known))
        for name in ("", "_foreground"):
            assert line[f"pseudo_label_coverage{name}"] == 1 and 0 <= line[f"pseudo_label_accuracy{name}"] <= 1
        assert line["pseudo_label_accuracy"] == pytest.approx(line["pixel_accuracy"])
    result = json.loads(run.result.read_text())
    assert (result["split"], result["step"]) == ("test", 4)
    assert set(Scores._fields) <= result.keys() and {k: result[k] for k in Scores._fields} == {
        k: evaluations[-1][k] for k in Scores._fields
    }
    assert result["best_miou"] == max(line["miou"] for line in evaluations[:2])


def test_checkpoints(run):
    last, best = checkpoint.load(run.last), checkpoint.load(run.best)
    assert last["step"] == 4 and best["step"] in (2, 4)
    for state in (last, best):
        assert state["class_names"] == CLASSES and len(state["colours"]) == 5
    assert all(torch.isfinite(v).all() for v in last["objective"].values())
    teacher = {k.removeprefix("teacher."): v for k, v in last["objective"].items() if k.startswith("teacher.")}
    assert teacher.keys() == best["net"].keys()
    assert not list(run.folder.rglob("*.partial"))


def test_pictures_open(run):
    assert [path.name for path in sorted(run.pictures.iterdir())] == ["step_000002.png", "step_000004.png"]
    with Image.open(run.pictures / "step_000004.png") as picture:
        picture.load()
        assert picture.format == "PNG" and picture.width > 7 * 190
        assert len(picture.getcolors(1 << 20)) > 1000


def test_tensorboard(run):
    board = EventAccumulator(str(run.tensorboard)).Reload()
    scalars = {name: [(e.step, e.value) for e in board.Scalars(name)] for name in ("loss_pix", "coverage", "val/miou")}
    lines = read_metrics(run)
    assert scalars["loss_pix"] == [(n["step"], pytest.approx(n["loss_pix"])) for n in lines if "loss_pix" in n]
    assert scalars["val/miou"] == [(n["step"], pytest.approx(n["miou"])) for n in lines if n.get("split") == "val"]
    assert len(scalars["coverage"]) == 4


@pytest.mark.parametrize("preset", ["supervised", "fixmatch", "fixmatch_fp", "unimatch", "semantic", "mim"])
def test_the_other_presets(preset, tmp_path, capsys):
    run = run_tiny(tmp_path / "run", train__steps=1, method__preset=preset, teacher__kind="student")
    line = read_metrics(run)[0]
    assert terms_of(line) == TERMS[preset]
    masked = {"semantic": {"valid_tokens", "token_purity"}, "mim": MASKED}.get(preset, set())
    assert MASKED & line.keys() == masked and COVERAGE.isdisjoint(line) == (preset == "supervised")
    assert not any(name.startswith("teacher.") for name in checkpoint.load(run.last)["objective"])
    printed = capsys.readouterr().out
    unused = " (not used)" if preset == "supervised" else ""
    assert f"{preset}: 6 labelled and 8 unlabelled images{unused}, 3 val, 4 test, 5 classes" in printed
    assert ("reconstruction decoder reaches" in printed) == (preset == "mim")
    assert f"{preset}, step 1, test" in printed and "mIoU" in printed and "cross" in printed


def test_masked_terms_are_left_out_before_mim_start(tmp_path):
    run = run_tiny(tmp_path / "run", mim__start=0.5, train__picture_every=9)
    first, second = (line for line in read_metrics(run) if "split" not in line)
    assert (terms_of(first), terms_of(second)) == (TERMS["fixmatch"] | {"fp"}, TERMS["mim"])


@pytest.mark.parametrize("ohem", [None, {"threshold": 0.7}])
def test_a_threshold_that_hardly_any_pixel_reaches_is_said_once(tmp_path, capsys, ohem):
    run_tiny(tmp_path / "run", method__preset="fixmatch", method__tau=1, method__ohem=ohem, train__log_every=1)
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("0.0% of the unlabelled pixels are as confident as method.tau 1.0") == 1
    assert ("or do without method.ohem" in printed) == bool(ohem)


def test_training_is_supervised_before_method_start(tmp_path):
    run = run_tiny(tmp_path / "run", method__start=0.5, train__picture_every=1)
    first, second = (line for line in read_metrics(run) if "split" not in line)
    assert (terms_of(first), terms_of(second)) == (TERMS["supervised"], TERMS["mim"])


def test_a_folder_without_test_images_reports_val(tmp_path, capsys):
    root = write_folder(tmp_path / "data", sizes=((40, 48), (31, 52)), test=0)
    run = run_tiny(tmp_path / "run", **FOLDER, data__root=str(root), method__preset="fixmatch")
    result = json.loads(run.result.read_text())
    evaluations = [line for line in read_metrics(run) if "split" in line]
    assert result["split"] == "val" and list(result["iou"]) == ["sky", "road", "tree"]
    assert [(line["step"], line["split"], line["miou"]) for line in evaluations] == [(2, "val", result["miou"])]
    assert "no test images: the result is on val" in capsys.readouterr().out
    assert len((run.folder / "labelled.txt").read_text().split()) == 2


def test_the_default_output_names_config_and_time(tmp_path, monkeypatch):
    from cmim import train
    from tests.tiny_runs import tiny

    monkeypatch.chdir(tmp_path)
    train.main(tiny("x", train__steps=1, method__preset="supervised")[2:])
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("shapes-20") and (folder / "result.json").exists()


def test_pseudo_labels_of_another_run(tmp_path):
    teacher = run_tiny(tmp_path / "teacher", method__preset="supervised", model__decoder_width=24)
    settings = dict(method__preset="fixmatch", teacher__run=str(teacher.folder), train__steps=3)
    run = run_tiny(tmp_path / "run", **settings)
    theirs = checkpoint.load(teacher.last)["objective"]
    ours = checkpoint.load(run.last)["objective"]
    judged = {name.removeprefix("judge."): value for name, value in ours.items() if name.startswith("judge.")}
    prefix = "teacher." if any(name.startswith("teacher.") for name in theirs) else "net."
    assert judged and all(torch.equal(value, theirs[prefix + name]) for name, value in judged.items())
    run_tiny(tmp_path / "run", "--resume", **settings | {"train__steps": 4})
    assert checkpoint.load(run.last)["step"] == 4
    evaluate.main([str(run.folder)])
    with pytest.raises(UserError, match=r"nowhere is not a run folder"):
        run_tiny(tmp_path / "other", **settings | {"teacher__run": str(tmp_path / "nowhere")})


@pytest.mark.parametrize(
    "names, channels, multiple, said",
    [
        (["a"] * 4, 3, 1, "has 4 classes, the data have 5"),
        (["a"] * 5, 4, 1, "has images of 4 channels, the data 3"),
        (["a"] * 5, 3, 14, "takes multiples of 14 pixels, but data.crop is 32"),
    ],
)
def test_a_run_that_cannot_make_pseudo_labels(names, channels, multiple, said, monkeypatch):
    net = SimpleNamespace(size_multiple=multiple)
    trained = SimpleNamespace(class_names=names, config=SimpleNamespace(data=SimpleNamespace(channels=channels)), net=net)
    monkeypatch.setattr(start, "load_trained", lambda folder, which: trained)
    config = tiny_config(method__preset="fixmatch", teacher__run="a run")
    with pytest.raises(UserError, match=said):
        start.load_judge(config, 5)
    assert start.load_judge(tiny_config(method__preset="supervised", teacher__run="a run"), 5) is None
    trained.class_names, trained.config.data.channels, net.size_multiple = ["a"] * 5, 3, 16
    assert start.load_judge(config, 5) is net


IDLE = {
    "method__tau": 0.5, "method__class_thresholds": True, "method__align": True, "method__w_unlabelled": 2,
    "method__start": 0.5, "method__ramp": 0.5, "method__cutmix": 0, "method__dropout": 0.1,
    "train__unlabelled_batch": 2, "mim__tau": 0.5, "mask__ratio": 0.3, "reconstruction__tokens": "pixel",
    "teacher__run": "nowhere", "data__colour_jitter": 0.5, "method__class_balance": True, "method__batch_norm": "batch",
    "method__logit_adjustment": True,
}  # fmt: skip


def test_settings_that_a_preset_does_not_use_are_noted_and_change_nothing(tmp_path, capsys):
    losses = []
    for i, settings in enumerate(({}, IDLE)):
        run = run_tiny(tmp_path / str(i), train__steps=2, method__preset="supervised", **settings)
        losses.append([line["loss"] for line in read_metrics(run) if "loss" in line])
        said = capsys.readouterr().out
    assert losses[0] == losses[1] and losses[0]
    for key in IDLE:
        assert f"note: --{key.replace('__', '.')} has no effect with the preset supervised\n" in said
    assert not {f"method.{key}" for key in ("preset", "class_weights", "dice")} & set(without_effect_of("supervised"))
    assert not {key.replace("__", ".") for key in IDLE} & set(without_effect_of("cmim"))
    assert without_effect_of("fixmatch") == ["mim.tau", "mask.ratio", "reconstruction.tokens"]


def without_effect_of(preset):
    words = [f"--{key.replace('__', '.')}={value}" for key, value in IDLE.items()]
    words += ["--method.class_weights=median", "--method.dice=1", f"--method.preset={preset}"]
    return without_effect(Config(method={"preset": preset}), words)
