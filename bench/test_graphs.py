"""A training with `train.graph` beside the same without it: rate, loss and result."""

import json
import subprocess

import pytest
import torch

from bench.test_training import command, trained

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
STEPS = 300


@pytest.mark.parametrize("preset", ["fixmatch", "cmim"])
def test_steps_from_a_graph(preset, tmp_path, record_property):
    late = {}
    for graph in ("false", "true"):
        folder = tmp_path / graph
        options = {"method.preset": preset, "train.graph": graph, "train.steps": STEPS, "train.log_every": 50}
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        result = subprocess.run(command(folder, *words), capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-1500:]
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        late[graph] = [line for line in lines if "loss" in line and line["step"] > STEPS // 2]
        rate = max(line["images_per_second"] for line in late[graph])
        record_property(f"graph_{graph}", {"images_per_second": rate, "miou": trained(folder)["miou"]})
    difference = max(abs(a["loss"] - b["loss"]) for a, b in zip(*late.values(), strict=True))
    record_property("largest_difference_of_the_loss", difference)
    assert difference < 0.1 * late["false"][0]["loss"]
