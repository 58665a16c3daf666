"""Evaluate a trained run.

    python -m cmim.evaluate runs/shapes-20260101-120000                 # the last weights on data.test, as training does
    python -m cmim.evaluate RUN --checkpoint best --split val
    python -m cmim.evaluate RUN --data.root /elsewhere/CamVid           # overrides settings: data.*, train.device, ...
    python -m cmim.evaluate RUN --evaluation.mode slide --evaluation.flip true --evaluation.scales "[0.75, 1, 1.25]"
    python -m cmim.evaluate RUN --evaluation.table "[iou, dice, precision, recall, image_miou]"
    python -m cmim.evaluate model.onnx --data.root CamVid               # or .pt2, .safetensors: written by cmim.export
    torchrun --nproc-per-node 8 -m cmim.evaluate RUN

Prints the IoU of every class, the mean IoU, the mean accuracy and the pixel accuracy, at the original resolution.
"""

from cmim import early

if __name__ == "__main__":
    early.begin("evaluate", __doc__)

import sys
from collections.abc import Sequence
from pathlib import Path

from cmim import distributed
from cmim.command_line import parser_of
from cmim.config import load_config
from cmim.data import load_held_out
from cmim.engine.device import choose_device, choose_precision
from cmim.engine.evaluation import evaluate
from cmim.engine.exported import is_exported, load_model
from cmim.engine.logging import console, print_table
from cmim.engine.run import Run, with_data
from cmim.errors import UserError, run_command
from cmim.settings import DataSettings


def main(arguments: Sequence[str]) -> None:
    given, overrides = parser_of("evaluate", __doc__).parse(arguments)
    console.quiet = distributed.world().rank > 0
    trained = load_model(given.run, given.checkpoint, overrides, data=True)
    config, data = trained.config, trained.config.data
    if data.format == "folder" and data.classes is None and not (data.root / "classes.txt").exists():
        config = with_data(config, classes=trained.class_names)  # use the class names of the run
    split = given.split or "test"
    val = drawn_val(given.run, config.data, split)
    image_set, class_names = load_held_out(config.data, split, val)
    if image_set is None and given.split is None:
        split = "val"
        image_set, class_names = load_held_out(config.data, split, drawn_val(given.run, config.data, split))
    if list(class_names) != trained.class_names:
        raise UserError(f"the data's classes {list(class_names)} are not those of the run, {trained.class_names}")
    if image_set is None:
        raise UserError("there are no test images; use --split val")
    device = choose_device(config.train.device)
    dtype = choose_precision(config.train.precision, device)
    with distributed.process_group(device):
        result = evaluate(trained.net.to(device), image_set, config, len(trained.class_names), device, dtype, split)
    if all(iou is None for iou in result.scores.iou):
        raise UserError(f"not one pixel of the {split} masks has a class, so there is nothing to measure; give other masks")
    which = "exported" if is_exported(given.run) else given.checkpoint or "last"
    title = f"{given.run}, {which}, step {trained.step}, {split}"
    print_table(result.scores, trained.class_names, title, config.evaluation.table)


def drawn_val(folder: str, data: DataSettings, split: str) -> Path | None:
    """The list of the run's val images; None where `data.val` names them.

    Raises:
        UserError: the list is gone, or other val images are to be drawn, which would be images of the training.
    """
    if isinstance(data.val, str):
        return None
    if is_exported(folder):  # the val images of the run are not known here
        if split == "val":
            raise UserError(
                f"the val images of the run were drawn, and {folder} does not list them: give --data.val RUN/val.txt"
            )
        return None
    run = Run(folder)
    own = load_config(run.config).data.val
    if data.val != own:
        raise UserError(f"--data.val {data.val} would draw images that the run was trained on; leave it away")
    if not run.val.is_file():
        raise UserError(f"{run.val} is gone, which lists the val images of the run; put it back, or give --data.val a list")
    return run.val


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
