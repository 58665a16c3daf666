"""The training objective: the network, the reconstruction decoder, all views and all losses in one module.

There are B images of H x W pixels, K classes, and tokens on a grid h x w. x are labelled images with labels y; u_w and u_s
are weak and strong views of unlabelled images; f is the segmenter, G the reconstruction decoder, M a mask; [.] is 1 where
the condition holds, else 0.

Pseudo-labels p and confidences conf come from u_w (from the student's own pass or from an EMA teacher); `valid` is false on
padding. CutMix applies the same box to u_s, p, conf and valid.

    L_sup    = sum CE(f(x), y)                         / number of labelled pixels
    L_strong = sum CE(f(u_s), p) [conf >= tau]         / number of valid pixels
    L_fp     = sum CE(f_dropout(u_w), p) [conf >= tau] / number of valid pixels

    supervised   L = L_sup
    fixmatch     L = (L_sup + L_strong) / 2
    fixmatch_fp  L = (L_sup + L_strong / 2 + L_fp / 2) / 2
    unimatch     L = (L_sup + L_strong1 / 4 + L_strong2 / 4 + L_fp / 2) / 2
    unimatch_v2  L = (L_sup + L_strong1 / 2 + L_strong2 / 2) / 2, complementary channels dropped
    semantic     L = L of fixmatch_fp + r(t) w_sem L_sem
    mim, cmim    L = L of fixmatch_fp + r(t) (w_pix L_pix + w_feat L_feat + w_sem L_sem)

Each preset is a row of `cmim.settings.PRESETS`, which holds these weights. L_strong and L_fp are also multiplied by
`method.w_unlabelled` and s(t), which grows from 0 at `method.start` to 1; before that L = L_sup with its weight.

The masked views v of x, u_w and u_s, with a class map c (y, or p where conf >= mim.tau), go through the segmenter once more
with hidden pixels filled in. F and z are the features and logits of that pass, and c_t is the majority class of each token:

    L_pix  = masked_patch_loss(G(F, c_t, M), v, M, c_t), over the hidden tokens
             of every (image, class) that has a visible token
    L_feat = distance between the hidden and the visible centroid of F,
             mean over (image, class) pairs
    L_sem  = (labelled + strong / 2 + weak / 2) / 2, each of these
             sum CE(z, c) / number of valid pixels of that view

`mim` is `cmim` with all valid tokens in one class for G, for L_feat and for the balance of classes; L_pix counts the same
tokens. Every term is S / max(1, n), where S and n are sums over the batches of all processes; a term with n = 0 is a zero
that is connected to the graph. With R processes, each one computes R S' / n from its own part S' of S, because
DistributedDataParallel takes the mean of the gradients over the processes.
"""

from copy import deepcopy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmim.checkpoint import warm_start
from cmim.data.datasets import IGNORED
from cmim.distributed import all_gather, all_reduce
from cmim.method import masking
from cmim.method.class_statistics import ClassStatistics
from cmim.method.diagnostics import coverage, gradient_norms, mean_colour_error, separation
from cmim.method.perturbations import cutmix, drop_channels, drop_complementary
from cmim.method.pseudo_labels import PseudoLabels, pseudo_labels
from cmim.models.batch_norm import batch_norm_mode
from cmim.models.build import build_segmenter, centroid_stride, token_stride
from cmim.models.pixel_tokens import PixelTokens
from cmim.models.reconstruction import build_reconstruction
from cmim.models.segmenter import Segmenter
from cmim.settings import Config
from cmim_kernels import (
    centroid_distance,
    class_centroids,
    masked_patch_loss,
    patch_labels,
    upsample_cross_entropy,
)


class Ratio(NamedTuple):
    """The vectors S and n of a term, whose value is the mean of S / n over the entries with n > 0."""

    total: Tensor
    count: Tensor

    def value(self, counts: Tensor) -> Tensor:
        """The value of the term, where `counts` is n summed over all processes."""
        return (self.total / counts.clamp(min=1)).sum() / (counts > 0).sum().clamp(min=1)


Terms = dict[str, tuple[float | Tensor, Ratio]]
"""{name: (weight, term)}."""


class Base(NamedTuple):
    """The terms without masks, and the unlabelled views that may be masked."""

    terms: Terms
    figures: dict[str, Tensor]
    features: list[Tensor]  # of each pass
    views: dict[str, tuple[Tensor, PseudoLabels]]  # weak and strong: images and their pseudo-labels


class MaskedViews(NamedTuple):
    image: Tensor  # (V, channels, H, W) uint8, not masked yet
    classes: Tensor  # (V, H, W) pixel classes, IGNORED where unknown
    valid: Tensor  # (V, H, W) bool, the pixels in the denominator of L_sem
    mask: Tensor  # (V, h, w) bool, true where a token is hidden
    token_classes: Tensor  # (V, h, w) int32, -1 where there is none
    sizes: list[int]  # number of images of each view in mim.views


class Reconstruction(NamedTuple):
    """Pixels from the tokens of the masked pass; V images, N = h w tokens."""

    groups: Tensor  # (V, N) classes for the decoder, -1 where there is none; all zero unless class-wise
    known: Tensor  # (V, N) bool: the (image, class) has a visible token, so hidden ones can be reconstructed
    prediction: Tensor  # (V, N, p p channels), G(F, c_t, M)


class MaskedPass(NamedTuple):
    """Maps of V masked images."""

    tokens: Tensor | None  # F (V, C, h, w), of reconstruction.tokens; None if L_pix is not one of the terms
    features: Tensor | None  # (V, C', h', w'), of centroids.features; None if L_feat is not one of the terms
    decoded: Tensor  # the feature map that is classified
    logits: Tensor  # z (V, K, ., .)


class Output(NamedTuple):
    loss: Tensor
    terms: dict[str, Tensor]  # weighted, so that they add up to the loss
    figures: dict[str, Tensor]  # for the log, without gradient


class Objective(nn.Module):
    """forward(batch, ramp, base_ramp=1.0, diagnostics=False, gradients=False) -> Output.

    batch: a dict of `cmim.data.batches.TrainBatches`.
    ramp: r(t), a scalar tensor; None before mim.start, when there is no masked pass.
    base_ramp: s(t), likewise; None before method.start, when L_sup is the only term.
    diagnostics: also compute the figures that take time.
    gradients: also compute the norm of the gradient of each term at the features; needs eager mode and one backward pass for
        each term.

    `ranks` is the number of processes; each of them has an equal part of the batch.
    """

    def __init__(self, config: Config, num_classes: int):
        super().__init__()
        self.ranks = 1
        self.config, self.preset, self.num_classes = config, config.preset, num_classes
        self.mean, self.std = config.data.normalisation()
        self.stride, self.centroid_stride = token_stride(config), centroid_stride(config)
        model = config.model
        if model.init_from is not None:  # the warm start overwrites the weights, so download none
            model = model.model_copy(update={"weights": "none"})
        self.net = build_segmenter(model, num_classes, self.mean, self.std)
        self.note = warm_start(self.net, config.model.init_from) if config.model.init_from is not None else None
        if config.has_teacher:
            self.teacher = deepcopy(self.net).eval().requires_grad_(False)
        if self.preset.uses_unlabelled and (config.method.align or config.method.class_thresholds):
            self.classes = ClassStatistics(num_classes)
        if self.preset.masked:
            self.fill = masking.Fill(config.mask.fill, self.mean, self.std)
        if "pixel" in self.maps_of_masked():
            self.pixel_tokens = PixelTokens(self.net.fine_channels, self.net.encoder_channels, config.reconstruction.width)
        if "pix" in self.preset.masked:
            channels = {
                "decoder": self.net.feature_channels,
                "encoder": self.net.encoder_channels,
                "pixel": config.reconstruction.width,
            }
            self.reconstruction = build_reconstruction(
                config.reconstruction,
                channels[config.reconstruction.tokens],
                self.stride,
                num_classes if self.preset.class_wise else 1,
                image_channels=len(self.mean),
            )

    def maps_of_masked(self) -> set[str]:
        """Which feature maps the masked terms use, by their names in the settings."""
        of_terms = {"pix": self.config.reconstruction.tokens, "feat": self.config.centroid_features}
        return {name for term, name in of_terms.items() if term in self.preset.masked}

    def evaluated(self) -> Segmenter:
        """The network whose weights evaluation and prediction use."""
        return self.teacher if self.config.evaluated_weights == "teacher" else self.net

    def train(self, mode: bool = True) -> "Objective":
        super().train(mode)
        if self.config.has_teacher:
            self.teacher.eval()
        return self

    @torch.no_grad()
    def update_teacher(self, step: int) -> None:
        """EMA of weights and buffers after optimiser step number `step` (from 0), decay min(1 - 1 / (step + 1), decay)."""
        decay = min(1 - 1 / (step + 1), self.config.teacher.decay)
        ours, theirs = self.teacher.state_dict().values(), self.net.state_dict().values()
        pairs = [(a, b) for a, b in zip(ours, theirs, strict=True)]
        floats = [(a, b) for a, b in pairs if a.is_floating_point()]
        torch._foreach_lerp_([a for a, _ in floats], [b for _, b in floats], 1 - decay)
        for a, b in pairs:
            if not a.is_floating_point():
                a.copy_(b)

    def forward(
        self,
        batch: dict[str, Tensor],
        ramp: Tensor | None,
        base_ramp: Tensor | float | None = 1.0,
        diagnostics: bool = False,
        gradients: bool = False,
    ) -> Output:
        begun = base_ramp is not None or not self.preset.uses_unlabelled
        if self.preset.uses_unlabelled and begun:
            terms, figures, features, views = self.base(batch, base_ramp)
        else:
            terms, figures, features, views = self.labelled_base(batch)
        if self.preset.masked and ramp is not None and begun:
            masked_terms, masked_figures, masked_features = self.masked_terms(batch, views, diagnostics)
            terms |= {name: (ramp * weight, term) for name, (weight, term) in masked_terms.items()}
            figures |= masked_figures
            features += masked_features
        return self.total_loss(terms, figures, features, gradients)

    def labelled_base(self, batch: dict[str, Tensor]) -> Base:
        """L_sup alone."""
        feature = self.net.decode(self.net.encode(self.net.normalise(batch["labelled_image"])))
        term = self.supervised(self.net.classify(feature), batch["label"])
        return Base({"sup": (self.preset.sup, term)}, {}, [feature], {})

    def base(self, batch: dict[str, Tensor], ramp: Tensor | float) -> Base:
        """L_sup, L_strong of each strong view and L_fp; `ramp` is s(t)."""
        config, net, preset = self.config, self.net, self.preset
        x, u_w, strong = batch["labelled_image"], batch["weak_image"], batch["strong_image"]

        # x and u_w share a pass; in the decoder, the clean and the perturbed features of u_w share it too.
        shared = [x, u_w] if preset.weak_pass or preset.fp or not config.has_teacher else [x]
        maps = net.encode(net.normalise(torch.cat(shared)))
        if preset.fp:
            dropped = drop_channels([m[len(x) :] for m in maps], batch["channel_key"], config.method.dropout)
            maps = [torch.cat([m, d]) for m, d in zip(maps, dropped, strict=True)]
        feature = net.decode(maps)
        parts = shared + ([u_w] if preset.fp else [])
        logits_x, *logits_w = net.classify(feature).split([len(part) for part in parts])
        if config.has_teacher:
            with torch.no_grad():
                logits = self.teacher(net.normalise(u_w))
        else:
            logits = logits_w[0]
        weak = self.pseudo_labels(logits, batch)

        # Every strong view has its own CutMix box, which is applied to image and pseudo-label.
        mixed = [cutmix(box, image, *weak) for box, image in zip(batch["box"], strong, strict=True)]
        u_s = [image for image, *_ in mixed]
        strong_labels = [PseudoLabels(*rest) for _, *rest in mixed]
        maps = net.encode(net.normalise(torch.cat(u_s)))
        if preset.complementary and config.method.complementary:
            maps = drop_complementary(maps, batch["channel_key"])
        feature_s = net.decode(maps)
        logits_s = net.classify(feature_s).split(len(u_w))

        terms: Terms = {"sup": (preset.sup, self.supervised(logits_x, batch["label"]))}
        factor = ramp * config.method.w_unlabelled
        for i, (logits, labels) in enumerate(zip(logits_s, strong_labels, strict=True)):
            name = f"strong{i + 1}" if len(u_s) > 1 else "strong"
            terms[name] = (factor * preset.strong, self.consistency(logits, labels))
        if preset.fp:
            terms["fp"] = (factor * preset.fp, self.consistency(logits_w[1], weak))
        figures = coverage(weak, config.method.tau, config.data.background)
        return Base(terms, figures, [feature, feature_s], {"weak": (u_w, weak), "strong": (u_s[0], strong_labels[0])})

    def pseudo_labels(self, logits: Tensor, batch: dict[str, Tensor]) -> PseudoLabels:
        """Those of the weak views, from their logits."""
        method, valid, logits = self.config.method, batch["valid"], logits.detach()
        if method.align:
            logits = self.classes.align(logits, valid, batch["label"], self.ranks)
        labels = pseudo_labels(logits, valid, self.net.align_corners)
        return self.classes.relative(labels, logits, self.ranks) if method.class_thresholds else labels

    def supervised(self, logits: Tensor, y: Tensor) -> Ratio:
        """L_sup. With OHEM only pixels count whose true class has a probability of at most the threshold, or of at most that
        of the min_kept-th hardest pixel of all processes if that is larger."""
        error = upsample_cross_entropy(logits, y, align_corners=self.net.align_corners)
        counted = y < self.num_classes
        if self.config.method.ohem is not None:
            settings = self.config.method.ohem
            probability = torch.where(counted, torch.exp(-error.detach()), 1).flatten()
            everywhere = probability if self.ranks == 1 else all_gather(probability, self.ranks)
            least = everywhere.kthvalue(min(settings.min_kept, everywhere.numel())).values
            counted = counted & (probability <= least.clamp(min=settings.threshold)).view_as(counted)
        return Ratio(torch.where(counted, error, 0).sum()[None], counted.sum()[None])

    def consistency(self, logits: Tensor, labels: PseudoLabels) -> Ratio:
        """L_strong and L_fp: the sum over confident pixels, divided by the number of valid pixels."""
        target = labels.classes(self.config.method.tau)
        error = upsample_cross_entropy(logits, target, align_corners=self.net.align_corners)
        return Ratio(error.sum()[None], labels.valid.sum()[None])

    def masked_terms(
        self, batch: dict[str, Tensor], views: dict[str, tuple[Tensor, PseudoLabels]], diagnostics: bool
    ) -> tuple[Terms, dict[str, Tensor], list[Tensor]]:
        """The terms L_pix, L_feat and L_sem that the preset has, figures for the log, and the maps that they use."""
        masked = self.masked_views(batch, views)
        maps = self.masked_pass(self.apply_mask(masked.image, masked.classes, masked.mask))
        terms, figures = {}, {"valid_tokens": (masked.token_classes >= 0).float().mean()}
        wanted, visible = self.preset.masked, None
        if "feat" in wanted:
            term, more, count = self.feature_term(masked, maps.features, diagnostics)
            terms["feat"], figures = (self.config.mim.w_feat, term), figures | more
            visible = count[:, :, 0] if self.centroid_stride == self.stride else None
        if "pix" in wanted:
            result = self.reconstruct(maps.tokens, masked.token_classes, masked.mask, visible)
            term, more = self.pixel_term(masked, result, diagnostics)
            terms["pix"], figures = (self.config.mim.w_pix, term), figures | more
        if "sem" in wanted:
            terms |= self.semantic_terms(masked, maps.logits)
        used = {id(x): x for x in (maps.decoded, maps.tokens, maps.features) if x is not None}
        return terms, figures, list(used.values())

    def masked_views(self, batch: dict[str, Tensor], views: dict[str, tuple[Tensor, PseudoLabels]]) -> MaskedViews:
        """The views of `mim.views`, concatenated, with their class maps and masks."""
        config, names = self.config, self.config.mim.views
        y, tau = batch["label"], config.mim.tau
        known = y < self.num_classes
        available = {"labelled": (batch["labelled_image"], torch.where(known, y, IGNORED).int(), known)}
        available |= {name: (image, labels.classes(tau), labels.valid) for name, (image, labels) in views.items()}
        image, classes, valid = (torch.cat(parts) for parts in zip(*(available[name] for name in names), strict=True))
        if config.mim.isolate == "input":
            keys = torch.cat([batch[f"{name}_class_key"] for name in names])
            classes = masking.isolate_class(classes, keys, self.num_classes)
        min_share, block = config.reconstruction.min_share, config.mask.block // self.stride
        token_classes = patch_labels(classes, self.stride, self.num_classes, min_share=min_share)
        if config.mask.per_class:
            keys = torch.cat([batch[f"{name}_mask_key"] for name in names])
            mask = masking.per_class_mask(token_classes, keys, self.num_classes, config.mask.ratio, block)
        else:
            mask = masking.expand(torch.cat([batch[f"{name}_mask"] for name in names]), block)
        return MaskedViews(image, classes, valid, mask, token_classes, [len(available[name][0]) for name in names])

    def apply_mask(self, image: Tensor, classes: Tensor, mask: Tensor) -> Tensor:
        """fill(v, M), the input of the encoder; with mim.isolate=input, pixels without a class are hidden too."""
        hidden = masking.expand(mask, self.stride)
        if self.config.mim.isolate == "input":
            hidden = hidden | (classes == IGNORED)
        return self.fill(self.net.normalise(image), hidden)

    def masked_pass(self, images: Tensor) -> MaskedPass:
        """The maps of masked images (V, channels, H, W), normalised."""
        net, used = self.net, self.maps_of_masked()
        with batch_norm_mode(net, self.config.mim.batch_norm):
            maps = net.encode(images)
            decoded = net.decode(maps)
            logits = net.classify(decoded)
        named = {"decoder": decoded, "encoder": maps[-1]}
        if "pixel" in used:
            named["pixel"] = self.pixel_tokens(maps[net.fine_map], maps[-1])
        tokens = named[self.config.reconstruction.tokens] if "pix" in self.preset.masked else None
        features = named[self.config.centroid_features] if "feat" in self.preset.masked else None
        return MaskedPass(tokens, features, decoded, logits)

    def reconstruct(
        self, tokens: Tensor, token_classes: Tensor, mask: Tensor, visible: Tensor | None = None
    ) -> Reconstruction:
        """Pixels from the tokens F.

        Args:
            tokens: (V, C, h, w).
            token_classes: (V, h, w) int32, -1 where there is none.
            mask: (V, h, w) bool.
            visible: (V, K) number of visible tokens of each class, if it is known.
        """
        labels = token_classes.flatten(1)
        if visible is None:
            visible = class_centroids(tokens.detach(), labels, mask.flatten(1), self.num_classes).count[:, :, 0]
        known = (visible > 0).gather(1, labels.clamp(min=0).long()) & (labels >= 0)
        groups = self.groups_of(labels)
        return Reconstruction(groups, known, self.reconstruction(tokens, groups.view_as(mask), mask))

    def groups_of(self, labels: Tensor) -> Tensor:
        """The classes that the masked terms keep apart: those of `labels`, or all as one."""
        return labels if self.preset.class_wise else torch.where(labels >= 0, 0, -1).int()

    def centroid_tokens(self, views: MaskedViews) -> tuple[Tensor, Tensor]:
        """Class and mask, (V, N') each, of the tokens of `centroids.features`. If they are larger than those of
        `reconstruction.tokens`, those that are hidden in part have no class."""
        if self.centroid_stride == self.stride:
            return views.token_classes.flatten(1), views.mask.flatten(1)
        min_share = self.config.reconstruction.min_share
        classes = patch_labels(views.classes, self.centroid_stride, self.num_classes, min_share=min_share)
        if self.centroid_stride < self.stride:
            return classes.flatten(1), masking.expand(views.mask, self.stride // self.centroid_stride).flatten(1)
        hidden = F.avg_pool2d(views.mask[:, None].float(), self.centroid_stride // self.stride)[:, 0]
        classes = torch.where((hidden > 0) & (hidden < 1), -1, classes)
        return classes.flatten(1), (hidden == 1).flatten(1)

    def pixel_term(self, views: MaskedViews, result: Reconstruction, diagnostics: bool) -> tuple[Ratio, dict[str, Tensor]]:
        """L_pix, and figures for the log."""
        settings = self.config.reconstruction
        target = dict(
            image=views.image, masked=views.mask.flatten(1), labels=torch.where(result.known, result.groups, -1),
            num_classes=self.num_classes if self.preset.class_wise else 1, patch_size=self.stride,
            distance=settings.distance, normalize=settings.normalize, balance=settings.balance,
            mean=self.mean, std=self.std,
        )  # fmt: skip
        patches = masked_patch_loss(result.prediction, **target)
        total, count = patches.class_sum, patches.class_count
        if settings.balance == "token":
            total, count = total.sum()[None], count.sum()[None]
        if not diagnostics:
            return Ratio(total, count), {}
        guess = mean_colour_error(self.net.normalise(views.image), target)
        return Ratio(total, count), {"pix_vs_mean_colour": patches.loss.detach() / guess.clamp(min=1e-8)}

    def feature_term(
        self, views: MaskedViews, features: Tensor, diagnostics: bool
    ) -> tuple[Ratio, dict[str, Tensor], Tensor]:
        """L_feat, figures for the log, and the numbers of visible and hidden tokens of each class, (V, K, 2)."""
        settings = self.config.centroids
        labels, mask = self.centroid_tokens(views)
        of_classes = centroids = class_centroids(features, labels, mask, self.num_classes)
        if not self.preset.class_wise:
            centroids = class_centroids(features, self.groups_of(labels), mask, 1)
        pairs = centroid_distance(
            centroids, distance=settings.distance, detach=settings.detach, min_tokens=settings.min_tokens
        )
        figures = {"pairs": self.ranks * pairs.pair_count.float()}
        if diagnostics:
            figures["separation"] = separation(of_classes)
        return Ratio(pairs.pair_sum[None], pairs.pair_count[None]), figures, of_classes.count

    def semantic_terms(self, views: MaskedViews, logits: Tensor) -> Terms:
        """L_sem, one term for each view."""
        terms: Terms = {}
        names, sizes = self.config.mim.views, views.sizes
        error = upsample_cross_entropy(logits, views.classes, align_corners=self.net.align_corners)
        for name, part, valid in zip(names, error.split(sizes), views.valid.split(sizes), strict=True):
            share = 0.5 if name == "labelled" else 0.25
            terms[f"sem_{name}"] = (self.config.mim.w_sem * share, Ratio(part.sum()[None], valid.sum()[None]))
        return terms

    def total_loss(self, terms: Terms, figures: dict[str, Tensor], features: list[Tensor], gradients: bool) -> Output:
        """The weighted sum of all terms S / n; `features`: those of each pass, for `gradient_norms`."""
        counts = [ratio.count for _, ratio in terms.values()]
        if self.ranks > 1:
            counts = all_reduce(torch.cat([count.long() for count in counts])).split([len(count) for count in counts])
        weighted = {
            name: self.ranks * weight * ratio.value(count)
            for (name, (weight, ratio)), count in zip(terms.items(), counts, strict=True)
        }
        loss = torch.stack(list(weighted.values())).sum()
        if gradients:
            figures = figures | gradient_norms(weighted, features, self.ranks)
        return Output(loss, {name: value.detach() for name, value in weighted.items()}, figures)
