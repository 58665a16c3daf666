"""Training as several processes: the same run as one process, one voice, and what is left when a process dies."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cmim import checkpoint, errors, train
from cmim.engine.run import Run
from tests.ranks import run_on_ranks
from tests.tiny_runs import read_metrics, run_tiny, tiny

BATCH = {
    "data__shapes__labelled": 8, "train__labelled_batch": 4, "train__unlabelled_batch": 4, "optimizer__lr_batch": 4,
    "optimizer__lr": 0.0003, "mim__views": ["labelled", "weak", "strong"],
}  # fmt: skip


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def train_as(words, port):
    """One of two processes, as torchrun starts them."""
    import torch.distributed as dist

    rank, size = dist.get_rank(), dist.get_world_size()
    dist.barrier()  # the group must not be destroyed while the other process still connects to it
    dist.destroy_process_group()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    train.main(words)


def assert_close_runs(one, other, rel=2e-3):
    """Figures of every step and evaluation, and weights: but for rounding, which grows with the steps."""
    for ours, theirs in zip(read_metrics(one), read_metrics(other), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            if name.startswith(("loss", "coverage", "grad", "pairs", "miou", "lr", "pixel_accuracy")):
                assert theirs[name] == pytest.approx(value, rel=rel, abs=1e-5), (ours["step"], name)
    ours, theirs = (checkpoint.load(run.last)["objective"] for run in (one, other))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=5e-3, atol=rel / 2, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "options",
    [
        {"train__accumulate": 2, "mim__start": 0.5, "train__steps": 4, "teacher__kind": "student"},
        {"method__preset": "unimatch", "method__ohem": {"threshold": 0.2, "min_kept": 700}, "train__steps": 3},
        {
            "method__preset": "supervised",
            "method__class_weights": "median",
            "method__dice": 1.0,
            "train__accumulate": 2,
            "model__checkpointing": True,
            "train__patience": 1,
        },
        {
            "method__preset": "supervised",
            "optimizer__name": "lamb",
            "optimizer__warmup": 0.5,
            "train__clip_grad": 0.5,
            "train__accumulate": 2,
            "train__steps": 4,
        },
    ],
)
def test_two_processes_train_like_one(options, tmp_path):
    settings = BATCH | {"train__picture_every": 2} | options
    if settings.get("method__preset") is not None:
        settings.pop("mim__views")
    one = run_tiny(tmp_path / "one", **settings)
    two = Run(tmp_path / "two")
    run_on_ranks(train_as, 2, tmp_path, tiny(two.folder, **settings), free_port())
    assert_close_runs(one, two)
    assert sorted(p.name for p in one.folder.iterdir()) == sorted(p.name for p in two.folder.iterdir())


def process_of_rank(rank, folder):
    """The id of the training process of that number."""
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if f"RANK={rank}".encode() not in (place / "environ").read_bytes().split(b"\0"):
                continue
            if str(folder).encode() in (place / "cmdline").read_bytes().split(b"\0"):
                return int(place.name)
        except OSError:
            continue
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes in /proc")
def test_a_killed_process_ends_the_job_and_one_process_continues_it(tmp_path):
    settings = BATCH | {"train__steps": 16, "train__checkpoint_every": 2, "train__evaluate_every": 16}
    broken = Run(tmp_path / "broken")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "cmim.train"]
    job = subprocess.Popen(
        [*command, *tiny(broken.folder, **settings)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not broken.last.exists():
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()
        time.sleep(0.02)
    os.kill(process_of_rank(1, broken.folder), signal.SIGKILL)
    said, complained = job.communicate(timeout=60)
    assert job.returncode != 0
    assert "Signal 9 (SIGKILL)" in complained and re.search(r"rank +: 1 ", complained)
    assert complained.count("error: ") <= 1 and not re.search("process 1:", complained)
    steps = re.findall(r"^step (\d+)/", said, re.M)
    assert len(steps) == len(set(steps)) < 16  # one voice
    assert not broken.result.exists() and 2 <= checkpoint.load(broken.last)["step"] < 16

    run_tiny(broken.folder, "--resume", **settings)
    assert_close_runs(run_tiny(tmp_path / "whole", **settings), broken, rel=0.02)


@pytest.mark.parametrize("rank, expected", [(0, "error: mind the gap\n"), (1, "error: process 1: mind the gap\n")])
def test_a_mistake_is_told_once_and_reported(rank, expected, tmp_path, monkeypatch, capfd):
    def fail():
        raise errors.UserError("mind the gap")

    waited, ended = [], []
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr(os, "_exit", lambda code: ended.append(code) or sys.exit(code))
    with pytest.raises(SystemExit):
        errors.run_command(fail)
    assert ended == [2] and waited == [errors.RANK0_HEAD_START] * rank
    assert capfd.readouterr().err == expected
    assert '"mind the gap"' in (tmp_path / "error.json").read_text() or rank == 1


@pytest.mark.parametrize(
    "processes, options, message",
    [
        (3, {}, "train.labelled_batch is 4, but 3 processes share images equally; try 6"),
        (4, {}, "train.unlabelled_batch is 4, but 4 processes share pairs of images (method.cutmix) equally; try 8"),
        (3, {"train__labelled_batch": 3, "method__preset": "supervised"}, None),
        (4, {"method__cutmix": 0}, None),
    ],
)
def test_processes_share_the_batches(processes, options, message, tmp_path):
    config = train.load_config(train.default_config_path(), tiny("x", **BATCH | options)[2:])
    splits = train.load_splits(config.data)
    counts = len(splits.labelled), len(splits.unlabelled)
    if message is None:
        return train.check_counts(config, *counts, processes)
    with pytest.raises(errors.UserError) as caught:
        train.check_counts(config, *counts, processes)
    assert str(caught.value) == message
