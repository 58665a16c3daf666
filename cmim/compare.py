"""Train several presets on several seeds and print the table of their results.

    python -m cmim.compare --output runs/shapes-table --presets supervised cmim --seeds 0 1 2
    python -m cmim.compare configs/camvid_tiny.yaml --output runs/camvid --presets supervised fixmatch cmim \\
        --seeds 0 1 2 --jobs 2 --data.root CamVid

Each run is a run folder OUTPUT/<preset>-<seed>; what is finished is kept, what was interrupted is continued.
`--jobs N` trains N runs at a time, each on its share of the cores (on one GPU, leave it at 1). The table (mIoU of the
last step in per cent, mean and sample standard deviation over the seeds) is written to OUTPUT/table.md.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cmim.config import default_config_path, load_config
from cmim.data.batches import available_cores
from cmim.engine.command import CommandLine
from cmim.engine.logging import console
from cmim.engine.run import Run, changed_setting, write_text
from cmim.errors import UserError, run_command

PRESETS = ("supervised", "fixmatch", "unimatch", "mim", "cmim")


def main(arguments):
    parser = CommandLine("cmim.compare", __doc__)
    parser.add_argument("config", nargs="?", default=default_config_path())
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=PRESETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1)
    given, overrides = parser.parse(arguments)
    for key in ("seed", "method.preset"):
        if any(word.partition("=")[0] == f"--{key}" for word in overrides):
            raise UserError(f"--{key} is set for each run; give --seeds and --presets")
    if given.jobs < 1:
        raise UserError(f"--jobs is {given.jobs}, expected at least 1")
    load_config(given.config, overrides)
    given.output.mkdir(parents=True, exist_ok=True)
    jobs = [(preset, seed) for seed in given.seeds for preset in given.presets]
    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(lambda job: train(given, overrides, *job), jobs))
    table = make_table(given)
    write_text(given.output / "table.md", table)
    console.print(table)


def train(given, overrides, preset, seed):
    """One run in a process of its own; its output goes to OUTPUT/<preset>-<seed>.log."""
    folder = given.output / f"{preset}-{seed}"
    settings = ["--method.preset", preset, f"--seed={seed}", *overrides]
    if finished(Run(folder), load_config(given.config, settings)):
        return
    command = [sys.executable, "-m", "cmim.train", str(given.config), "--output", str(folder), "--resume", *settings]
    environment = dict(os.environ)
    if given.jobs > 1:  # a share of the cores for each; a single run chooses for itself
        command += ["--data.workers", "0"]
        environment["OMP_NUM_THREADS"] = str(max(1, available_cores() // given.jobs))
    started = time.perf_counter()
    with open(given.output / f"{preset}-{seed}.log", "a") as log:
        code = subprocess.run(command, stdout=log, stderr=log, env=environment).returncode
    if code != 0:
        last = Path(log.name).read_text().strip().splitlines()[-1:] or ["no output"]
        raise UserError(f"{preset}, seed {seed} stopped with exit code {code}: {last[0]} (see {log.name})")
    miou = json.loads(Run(folder).result.read_text())["miou"]
    console.print(f"{preset}, seed {seed}: mIoU {100 * miou:.2f}, {(time.perf_counter() - started) / 60:.1f} min")


def finished(run, config):
    """Whether the folder holds the result of these settings; what it holds of others, cmim.train refuses or continues."""
    if not run.result.exists():
        return False
    same = changed_setting(load_config(run.config), config) is None
    return same and json.loads(run.result.read_text())["step"] == config.train.steps


def make_table(given):
    rows = [
        f"| preset | {' | '.join(f'seed {s}' for s in given.seeds)} | mean ± sd |",
        "| --- |" + " ---: |" * (len(given.seeds) + 1),
    ]
    for preset in given.presets:
        results = [json.loads(Run(given.output / f"{preset}-{s}").result.read_text()) for s in given.seeds]
        values = [100 * r["miou"] for r in results]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        rows.append(f"| {preset} | {' | '.join(f'{v:.2f}' for v in values)} | {statistics.mean(values):.2f}{spread} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
