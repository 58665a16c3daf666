"""logging.tracker: the figures of TensorBoard in a stand-in for trackio, and in the real packages where these are there."""

import importlib.util
import json
import sqlite3
import struct
import subprocess
import sys

import pytest

from cmim.config import load_config
from cmim.engine.run import Run
from cmim.engine.tracker import check_tracker
from cmim.engine.trainer import Trainer
from cmim.errors import UserError
from cmim.settings import LoggingSettings
from tests.ranks import run_on_ranks
from tests.test_resume import assert_same_run
from tests.test_torchrun import BATCH, free_port, train_as
from tests.tiny_runs import read_metrics, run_tiny, tiny

SUPERVISED = {"method__preset": "supervised", "train__picture_every": 99, "train__evaluate_every": 2}
STAND_IN = '''
"""Writes what it is told to calls.jsonl beside it."""
import json
from pathlib import Path

def write(*call):
    with open(Path(__file__).with_name("calls.jsonl"), "a") as file:
        file.write(json.dumps(call) + "\\n")

class Run:
    def log(self, figures, step):
        write("log", step, figures)
        if step in BROKEN:
            raise ConnectionError("gone")

    def finish(self):
        write("finish")

BROKEN = set()

def init(project, name, resume, config):
    write("init", project, name, resume, config["train"]["steps"])
    return Run()
'''


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A package trackio in place of the real one; calls() are what it was told."""
    path = tmp_path / "packages" / "trackio.py"
    path.parent.mkdir()
    path.write_text(STAND_IN)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    monkeypatch.syspath_prepend(str(path.parent))
    yield lambda: [json.loads(line) for line in path.with_name("calls.jsonl").read_text().splitlines()]
    sys.modules.pop("trackio", None)


def scalars(run):
    """(step, figures) of each line of metrics.jsonl, as TensorBoard gets them."""
    lines = []
    for line in read_metrics(run):
        split = f"{line['split']}/" if "split" in line else ""
        figures = {split + k: v for k, v in line.items() if isinstance(v, int | float) and k != "step"}
        lines.append((line["step"], figures))
    return lines


def test_it_gets_the_figures_of_the_run_and_a_resumed_run_continues_the_same(stand_in, tmp_path, capsys):
    options = SUPERVISED | {"logging__tracker": "trackio", "logging__project": "roads"}
    run = run_tiny(tmp_path / "run", train__steps=2, **options)
    run_tiny(tmp_path / "run", "--resume", train__steps=3, **options)
    name = f"run-{run.tracker.read_text().strip()}"
    assert f"figures also go to {name} in the project roads\n" in capsys.readouterr().out
    calls = stand_in()
    assert [call for call in calls if call[0] != "log"] == [
        ["init", "roads", name, "allow", 2], ["finish"], ["init", "roads", name, "allow", 3], ["finish"],
    ]  # fmt: skip
    logged = [(step, figures) for kind, step, figures in (call for call in calls if call[0] == "log")]
    # The test result of step 2 is no longer in metrics.jsonl.
    assert [line for line in logged if not (line[0] == 2 and "test/miou" in line[1])] == scalars(run)
    assert {"loss", "lr", "val/miou", "test/miou"} <= set().union(*(figures for _, figures in logged))

    other = run_tiny(tmp_path / "other", train__steps=1, **options)
    assert other.tracker.read_text() != run.tracker.read_text()


def test_a_tracker_may_be_added_or_left_out_when_a_run_goes_on(stand_in, tmp_path, capsys):
    run = run_tiny(tmp_path / "run", train__steps=2, **SUPERVISED)
    assert not run.tracker.exists()
    run_tiny(tmp_path / "run", "--resume", train__steps=3, logging__tracker="trackio", **SUPERVISED)
    without = SUPERVISED | {"logging__tracker": "none", "logging__project": "roads"}
    run_tiny(tmp_path / "run", "--resume", train__steps=4, **without)
    assert "note: logging.project roads has no effect without logging.tracker\n" in capsys.readouterr().out
    assert [call[1] for call in stand_in() if call[0] == "log"] == [3, 3, 3] and run.tracker.exists()


def test_a_run_does_not_end_because_its_tracker_fails(stand_in, tmp_path, capsys, monkeypatch):
    import trackio

    monkeypatch.setattr(trackio, "BROKEN", {2})
    run = run_tiny(tmp_path / "run", train__steps=3, logging__tracker="trackio", **SUPERVISED)
    assert run.result.exists() and [call[:2] for call in stand_in()[1:]] == [["log", 1], ["log", 2]]
    assert (
        "warning: the tracker gets no more figures, metrics.jsonl has them all: ConnectionError: gone"
        in capsys.readouterr().out
    )

    monkeypatch.setattr(trackio, "init", lambda *_, **__: 1 / 0)
    with pytest.raises(
        UserError, match=r"trackio cannot be opened \(division by zero\); --logging.tracker none does without"
    ):
        run_tiny(tmp_path / "other", train__steps=3, logging__tracker="trackio", **SUPERVISED)


def tracked(words, port, packages):
    sys.path.insert(0, packages)
    train_as(words, port)


def test_one_of_two_processes_tracks(stand_in, tmp_path):
    options = SUPERVISED | BATCH | {"logging__tracker": "trackio", "train__steps": 1}
    options.pop("mim__views")
    words = tiny(tmp_path / "run", **options)
    run_on_ranks(tracked, 2, tmp_path, words, free_port(), str(tmp_path / "packages"))
    assert [call[0] for call in stand_in()] == ["init", "log", "log", "log", "finish"]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_what_is_not_installed_is_said_before_a_run(name, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = f"^logging.tracker: {name} is not installed: pip install {name}, or pip install 'cmim\\[trackers\\]'$"
    with pytest.raises(UserError, match=said):
        run_tiny(tmp_path / "run", logging__tracker=name, data__format="folder", data__root="nowhere")


def test_the_project_has_a_name():
    with pytest.raises(UserError, match=r"logging\.project is empty"):
        load_config("configs/shapes.yaml", ["--logging.project", " x".strip("x")])


def records(path):
    """The messages in a file of wandb: a log of LevelDB after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # records do not begin in the last bytes of a block
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole of a message, or the last part
            found.append(Record.FromString(whole))
            whole = b""
    return found


@pytest.fixture
def wandb(monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    return pytest.importorskip("wandb", reason="wandb is not installed")


def test_wandb_offline(wandb, tmp_path, monkeypatch):
    """A run that fails in step 3, and goes on as the same run."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    options = SUPERVISED | {"train__steps": 4, "train__checkpoint_every": 2, "logging__tracker": "wandb"}
    original = Trainer.update
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", lambda self: 1 / 0 if self.step == 2 else original(self))
        with pytest.raises(ZeroDivisionError):
            run_tiny(tmp_path / "run", **options)
    run = run_tiny(tmp_path / "run", "--resume", **options)
    assert_same_run(run, run_tiny(tmp_path / "whole", **SUPERVISED, train__steps=4, train__checkpoint_every=2))
    identifier, steps, codes = run.tracker.read_text().strip(), [], []
    for path in sorted(run.folder.glob("wandb/offline-run-*/*.wandb")):
        assert path.stem == f"run-{identifier}"
        parts = {kind: [getattr(r, kind) for r in records(path) if r.HasField(kind)] for kind in ("run", "history", "exit")}
        assert {(r.run_id, r.project, r.display_name) for r in parts["run"]} == {(identifier, "cmim", "run")}
        steps += [line.step.num for line in parts["history"]]
        codes += [line.exit_code for line in parts["exit"]]
    assert steps == [1, 2, 3, 4] and codes == [1, 0]
    logged = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in parts["history"][-1].item}
    for _, figures in scalars(run)[-3:]:
        assert figures.items() <= logged.items()
    wandb.teardown()


def test_wandb_without_a_key(wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    wandb.teardown()
    with pytest.raises(UserError, match="wandb has no API key: run `wandb login`, or set WANDB_MODE=offline"):
        check_tracker(LoggingSettings(tracker="wandb"))
    wandb.teardown()


def test_trackio_itself(tmp_path):
    """In a process of its own, because trackio reads its folder when it is imported."""
    if importlib.util.find_spec("trackio") is None:
        pytest.skip("trackio is not installed")
    words = [str(word) for word in tiny(tmp_path / "run", **SUPERVISED, logging__tracker="trackio")]
    program = (
        f"import os; os.environ['TRACKIO_DIR'] = {str(tmp_path / 'trackio')!r}\n"
        f"from cmim import train\nfor steps in (2, 3): train.main([*{words!r}, '--resume', f'--train.steps={{steps}}'])"
    )
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    run = Run(tmp_path / "run")
    name = f"run-{run.tracker.read_text().strip()}"
    with sqlite3.connect(tmp_path / "trackio" / "cmim.db") as base:
        lines = base.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    assert {line[0] for line in lines} == {name}
    logged = [(step, json.loads(figures)) for _, step, figures in lines]
    assert [line for line in logged if not (line[0] == 2 and "test/miou" in line[1])] == scalars(run)
