"""Train several presets on several seeds and print the table of their results.

    python -m cmim.compare --output runs/shapes-table --presets supervised cmim --seeds 0 1 2
    python -m cmim.compare configs/camvid_tiny.yaml --output runs/camvid --presets supervised fixmatch cmim \\
        --seeds 0 1 2 --jobs 2 --data.root CamVid

Each run has a run folder OUTPUT/<preset>-<seed>; finished runs are kept and interrupted ones are continued. `--jobs N`
trains N runs at a time, each on its share of the cores (leave it at 1 on one GPU); `--gpus N` trains each run in N
processes, one per GPU. The table is written to OUTPUT/table.md: the mIoU after the last step in per cent for every seed,
then mean and sample standard deviation over the seeds, both of the last step and of the best evaluation on data.val.
"""

from cmim import early

if __name__ == "__main__":
    early.begin("compare", __doc__)

import json
import os
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cmim.command_line import parser_of
from cmim.config import load_config
from cmim.distributed import available_cores
from cmim.engine.logging import console
from cmim.engine.run import Run, changed_setting, write_text
from cmim.engine.schedule import total_steps
from cmim.errors import UserError, run_command
from cmim.models.build import check_sizes
from cmim.settings import Config


def main(arguments: Sequence[str]) -> None:
    given, overrides = parser_of("compare", __doc__).parse(arguments)
    for key in ("seed", "method.preset"):
        if any(word.partition("=")[0] == f"--{key}" for word in overrides):
            raise UserError(f"--{key} is set for each run; give --seeds and --presets")
    for option, number in (("--jobs", given.jobs), ("--gpus", given.gpus)):
        if number < 1:
            raise UserError(f"{option} is {number}, expected at least 1")
    for option, values in (("--seeds", given.seeds), ("--presets", given.presets)):
        twice = next((value for i, value in enumerate(values) if value in values[:i]), None)
        if twice is not None:
            raise UserError(f"{option} names {twice} twice, which would count one run twice; name it once")
    check_sizes(load_config(given.config, overrides))
    given.output.mkdir(parents=True, exist_ok=True)
    jobs = [(preset, seed) for seed in given.seeds for preset in given.presets]
    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(lambda job: train(given, overrides, *job), jobs))
    table = make_table(given)
    write_text(given.output / "table.md", table)
    console.print(table)


def train(given: Namespace, overrides: Sequence[str], preset: str, seed: int) -> None:
    """Train one run in separate processes; its output goes to OUTPUT/<preset>-<seed>.log."""
    folder = given.output / f"{preset}-{seed}"
    settings = ["--method.preset", preset, f"--seed={seed}", *overrides]
    if finished(Run(folder), load_config(given.config, settings)):
        return
    launcher = []
    if given.gpus > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={given.gpus}"]
    command = [sys.executable, *launcher, "-m", "cmim.train", str(given.config), f"--output={folder}", "--resume", *settings]
    environment = dict(os.environ)
    if given.jobs > 1:  # each run gets its share of the cores; a single run makes its own choice
        command += ["--data.workers", "0"]
        environment["OMP_NUM_THREADS"] = str(max(1, available_cores() // (given.jobs * given.gpus)))
    started = time.perf_counter()
    with open(given.output / f"{preset}-{seed}.log", "a", encoding="utf-8") as log:
        before = log.tell()
        code = subprocess.run(command, stdout=log, stderr=log, env=environment).returncode
    if code != 0:
        said = Path(log.name).read_bytes()[before:].decode(errors="replace").strip().splitlines() or ["no output"]
        errors = [line for line in said if line.startswith("error: ")]  # torchrun prints a report below them
        raise UserError(f"{preset}, seed {seed} stopped with exit code {code}: {(errors or said)[-1]} (see {log.name})")
    miou = read_result(Run(folder))["miou"]
    console.print(f"{preset}, seed {seed}: mIoU {100 * miou:.2f}, {(time.perf_counter() - started) / 60:.1f} min")


def finished(run: Run, config: Config) -> bool:
    """Whether the folder holds the result of these settings. If not, cmim.train continues or refuses what is there."""
    if not run.result.exists() or changed_setting(load_config(run.config), config) is not None:
        return False
    result = read_result(run)
    if result.get("stopped_early"):  # it would go on with more patience only
        return config.train.patience is not None and config.train.patience <= result["patience"]
    if config.train.epochs is not None:
        return result.get("epochs") == config.train.epochs
    return result["step"] == total_steps(config.train, unlabelled=0)


def read_result(run: Run) -> dict[str, Any]:
    """The content of a run's result.json."""
    try:
        result = json.loads(run.result.read_text(encoding="utf-8"))
        float(result["miou"]), float(result["best_miou"]), int(result["step"]), str(result["split"])
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{run.result} is not a result of cmim.train; remove it, and the run will write it again") from None
    return result


def make_table(given: Namespace) -> str:
    """The results of all runs as a table in Markdown."""
    results = {
        preset: [read_result(Run(given.output / f"{preset}-{seed}")) for seed in given.seeds] for preset in given.presets
    }
    split = results[given.presets[0]][0]["split"]
    rows = [
        ["preset", *(f"seed {seed}" for seed in given.seeds), f"last on {split}, mean ± sd", "best on val, mean ± sd"],
        ["---", *["---:"] * (len(given.seeds) + 2)],
    ]
    for preset, runs in results.items():
        last, best = ([100 * run[key] for run in runs] for key in ("miou", "best_miou"))
        rows.append([preset, *(f"{value:.2f}" for value in last), mean_and_spread(last), mean_and_spread(best)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
