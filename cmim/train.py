"""Train a segmentation network from a few labelled and many unlabelled images.

    python -m cmim.train                                              # the built-in `shapes` set
    python -m cmim.train FOLDER                                       # your images, as `python -m cmim.check FOLDER` finds
    python -m cmim.train configs/camvid.yaml --data.root CamVid       # a config file and overrides
    python -m cmim.train --method.preset supervised --output runs/s   # another method, a folder of your choice
    python -m cmim.train --output runs/s --resume                     # continue after an interruption
    python -m cmim.train configs/camvid.yaml --data.root CamVid --dry-run    # what it would do, how long, in how much memory

    torchrun --nproc-per-node 8 -m cmim.train CONFIG ...              # the GPUs of one machine
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m cmim.train CONFIG ...
                                                                      # on both machines; HOST is one of them
    srun --ntasks-per-node 1 torchrun --nnodes $SLURM_NNODES ...      # the same under Slurm

Batch sizes count the images of all processes together, so the result does not depend on the number of processes, which must
divide the batch sizes. Every setting of cmim/settings/ can be overridden: --section.key VALUE. The run folder gets
config.yaml, labelled.txt, metrics.jsonl, result.json, report.html, checkpoints/, pictures/ and TensorBoard's files.
"""

from cmim import early

if __name__ == "__main__":
    early.begin("train", __doc__)

import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from cmim import distributed
from cmim.check import for_training
from cmim.command_line import parser_of
from cmim.config import (
    check_background,
    check_class_weights,
    check_counts,
    default_config_path,
    load_config,
    without_effect,
)
from cmim.data import load_splits
from cmim.engine.device import choose_device, environment
from cmim.engine.dry_run import dry_run, scratch, untrained
from cmim.engine.logging import console
from cmim.engine.records import note_start
from cmim.engine.run import Run, default_folder, locked, open_run, start_run, take_over
from cmim.engine.start import build_objective, check_parts, describe, open_files, settle, settle_class_weights
from cmim.engine.state import names_of
from cmim.engine.trainer import Trainer
from cmim.errors import UserError, run_command


def main(arguments: Sequence[str]) -> Path:
    """Train; returns the run folder, which a dry run does not make."""
    given, overrides = parser_of("train", __doc__).parse(arguments)
    if given.resume and given.output is None:
        raise UserError("--resume needs --output RUN")
    if given.resume and given.dry_run:
        raise UserError("--dry-run tells about a new run; leave --resume out")
    console.quiet = distributed.world().rank > 0
    config_path = default_config_path() if given.config is None else given.config
    if given.resume and (given.config is None or Path(given.config).is_dir()) and Run(given.output).config.exists():
        config_path = Run(given.output).config
    suggested = for_training(Path(config_path)) if Path(config_path).is_dir() else None
    config = suggested.config(overrides) if suggested is not None else load_config(config_path, overrides)
    earlier = Run(given.output) if given.resume else None
    continues = earlier is not None and earlier.config.exists() and earlier.has_results()
    if continues:
        config = take_over(config, load_config(earlier.config))
    check_parts(config)
    lists = [path if continues and path.exists() else None for path in ((earlier.labelled, earlier.val) if earlier else ())]
    splits = load_splits(config.data, *lists)
    check_background(config, len(splits.class_names))
    check_class_weights(config, len(splits.class_names))
    check_counts(config, len(splits.labelled), len(splits.unlabelled), distributed.world().size)
    idle = [f"--{key} has no effect with the preset {config.method.preset}" for key in without_effect(config, overrides)]
    device = choose_device(config.train.device)
    folder = given.output or default_folder(os.path.abspath(config_path))
    run = open_run(folder, config, given.resume)
    if given.dry_run:
        config, splits, notes = settle(config, splits)
        describe(config, splits, run, [*notes, *idle])
        with scratch(), distributed.process_group(device):
            objective = build_objective(untrained(config), len(splits.class_names), run)
            trainer = Trainer(config, splits, Run(os.devnull), objective, device)
            dry_run(config, splits, run, objective, trainer.optimizer, trainer.time_steps, device)
        return run.folder
    with locked(run) if distributed.world().rank == 0 else nullcontext():
        open_run(folder, config, given.resume)  # again, because another process may have used the folder until now
        notes = []
        if not continues:
            config, splits, notes = settle(config, splits)
        notes = describe(config, splits, run, [*notes, *idle])
        weights = None
        if distributed.world().rank == 0:  # the other processes wait for this one, or end with it
            notes += [*(suggested.found.notes if suggested is not None else ()), *open_files(config, splits)]
            weights = settle_class_weights(config, splits, run if continues else None)
        objective = build_objective(config, len(splits.class_names), run)
        with distributed.process_group(device):  # after all checks, so that no process waits for one that failed them
            run = Run(distributed.from_rank0(str(run.folder)))
            trainer = Trainer(config, splits, run, objective, device)
            weights = distributed.from_rank0(weights)
            if weights is not None:
                objective.set_class_weights(list(weights.values()))
            if distributed.rank() == 0:
                drawn = None if isinstance(config.data.val, str) else names_of(splits.val)
                start_run(run, config, names_of(splits.labelled), drawn, weights)
                note_start(run, environment(device), notes, splits.class_names, splits.colours)
                if suggested is not None:
                    suggested.write(run.folder)
            trainer.train()
    return run.folder


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    # Silence PyTorch: it renamed the first argument in 2.14; the second is needed only before mim.start.
    warnings.filterwarnings("ignore", message=".*(broadcast_buffers|find_unused_parameters).*")
    run_command(lambda: main(sys.argv[1:]))
