"""The training objective: the network, the reconstruction decoder, all views and all losses in one module.

B images of H x W pixels, K classes; tokens on a grid h x w; x labelled with truth y, u_w weak and u_s strong views
of unlabelled images; f the segmenter, G the reconstruction decoder, M a mask, [.] one where true and zero elsewhere.

Pseudo-labels p and confidences conf come from u_w (by the student's own pass or an EMA teacher), `valid` is false on
padding. u_s and its p, conf and valid are cut together by CutMix.

    L_sup    = sum CE(f(x), y)                         / number of pixels with a class
    L_strong = sum CE(f(u_s), p) [conf >= tau]         / number of valid pixels
    L_fp     = sum CE(f_dropout(u_w), p) [conf >= tau] / number of valid pixels

    supervised   L = L_sup
    fixmatch     L = (L_sup + L_strong) / 2
    unimatch     L = (L_sup + L_strong1 / 4 + L_strong2 / 4 + L_fp / 2) / 2
    unimatch_v2  L = (L_sup + L_strong1 / 2 + L_strong2 / 2) / 2, the two views with complementary channels dropped
    mim, cmim    L = (L_sup + L_strong / 2 + L_fp / 2) / 2 + r(t) (w_pix L_pix + w_feat L_feat + w_sem L_sem)

Masked views v of x, u_w and u_s, with a class map c (y, or p where conf >= mim.tau), go through the segmenter once
more with the mask filled in, F and z are the features and logits of that pass, c_t the majority class of each token:

    L_pix  = masked_patch_loss(G(F, c_t, M), v, M, c_t) over hidden tokens whose (image, class) has a visible token
    L_feat = distance of the hidden to the visible centroid of F, mean over (image, class) pairs
    L_sem  = (labelled + strong / 2 + weak / 2) / 2, each sum CE(z, c) / number of valid pixels of that view

`mim` is `cmim` with every valid token in one class, for G, for L_feat and for balance; the tokens that L_pix counts
are the same. Every term is S / max(1, n), S and n over the batches of all processes; a term without anything to
count is a zero that is still connected to the graph. With R processes each computes R S' / n of its own part S', so
that the mean over processes, which DistributedDataParallel takes of the gradients, is the term.
"""

from copy import deepcopy
from typing import NamedTuple

import torch
from torch import nn

from cmim import masking
from cmim.data.datasets import IGNORED
from cmim.diagnostics import coverage, gradient_norms, mean_colour_error, separation
from cmim.engine.distributed import all_gather, all_reduce
from cmim.models.batch_norm import batch_norm_mode
from cmim.models.reconstruction import build_reconstruction
from cmim.models.segmenter import build_segmenter
from cmim.models.weights import warm_start
from cmim.pseudo_labels import PseudoLabels, cutmix, drop_channels, drop_complementary, pseudo_labels
from cmim.settings import normalisation, token_stride, uses_masking, uses_unlabelled
from cmim_kernels import (
    ClassCentroids,
    centroid_distance,
    class_centroids,
    masked_patch_loss,
    patch_labels,
    upsample_cross_entropy,
)


class Ratio(NamedTuple):
    """S and n of a term, vectors: its value is the mean of S / n over the entries with n > 0."""

    total: torch.Tensor
    count: torch.Tensor

    def value(self, counts):
        """With the n of all processes."""
        return (self.total / counts.clamp(min=1)).sum() / (counts > 0).sum().clamp(min=1)


class MaskedViews(NamedTuple):
    image: torch.Tensor  # (V, 3, H, W) uint8, unmasked
    classes: torch.Tensor  # (V, H, W) pixel classes, IGNORED where unknown
    valid: torch.Tensor  # (V, H, W) bool, the pixels that L_sem divides by
    masked: torch.Tensor  # (V, h, w) bool
    token_classes: torch.Tensor  # (V, h, w) int32, -1 where there is none
    sizes: list[int]  # number of images of each view in mim.views


class Reconstruction(NamedTuple):
    """What the masked pass gives; V images, N = h w tokens."""

    tokens: torch.Tensor  # (V, C, h, w), F
    logits: torch.Tensor  # (V, K, ., .), z
    groups: torch.Tensor  # (V, N) classes that the decoder keeps apart, -1 where there is none; all zero for `mim`
    known: torch.Tensor  # (V, N) bool: the (image, class) has a visible token, so that a hidden one can be reconstructed
    prediction: torch.Tensor  # (V, N, p p channels), G(F, c_t, M)
    centroids: ClassCentroids  # of F by true class


class Output(NamedTuple):
    loss: torch.Tensor
    terms: dict[str, torch.Tensor]  # weighted, so that they add up to the loss
    figures: dict[str, torch.Tensor]  # for the log, without gradient


class Objective(nn.Module):
    """forward(batch, ramp, diagnostics=False, gradients=False) -> Output.

    batch: a dict of `cmim.data.batches.TrainBatches`.
    ramp: r(t), a scalar tensor; None before mim.start, where the masked pass is left out.
    diagnostics: also compute the figures that cost time.
    gradients: also the norm of each term's gradient at the features, eagerly and at the cost of a backward pass a term.

    `ranks` is the number of processes that share a batch, each of which holds an equal part of it.
    """

    def __init__(self, config, num_classes):
        super().__init__()
        self.ranks = 1
        self.config, self.num_classes = config, num_classes
        self.mean, self.std = normalisation(config.data)
        self.stride = token_stride(config)
        model = config.model
        if model.init_from is not None:  # nothing is fetched that would be overwritten
            model = model.model_copy(update={"weights": "none"})
        self.net = build_segmenter(model, num_classes, self.mean, self.std)
        self.note = warm_start(self.net, config.model.init_from) if config.model.init_from is not None else None
        if config.teacher.kind == "ema":
            self.teacher = deepcopy(self.net).eval().requires_grad_(False)
        if uses_masking(config):
            self.class_wise = config.method.preset == "cmim"
            self.fill = masking.Fill(config.mask.fill, self.mean, self.std)
            self.reconstruction = build_reconstruction(
                config.reconstruction,
                self.net.feature_channels if config.reconstruction.tokens == "decoder" else self.net.encoder_channels,
                self.stride,
                num_classes if self.class_wise else 1,
                image_channels=len(self.mean),
            )

    def evaluated(self):
        """The weights that evaluation and prediction use."""
        return (
            self.teacher if self.config.teacher.kind == "ema" and self.config.evaluation.weights == "teacher" else self.net
        )

    def train(self, mode=True):
        super().train(mode)
        if self.config.teacher.kind == "ema":
            self.teacher.eval()
        return self

    @torch.no_grad()
    def update_teacher(self, step):
        """EMA of weights and buffers after optimiser step number `step` (from 0), decay min(1 - 1 / (step + 1), decay)."""
        decay = min(1 - 1 / (step + 1), self.config.teacher.decay)
        ours, theirs = self.teacher.state_dict().values(), self.net.state_dict().values()
        pairs = [(a, b) for a, b in zip(ours, theirs, strict=True)]
        floats = [(a, b) for a, b in pairs if a.is_floating_point()]
        torch._foreach_lerp_([a for a, _ in floats], [b for _, b in floats], 1 - decay)
        for a, b in pairs:
            if not a.is_floating_point():
                a.copy_(b)

    def forward(self, batch, ramp, diagnostics=False, gradients=False):
        config, net = self.config, self.net
        x, y = batch["labelled_image"], batch["label"]
        if not uses_unlabelled(config):
            feature = net.decode(net.encode(net.normalise(x)))
            return self.finish({"sup": (1.0, self.supervised(net.classify(feature), y))}, {}, [feature], gradients)

        # x and u_w share a pass; so do, in the decoder, the clean and the dropped-out features of u_w.
        u_w, strong = batch["weak_image"], batch["strong_image"]
        preset, taught = config.method.preset, config.teacher.kind == "ema"
        shared = [x] if taught and preset == "unimatch_v2" else [x, u_w]  # that preset has no other use for u_w
        maps = net.encode(net.normalise(torch.cat(shared)))
        perturbed = preset not in ("fixmatch", "unimatch_v2")
        if perturbed:
            dropped = drop_channels([m[len(x) :] for m in maps], batch["key"], config.method.dropout)
            maps = [torch.cat([m, d]) for m, d in zip(maps, dropped, strict=True)]
        feature = net.decode(maps)
        logits_x, *logits_w = net.classify(feature).split([len(part) for part in shared + [u_w] * perturbed])
        if taught:
            with torch.no_grad():
                weak = self.teacher(net.normalise(u_w))
        else:
            weak = logits_w[0]
        weak = pseudo_labels(weak, batch["valid"], net.align_corners)

        # Every strong view has its own box; image and pseudo-label are cut together.
        mixed = [cutmix(box, image, *weak) for box, image in zip(batch["box"], strong, strict=True)]
        u_s = [image for image, *_ in mixed]
        strong_labels = [PseudoLabels(*rest) for _, *rest in mixed]
        maps = net.encode(net.normalise(torch.cat(u_s)))
        if preset == "unimatch_v2" and config.method.complementary:
            maps = drop_complementary(maps, batch["key"])
        feature_s = net.decode(maps)
        logits_s = net.classify(feature_s).split(len(u_w))

        terms = {"sup": (0.5, self.supervised(logits_x, y))}
        strong_weight = {"fixmatch": 0.5, "unimatch": 0.125}.get(preset, 0.25)
        for i, (logits, labels) in enumerate(zip(logits_s, strong_labels, strict=True)):
            terms[f"strong{i + 1}" if len(u_s) > 1 else "strong"] = (strong_weight, self.consistency(logits, labels))
        if perturbed:
            terms["fp"] = (0.25, self.consistency(logits_w[1], weak))
        figures = coverage(weak, config.method.tau, config.data.background)
        features = [feature, feature_s]
        if uses_masking(config) and ramp is not None:
            masked_terms, masked_figures, masked_feature = self.masked(batch, weak, u_s[0], strong_labels[0], diagnostics)
            terms |= {name: (ramp * weight, term) for name, (weight, term) in masked_terms.items()}
            figures |= masked_figures
            features.append(masked_feature)
        return self.finish(terms, figures, features, gradients)

    def supervised(self, logits, y):
        """L_sup; with OHEM only over pixels whose true class has a probability of at most the threshold, or at most
        that of the min_kept-th hardest pixel, of all processes, if that is larger."""
        error = upsample_cross_entropy(logits, y, align_corners=self.net.align_corners)
        counted = y < self.num_classes
        if self.config.method.ohem is not None:
            settings = self.config.method.ohem
            probability = torch.where(counted, torch.exp(-error.detach()), 1).flatten()
            everyones = probability if self.ranks == 1 else all_gather(probability, self.ranks)
            least = everyones.kthvalue(min(settings.min_kept, everyones.numel())).values
            counted = counted & (probability <= least.clamp(min=settings.threshold)).view_as(counted)
        return Ratio(torch.where(counted, error, 0).sum()[None], counted.sum()[None])

    def consistency(self, logits, labels):
        """L_strong and L_fp: the confident pixels count, all valid pixels divide."""
        target = labels.classes(self.config.method.tau)
        error = upsample_cross_entropy(logits, target, align_corners=self.net.align_corners)
        return Ratio(error.sum()[None], labels.valid.sum()[None])

    def masked_views(self, batch, weak, u_s, strong_labels):
        """The views of `mim.views`, one after another, with their class maps and masks."""
        config = self.config
        y, tau = batch["label"], config.mim.tau
        known = y < self.num_classes
        available = {
            "labelled": (batch["labelled_image"], torch.where(known, y, IGNORED).int(), known, batch["labelled_mask"]),
            "weak": (batch["weak_image"], weak.classes(tau), weak.valid, batch["weak_mask"]),
            "strong": (u_s, strong_labels.classes(tau), strong_labels.valid, batch["strong_mask"]),
        }
        # Every draw has a key of its own: batch["key"] is that of the dropped channels.
        keys = {"labelled": batch["labelled_key"], "weak": batch["key"] + 1, "strong": batch["key"] + 2}
        chosen = [available[name] for name in config.mim.views]
        image, classes, valid, masked = (torch.cat(parts) for parts in zip(*chosen, strict=True))
        key = torch.cat([keys[name] for name in config.mim.views])
        stride = self.stride
        if config.mim.isolate == "input":
            classes = masking.isolate_class(classes, key, self.num_classes)
        token_classes = patch_labels(classes, stride, self.num_classes, min_share=config.reconstruction.min_share)
        if config.mask.per_class:
            block = config.mask.block // stride
            masked = masking.per_class_mask(token_classes, key + 2, self.num_classes, config.mask.ratio, block)
        return MaskedViews(image, classes, valid, masked, token_classes, [len(part[0]) for part in chosen])

    def see(self, image, classes, masked):
        """fill(v, M) as the encoder sees it; with mim.isolate=input, pixels without a class are hidden too."""
        hidden = masking.to_pixels(masked, self.stride)
        if self.config.mim.isolate == "input":
            hidden = hidden | (classes == IGNORED)
        return self.fill(self.net.normalise(image), hidden)

    def reconstruct(self, seen, token_classes, masked):
        """The masked pass.

        Args:
            seen: (V, channels, H, W) what the encoder sees.
            token_classes: (V, h, w) int32, -1 where there is none.
            masked: (V, h, w) bool.
        """
        with batch_norm_mode(self.net, self.config.mim.batch_norm):
            maps = self.net.encode(seen)
            feature = self.net.decode(maps)
            logits = self.net.classify(feature)
        tokens = feature if self.config.reconstruction.tokens == "decoder" else maps[-1]
        labels = token_classes.flatten(1)
        centroids = class_centroids(tokens, labels, masked.flatten(1), self.num_classes)
        known = (centroids.count[:, :, 0] > 0).gather(1, labels.clamp(min=0).long()) & (labels >= 0)
        groups = labels if self.class_wise else torch.where(labels >= 0, 0, -1).int()
        prediction = self.reconstruction(tokens, groups.view_as(masked), masked)
        return Reconstruction(tokens, logits, groups, known, prediction, centroids)

    def masked(self, batch, weak, u_s, strong_labels, diagnostics):
        """{name: (weight, term)} of L_pix, L_feat and L_sem, figures for the log, and F."""
        config, net = self.config, self.net
        views = self.masked_views(batch, weak, u_s, strong_labels)
        result = self.reconstruct(self.see(views.image, views.classes, views.masked), views.token_classes, views.masked)
        masked = views.masked.flatten(1)
        num_groups = self.num_classes if self.class_wise else 1
        target = dict(
            image=views.image, masked=masked, labels=torch.where(result.known, result.groups, -1), num_classes=num_groups,
            patch_size=self.stride, distance=config.reconstruction.distance,
            normalize=config.reconstruction.normalize, balance=config.reconstruction.balance,
            mean=self.mean, std=self.std,
        )  # fmt: skip
        patches = masked_patch_loss(result.prediction, **target)
        pix = Ratio(patches.class_sum, patches.class_count)
        if config.reconstruction.balance == "token":
            pix = Ratio(pix.total.sum()[None], pix.count.sum()[None])
        pairs = centroid_distance(
            result.centroids if self.class_wise else class_centroids(result.tokens, result.groups, masked, 1),
            distance=config.centroids.distance,
            detach=config.centroids.detach,
            min_tokens=config.centroids.min_tokens,
        )
        terms = {
            "pix": (config.mim.w_pix, pix),
            "feat": (config.mim.w_feat, Ratio(pairs.pair_sum[None], pairs.pair_count[None])),
        }
        error = upsample_cross_entropy(result.logits, views.classes, align_corners=net.align_corners)
        each = zip(config.mim.views, error.split(views.sizes), views.valid.split(views.sizes), strict=True)
        for name, part, valid in each:
            share = 0.5 if name == "labelled" else 0.25
            terms[f"sem_{name}"] = (config.mim.w_sem * share, Ratio(part.sum()[None], valid.sum()[None]))
        figures = {"valid_tokens": (views.token_classes >= 0).float().mean(), "pairs": self.ranks * pairs.pair_count.float()}
        if diagnostics:
            guess = mean_colour_error(net.normalise(views.image), target)
            figures["pix_vs_mean_colour"] = patches.loss.detach() / guess.clamp(min=1e-8)
            figures["separation"] = separation(result.centroids)
        return terms, figures, result.tokens

    def finish(self, terms, figures, features, gradients):
        """Divide every S by its n, weight, and add up; `features` are those of each pass."""
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
