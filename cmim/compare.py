"""Train several variants of a config on several seeds, and compare them seed by seed.

    python -m cmim.compare --output runs/shapes-table --presets supervised cmim --seeds 0 1 2
    python -m cmim.compare configs/camvid_tiny.yaml --output runs/camvid --presets supervised fixmatch cmim \\
        --seeds 0 1 2 --jobs 2 --data.root CamVid
    python -m cmim.compare configs/aerial_cpu.yaml --output runs/aerial --variants variants.yaml --base fixmatch \\
        --seeds 0 1 2 3 4 --draw-splits --data.root AERIAL

A file of variants has lines such as `fixmatch: {method.preset: fixmatch, method.tau: 0.9}`: a name and its overrides,
in which `{output}` and `{seed}` stand for OUTPUT and the seed of a run. With `teacher.run:
"{output}/supervised-{seed}"` a variant takes its pseudo-labels from the run of the variant `supervised`, and with the same
`model.init_from` it starts with its weights; it is trained after it.
Each run has a run folder OUTPUT/<variant>-<seed>; finished runs are kept and interrupted ones are continued.
`--draw-splits` lets the seed draw the labelled images too. As soon as a run ends, its result is written to
RESULTS/<variant>-<seed>.json (by default OUTPUT/results/): a few kB to keep, with which the run folder is not needed
any more.

`--jobs N` trains N runs at a time, each on its share of the cores (leave it at 1 on one GPU); `--gpus N` trains each run in
N processes, one per GPU. OUTPUT/table.md has the mIoU after the last step in per cent for every seed, mean and standard
deviation over the seeds, of the last step and of the best evaluation on data.val, and the mean difference to the base (by
default the first variant) with its 95 % interval: on the split of the result, on val, and on val when the training time of
the base is over. OUTPUT/plot.png shows the runs, and OUTPUT/report.html is a page with the table, differences, curves and
classes.
"""

from cmim import early

if __name__ == "__main__":
    early.begin("compare", __doc__)

import os
import re
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cmim.command_line import parser_of
from cmim.config import load_config, read_yaml, words_of
from cmim.distributed import available_cores
from cmim.engine.logging import clock, console
from cmim.engine.run import Run, changed_setting, write_text
from cmim.engine.schedule import total_steps
from cmim.engine.start import check_parts
from cmim.engine.study import Result, keep_result, load_result, make_table, read_result, save_plot
from cmim.engine.study_report import study_page
from cmim.errors import UserError, run_command
from cmim.settings import Config

OUTPUT, SEED = "{output}", "{seed}"
"""What stands for them in a file of variants."""


def main(arguments: Sequence[str]) -> None:
    given, overrides = parser_of("compare", __doc__).parse(arguments)
    for option, number in (("--jobs", given.jobs), ("--gpus", given.gpus)):
        if number < 1:
            raise UserError(f"{option} is {number}, expected at least 1")
    for option, values in (("--seeds", given.seeds), ("--presets", given.presets)):
        twice = next((value for i, value in enumerate(values) if value in values[:i]), None)
        if twice is not None:
            raise UserError(f"{option} names {twice} twice, which would count one run twice; name it once")
    variants = variants_of(given)
    base = given.base or next(iter(variants))
    if base not in variants:
        raise UserError(f"--base {base} is none of the variants: {', '.join(variants)}")
    for key in ("seed", *(["data.split_seed"] if given.draw_splits else ())):
        if key in keys_of(overrides) or any(key in keys_of(words) for words in variants.values()):
            raise UserError(f"--{key} is set for each run; give --seeds")
    for name, words in variants.items():
        twice = next((key for key in keys_of(overrides) if key in keys_of(words)), None)
        if twice is not None:
            remedy = "give --seeds and --presets" if given.variants is None else f"leave it away, or out of {name}"
            raise UserError(f"--{twice} is set for each run; {remedy}")
        check_parts(config_of(given, name, words, overrides))
    given.output.mkdir(parents=True, exist_ok=True)
    jobs = [(name, seed) for seed in given.seeds for name in variants]
    settings = {(name, seed): settings_of(given, variants[name], seed, overrides) for name, seed in jobs}
    # Those that need the run of another variant come after all that do not.
    needing = {name for name, words in variants.items() if any(OUTPUT in word for word in words)}
    stages = [[job for job in jobs if (job[0] in needing) == later] for later in (False, True)]
    open_jobs = [job for job in stages[1] if kept_result(given, *job, load_config(given.config, settings[job])) is None]
    needed = {(other, seed) for name, seed in open_jobs for other in runs_needed_by(variants[name], variants)}
    started, trained, done = time.perf_counter(), [], {}

    def work(job: tuple[str, int]) -> None:
        done[job], is_new = result_of(given, *job, settings[job], needs_run=job in needed)
        if is_new:
            trained.append(job)
            left = (time.perf_counter() - started) / len(trained) * (len(jobs) - len(done))
            console.print(f"{len(done)} of {len(jobs)} runs, about {clock(left)} left")

    with ThreadPoolExecutor(given.jobs) as pool:
        for stage in stages:
            list(pool.map(work, stage))
    results = {name: [done[name, seed] for seed in given.seeds] for name in variants}
    table = make_table(results, base)
    write_text(given.output / "table.md", table)
    save_plot(results, base, given.output / "plot.png")
    write_text(given.output / "report.html", study_page(results, base, given.output))
    console.print(table)


def variants_of(given: Namespace) -> dict[str, list[str]]:
    """The words that each variant adds to the command line of cmim.train.

    Raises:
        UserError: the file of variants is not of the form {name: {section.key: value}}.
    """
    if given.variants is None:
        return {preset: ["--method.preset", preset] for preset in given.presets}
    variants = {}
    for name, settings in read_yaml(given.variants, "file of variants").items():
        if not re.fullmatch(r"[\w.+-]+", str(name)):
            raise UserError(f"{given.variants}: {name!r} names a folder, so letters, digits and _ . + - only")
        if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
            raise UserError(f"{given.variants}: {name} is {settings!r:.60}, expected overrides {{section.key: value}}")
        variants[str(name)] = words_of(settings)
    if not variants:
        raise UserError(f"{given.variants} names no variant; expected lines NAME: {{section.key: value}}")
    return variants


def keys_of(words: Sequence[str]) -> list[str]:
    return [word[2:].partition("=")[0] for word in words if word.startswith("--")]


def settings_of(given: Namespace, variant: Sequence[str], seed: int, overrides: Sequence[str]) -> list[str]:
    """The overrides of a run."""
    split = [f"--data.split_seed={seed}"] if given.draw_splits else []
    words = [word.replace(OUTPUT, str(given.output)).replace(SEED, str(seed)) for word in variant]
    return [*words, f"--seed={seed}", *split, *overrides]


def runs_needed_by(words: Sequence[str], variants: Sequence[str]) -> list[str]:
    """The variants whose runs, `{output}/NAME-{seed}`, stand in the overrides of another."""
    return [name for name in variants if any(f"{OUTPUT}/{name}-{SEED}" in word for word in words)]


def config_of(given: Namespace, variant: str, words: Sequence[str], overrides: Sequence[str]) -> Config:
    """The settings of a variant's first run. A UserError names the file of variants if the mistake is there."""
    try:
        return load_config(given.config, settings_of(given, words, given.seeds[0], overrides))
    except UserError as error:
        if given.variants is None or str(error) == mistake_in(given.config, overrides):
            raise
        raise UserError(f"{given.variants}: {variant}: {str(error).removeprefix('command line: ')}") from None


def mistake_in(config: Path, overrides: Sequence[str]) -> str | None:
    """What is said of a config with overrides alone; None if they are right."""
    try:
        load_config(config, overrides)
    except UserError as error:
        return str(error)
    return None


def kept_result(given: Namespace, variant: str, seed: int, config: Config) -> Result | None:
    """The result in the folder of results, if there is one."""
    return load_result(path_of_result(given, variant, seed), config)


def path_of_result(given: Namespace, variant: str, seed: int) -> Path:
    return (given.results or given.output / "results") / f"{variant}-{seed}.json"


def result_of(
    given: Namespace, variant: str, seed: int, settings: Sequence[str], needs_run: bool = False
) -> tuple[Result, bool]:
    """The result of a run, which is trained if there is none yet; and whether it was. With `needs_run` it is also trained if
    its result was kept without its run folder; the result that was kept stays."""
    config = load_config(given.config, settings)
    run = Run(given.output / f"{variant}-{seed}")
    kept = kept_result(given, variant, seed, config)
    if kept is not None and not needs_run:  # a run is kept once it has ended
        return kept, False
    is_new = not finished(run, config)
    if is_new:
        if kept is not None:
            console.print(f"{variant}, seed {seed}: only its result is there; others need the run, which is made again")
        train(given, variant, seed, settings)
    return kept or keep_result(path_of_result(given, variant, seed), variant, seed, run, config), is_new


def train(given: Namespace, variant: str, seed: int, settings: Sequence[str]) -> None:
    """Train one run in separate processes; its output goes to OUTPUT/<variant>-<seed>.log."""
    folder = given.output / f"{variant}-{seed}"
    launcher = []
    if given.gpus > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={given.gpus}"]
    command = [sys.executable, *launcher, "-m", "cmim.train", str(given.config), f"--output={folder}", "--resume", *settings]
    environment = dict(os.environ)
    if given.jobs > 1:  # each run gets its share of the cores; a single run makes its own choice
        command += ["--data.workers", "0"]
        environment["OMP_NUM_THREADS"] = str(max(1, available_cores() // (given.jobs * given.gpus)))
    started = time.perf_counter()
    with open(given.output / f"{variant}-{seed}.log", "a", encoding="utf-8") as log:
        before = log.tell()
        code = subprocess.run(command, stdout=log, stderr=log, env=environment).returncode
    if code != 0:
        said = Path(log.name).read_bytes()[before:].decode(errors="replace").strip().splitlines() or ["no output"]
        errors = [line for line in said if line.startswith("error: ")]  # torchrun prints a report below them
        raise UserError(f"{variant}, seed {seed} stopped with exit code {code}: {(errors or said)[-1]} (see {log.name})")
    miou = read_result(Run(folder))["miou"]
    console.print(f"{variant}, seed {seed}: mIoU {100 * miou:.2f}, {(time.perf_counter() - started) / 60:.1f} min")


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


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
