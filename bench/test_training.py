"""A short real training as a user would start it: killed, resumed, and ended with an mIoU. On a GPU compiled and in bf16."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ON_GPU, DRY = torch.cuda.is_available(), bool(os.environ.get("CMIM_BENCH_DRY_RUN"))
pytestmark = pytest.mark.skipif(not (ON_GPU or DRY), reason="needs a CUDA device: on a CPU, `make train` does the same")
pytest.importorskip("pydantic", reason="the trainer's settings need pydantic")
STEPS = 600 if ON_GPU else 8
SHAPES = ["--train.steps", str(STEPS)] + ([] if ON_GPU else ["--train.evaluate_every", "4", "--data.shapes.test", "4"])


def command(folder, *arguments):
    return [sys.executable, "-m", "cmim.train", *arguments, "--output", str(folder)]


def trained(folder):
    return json.loads((folder / "result.json").read_text())


def logged_step(folder):
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return max((line.get("step", 0) for line in lines), default=0)


def test_shapes_killed_and_resumed(tmp_path, record_property):
    checkpoints = ["--train.checkpoint_every", str(STEPS // 4)]
    with subprocess.Popen(command(tmp_path / "run", *SHAPES, *checkpoints), stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not (tmp_path / "run/checkpoints/last.pt").exists():
            time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
    record_property("killed_at_step", logged_step(tmp_path / "run"))
    start = time.time()
    resumed = command(tmp_path / "run", *SHAPES, *checkpoints, "--resume")
    result = subprocess.run(resumed, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-1500:]
    record_property("resumed_seconds", round(time.time() - start, 1))
    record_property("miou", trained(tmp_path / "run")["miou"])
    assert trained(tmp_path / "run")["miou"] > (0.4 if ON_GPU else 0)


@pytest.mark.parametrize("preset", ["supervised", "cmim"])
def test_a_folder_of_images(preset, tmp_path, record_property):
    data = os.environ.get("CMIM_BENCH_DATA")
    if not data:
        pytest.skip("no folder of images is given (--data)")
    size = [] if ON_GPU else ["--data.crop", "64", "--data.size", "[64, 64]"]
    options = ["--data.root", data, "--method.preset", preset, "--train.steps", str(STEPS), *size]
    config = Path(__file__).parents[1] / "configs/camvid_tiny.yaml"
    result = subprocess.run(command(tmp_path / "run", str(config), *options), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-1500:]
    record_property("miou", trained(tmp_path / "run")["miou"])
    record_property("last_lines", result.stdout.splitlines()[-12:])
