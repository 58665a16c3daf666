"""Evaluate a trained run.

    python -m cmim.evaluate runs/shapes-20260101-120000                 # the last weights on data.test, as training does
    python -m cmim.evaluate RUN --checkpoint best --split val
    python -m cmim.evaluate RUN --data.root /elsewhere/CamVid           # overrides settings: data.*, train.device, ...
    python -m cmim.evaluate RUN --evaluation.mode slide --evaluation.flip true --evaluation.scales "[0.75, 1, 1.25]"
    torchrun --nproc-per-node 8 -m cmim.evaluate RUN

Prints the IoU of every class, the mean IoU, the mean accuracy and the pixel accuracy, at the original resolution.
"""

from cmim import early

if __name__ == "__main__":
    early.begin("evaluate", __doc__)

import sys
from collections.abc import Sequence

from cmim import distributed
from cmim.command_line import parser_of
from cmim.data import load_held_out
from cmim.engine.device import choose_device, choose_precision
from cmim.engine.evaluation import evaluate
from cmim.engine.logging import console, print_table
from cmim.engine.run import load_trained, with_data
from cmim.errors import UserError, run_command


def main(arguments: Sequence[str]) -> None:
    given, overrides = parser_of("evaluate", __doc__).parse(arguments)
    console.quiet = distributed.world().rank > 0
    trained = load_trained(given.run, given.checkpoint, overrides)
    config, data = trained.config, trained.config.data
    if data.format == "folder" and data.classes is None and not (data.root / "classes.txt").exists():
        config = with_data(config, classes=trained.class_names)  # use the class names of the run
    split = given.split or "test"
    image_set, class_names = load_held_out(config.data, split)
    if image_set is None and given.split is None:
        split = "val"
        image_set, class_names = load_held_out(config.data, split)
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
    print_table(result.scores, trained.class_names, f"{given.run}, {given.checkpoint}, step {trained.step}, {split}")


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
