"""Runs that go on: after an unreadable image, a stop before the first checkpoint or in an evaluation; one at a time."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from cmim import train
from cmim.config import load_config
from cmim.data import load_splits
from cmim.data.batches import TrainBatches, train_loader
from cmim.engine.run import Run, locked
from cmim.errors import UserError
from cmim.settings import Config
from tests.test_resume import assert_same_run
from tests.tiny_runs import FOLDER, read_metrics, run_tiny, write_folder


def folder_run(output, root, *more, **settings):
    return run_tiny(output, *more, **(FOLDER | {"data__root": str(root), "method__preset": "supervised"} | settings))


def break_image(path):
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize("more", [(), ("--resume",)])
def test_a_run_without_a_checkpoint_starts_anew(more, tmp_path, monkeypatch):
    """With other settings and images too, and nothing of before is left in its metrics."""
    output = tmp_path / "run"

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "refuse_broken_weights", stop)
        with pytest.raises(Stop):
            run_tiny(output, method__preset="supervised")
    assert len(read_metrics(Run(output))) == 2 and not Run(output).has_results()
    run = run_tiny(output, *more, method__preset="supervised", optimizer__lr=0.01, data__shapes__labelled=5)
    assert load_config(run.config).optimizer.lr == 0.01 and len(run.labelled.read_text().split()) == 5
    assert [line["step"] for line in read_metrics(run) if "split" not in line] == [1, 2]
    with pytest.raises(UserError, match="holds a run; continue it with --resume"):
        run_tiny(output, method__preset="supervised")


def test_an_evaluation_that_fails_costs_nothing(tmp_path, monkeypatch):
    settings = dict(method__preset="supervised", train__steps=4, train__evaluate_every=2, train__checkpoint_every=2)
    whole, broken = run_tiny(tmp_path / "whole", **settings), Run(tmp_path / "broken")

    def fail(*_):
        raise UserError("a bad image")

    measure = train.Trainer.measure
    for step in (2, 4):
        with monkeypatch.context() as patch:
            patch.setattr(
                train.Trainer, "measure", lambda self, *a, at=step: fail() if self.step == at else measure(self, *a)
            )
            with pytest.raises(UserError, match="a bad image"):
                run_tiny(broken.folder, "--resume", **settings)
    run_tiny(broken.folder, "--resume", **settings)
    assert_same_run(whole, broken)


def test_the_best_of_the_last_step_counts_where_a_run_goes_on(tmp_path):
    settings = dict(method__preset="supervised", train__evaluate_every=1)
    run = run_tiny(tmp_path / "run", **settings)
    state = torch.load(run.last, weights_only=True)
    assert state["best_miou"] < json.loads(run.result.read_text())["best_miou"] or state["step"] == 2
    run_tiny(run.folder, "--resume", **settings, train__steps=3)
    every = [line["miou"] for line in read_metrics(run) if line.get("split") == "val"]
    assert json.loads(run.result.read_text())["best_miou"] == max(every)


def test_two_processes_never_train_in_one_folder(tmp_path):
    run = Run(tmp_path / "run")
    program = (
        "import sys; from cmim.engine.run import Run, locked\n"
        "with locked(Run(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(run.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        for more in ((), ("--resume",)):
            with pytest.raises(UserError, match=rf"another process \(number {holder.pid} on .* is training in .*/run"):
                run_tiny(run.folder, *more, method__preset="supervised")
    finally:
        holder.kill()
        holder.wait()
    run_tiny(run.folder, "--resume", method__preset="supervised", train__steps=1)  # the killed process holds nothing
    assert not run.lock.exists()


def test_a_mistake_leaves_no_folder(tmp_path):
    with pytest.raises(UserError), locked(Run(tmp_path / "a" / "b")):
        assert (tmp_path / "a/b").is_dir()
        raise UserError("a mistake")
    assert not (tmp_path / "a").exists()


def test_a_continued_run_keeps_its_labelled_images(tmp_path):
    """Also where the data has fewer images now, which a new draw would notice."""
    root = write_folder(tmp_path / "data", train=6)
    run = folder_run(tmp_path / "run", root, train__steps=1)
    labelled = run.labelled.read_text()
    gone = next(f"train{i}" for i in range(6) if f"train{i}" not in labelled.split())
    for kind in ("images", "masks"):
        (root / f"train/{kind}/{gone}.png").unlink()
    folder_run(run.folder, root, "--resume", train__steps=2)
    assert run.labelled.read_text() == labelled and json.loads(run.result.read_text())["step"] == 2
    (root / f"train/images/{labelled.split()[0]}.png").unlink()
    with pytest.raises(UserError, match=r"the labelled images are not those of .*labelled.txt.*restore the data"):
        folder_run(run.folder, root, "--resume", train__steps=3)


@pytest.fixture
def broken(tmp_path):
    """A folder with two of five unlabelled images that cannot be read."""
    root = write_folder(tmp_path / "data", train=2)
    (root / "unlabeled").mkdir()
    for i in range(5):
        shutil.copy(root / "val/images/val0.png", root / f"unlabeled/u{i}.png")
    for i in (1, 3):
        break_image(root / f"unlabeled/u{i}.png")
    return root


def batches_of(root, rank=0, ranks=1, **data):
    config = Config(
        data={"format": "folder", "root": str(root), "labelled": 2, "crop": 32, "background": None, **data},
        method={"preset": "fixmatch"}, train={"labelled_batch": 2, "unlabelled_batch": 4},
    )  # fmt: skip
    return TrainBatches(load_splits(config.data), config, rank, ranks)


def test_unreadable_unlabelled_images_are_replaced_the_same_on_any_number_of_processes(broken):
    whole = [batches_of(broken)[step] for step in range(4)]
    for workers in (0, 2):
        for step, batch in enumerate(train_loader(batches_of(broken), 0, 4, workers)):
            assert batch.keys() == whole[step].keys()
            assert all(torch.equal(batch[name], whole[step][name]) for name in batch)
    replaced = [i for batch in whole for i in batch.get("replaced", torch.empty(0)).tolist()]
    assert set(replaced) == {1, 3}
    for step in range(4):
        parts = [batches_of(broken, rank, 2)[step]["weak_image"] for rank in range(2)]
        assert torch.equal(torch.cat(parts), whole[step]["weak_image"])
    with pytest.raises(UserError, match=r"cannot read .*unlabeled/u[13].png"):
        [batches_of(broken, strict=True)[step] for step in range(4)]


def test_without_a_readable_image_the_run_stops(broken):
    for path in (broken / "unlabeled").iterdir():
        break_image(path)
    with pytest.raises(UserError, match=r"cannot read .*unlabeled/u"):
        batches_of(broken)._readable(0)


def test_replaced_images_are_counted_and_named_once(broken, tmp_path, capsys):
    folder_run(tmp_path / "run", broken, method__preset="fixmatch", train__steps=5)
    said = capsys.readouterr().out
    assert said.count("warning: the unlabelled image u") == 1
    assert said.count("warning: 2 unlabelled images could not be read") == 1
