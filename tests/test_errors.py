"""A user's mistake is one line on stderr that names it, and exit code 2; never a traceback."""

import errno
import functools
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from cmim import checkpoint, compare, distributed, evaluate, predict, train
from cmim.engine.logging import console
from cmim.engine.run import Run
from cmim.errors import UserError, run_command
from tests.tiny_runs import FOLDER, read_metrics, run_tiny, tiny, write_folder

CHECKOUT = Path(__file__).parent.parent


def said_by(capfd, main, *arguments):
    """The one line that a command says before it stops with exit code 2."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: main([str(a) for a in arguments]))
    stderr = capfd.readouterr().err
    assert stop.value.code == 2 and stderr.startswith("error: ") and stderr.count("\n") == 1 and stderr.endswith("\n")
    return stderr.removeprefix("error: ").strip()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("errors")
    return run_tiny(folder / "run", method__preset="supervised", train__steps=1)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(folder / "a.png")
    return folder


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run that a test may damage."""
    return Run(shutil.copytree(run.folder, tmp_path / "copy"))


def folder_run(output, root, *more, **settings):
    settings = FOLDER | {"data__root": str(root), "method__preset": "supervised", "train__steps": 1} | settings
    return tiny(output, *more, **settings)


def test_mistakes_in_the_settings(tmp_path, capfd):
    output = tmp_path / "run"
    say = lambda *words, **settings: said_by(capfd, train.main, *words, *tiny(output, **settings))  # noqa: E731
    assert say("none.yaml") == "cannot read the config none.yaml: No such file or directory"
    assert say("--train.stps", "4") == "command line: unknown key train.stps; did you mean train.steps?"
    assert say("--outptu", "x").startswith("unknown option --outptu; did you mean --output?")
    assert say(train__steps="many") == "command line: train.steps: input should be a valid integer, got 'many'"
    assert "crop is 40, which is not a multiple of mask.block 16; try 32" in say(data__crop=40)
    assert say(model__encoder="resnet49").startswith("model.encoder")
    assert say(train__precision="fp16") == "train.precision is fp16, which needs a CUDA device; use bf16 or fp32"
    assert "7 labelled images are fewer than train.labelled_batch 8" in say(
        **{"data__shapes__labelled": 7, "train__labelled_batch": 8}
    )
    assert "5 unlabelled images are fewer than train.unlabelled_batch 6" in say(
        **{"data__shapes__unlabelled": 5, "train__unlabelled_batch": 6}
    )
    assert said_by(capfd, train.main, "--resume") == "--resume needs --output RUN"
    assert not output.exists()  # nothing stands in the way of a second try


def test_cuda_without_a_device(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = said_by(capfd, train.main, *tiny(tmp_path / "run", train__device="cuda"))
    assert said == "train.device is cuda, but PyTorch sees no CUDA device; use --train.device cpu"
    assert not (tmp_path / "run").exists()


def test_output_folders_that_hold_something(run, tmp_path, capfd):
    say = lambda *words, **settings: said_by(capfd, train.main, *tiny(*words, **settings))  # noqa: E731
    assert say(run.folder) == f"{run.folder} holds a run; continue it with --resume, or give another --output"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("text")
    for more in ((), ("--resume",)):
        assert say(foreign, *more) == f"{foreign} exists and is not a run folder; give another --output"
    assert [p.name for p in foreign.iterdir()] == ["thesis.tex"]
    said = say(run.folder, "--resume", method__preset="supervised", train__steps=1, optimizer__lr=1)
    assert said.startswith(f"optimizer.lr differs from {run.config}; resume with the same settings")


def test_places_that_cannot_be_written(run, images, tmp_path, capfd):
    file = tmp_path / "file"
    file.write_text("text")
    inside = file / "run"
    assert str(file) in said_by(capfd, train.main, *tiny(file))
    for main, words in (
        (train.main, tiny(inside, method__preset="supervised", train__steps=1)),
        (predict.main, [run.folder, images, "-o", inside]),
        (predict.main, [run.folder, images, "-o", file]),
        (compare.main, ["--output", inside]),
        (compare.main, ["--output", file]),
    ):
        said = said_by(capfd, main, *words)
        assert str(file) in said and said.endswith("give another --output")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, which stands in for a full disk")
def test_a_full_disk(tmp_path, capfd):
    """last.partial leads to a device that is always full; the checkpoint before it stays."""
    run = run_tiny(tmp_path / "run", method__preset="supervised", train__steps=1)
    before = run.last.read_bytes()
    run.last.with_suffix(".partial").symlink_to("/dev/full")
    said = said_by(capfd, train.main, "--output", run.folder, "--resume", "--train.steps", "2")
    assert said.startswith("No space left on device") and said.endswith("free some space or give another --output")
    assert str(run.last) in said and not list(run.folder.rglob("*.partial"))
    assert run.last.read_bytes() == before and checkpoint.load(run.last)["step"] == 1


@pytest.mark.parametrize("room", [1000, 100_000, 2_000_000])
def test_a_disk_that_becomes_full_inside_a_checkpoint(room, tmp_path, capfd):
    """Whatever part of it is being written: PyTorch's error of many lines hides the reason."""
    resource = pytest.importorskip("resource")
    path, before = tmp_path / "last.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoint.save({"class_names": [], "step": 1}, path)
    whole = path.read_bytes()

    def main(_):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        try:
            checkpoint.save({"class_names": [], "value": torch.zeros(3, 1_000_000)}, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    said = said_by(capfd, main)
    assert said == f"File too large: {path}; free some space or give another --output"
    assert path.read_bytes() == whole and [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_only_errors_of_the_place_are_the_users(capfd):
    def main(number):
        raise OSError(number, os.strerror(number), "file")

    for number in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        assert said_by(capfd, lambda _, n=number: main(n)).startswith(f"{os.strerror(number)}: file; ")
    with pytest.raises(OSError, match="Input/output"):
        run_command(lambda: main(errno.EIO))
    with pytest.raises(ValueError, match="a bug"):
        run_command(lambda: (_ for _ in ()).throw(ValueError("a bug")))
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert stop.value.code == 130 and capfd.readouterr().err == ""


def test_a_message_is_one_line():
    assert str(UserError("two\n  lines")) == "two lines"


def break_size(root):
    path = root / "train" / "masks" / "train1.png"
    Image.fromarray(np.zeros((9, 12), np.uint8)).save(path)
    return f"{path} is 12 x 9 pixels, its image train1.png is 48 x 40"


def break_label(root):
    path = root / "train" / "masks" / "train1.png"
    Image.fromarray(np.full((40, 48), 7, np.uint8)).save(path)
    return f"{path} holds the value 7, which is no class"


def break_image(root):
    path = root / "train" / "images" / "train1.png"
    path.write_bytes(path.read_bytes()[:200])
    return f"cannot read {path}"


def break_val(root):
    path = root / "val" / "masks" / "val1.png"
    path.write_bytes(b"no image")
    return f"cannot read {path}"


@pytest.mark.parametrize("damage", [break_size, break_label, break_image, break_val])
@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_data(damage, workers, tmp_path, capfd):
    root = write_folder(tmp_path / "data", train=2)
    expected = damage(root)
    said = said_by(capfd, train.main, *folder_run(tmp_path / "run", root, data__workers=workers))
    assert said.startswith(expected) and "Traceback" not in said and "worker" not in said


def test_missing_data(tmp_path, capfd):
    root = write_folder(tmp_path / "data", train=2)
    say = lambda **settings: said_by(capfd, train.main, *folder_run(tmp_path / "run", root, **settings))  # noqa: E731
    assert say(data__root=str(tmp_path / "none")) == f"data.root: there is no folder {tmp_path / 'none'}"
    assert say(data__labelled=9).startswith("data.labelled is 9, but only 2 training images have a mask")
    assert say(data__labelled=1, train__labelled_batch=3).startswith(
        "1 labelled images are fewer than train.labelled_batch 3"
    )
    assert "there is no folder" in say(data__val="validation")
    shutil.copy(root / "train/images/train0.png", root / "val/images/val0.png")
    assert "is a labelled image and also in val" in say()
    assert not (tmp_path / "run").exists()


def test_folders_that_are_no_run(run, images, copy, tmp_path, capfd):
    for main, words in ((evaluate.main, []), (predict.main, [images, "-o", tmp_path / "out"])):
        assert said_by(capfd, main, images, *words) == f"{images} is not a run folder: it has no config.yaml"
        copy.best.unlink(missing_ok=True)
        said = said_by(capfd, main, copy.folder, *words, "--checkpoint", "best")
        assert said == f"no checkpoint {copy.best}; train first, or give another run folder"
    assert not (tmp_path / "out").exists()


def test_checkpoints_of_another_model_and_damaged_ones(run, images, copy, tmp_path, capfd):
    commands = [
        (evaluate.main, [copy.folder]),
        (predict.main, [copy.folder, images, "-o", tmp_path / "out"]),
        (train.main, ["--output", copy.folder, "--resume"]),
    ]
    text = copy.config.read_text()
    for key, value, unknown in (("decoder_width", 24, "0 unknown, "), ("atrous_rates", [1], "")):
        settings = yaml.safe_load(text)
        settings["model"][key] = value
        copy.config.write_text(yaml.safe_dump(settings))
        for main, words in commands[:2]:
            said = said_by(capfd, main, *words)
            assert said.startswith(f"{copy.last} belongs to another model: 0 tensors missing, {unknown}")
            assert " 0 of another" not in said
    copy.config.write_text(text)
    for damage, expected in (
        (lambda path: os.truncate(path, path.stat().st_size // 2), "is not a readable checkpoint"),
        (lambda path: torch.save([1, 2], path), "is not a checkpoint of cmim.train"),
        (lambda path: torch.save({"model": torch.ones(2)}, path), "is not a checkpoint of cmim.train"),
    ):
        damage(copy.last)
        for main, words in commands:
            assert said_by(capfd, main, *words).startswith(f"{copy.last} {expected}")


def test_resume_with_other_images_or_classes(tmp_path, capfd):
    root, output = write_folder(tmp_path / "data"), tmp_path / "run"
    run_tiny(output, **FOLDER, data__root=str(root), method__preset="supervised", train__steps=1)
    again = folder_run(output, root, "--resume", train__steps=2)
    (root / "classes.txt").write_text("road\nsky\ntree\n")
    assert "the classes of the data are not those of" in said_by(capfd, train.main, *again)
    (root / "classes.txt").write_text("sky\nroad\ntree\n")
    for kind in ("images", "masks"):
        for name in ("train0", "train1", "train2", "train3"):
            (root / "train" / kind / f"{name}.png").rename(root / "train" / kind / f"new-{name}.png")
    assert "the labelled images are not those of" in said_by(capfd, train.main, *again)


def test_nothing_to_predict(run, tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    say = lambda path: said_by(capfd, predict.main, run.folder, path, "-o", tmp_path / "out")  # noqa: E731
    assert say(tmp_path / "empty").startswith(f"{tmp_path / 'empty'} holds no images (.bmp, .gif")
    assert (
        say(tmp_path / "none")
        == f"{tmp_path / 'none'} does not exist; give an image, a folder of images or a pattern in quotes"
    )
    (tmp_path / "bad.png").write_bytes(b"no image")
    assert say(tmp_path / "bad.png").startswith(f"cannot read {tmp_path / 'bad.png'}")
    assert "the following arguments are required: -o/--output" in said_by(capfd, predict.main, run.folder, "x.png")


def finite(path, key):
    return all(torch.isfinite(v).all() for v in checkpoint.load(path)[key].values())


def test_a_loss_that_is_not_finite_is_named(tmp_path, capfd):
    settings = dict(
        method__preset="fixmatch", optimizer__name="sgd", optimizer__lr=1e30, train__steps=4, train__picture_every=9,
        train__checkpoint_every=1, train__evaluate_every=9,
    )  # fmt: skip
    run = Run(tmp_path / "run")
    said = said_by(capfd, train.main, *tiny(run.folder, **settings))
    assert said.startswith("the loss term sup is not finite at or before step 2; lower optimizer.lr")
    assert checkpoint.load(run.last)["step"] == 1 and finite(run.last, "objective")


def test_no_checkpoint_is_written_of_weights_that_are_not_finite(tmp_path, capfd):
    """A finite loss, but an update that breaks the weights; nor is one chosen as the best."""
    run = Run(tmp_path / "run")
    more = dict(optimizer__head_lr_factor=100, train__evaluate_every=1)
    settings = dict(method__preset="supervised", optimizer__name="sgd", optimizer__lr=1e38, **more)
    said = said_by(capfd, train.main, *tiny(run.folder, **settings))
    assert said.startswith("the weights are not finite after step 1; lower optimizer.lr")
    assert not run.last.exists() and not run.best.exists()
    assert [line["step"] for line in read_metrics(run)] == [1]


def test_real_processes(run, images, tmp_path):
    """The exit code and the only line on stderr, of a mistake in a worker process and of two commands."""
    root = write_folder(tmp_path / "data", train=2)
    expected = break_size(root)
    commands = {
        "train": (folder_run(tmp_path / "run", root, data__workers=1), expected),
        "evaluate": ([str(images)], f"{images} is not a run folder"),
    }
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = {
        name: subprocess.Popen(
            [sys.executable, "-m", f"cmim.{name}", *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=CHECKOUT, env=environment,
        )
        for name, (words, _) in commands.items()
    }  # fmt: skip
    for name, process in started.items():
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 2
        assert stderr.startswith(f"error: {commands[name][1]}") and stderr.count("\n") == 1, stderr
    assert json.loads(run.result.read_text())["step"] == 1


@pytest.mark.parametrize("compile", [False, True])
def test_a_pass_of_a_single_image(compile, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    settings = dict(method__preset="supervised", train__labelled_batch=1, train__compile=compile)
    with pytest.raises(UserError, match=r"a pass has only one image; raise train.labelled_batch"):
        run_tiny(tmp_path / "run", **settings)


def test_an_error_is_one_line_without_colours():
    assert str(UserError("two\n  lines, \x1b[1;31mred\x1b[0m")) == "two lines, red"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value, run, copy, images, tmp_path, capfd):
    state = checkpoint.load(copy.last)
    next(v for k, v in state["objective"].items() if k.startswith("teacher.") and v.dim() == 4)[0] = value
    checkpoint.save(state, copy.last)
    for main, words in (
        (evaluate.main, [copy.folder]),
        (predict.main, [copy.folder, images, "-o", tmp_path / "out"]),
        (train.main, tiny(tmp_path / "warm", model__init_from=str(copy.folder), method__preset="supervised")),
        (train.main, ["--output", copy.folder, "--resume", "--train.steps", "2"]),
    ):
        assert f"{copy.last} holds weights that are not finite, 1 tensors" in said_by(capfd, main, *words)


def test_a_seed_or_preset_twice_is_refused(tmp_path, capfd):
    for option, values in (("--seeds", ["0", "1", "0"]), ("--presets", ["mim", "mim"])):
        said = said_by(capfd, compare.main, "--output", tmp_path / "c", option, *values)
        assert said.startswith(f"{option} names {values[0]} twice")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 2.73 TiB"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has\na total capacity"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("Storage size calculation overflowed with sizes=[9, 9]"),
        RuntimeError("could not create a primitive"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_want_of_memory_names_what_to_lower(error, capfd):
    def main(_):
        raise error

    assert said_by(capfd, main).startswith("out of memory: lower data.crop, train.labelled_batch")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EMFILE, "Too many open files", "x.png"), "too many open files: raise the limit (ulimit -n"),
        (OSError(errno.ENFILE, "File table overflow"), "too many open files: raise the limit (ulimit -n"),
        (
            BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
            "the system starts no more processes or threads",
        ),
        (
            RuntimeError("can't start new thread"),
            "the system starts no more processes or threads: raise the limit (ulimit -u)",
        ),
    ],
)
def test_limits_of_the_system_are_named(error, said, capfd, monkeypatch):
    def main(_):
        raise error

    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    assert said_by(capfd, main).startswith(said)


def test_who_reads_the_output_may_leave():
    """The exit code is that of other programs, which run_command gives."""

    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        type(console)(file=Gone()).print("a line")


def test_a_killed_loader_is_one_line(capfd):
    def main(_):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. \nlines")

    assert said_by(capfd, main).startswith("a process that loads images was killed, often because memory ran out")


def test_values_that_cannot_be(tmp_path, capfd, monkeypatch):
    say = lambda **settings: said_by(capfd, train.main, *tiny(tmp_path / "run", **settings))  # noqa: E731
    assert "seed: " in say(seed=99999999999999999999) and "seed: " in say(seed=-(2**63) - 1)
    assert say(data__mean=[124, 116, 104]).endswith("got 124; values are from 0 to 1: divide by 255")
    assert say(data__std=[58, 57, 57]).endswith("; values are from 0 to 1: divide by 255")
    assert say(data__size=64).endswith("got 64; give [height, width]")
    assert say(data__scale=2).endswith("give [lowest, highest]")
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(UserError, match="RANK is 'x', expected a number: start with torchrun, or unset RANK"):
        train.main(tiny(tmp_path / "run"))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("WORLD_SIZE", "0", "WORLD_SIZE is '0', expected a number from 1: start with torchrun, or unset WORLD_SIZE"),
        ("LOCAL_WORLD_SIZE", "0", "LOCAL_WORLD_SIZE is '0', expected a number from 1"),
        ("RANK", "1", "RANK is 1, but WORLD_SIZE is 1: start with torchrun, or unset RANK"),
    ],
)
def test_processes_that_cannot_be(name, value, said, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        distributed.world()


def test_a_backend_that_is_not_there():
    import cmim_kernels.backends
    from cmim import early

    assert early.BACKENDS == cmim_kernels.backends.OPTIONS
    for command in ("train", "predict"):
        result = subprocess.run(
            [sys.executable, "-m", f"cmim.{command}"], capture_output=True, text=True, cwd=CHECKOUT,
            env=os.environ | {"CMIM_KERNELS_BACKEND": "foo"},
        )  # fmt: skip
        assert result.returncode == 2
        assert result.stderr == "error: CMIM_KERNELS_BACKEND is 'foo', expected one of auto, cpu, cuda, triton, torch\n"


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="needs a file system that makes no folders")
def test_a_folder_that_cannot_be_made(run, images, capfd):
    assert said_by(capfd, train.main, *tiny("/proc/x")) == "/proc/x cannot be made; give another --output"
    for main, words in ((predict.main, [run.folder, images, "-o", "/proc/x"]), (compare.main, ["--output", "/proc/x"])):
        said = said_by(capfd, main, *words)
        assert "/proc/x" in said and said.endswith("give another --output")


def test_links_that_lead_nowhere(tmp_path, capfd):
    for place, remedy in (
        ("train/images/train1", "a link to a file that is not there; replace it or take it away"),
        ("val/images/val1", "a link to a file that is not there; replace it or take it away"),
        ("train/masks/train1", "a link to a file that is not there; replace the file or take it away"),
        ("val/masks/val1", "a link to a file that is not there; replace the file or take it away"),
    ):
        root = write_folder(tmp_path / place.replace("/", "-"), train=2)
        path = root / f"{place}.png"
        path.unlink()
        path.symlink_to(tmp_path / "nowhere")
        assert said_by(capfd, train.main, *folder_run(tmp_path / "run", root)) == f"cannot read {path}: {remedy}"


def test_names_that_are_not_utf_8(tmp_path, capfd):
    root = write_folder(tmp_path / "data", train=2)
    for kind in ("images", "masks"):
        os.rename(root / f"train/{kind}/train1.png", os.fsencode(root / f"train/{kind}") + b"/caf\xe9.png")
    run = run_tiny(tmp_path / "run", **FOLDER, data__root=str(root), method__preset="supervised", train__steps=1)
    assert b"caf\xe9\n" in run.labelled.read_bytes()
    train.main(["--output", str(run.folder), "--resume", "--train.steps", "2"])
    predict.main([str(run.folder), str(root / "train/images"), "-o", str(tmp_path / "out")])
    assert os.path.exists(os.fsencode(tmp_path) + b"/out/masks/caf\xe9.png")


def test_text_is_utf_8_whatever_the_locale(tmp_path):
    """Under an ASCII locale: a config, class names and folders with other letters."""
    root = write_folder(tmp_path / "größe", train=2)
    (root / "classes.txt").write_text("Straße\nÄcker\nhöhe\n", encoding="utf-8")
    config = tmp_path / "config.yaml"
    config.write_text(
        "# Bäume\ndata: {format: folder}\nmodel: {encoder: test_resnet, weights: none}\nmask: {block: 16}\n",
        encoding="utf-8",
    )
    words = [str(config), *folder_run(tmp_path / "läufe", root, data__classes=["Straße", "Äcker", "höhe"])]
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "cmim.train", *words], capture_output=True, text=True, cwd=CHECKOUT, env=environment
    )
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    assert "Äcker" in json.loads(Run(tmp_path / "läufe").result.read_text(encoding="utf-8"))["iou"]


def test_what_to_do_about_a_damaged_checkpoint(copy, capfd):
    shutil.copy(copy.last, copy.best)
    os.truncate(copy.last, 1000)
    said = said_by(capfd, evaluate.main, copy.folder)
    assert (
        "put an earlier copy of it there, or start again" in said
        and f"{copy.best} still has weights: --checkpoint best" in said
    )
    copy.best.unlink()
    assert "still has weights" not in said_by(capfd, evaluate.main, copy.folder)


def test_a_best_checkpoint_in_the_place_of_the_last(copy, capfd):
    state = checkpoint.load(copy.last)
    net = {name.removeprefix("teacher."): v for name, v in state["objective"].items() if name.startswith("teacher.")}
    about = {key: state[key] for key in ("step", "class_names", "colours", "evaluated")}
    checkpoint.save({"net": net, **about}, copy.last)
    evaluate.main([str(copy.folder), "--data.workers", "0"])
    said = said_by(capfd, train.main, "--output", copy.folder, "--resume", "--train.steps", "3")
    assert "holds only weights, as best.pt does, and no state to continue from" in said


@pytest.mark.parametrize("text", ["hello\nworld\n", '{"a": 1}\n{"step": 1}\n', "[1]\n[2]\n", '{"step": "x"}\n{}\n'])
def test_metrics_of_something_else_are_kept(text, copy, capfd):
    copy.metrics.write_text(text)
    said = said_by(capfd, train.main, "--output", copy.folder, "--resume", "--train.steps", "2")
    assert said.startswith(f"{copy.metrics}: line 1 was not written by a run; move the file away")
    assert copy.metrics.read_text() == text
