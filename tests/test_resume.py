"""Runs that are killed and continued end as if nothing had happened, to the bit."""

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import time

import pytest
import torch

from cmim import checkpoint, train
from cmim.engine.records import cut_metrics
from cmim.engine.run import Run
from cmim.engine.trained import load_trained
from cmim.errors import UserError
from tests.tiny_runs import FOLDER, read_metrics, run_tiny, tiny, write_folder

TIMING = ("images_per_second", "data_wait", "seconds", "memory_gib")
STEPS = 12


@pytest.fixture(scope="module")
def start():
    """start(words) -> a training process of its own; a server imports PyTorch once for all of them."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cmim.train"])
    started = []

    def begin(words):
        process = context.Process(target=train.main, args=(words,))
        process.start()
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.join()
    os.environ.pop("OMP_NUM_THREADS")
    if before is not None:
        os.environ["OMP_NUM_THREADS"] = before


def long_run(output, *more):
    return tiny(
        output, "--resume", *more, train__steps=STEPS, train__checkpoint_every=3, train__evaluate_every=4,
        train__picture_every=100, mim__views=["labelled", "weak", "strong"],
    )  # fmt: skip


def lines_of(run):
    return run.metrics.read_text().count("\n") if run.metrics.exists() else 0


def kill_at(process, run, lines):
    """SIGKILL as soon as metrics.jsonl holds so many lines."""
    deadline = time.monotonic() + 120
    while lines_of(run) < lines:
        assert process.is_alive() and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def finish(process):
    process.join(120)
    assert process.exitcode == 0


def assert_same_state(one, other):
    """Nested dicts and lists of tensors and plain values, equal bit for bit."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same_state(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same_state(a, b)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    else:
        assert one == other


def without_times(lines):
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def assert_same_run(one, other):
    assert_same_state(checkpoint.load(one.last), checkpoint.load(other.last))
    assert_same_state(checkpoint.load(one.best), checkpoint.load(other.best))
    assert without_times(read_metrics(one)) == without_times(read_metrics(other))
    assert one.result.read_text() == other.result.read_text()


def test_a_run_killed_at_any_moment_ends_as_an_undisturbed_one(tmp_path, start):
    whole, broken = Run(tmp_path / "whole"), Run(tmp_path / "broken")
    undisturbed = start(long_run(whole.folder))  # --resume on an absent folder starts it
    for lines in (1, 5, 9):
        process = start(long_run(broken.folder))
        kill_at(process, broken, max(lines, lines_of(broken) + 1))
        if lines == 5:  # as if killed while writing
            shutil.copy(broken.last, broken.last.with_suffix(".partial"))
            os.truncate(broken.last.with_suffix(".partial"), 1000)
            with open(broken.metrics, "a") as file:
                file.write('{"step": 6, "lo')
    finish(start(long_run(broken.folder)))
    finish(undisturbed)
    assert checkpoint.load(whole.last)["step"] == STEPS
    assert len([line for line in read_metrics(whole) if "split" not in line]) == STEPS
    assert min(line["loss_pix"] for line in read_metrics(whole) if "loss_pix" in line) > 0
    assert_same_run(whole, broken)
    assert not list(broken.folder.rglob("*.partial"))


def test_a_finished_run_ends_again_with_the_same_result_and_more_steps_continue_it(tmp_path):
    run = run_tiny(tmp_path / "run", method__preset="supervised", train__steps=2)
    state, lines, result = checkpoint.load(run.last), read_metrics(run), run.result.read_text()
    train.main(["--output", str(run.folder), "--resume"])  # with its own config
    assert_same_state(checkpoint.load(run.last), state)
    assert read_metrics(run) == lines and run.result.read_text() == result

    more = ["--train.steps", "4", "--data.workers=1", "--evaluation.table", "[dice]", "--train.patience", "9"]
    train.main(["--output", str(run.folder), "--resume", *more])
    assert json.loads(run.result.read_text())["step"] == 4
    kept = [(line["step"], line.get("split")) for line in read_metrics(run)]
    assert kept == [(1, None), (2, None), (2, "val"), (3, None), (4, None), (4, "val"), (4, "test")]
    assert read_metrics(run)[:3] == lines[:3]

    config = run.config.read_text()
    with pytest.raises(UserError, match=r"the run has 3 steps, but .*last.pt is at step 4"):
        train.main(["--output", str(run.folder), "--resume", "--train.steps", "3"])
    assert run.config.read_text() == config


def test_what_was_logged_before_the_first_checkpoint_is_not_logged_twice(tmp_path):
    run = run_tiny(tmp_path / "run", method__preset="supervised")
    lines = without_times(read_metrics(run))
    for path in (run.last, run.best, run.result):
        path.unlink()
    run_tiny(run.folder, "--resume", method__preset="supervised")
    assert without_times(read_metrics(run)) == lines


def test_a_kill_before_the_config_is_written_leaves_a_folder_that_starts(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml.partial").write_text("see")
    run = run_tiny(tmp_path / "run", "--resume", method__preset="supervised", train__steps=1)
    assert run.result.exists()


@pytest.mark.parametrize(
    "change, key",
    [
        ({"optimizer__lr": 0.5}, "optimizer.lr"),
        ({"seed": 4}, "seed"),
        ({"data__shapes__val": 4}, "data.shapes"),
        ({"train__checkpoint_every": 4}, "train.checkpoint_every"),
        ({"method__preset": "cmim"}, "method.preset"),
    ],
)
def test_other_settings_are_not_continued(change, key, tmp_path):
    base = {"method__preset": "supervised", "train__steps": 1}
    run = Run(tmp_path / "run")
    train.start_run(run, train.load_config(train.default_config_path(), tiny("x", **base)[2:]), ["a"])
    run.last.parent.mkdir()
    run.last.touch()  # what is refused is a run that has something to continue
    before = run.config.read_text()
    with pytest.raises(UserError) as caught:
        run_tiny(run.folder, "--resume", **(base | change))
    assert str(caught.value).startswith(f"{key} differs from {run.config}")
    assert run.config.read_text() == before


def test_an_interrupted_save_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch):
    path = tmp_path / "checkpoints" / "last.pt"
    checkpoint.save({"class_names": [], "value": torch.arange(3)}, path)

    def half(state, file):
        file.write(b"PK half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save({"class_names": [], "value": torch.arange(4)}, path)
    assert checkpoint.load(path)["value"].tolist() == [0, 1, 2]


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["CMIM_TEST_BOMB"],)


def test_a_checkpoint_cannot_run_code(tmp_path, monkeypatch):
    bomb = tmp_path / "exploded"
    monkeypatch.setenv("CMIM_TEST_BOMB", str(bomb))
    torch.save({"class_names": [], "objective": Bomb()}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb()))
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(UserError, match="is not a readable checkpoint"):
            checkpoint.load(tmp_path / name)
    assert not bomb.exists()
    with pytest.raises(FileExistsError):  # the bomb is live
        bomb.mkdir()
        pickle.loads((tmp_path / "plain.pt").read_bytes())


@pytest.mark.parametrize("damage", ["empty", "text", "half", "flipped", "tensor", "foreign"])
def test_a_damaged_or_foreign_checkpoint_is_one_line(damage, tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save({"class_names": [], "value": torch.arange(1000)}, path)
    whole = path.read_bytes()
    if damage in ("tensor", "foreign"):
        torch.save(torch.zeros(3) if damage == "tensor" else {"model": torch.zeros(3)}, path)
    else:
        path.write_bytes(
            {"empty": b"", "text": b"hello", "half": whole[: len(whole) // 2], "flipped": b"\x80\x02." + whole}[damage]
        )
    with pytest.raises(UserError) as caught:
        checkpoint.load(path)
    assert str(caught.value).startswith(f"{path} is not a ")


def test_a_changed_bit_is_a_damage(tmp_path):
    """PyTorch would read other weights without a word."""
    path = tmp_path / "last.pt"
    checkpoint.save({"class_names": [], "value": torch.arange(1000)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(bytes([9, 0, 0, 0, 0, 0, 0, 0, 10])) + 1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"last.pt is not a readable checkpoint \(BadZipFile\)"):
        checkpoint.load(path)


def test_other_unlabelled_images_are_said_when_a_run_goes_on(tmp_path, capsys):
    root = write_folder(tmp_path / "data")
    settings = FOLDER | dict(data__root=str(root), method__preset="fixmatch")
    run_tiny(tmp_path / "run", train__steps=1, **settings)
    run_tiny(tmp_path / "run", "--resume", train__steps=2, **settings)
    assert "warning" not in capsys.readouterr().out
    shutil.copy(root / "train/images/train0.png", root / "train/images/more.png")
    run_tiny(tmp_path / "run", "--resume", train__steps=3, **settings)
    said = capsys.readouterr().out
    assert "warning: the unlabelled images changed since the run was stopped (2 then, 3 now)" in said
    assert "the val images" not in said


@pytest.mark.parametrize("value", [{}, {"step": 0}, {"step": "x", "best_miou": 0}])
def test_a_state_that_is_not_whole(value, tmp_path):
    run = run_tiny(tmp_path / "run", train__steps=1)
    state = checkpoint.load(run.last)
    kept = {key: state[key] for key in ("objective", "class_names", "optimizer", "scaler")}
    checkpoint.save(kept | value, run.last)
    with pytest.raises(UserError, match=r"last.pt is no checkpoint of this run's last step"):
        run_tiny(tmp_path / "run", "--resume", train__steps=2)
    with pytest.raises(UserError, match=r"last.pt is not a complete checkpoint of cmim.train, it has no (step|colours)"):
        load_trained(run.folder, "last")


def test_a_result_whose_checkpoint_is_gone_is_not_written_over(tmp_path):
    run = run_tiny(tmp_path / "run", train__steps=1)
    run.last.unlink()
    with pytest.raises(UserError, match=r"run has a result, but .*last.pt is gone; put it back"):
        run_tiny(tmp_path / "run", "--resume", train__steps=1)
    assert run.best.exists()


@pytest.mark.parametrize("line", ['{"step": 1, "split": "val"}', '{"step": 1, "split": "val", "miou": null}'])
def test_an_evaluation_without_its_figure(line, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(f'{line}\n{{"step": 1}}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl: line 1 was not written by a run"):
        cut_metrics(tmp_path / "metrics.jsonl", 1)
