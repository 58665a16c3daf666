"""Early stopping: where a run stops, that a killed and resumed run stops there too, and on two processes."""

import json

import pytest

from cmim import checkpoint, compare, train
from cmim.config import load_config
from cmim.engine.run import Run
from tests.ranks import run_on_ranks
from tests.test_resume import assert_same_run, without_times
from tests.test_torchrun import free_port, train_as
from tests.tiny_runs import read_metrics, run_tiny, tiny

MIOUS = {2: 0.1, 4: 0.3, 6: 0.3, 8: 0.2, 10: 0.4, 12: 0.1, 14: 0.1, 16: 0.1}
"""What each evaluation on val is to find; the one at step 6 is not better than that at step 4."""
OPTIONS = dict(
    method__preset="supervised", train__steps=16, train__evaluate_every=2, train__checkpoint_every=3,
    train__picture_every=99, data__shapes__val=1, data__shapes__test=1,
)  # fmt: skip


class Killed(BaseException):
    pass


def script(monkeypatch, killed_at=None):
    """Evaluations on val that find MIOUS; that at step `killed_at` kills the run."""
    original = train.Trainer.measure

    def measure(self, image_set, name):
        result = original(self, image_set, name)
        if name == "test":
            return result
        if self.step == killed_at:
            raise Killed
        return result._replace(scores=result.scores._replace(miou=MIOUS[self.step]))

    monkeypatch.setattr(train.Trainer, "measure", measure)


@pytest.fixture(autouse=True)
def scripted(monkeypatch):
    with monkeypatch.context() as patch:
        script(patch)
        yield


@pytest.mark.parametrize("patience, last", [(1, 6), (2, 8), (3, 16), (8, 16), (None, 16)])
def test_a_run_stops_after_so_many_evaluations_without_a_better_one(patience, last, tmp_path, capsys):
    run = run_tiny(tmp_path / "run", **OPTIONS, train__patience=patience)
    result, lines = json.loads(run.result.read_text()), read_metrics(run)
    assert (result["step"], result["stopped_early"], result["patience"]) == (last, last < 16, patience)
    assert result["best_miou"] == max(miou for step, miou in MIOUS.items() if step <= last)
    assert [line["step"] for line in lines if line.get("split") == "val"] == [step for step in MIOUS if step <= last]
    assert checkpoint.load(run.last)["step"] == last and lines[-1]["split"] == "test"
    assert [path.name for path in run.pictures.iterdir()] == [f"step_{last:06d}.png"]
    rates = [line["lr"] for line in lines if "lr" in line]
    assert rates == pytest.approx([0.003 * (1 - step / 16) ** 0.9 for step in range(last)])  # the schedule of all steps
    said = f"stopped early after step {last} of 16: no better val mIoU within train.patience {patience}\n"
    assert (said in capsys.readouterr().out) == (last < 16)


@pytest.mark.parametrize("killed_at", [4, 6, 8])
def test_a_resumed_run_stops_at_the_same_step(killed_at, tmp_path, monkeypatch):
    whole = run_tiny(tmp_path / "whole", **OPTIONS, train__patience=2)
    with monkeypatch.context() as patch:
        script(patch, killed_at)
        with pytest.raises(Killed):
            run_tiny(tmp_path / "broken", **OPTIONS, train__patience=2)
    broken = run_tiny(tmp_path / "broken", "--resume", **OPTIONS, train__patience=2)
    assert_same_run(whole, broken)
    before = read_metrics(broken), broken.result.read_text()
    assert_same_run(whole, run_tiny(tmp_path / "broken", "--resume", **OPTIONS, train__patience=2))  # it ends again
    assert (read_metrics(broken), broken.result.read_text()) == before


def test_more_patience_continues_a_run_as_if_it_had_always_had_it(tmp_path):
    run = run_tiny(tmp_path / "run", **OPTIONS, train__patience=1)
    run_tiny(tmp_path / "run", "--resume", **OPTIONS, train__patience=None)
    whole = run_tiny(tmp_path / "whole", **OPTIONS)
    assert without_times(read_metrics(run)) == without_times(read_metrics(whole))
    assert run.result.read_text() == whole.result.read_text()


def scripted_train(words, port):
    with pytest.MonkeyPatch.context() as patch:
        script(patch)
        train_as(words, port)


def test_two_processes_stop_together(tmp_path):
    words = tiny(tmp_path / "two", **OPTIONS, train__patience=2, train__unlabelled_batch=4)
    run_on_ranks(scripted_train, 2, tmp_path, words, free_port())
    result = json.loads(Run(tmp_path / "two").result.read_text())
    assert (result["step"], result["stopped_early"]) == (8, True)
    assert checkpoint.load(Run(tmp_path / "two").last)["step"] == 8


@pytest.mark.parametrize("patience, done", [(1, True), (2, True), (3, False), (None, False)])
def test_compare_knows_that_a_run_that_stopped_early_is_finished(patience, done, tmp_path):
    run = run_tiny(tmp_path / "run", **OPTIONS, train__patience=2)
    words = tiny("unused", **OPTIONS, train__patience=patience)[2:]
    config = load_config(train.default_config_path(), words)
    assert compare.finished(run, config) == done
    # A run that was continued with more patience and killed is not finished, whatever its config says now.
    run.config.write_text(run.config.read_text().replace("patience: 2", f"patience: {patience or 'null'}"))
    assert compare.finished(run, config) == done
