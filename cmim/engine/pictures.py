"""Pictures of a training run, and overlays of predictions."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cmim.data.augmentation import resize
from cmim.data.datasets import IGNORED, ImageSet
from cmim.engine.inference import probabilities
from cmim.method import masking
from cmim.method.objective import Objective
from cmim.randomness import torch_generator
from cmim.settings import Config
from cmim_kernels import patch_labels, random_mask

HATCH = (96, 224)  # greys of the hatching where there is no class; colours of classes may equal them, but are never hatched
TILE = 192  # side of a tile in pixels


@torch.no_grad()
def save_picture(
    path: Path,
    objective: Objective,
    image_set: ImageSet,
    config: Config,
    class_names: Sequence[str],
    colours: np.ndarray,
    device: torch.device,
    rows: int = 6,
) -> None:
    """A grid of evenly spaced images of an ImageSet: image, masked image, class-wise reconstruction, pseudo-label,
    confidence, prediction, truth. The pseudo-label is the prediction where it is confident. Images with more than three
    channels are shown with the first three; those with one or two with the first, in grey."""
    objective.eval()
    chosen = np.linspace(0, len(image_set) - 1, min(rows, len(image_set))).astype(int)
    pairs = [_square(image_set.image(i), image_set.label(i), config.data.crop) for i in chosen]
    images = torch.stack([image for image, _ in pairs]).to(device)
    truth = torch.stack([label for _, label in pairs])
    sizes = [tuple(label.shape) for label in truth]
    best = [p.max(0) for p in probabilities(objective.evaluated(), images, sizes, config)]
    confidence, prediction = (torch.stack(parts) for parts in zip(*best, strict=True))
    tau = config.mim.tau if config.preset.masked else config.method.tau
    pseudo = torch.where(confidence >= tau, prediction, IGNORED)
    columns = {"image": [to_array(image) for image in images]}
    if config.preset.masked:
        columns |= _masked_columns(objective, images, pseudo, chosen, config)
    columns |= {
        "pseudo-label": [colourise(p, colours) for p in pseudo],
        "confidence": [np.repeat((c.cpu().numpy() * 255).astype(np.uint8)[:, :, None], 3, axis=2) for c in confidence],
        "prediction": [colourise(p, colours) for p in prediction],
        "truth": [colourise(t, colours) for t in truth],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(columns, class_names, colours).save(path)


def _square(image, label, side):
    """The central square of an image (H, W, C) and of its label (H, W), uint8 arrays, resized to side S: (C, S, S) and (S,
    S) uint8 tensors."""
    height, width = label.shape
    half = min(height, width) / 2
    box = (width / 2 - half, height / 2 - half, width / 2 + half, height / 2 + half)
    pixels = np.array(resize(image, (side, side), box))
    classes = np.array(Image.fromarray(label).resize((side, side), Image.NEAREST, box))
    return torch.from_numpy(pixels).permute(2, 0, 1), torch.from_numpy(classes)


def _masked_columns(objective, images, pseudo, chosen, config):
    """The masked image and, if the preset has L_pix, its reconstruction: visible tokens unchanged, hidden tokens as decoded
    from their own class, and still masked where the class is unknown or has no visible token in the image."""
    stride, net = objective.stride, objective.net
    height, width = images.shape[-2] // stride, images.shape[-1] // stride
    masked = [
        random_mask(1, height, width, config.mask.ratio, block=config.mask.block // stride,
                    generator=torch_generator(config.seed, int(i), "picture"))
        for i in chosen
    ]  # fmt: skip
    masked = torch.cat(masked).to(images.device)
    tokens = patch_labels(pseudo, stride, objective.num_classes, min_share=config.reconstruction.min_share)
    seen = objective.apply_mask(images, pseudo, masked)
    columns = {"masked": [to_array(image) for image in _denormalise(seen, net)]}
    if "pix" not in config.preset.masked:
        return columns
    result = objective.reconstruct(objective.masked_pass(seen).tokens, tokens, masked)
    patches = result.prediction.float()
    if config.reconstruction.normalize:
        patches = _undo_patch_normalisation(patches, net.normalise(images), stride)
    patches = patches.view(len(images), height, width, stride, stride, images.shape[1])
    decoded = patches.permute(0, 5, 1, 3, 2, 4).reshape(images.shape)
    known = masking.expand(result.known.view_as(masked), stride)[:, None]
    hidden = masking.expand(masked, stride)[:, None]
    both = _denormalise(torch.where(hidden & known, decoded, seen), net)
    return columns | {"reconstruction": [to_array(image) for image in both]}


def _denormalise(images, net):
    return ((images * net.std + net.mean) * 255).clamp(0, 255)


def _undo_patch_normalisation(patches, images, stride):
    """Give normalised patches the mean and standard deviation of the true patches, as is usual in such pictures."""
    target = F.unfold(images, stride, stride=stride).transpose(1, 2)  # entries (channel, row, column)
    return patches * (target.var(-1, keepdim=True) + 1e-6).sqrt() + target.mean(-1, keepdim=True)


def to_array(image: Tensor) -> np.ndarray:
    """(C, H, W) with values 0..255 to (H, W, 3) uint8."""
    return rgb(image.round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def rgb(image: np.ndarray) -> np.ndarray:
    """(H, W, C) to (H, W, 3): the first three channels, or the first one in grey."""
    return image[:, :, :3] if image.shape[2] >= 3 else image[:, :, :1].repeat(3, axis=2)


def colourise(classes: Tensor | np.ndarray, colours: np.ndarray) -> np.ndarray:
    """(H, W) class ids to (H, W, 3) uint8; hatched where there is no class."""
    classes = torch.as_tensor(classes).cpu().numpy().astype(np.uint8)
    table = np.zeros((256, 3), np.uint8)
    table[: len(colours)] = colours
    height, width = classes.shape
    period = max(4, min(height, width) // 12)
    stripes = (np.add.outer(np.arange(height), np.arange(width)) % period < period / 2).astype(int)
    return np.where((classes >= len(colours))[..., None], np.array(HATCH, np.uint8)[stripes][..., None], table[classes])


def overlay(
    image: np.ndarray, classes: np.ndarray, colours: np.ndarray, opacity: float = 0.5, clear: int | None = None
) -> Image.Image:
    """An image (H, W, C) uint8 with its classes (H, W) drawn over it, except the class `clear`, as a PIL image."""
    shown = rgb(image)
    mixed = (shown * np.float32(1 - opacity) + colourise(classes, colours) * np.float32(opacity)).round().astype(np.uint8)
    return Image.fromarray(mixed if clear is None else np.where((classes == clear)[..., None], shown, mixed))


def with_legend(image: Image.Image, class_names: Sequence[str], colours: np.ndarray, present: Sequence[int]) -> Image.Image:
    """An image with the names and colours of the classes `present` below it, larger below an image of several megapixels."""
    width, scale = max(image.width, 154), max(1, image.width // 1000)
    per_line, line = max(1, width // (150 * scale)), 24 * scale
    sheet = Image.new("RGB", (width, image.height + 4 + -(-len(present) // per_line) * line), "white")
    sheet.paste(image, (0, 0))
    _legend(sheet, image.height, per_line, line, [(class_names[k], colours[k]) for k in present], scale)
    return sheet


def _legend(sheet, top, per_line, line, entries, scale=1):
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(16 * scale)
    for k, (name, colour) in enumerate(entries):
        x, y = (k % per_line * 150 + 4) * scale, top + k // per_line * line
        box = (x, y + 3 * scale, x + 16 * scale, y + 19 * scale)
        draw.rectangle(box, fill=tuple(int(c) for c in colour), outline="black")
        draw.text((x + 22 * scale, y + 2 * scale), name[:15], fill="black", font=font)


def grid(columns: dict[str, list[np.ndarray]], class_names: Sequence[str], colours: np.ndarray) -> Image.Image:
    """One row per image, one titled column per entry of `columns`, and a legend of the classes."""
    font = ImageFont.load_default(16)
    rows, gap, head, line = len(next(iter(columns.values()))), 4, 26, 24
    per_line = max(1, len(columns) * (TILE + gap) // 150)
    legend = -(-len(class_names) // per_line) * line
    size = (len(columns) * (TILE + gap), head + rows * (TILE + gap) + legend + line + gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for x, (title, tiles) in enumerate(columns.items()):
        draw.text((x * (TILE + gap) + gap, 4), title, fill="black", font=font)
        for y, tile in enumerate(tiles):
            sheet.paste(
                Image.fromarray(tile).resize((TILE, TILE), Image.NEAREST), (x * (TILE + gap), head + y * (TILE + gap))
            )
    top = head + rows * (TILE + gap)
    _legend(sheet, top, per_line, line, list(zip(class_names, colours, strict=False)))
    hatched = Image.fromarray(colourise(np.full((16, 16), IGNORED), colours))
    sheet.paste(hatched, (gap, top + legend + 4))
    said = "no class, or not confident"
    if "masked" in columns:
        said += "; plain blocks of the masked image (brown, black or the learned colour) are hidden"
    draw.text((gap + 22, top + legend + 2), said, fill="black", font=font)
    return sheet
