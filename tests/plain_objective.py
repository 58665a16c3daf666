"""The training objective once more, straight from its formulas: loops over images, tokens and classes, logits at full
resolution, one decoder pass per class. And a tiny network and batch to compare it on."""

import torch
import torch.nn.functional as F
from torch import nn

from cmim.config import config_from
from cmim.method import objective as objective_module
from cmim.method.masking import isolate_class, per_class_mask
from cmim.method.perturbations import drop_channels, drop_complementary
from cmim.models.build import token_stride
from cmim.models.geometry import Geometry
from cmim.models.reconstruction import decode_per_class
from cmim.models.segmenter import Segmenter
from cmim_kernels import random_mask

CLASSES, CROP, BLOCK = 3, 32, 8
BASES = {
    "supervised": {"sup": 1},
    "fixmatch": {"sup": 1 / 2, "strong": 1 / 2},
    "fixmatch_fp": {"sup": 1 / 2, "strong": 1 / 4, "fp": 1 / 4},
    "unimatch": {"sup": 1 / 2, "strong1": 1 / 8, "strong2": 1 / 8, "fp": 1 / 4},
    "unimatch_v2": {"sup": 1 / 2, "strong1": 1 / 4, "strong2": 1 / 4},
}
"""The weight of each term without masks."""
BASE_TERMS = set().union(*BASES.values())
MASKED = {"semantic": {"sem"}, "mim": {"pix", "feat", "sem"}, "cmim": {"pix", "feat", "sem"}}
"""The terms of the masked views."""
CLASS_WISE = {"cmim"}
UNLABELLED_SEM = {"sem_weak", "sem_strong"}
OHEM = {"threshold": 0.05, "min_kept": 300}
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


class TinyEncoder(nn.Module):
    """Maps at strides 4 and 8."""

    def __init__(self):
        super().__init__()
        self.low = nn.Sequential(nn.Conv2d(3, 6, 4, stride=4), nn.BatchNorm2d(6), nn.GELU())
        self.deep = nn.Sequential(nn.Conv2d(6, 10, 3, stride=2, padding=1), nn.BatchNorm2d(10), nn.GELU())

    def forward(self, images):
        low = self.low(images)
        return low, self.deep(low)


class TinyDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.fuse = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU())

    def forward(self, maps):
        low, deep = maps
        return self.fuse(torch.cat([low, F.interpolate(deep, size=low.shape[-2:])], dim=1))


def tiny_segmenter(settings, num_classes, mean, std):
    torch.manual_seed(0)
    net = Segmenter(
        TinyEncoder(), TinyDecoder(), num_classes, mean=mean, std=std,
        geometry=Geometry(4, 8, 1, 4), feature_channels=8, encoder_channels=10,
        fine_map=0, fine_channels=6,
    )  # fmt: skip
    net.head.weight.data *= 4  # confidences of many sizes
    return net


def make_config(preset="cmim", **options):
    """Settings of the tiny network; options as section__key=value."""
    values = {
        "data": {"format": "shapes", "crop": CROP},
        "model": {"output_stride": 8},
        "method": {"preset": preset, "tau": 0.6},
        "mim": {"tau": 0.5},
        "mask": {"block": BLOCK, "ratio": 0.5},
        "reconstruction": {"width": 8, "depth": 1, "kernel_size": 3, "num_heads": 2},
        "centroids": {"min_tokens": 2},
    }
    for name, value in options.items():
        section, key = name.split("__")
        values.setdefault(section, {})[key] = value
    return config_from(values, "test")


def make_objective(monkeypatch, config):
    monkeypatch.setattr(objective_module, "build_segmenter", tiny_segmenter)
    return objective_module.Objective(config, CLASSES)


def make_batch(config, seed=0, labelled=2, unlabelled=2):
    """What `TrainBatches` gives, drawn at random: ignored labels, padding, one view with a box and one without."""
    g = torch.Generator().manual_seed(seed)

    def images(count):
        coarse = torch.rand(count, 3, 4, 4, generator=g) * 200
        fine = torch.rand(count, 3, CROP, CROP, generator=g) * 55
        return (F.interpolate(coarse, size=CROP) + fine).to(torch.uint8)

    def keys(count):
        return torch.randint(0, 2**62, (count,), generator=g)

    label = torch.randint(0, CLASSES + 1, (labelled, 1, 5, 5), generator=g).float()
    label = F.interpolate(label, size=CROP)[:, 0].to(torch.uint8)
    batch = {
        "labelled_image": images(labelled),
        "label": torch.where(label == CLASSES, 255, label).to(torch.uint8),
    }
    base = base_of(config)
    if base != "supervised":
        batch |= unlabelled_batch(2 if "strong2" in BASES[base] else 1, unlabelled, images, keys)
    if masked_of(config):
        for name, count in (("labelled", labelled), ("weak", unlabelled), ("strong", unlabelled)):
            side = CROP // config.mask.block
            batch[f"{name}_mask"] = random_mask(count, side, side, config.mask.ratio, generator=g)
            batch[f"{name}_mask_key"], batch[f"{name}_class_key"] = keys(count), keys(count)
    return batch


def base_of(config):
    """The preset on which the masked terms stand, or the preset itself."""
    base = config.preset.base or config.method.preset
    assert base in BASES, f"tests/plain_objective.py: BASES has no row for the preset {base}"
    return base


def masked_of(config):
    """The terms of the masked views that the preset has."""
    preset = config.method.preset
    assert preset in (*MASKED, *BASES), f"tests/plain_objective.py: MASKED has no row for the preset {preset}"
    return {term for term in MASKED.get(preset, ()) if getattr(config.mim, f"w_{term}") > 0}


def unlabelled_batch(views, unlabelled, images, keys):
    valid = torch.ones(unlabelled, CROP, CROP, dtype=torch.bool)
    valid[0, 25:] = False
    box = torch.zeros(views, unlabelled, 4, dtype=torch.int64)
    box[0, 0] = torch.tensor([3, 6, 29, 27])
    box[-1, 1] = torch.tensor([10, 0, 32, 9])
    return {
        "weak_image": images(unlabelled),
        "valid": valid,
        "channel_key": keys(unlabelled),
        "strong_image": torch.stack([images(unlabelled) for _ in range(views)]),
        "box": box,
    }


def ramp():
    return torch.tensor(0.3)


def plain_terms(objective, batch, ramp):
    """{name: weighted term} of an `Objective`'s network, reconstruction decoder, fill colour and teacher."""
    config = objective.config
    terms, weak, strong, prior = base_terms(objective, batch)
    weights = BASES[base_of(config)]
    if config.method.dice > 0:
        weights = weights | {"dice": config.method.dice * weights["sup"]}
    terms = {name: weight * terms[name] for name, weight in weights.items()}
    terms = {name: term * (1 if name in ("sup", "dice") else config.method.w_unlabelled) for name, term in terms.items()}
    if not masked_of(config) or ramp is None:
        return terms
    return terms | {name: ramp * term for name, term in masked_terms(objective, batch, weak, strong, prior).items()}


def base_terms(objective, batch):
    """Unweighted; the weak view's labels, the first strong view with its labels, and what is added to unlabelled logits."""
    config, net = objective.config, objective.net
    base, tau = base_of(config), config.method.tau
    x, y = batch["labelled_image"], batch["label"]
    if base == "supervised":
        return labelled_terms(net(normalise(x)), y, objective), None, None, 0

    u_w = batch["weak_image"]
    taught = config.teacher.kind == "ema" or objective.judge is not None
    clean = net.encode(normalise(x if taught and base == "unimatch_v2" else torch.cat([x, u_w])))
    both = clean
    if "fp" in BASES[base]:
        dropped = drop_channels([m[len(x) :] for m in clean], batch["channel_key"], config.method.dropout)
        both = [torch.cat(pair) for pair in zip(clean, dropped, strict=True)]
    logits = net.classify(net.decode(both))
    logits_x, logits_w, logits_fp = logits[: len(x)], logits[len(x) : len(x) + len(u_w)], logits[len(x) + len(u_w) :]
    judge = logits_w
    if taught:
        judge = (objective.judge or objective.teacher).eval()(normalise(u_w))
    weak = pseudo_labels(judge.detach(), y, batch["valid"], config.method)
    side, balance, prior = judge.shape[-1], None, 0
    if config.method.class_balance:
        balance = (shares(y, side) / shares(sure(weak, tau), side)).clamp(0.1, 10)
    if config.method.logit_adjustment:
        prior = torch.stack([torch.log(shares(sure(weak, tau), side)[k] / shares(y, side)[k]) for k in range(CLASSES)])
        prior = prior[None, :, None, None]

    strong = []
    for images, boxes in zip(batch["strong_image"], batch["box"], strict=True):
        before, after = (images, *weak), tuple(t.clone() for t in (images, *weak))
        for i, (top, left, bottom, right) in enumerate(boxes.tolist()):
            for old, new in zip(before, after, strict=True):
                new[i][..., top:bottom, left:right] = old[i ^ 1][..., top:bottom, left:right]
        strong.append(after)
    maps = net.encode(normalise(torch.cat([view[0] for view in strong])))
    if base == "unimatch_v2" and config.method.complementary:
        maps = drop_complementary(maps, batch["channel_key"])
    logits_s = net.classify(net.decode(maps)).split(len(u_w))

    terms = labelled_terms(logits_x, y, objective)
    for i, (z, view) in enumerate(zip(logits_s, strong, strict=True)):
        terms[f"strong{i + 1}" if len(strong) > 1 else "strong"] = consistency(z + prior, view[1:], tau, balance)
    if "fp" in BASES[base]:
        terms["fp"] = consistency(logits_fp + prior, weak, tau, balance)
    return terms, weak, strong[0], prior


def pseudo_labels(logits, y, valid, method):
    """Label, confidence and validity of each pixel in the first step, before there are statistics of earlier ones."""
    nearest = torch.arange(logits.shape[-1]) * CROP // logits.shape[-1]
    y, at_logits = (x[:, nearest][:, :, nearest] for x in (y, valid))
    if method.align:
        known = torch.tensor([(y == k).sum() + 1.0 for k in range(CLASSES)])
        guessed = torch.stack([logits.softmax(1)[:, k][at_logits].sum() + 1 for k in range(CLASSES)])
        logits = logits + (known / known.sum() / (guessed / guessed.sum())).log().view(1, -1, 1, 1)
    confidence, label = upsample(logits).softmax(1).max(1)
    if method.class_thresholds:
        highest, own = logits.softmax(1).max(1)
        means = [highest[at_logits & (own == k)] for k in range(CLASSES)]
        means = torch.stack([values.mean() if len(values) else torch.tensor(torch.nan) for values in means])
        relative = (means / means.nan_to_num().max()).nan_to_num(1.0)
        confidence = confidence / relative[label]
    return label, confidence, valid


def masked_terms(objective, batch, weak, strong, prior):
    config, net = objective.config, objective.net
    stride, settings = token_stride(config), config.reconstruction
    y = batch["label"].long()
    views = {"labelled": (batch["labelled_image"], y, y != 255)}
    if weak is not None:
        views["weak"] = (batch["weak_image"], sure(weak, config.mim.tau), weak[2])
        views["strong"] = (strong[0], sure(strong[1:], config.mim.tau), strong[3])
    chosen = [views[name] for name in config.mim.views]
    image, classes, valid = (torch.cat(parts) for parts in zip(*chosen, strict=True))
    entry = lambda name: torch.cat([batch[f"{view}_{name}"] for view in config.mim.views])  # noqa: E731
    block = config.mask.block // stride
    masked = entry("mask").repeat_interleave(block, 1).repeat_interleave(block, 2)
    isolate = config.mim.isolate == "input"
    if isolate:
        classes = isolate_class(classes, entry("class_key"), CLASSES)
    token_classes = vote(classes, stride, settings.min_share)
    if config.mask.per_class:
        masked = per_class_mask(token_classes, entry("mask_key"), CLASSES, config.mask.ratio, block)

    colour = {"mean": torch.zeros(3, 1, 1), "black": -MEAN / STD}.get(config.mask.fill)
    if colour is None:
        colour = objective.fill.colour.view(3, 1, 1)
    images = normalise(image)
    seen = []
    for i in range(len(image)):
        hidden = masked[i].repeat_interleave(stride, 0).repeat_interleave(stride, 1)
        if isolate:
            hidden = hidden | (classes[i] == 255)
        seen.append(torch.where(hidden, colour, images[i]))

    layers = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [(m.running_mean.clone(), m.running_var.clone(), m.num_batches_tracked.clone()) for m in layers]
    for layer in layers:
        layer.train(config.mim.batch_norm != "running")
    maps = net.encode(torch.stack(seen))
    feature = net.decode(maps)
    logits = net.classify(feature)
    for layer, (mean, variance, count) in zip(layers, before, strict=True):
        layer.train()
        if config.mim.batch_norm == "batch":
            layer.running_mean, layer.running_var, layer.num_batches_tracked = mean, variance, count

    fused = None
    if "pixel" in (settings.tokens, config.centroids.features):
        parts = objective.pixel_tokens
        deepest = F.interpolate(
            F.conv2d(maps[-1], parts.deep.weight[:, :, None, None]), size=maps[0].shape[-2:], mode="bilinear"
        )
        fused = F.conv2d(maps[0], parts.fine.weight[:, :, None, None], parts.fine.bias) + deepest
        mean, variance = fused.mean(1, keepdim=True), fused.var(1, correction=0, keepdim=True)
        scale, shift = (p.view(1, -1, 1, 1) for p in (parts.norm.weight, parts.norm.bias))
        fused = F.gelu((fused - mean) / (variance + 1e-5).sqrt() * scale + shift)
    named = {"decoder": feature, "encoder": maps[-1], "pixel": fused}
    compared = config.centroids.features or ("decoder" if settings.tokens == "pixel" else settings.tokens)
    tokens, features = named[settings.tokens], named[compared]
    terms, wanted = {}, masked_of(config)
    groups = token_classes if config.method.preset in CLASS_WISE else token_classes.clamp(max=0)
    if "pix" in wanted:
        reconstructed = decode_per_class(objective.reconstruction, tokens, groups, masked)
        pixels = pixel_term(reconstructed, images, masked, token_classes, groups, stride, settings)
        terms["pix"] = config.mim.w_pix * pixels
    if "feat" in wanted:
        side = {"decoder": 4, "encoder": 8, "pixel": 4}[compared]
        labels, hidden = vote(classes, side, settings.min_share), masked
        if side < stride:
            hidden = masked.repeat_interleave(2, 1).repeat_interleave(2, 2)
        elif side > stride:
            quarters = masked.float().view(len(masked), CROP // 8, 2, CROP // 8, 2).mean((2, 4))
            labels, hidden = torch.where((quarters > 0) & (quarters < 1), -1, labels), quarters == 1
        labels = labels if config.method.preset in CLASS_WISE else labels.clamp(max=0)
        terms["feat"] = config.mim.w_feat * feature_term(features, hidden, labels, config.centroids)
    first = 0
    for name in config.mim.views if "sem" in wanted else ():
        part = slice(first, first + len(views[name][0]))
        share = {"labelled": 1 / 2, "weak": 1 / 4, "strong": 1 / 4}[name]
        z = logits[part] + (0 if name == "labelled" else prior)
        terms[f"sem_{name}"] = config.mim.w_sem * share * cross_entropy(z, classes[part]) / max(1, int(valid[part].sum()))
        first = part.stop
    return terms


def pixel_term(reconstructed, images, masked, token_classes, groups, p, settings):
    errors = [[] for _ in range(CLASSES)]
    columns = masked.shape[2]
    for b, row, column in masked.nonzero().tolist():
        k = token_classes[b, row, column]
        if k < 0 or not (~masked[b] & (token_classes[b] == k)).any():
            continue
        patch = images[b, :, row * p : row * p + p, column * p : column * p + p].permute(1, 2, 0).flatten()
        if settings.normalize:
            patch = (patch - patch.mean()) / (patch.var(correction=1) + 1e-6).sqrt()
        difference = reconstructed[b, row * columns + column] - patch
        error = {
            "l1": difference.abs(),
            "mse": difference**2,
            "smooth_l1": torch.where(difference.abs() < 1, difference**2 / 2, difference.abs() - 0.5),
        }[settings.distance].mean()
        errors[groups[b, row, column]].append(error)
    if settings.balance == "token":
        errors = [[error for of_class in errors for error in of_class]]
    means = [torch.stack(e).mean() for e in errors if e]
    return torch.stack(means).mean() if means else reconstructed.sum() * 0


def feature_term(tokens, masked, groups, settings):
    distances = []
    for b in range(len(tokens)):
        for k in range(CLASSES):
            own = groups[b] == k
            visible, hidden = tokens[b][:, own & ~masked[b]], tokens[b][:, own & masked[b]]
            if min(visible.shape[1], hidden.shape[1]) < settings.min_tokens:
                continue
            visible, hidden = visible.mean(1), hidden.mean(1)
            if settings.detach == "visible":
                visible = visible.detach()
            elif settings.detach == "masked":
                hidden = hidden.detach()
            cosine = (visible @ hidden) / (visible.norm() * hidden.norm())
            distances.append(1 - cosine if settings.distance == "cosine" else ((visible - hidden) ** 2).mean())
    return torch.stack(distances).mean() if distances else tokens.sum() * 0


def vote(classes, p, min_share):
    """Majority of each patch, the smaller class among equals; -1 below `min_share` of the patch."""
    result = torch.full((len(classes), CROP // p, CROP // p), -1)
    for b, row, column in torch.ones_like(result).nonzero().tolist():
        patch = classes[b, row * p : row * p + p, column * p : column * p + p]
        counts = [int((patch == k).sum()) for k in range(CLASSES)]
        if max(counts) > 0 and max(counts) >= min_share * p * p:
            result[b, row, column] = counts.index(max(counts))
    return result


def labelled_terms(logits, y, objective):
    method = objective.config.method
    return {"sup": supervised(logits, y, method.ohem, objective.class_weights), "dice": dice(logits, y)}


def supervised(logits, y, ohem, class_weights):
    y = y.long()
    known = y != 255
    if ohem is not None:
        probability = upsample(logits.detach()).softmax(1).gather(1, torch.where(known, y, 0)[:, None])[:, 0]
        ranked = sorted(probability[known].tolist())
        limit = ranked[ohem.min_kept - 1] if len(ranked) >= ohem.min_kept else 1.0
        known = known & (probability <= max(limit, ohem.threshold))
    target = torch.where(known, y, 255)
    if class_weights is not None:  # PyTorch divides by the weights of the pixels
        return F.cross_entropy(upsample(logits), target, class_weights, ignore_index=255)
    return cross_entropy(logits, target) / max(1, int(known.sum()))


def dice(logits, y):
    return soft_dice(upsample(logits).softmax(1), y)


def soft_dice(probability, y):
    """As nnU-Net defines it, one class after another."""
    losses = []
    for k in range(CLASSES):
        p = probability[:, k][y != 255]
        truth = (y == k)[y != 255].to(p.dtype)
        if truth.any():
            losses.append(1 - 2 * (p @ truth) / (p.sum() + truth.sum()))
    return torch.stack(losses).mean() if losses else probability.sum() * 0


def consistency(logits, labels, tau, balance):
    target = sure(labels, tau)
    if balance is None:
        return cross_entropy(logits, target) / max(1, int(labels[2].sum()))
    parts = [balance[k] * cross_entropy(logits, torch.where(target == k, target, 255)) for k in range(CLASSES)]
    return sum(parts) / max(1, int(labels[2].sum()))


def shares(classes, side):
    """Of each class, at every `side`-th part of a row and column, from one pixel of each on."""
    nearest = torch.arange(side) * CROP // side
    counts = torch.tensor([(classes[:, nearest][:, :, nearest] == k).sum() + 1.0 for k in range(CLASSES)])
    return counts / counts.sum()


def sure(labels, tau):
    label, confidence, valid = labels
    return torch.where(valid & (confidence >= tau), label, 255)


def cross_entropy(logits, target):
    return F.cross_entropy(upsample(logits), target, ignore_index=255, reduction="sum")


def upsample(logits):
    return F.interpolate(logits, size=(CROP, CROP), mode="bilinear", align_corners=True)


def normalise(images):
    return (images / 255.0 - MEAN) / STD
