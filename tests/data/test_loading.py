"""Loaders where /dev/shm is small or missing."""

import os
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import Dataset
from torch.utils.data._utils import worker

from cmim.data import loading
from cmim.data.loading import make_loader, transport, transport_note
from tests.tiny_runs import FOLDER, read_metrics, run_tiny, write_folder


def with_space(monkeypatch, free):
    """As if /dev/shm had so many bytes; None: it is not there."""

    def statvfs(path):
        assert path == "/dev/shm"
        if free is None:
            raise FileNotFoundError(path)
        return SimpleNamespace(f_bavail=free // 4096, f_frsize=4096)

    monkeypatch.setattr(loading, "sys", SimpleNamespace(platform="linux"))
    monkeypatch.setattr(loading, "os", SimpleNamespace(statvfs=statvfs))


def test_the_way_follows_the_space(monkeypatch):
    for free, way, said in ((4 << 20, "pickled", "through pipes"), (64 << 20, "pickled", "through pipes"),
                            (8 << 30, "shared", None), (None, "none", "without processes")):  # fmt: skip
        with_space(monkeypatch, free)
        assert transport(2) == way and transport(0) == "shared"
        assert said in transport_note(2) if said else transport_note(2) is None
    with_space(monkeypatch, 8 << 30)
    assert transport(8, 1 << 30) == "pickled"  # batches that are larger than it
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert transport(2, 200 << 20) == "pickled"


class Items(Dataset):
    def __len__(self):
        return 5

    def __getitem__(self, i):
        return {"a": torch.full((3, 2), i), "b": (torch.tensor([True, False]), i)}


@pytest.mark.parametrize("free", [4 << 20, 8 << 30, None])
def test_items_are_the_same_on_every_way(free, monkeypatch):
    with_space(monkeypatch, free)
    items = list(make_loader(Items(), range(1, 4), 2, 100))
    for i, item in zip(range(1, 4), items, strict=True):
        assert torch.equal(item["a"], torch.full((3, 2), i)) and item["b"][0].tolist() == [True, False] and item["b"][1] == i


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes of a loader are forked on Linux alone")
def test_a_signal_to_a_process_of_a_loader_that_just_begins(monkeypatch):
    """It has the handlers of the run until it sets its own, and what they raise would end it."""
    loop = worker._worker_loop

    def hit(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        loop(*arguments)

    monkeypatch.setattr(worker, "_worker_loop", hit)
    assert len(list(make_loader(Items(), range(5), 1, 100))) == 5
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGINT, signal.SIGTERM}


def test_a_run_with_workers_and_little_shared_memory(tmp_path, monkeypatch, capsys):
    root = write_folder(tmp_path / "data")
    settings = FOLDER | dict(data__root=str(root), method__preset="fixmatch", train__steps=2)
    plain = run_tiny(tmp_path / "plain", **settings)
    with_space(monkeypatch, 4 << 20)
    run = run_tiny(tmp_path / "run", **settings | {"data__workers": 2})
    assert "note: /dev/shm has little space" in capsys.readouterr().out
    assert [line.get("loss") for line in read_metrics(run)] == [line.get("loss") for line in read_metrics(plain)]
