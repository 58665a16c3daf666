"""Write files of a trained network that run without cmim: ONNX, torch.export, safetensors.

    python -m cmim.export runs/shapes-20260101-120000                  # into RUN/export/
    python -m cmim.export RUN --checkpoint best --output DIR --formats onnx --argmax

model.onnx and model.pt2 take images (batch, channels, height, width), float32 with values from 0 to 255, normalise them,
and return logits (batch, classes, height, width) at the resolution of the images; with --argmax the classes, (batch,
height, width) uint8. Batch, height and width may be any; where a network does not allow that, the command says which.
model.safetensors holds the weights. Class names, colours, normalisation, size multiple, scores and settings are in
model.json, and inside each file; README.md is a model card for a hub. The reconstruction decoder is in none of them.

Each file is read again and compared with the network on images of several sizes before it takes its name. `evaluate` and
`predict` take such a file in place of a run. ONNX needs more packages: pip install 'cmim[export]'. Of the settings only
evaluation.weights has an effect: --evaluation.weights student.
"""

from cmim import early

if __name__ == "__main__":
    early.begin("export", __doc__)

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from cmim.command_line import parser_of
from cmim.config import overridden
from cmim.engine.card import is_own, make_card
from cmim.engine.export import FORMATS, Exporter, describe, require
from cmim.engine.exported import is_exported
from cmim.engine.logging import console
from cmim.engine.records import scores_of
from cmim.engine.run import Run, write_text
from cmim.engine.trained import load_trained
from cmim.errors import UserError, run_command
from cmim.settings import Config


def main(arguments: Sequence[str]) -> Path:
    """Export; returns the folder of the files."""
    given, overrides = parser_of("export", __doc__).parse(arguments)
    if is_exported(given.run):
        raise UserError(f"{given.run} is an exported file already; give the run folder")
    for key, _ in overridden(overrides):
        if key != "evaluation.weights":
            raise UserError(f"--{key} has no effect on an export; leave it out")
    formats = list(dict.fromkeys(given.formats))
    require(formats)
    if given.argmax and formats == ["safetensors"]:
        raise UserError("--argmax has no effect on weights alone; leave it out, or add pt2 or onnx to --formats")
    run, folder = Run(given.run), given.output or Run(given.run).export
    trained = load_trained(given.run, given.checkpoint, overrides)
    refuse_foreign(folder, formats)
    about = describe(trained, given.checkpoint, scores_of(run, trained.step))
    exporter, written = Exporter(trained, about, folder, given.argmax), []
    for number, name in enumerate(formats, 1):
        console.print(f"{number}/{len(formats)} model.{name}" + ": takes about a minute" * (name != "safetensors"))
        file = exporter.write(name)
        sizes = ", ".join("x".join(map(str, size)) for size in file.sizes)
        console.print(
            f"    {file.path.stat().st_size / 2**20:.1f} MiB; on images of {sizes}: largest difference "
            f"{file.difference:.1e}, {file.equal:.3%} of the pixels have the same class"
        )
        fixed = [f"{n} {what}" for n, what in zip(file.shape, ("images", "", "rows", "columns"), strict=True) if what]
        fixed = [text for text, n in zip(fixed, (file.shape[0], *file.shape[2:]), strict=True) if isinstance(n, int)]
        if fixed:
            console.print(f"note: {file.path.name} takes {', '.join(fixed)} only: the network does not allow other sizes")
        written.append(file)
    about = written[-1].about
    write_text(folder / "model.json", json.dumps(about, indent=1) + "\n")
    write_text(folder / "README.md", make_card(run, Config.model_validate(about["config"]), about, written))
    console.print(f"{folder}: {', '.join(file.path.name for file in written)}, model.json, README.md")
    return folder


def refuse_foreign(folder: Path, formats: Sequence[str]) -> None:
    """Raise a UserError if files would be overwritten that cmim.export did not write, or a card that was changed."""
    card = folder / "README.md"
    if card.exists() and not is_own(card):
        raise UserError(f"{card} was changed, or is not written by cmim.export: give another --output, or move it away")
    files = [path for name in FORMATS if name in formats and (path := folder / f"model.{name}").exists()]
    files += [path for path in (folder / "model.json",) if path.exists()]
    if files and not card.exists():
        raise UserError(
            f"{files[0]} would be overwritten, but is not of an export here (there is no README.md): give another --output"
        )


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
