"""--dry-run: what it says, and that it leaves nothing behind."""

import os
import re

import pytest
import torch

from cmim import checkpoint
from cmim.engine import dry_run as module
from cmim.engine.dry_run import _phases
from cmim.engine.schedule import ramp
from cmim.errors import UserError
from tests.ranks import run_on_ranks
from tests.test_engine import tiny_config
from tests.test_torchrun import free_port, train_as
from tests.tiny_runs import FOLDER, run_tiny, tiny, write_folder

OPTIONS = dict(FOLDER, train__steps=7, train__evaluate_every=2, train__picture_every=3, model__weights="none")


def everything_below(folder):
    return {path: path.is_file() and path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture
def place(tmp_path, monkeypatch):
    for name in ("CMIM_CACHE", "HOME", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path / "places" / name))
        (tmp_path / "places" / name).mkdir(parents=True)
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path / "places/TMPDIR"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_says_what_a_run_would_do_and_leaves_nothing(place, capsys):
    root = write_folder(place / "data")
    before, variables = everything_below(place), dict(os.environ)
    assert run_tiny(place / "run", "--dry-run", **OPTIONS, data__root=str(root), method__class_weights="median")
    assert everything_below(place) == before and dict(os.environ) == variables
    said = capsys.readouterr().out
    assert "cmim: 2 labelled and 2 unlabelled images, 2 val, 2 test, 3 classes" in said
    assert f"  data.root: {root}\n  data.exif: ignore\n" in said and "  method.class_weights: median\n" in said
    assert "  train.steps: 7\n" in said and "train.accumulate" not in said and "  seed" not in said
    time = re.search(r"^time: 7 steps of ([\d.e-]+) s are 0:00:\d\d; 4 evaluations on val and one on test 0:00", said, re.M)
    assert 0 < float(time[1]) < 10 and re.search(r"^memory: at its peak \d\.\d\d GiB", said, re.M)
    assert "val  " not in said and "step 1" not in said  # no lines of a training

    run = run_tiny(place / "run", **OPTIONS, data__root=str(root))
    sizes = [path.stat().st_size / 2**20 for path in (run.last, run.best)]
    last, best, pictures = re.search(r"last.pt \((.*) MiB\) and best.pt \((.*) MiB\), (\d) pictures", said).groups()
    assert [float(last), float(best)] == pytest.approx(sizes, rel=0.2) and int(pictures) == len(list(run.pictures.iterdir()))
    assert "config.yaml, labelled.txt, class_weights.txt, metrics.jsonl, result.json, tensorboard/\n" in said
    objective = checkpoint.load(run.last)["objective"]
    trained = sum(
        v.numel() for k, v in objective.items() if "running" not in k and "num_batches" not in k and "teacher" not in k
    )
    assert f"; {trained / 1e6:.2f} M are trained" in said
    with pytest.raises(UserError, match="holds a run"):
        run_tiny(place / "run", "--dry-run", **OPTIONS, data__root=str(root))


def test_long_settings_are_shortened():
    names = [f"class {i}" for i in range(59)]
    assert module._short(names) == f"{str(names[:6])[:-1]}, ...], 59 in all" and module._short(names[:8]) == names[:8]
    colours = dict.fromkeys(names, "#ff0000")
    assert module._short(colours).endswith("'class 5': '#ff0000', ...}, 59 in all")


def test_two_processes_say_it_once(tmp_path):
    words = tiny(tmp_path / "run", "--dry-run", train__labelled_batch=2, train__unlabelled_batch=4)
    run_on_ranks(train_as, 2, tmp_path, words, free_port())
    assert not (tmp_path / "run").exists()


def test_mistakes_are_found_as_in_a_run(tmp_path):
    with pytest.raises(UserError, match=r"fewer than train.labelled_batch"):
        run_tiny(tmp_path / "run", "--dry-run", train__labelled_batch=50)
    with pytest.raises(UserError, match="--dry-run tells about a new run; leave --resume out"):
        run_tiny(tmp_path / "run", "--dry-run", "--resume")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"method__preset": "supervised", "mim__start": 0.5}, [(0, 100)]),
        ({"method__preset": "fixmatch", "method__start": 0.25}, [(0, 25), (25, 75)]),
        ({"mim__start": 0.301}, [(0, 31), (31, 69)]),
        ({"mim__start": 0.3, "method__start": 0.5}, [(0, 50), (50, 50)]),
        ({"mim__start": 0.5, "method__start": 0.1}, [(0, 10), (10, 40), (50, 50)]),
        ({"mim__start": 1.0}, [(0, 100)]),
    ],
)
def test_every_phase_of_the_training_is_timed(options, expected):
    config = tiny_config(**options)
    assert _phases(config, 100) == expected
    for first, _ in expected[1:]:  # where the ramps of the training begin too
        starts = [ramp(step, 100, start, 0) is None for step in (first - 1, first) for start in (config.mim.start,)]
        starts += [ramp(step, 100, config.method.start, 0) is None for step in (first - 1, first)]
        assert starts[0] != starts[1] or starts[2] != starts[3]


@pytest.mark.parametrize(
    "graph, first, expected", [(False, 0, 3), (True, 0, 1), (False, 98, 3), (True, 97, 3), (True, 99, 9)]
)
def test_the_first_steps_and_those_before_replays_are_not_timed(graph, first, expected):
    """Of 100 steps; the first takes 9 s, the next four 3 s each, and further ones 1 s with a graph."""
    times = [9, 3, 3, 3, 3, *[1 if graph else 3] * 50]
    assert module._seconds(lambda start, count: times[: min(count, 100 - start)], first, 100, graph) == expected


def test_an_evaluation_is_extrapolated(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])

    def evaluate(net, images, *rest):
        now[0] += 5 + 0.25 * len(images)

    monkeypatch.setattr(module, "evaluate", evaluate)
    config = tiny_config(evaluation__batch=2)
    objective = torch.nn.Module()
    objective.evaluated, objective.num_classes = lambda: None, 3

    class Images(list):
        label = image = name = None

    for count in (3, 8, 100):
        assert module._evaluation(objective, Images(range(count)), config, torch.device("cpu"), "val") == 5 + 0.25 * count
