"""Training steps from a CUDA graph (`train.graph`) beside the same steps without it: weights, rate and memory."""

import gc
import itertools
import os
import time

import pytest
import torch

pytest.importorskip("pydantic", reason="the trainer's settings need pydantic")
from cmim.config import config_from
from cmim.data import load_splits
from cmim.engine.run import Run
from cmim.engine.start import build_objective
from cmim.engine.trainer import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
STEPS, TIMED = 32, 16


def trained(preset, compiles, graph):
    """Weights after STEPS steps on the same batches, seconds of each of the last TIMED, and GiB of reserved memory."""
    values = {
        "data": {"format": "shapes", "crop": 160, "workers": 0},
        "model": {"encoder": "resnet18", "weights": "none"},
        "method": {"preset": preset, "tau": 0.3},
        "mim": {"start": 0},
        "teacher": {"kind": "ema", "decay": 0.5},  # which is constant from the second step on
        # Learning rates that float32 holds, with which a graph computes.
        "optimizer": {"lr": 2**-10, "lr_batch": 4, "head_lr_factor": 8, "warmup": 0.5, "poly_power": 0},
        "train": {"steps": STEPS, "labelled_batch": 4, "unlabelled_batch": 4, "compile": compiles, "graph": graph},
    }
    config, device, run = config_from(values, "the benchmark"), torch.device("cuda"), Run(os.devnull)
    splits = load_splits(config.data)
    trainer = Trainer(config, splits, run, build_objective(config, len(splits.class_names), run), device)
    gc.collect()  # a graph and the trainer before refer to each other
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    batches = itertools.cycle(list(trainer.loader(0, 4)))
    with trainer.stream():
        for step in range(STEPS):
            if step == STEPS - TIMED:
                torch.cuda.synchronize()
                start = time.perf_counter()
            trainer.train_step(lambda: dict(next(batches)), lambda figures: None)
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / TIMED
    weights = {name: value.double() for name, value in trainer.objective.state_dict().items()}
    return weights, seconds, torch.cuda.max_memory_reserved() / 2**30


@pytest.mark.parametrize("preset, compiles", [("unimatch", False), ("cmim", False), ("cmim", True)])
def test_steps_from_a_graph(preset, compiles, record_property, monkeypatch):
    """The steps without a graph are also compared with themselves: where they are equal to the bit, so is the graph."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    first, differences = None, {}
    for name in ("without", "again", "graph"):
        weights, seconds, memory = trained(preset, compiles, name == "graph")
        first = first or weights
        differences[name] = max((a - b).abs().max().item() for a, b in zip(first.values(), weights.values(), strict=True))
        record_property(f"images_per_second_{name}", 8 / seconds)
        record_property(f"reserved_gib_{name}", memory)
    record_property("largest_difference", differences)
    assert differences["graph"] <= 10 * differences["again"]
