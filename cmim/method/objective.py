"""The training objective: the network, the reconstruction decoder, all views and all losses in one module.

There are B images of H x W pixels, K classes, and tokens on a grid h x w. x are labelled images with labels y; u_w and u_s
are weak and strong views of unlabelled images; f is the segmenter, G the reconstruction decoder, M a mask; [.] is 1 where
the condition holds, else 0.

Pseudo-labels p and confidences conf come from u_w (from the student's own pass, from an EMA teacher or from a trained
network); `valid` is false on padding. CutMix applies the same box to u_s, p, conf and valid.

    L_sup    = sum w_y CE(f(x), y)                     / sum w_y over the labelled pixels
    L_dice   = mean over classes k of 1 - 2 sum f(x)_k [y = k] / (sum f(x)_k + sum [y = k])
    L_strong = sum b_p CE(f(u_s), p) [conf >= tau]         / number of valid pixels
    L_fp     = sum b_p CE(f_dropout(u_w), p) [conf >= tau] / number of valid pixels

    supervised   L = L_sup
    fixmatch     L = (L_sup + L_strong) / 2
    fixmatch_fp  L = (L_sup + L_strong / 2 + L_fp / 2) / 2
    unimatch     L = (L_sup + L_strong1 / 4 + L_strong2 / 4 + L_fp / 2) / 2
    unimatch_v2  L = (L_sup + L_strong1 / 2 + L_strong2 / 2) / 2, complementary channels dropped
    semantic     L = L of fixmatch_fp + r(t) w_sem L_sem
    mim, cmim    L = L of fixmatch_fp + r(t) (w_pix L_pix + w_feat L_feat + w_sem L_sem)

Each preset is a row of `cmim.settings.PRESETS`, which holds these weights. L_strong and L_fp are also multiplied by
`method.w_unlabelled` and s(t), which grows from 0 at `method.start` to 1; before that L = L_sup with its weight. The class
weights w are 1 unless `method.class_weights` gives others, and b are 1 without `method.class_balance`. With
`method.logit_adjustment`, CE of unlabelled views takes the logits of `ClassStatistics.adjust`. `method.dice` times L_dice is
added to L_sup; f(x)_k is a probability, and the sums are over the labelled pixels of all processes, for the classes that
they have.

The masked views v of x, u_w and u_s, with a class map c (y, or p where conf >= mim.tau), go through the segmenter once more
with hidden pixels filled in. F and z are the features and logits of that pass, and c_t is the majority class of each token:

    L_pix  = masked_patch_loss(G(F, c_t, M), v, M, c_t), over the hidden tokens
             of every (image, class) that has a visible token
    L_feat = distance between the hidden and the visible centroid of F,
             mean over (image, class) pairs
    L_sem  = (labelled + strong / 2 + weak / 2) / 2, each of these
             sum CE(z, c) / number of valid pixels of that view

`mim` is `cmim` with all valid tokens in one class for G, for L_feat and for the balance of classes; L_pix counts the same
tokens. Every term but L_dice is S / n, where S and n are sums over the batches of all processes; a term with n = 0 is a zero
that is connected to the graph. With R processes, each one computes R S' / n from its own part S' of S, because
DistributedDataParallel takes the mean of the gradients over the processes.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor

from cmim.checkpoint import warm_start
from cmim.distributed import all_gather, all_reduce
from cmim.method.class_statistics import ClassStatistics
from cmim.method.diagnostics import agreement, coverage, gradient_norms
from cmim.method.dice import dice_loss
from cmim.method.masked_terms import MaskedTerms
from cmim.method.perturbations import cutmix, drop_channels, drop_complementary
from cmim.method.pseudo_labels import PseudoLabels, pseudo_labels
from cmim.method.terms import Ratio, Terms
from cmim.models.batch_norm import batch_norm_mode
from cmim.models.build import build_segmenter, centroid_stride, token_stride
from cmim.models.segmenter import Segmenter
from cmim.settings import Config
from cmim_kernels import upsample_cross_entropy


class Base(NamedTuple):
    """The terms without masks, and the unlabelled views that may be masked."""

    terms: Terms
    figures: dict[str, Tensor]
    features: list[Tensor]  # of each pass
    views: dict[str, tuple[Tensor, PseudoLabels]]  # weak and strong: images and their pseudo-labels


class Output(NamedTuple):
    loss: Tensor
    terms: dict[str, Tensor]  # weighted, so that they add up to the loss
    figures: dict[str, Tensor]  # for the log, without gradient


class Objective(MaskedTerms):
    """forward(batch, ramp, base_ramp=1.0, diagnostics=False, gradients=False) -> Output.

    batch: a dict of `cmim.data.batches.TrainBatches`.
    ramp: r(t), a scalar tensor; None before mim.start, when there is no masked pass.
    base_ramp: s(t), likewise; None before method.start, when L_sup is the only term.
    diagnostics: also compute the figures that take time.
    gradients: also compute the norm of the gradient of each term at the features, and whether it agrees with that of L_sup;
        needs eager mode and two backward passes for each term.

    `ranks` is the number of processes; each of them has an equal part of the batch. `judge` is the network of `teacher.run`.
    """

    def __init__(self, config: Config, num_classes: int, judge: Segmenter | None = None):
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
        weights = config.method.class_weights
        given = torch.tensor(weights).float() if isinstance(weights, list) else torch.ones(num_classes)
        # (K,); those that the data give are set before the first step, with set_class_weights.
        self.register_buffer("class_weights", None if weights == "none" else given, persistent=False)
        if config.has_teacher:
            self.teacher = deepcopy(self.net).eval().requires_grad_(False)
        if self.preset.uses_unlabelled and (
            config.method.align or config.method.class_thresholds or config.method.counts_classes
        ):
            self.classes = ClassStatistics(num_classes)
        self.judge = None if judge is None else judge.eval().requires_grad_(False)
        self.add_masked_parts()

    def evaluated(self) -> Segmenter:
        """The network whose weights evaluation and prediction use."""
        return self.teacher if self.config.evaluated_weights == "teacher" else self.net

    def train(self, mode: bool = True) -> "Objective":
        super().train(mode)
        if self.config.has_teacher:
            self.teacher.eval()
        if self.judge is not None:
            self.judge.eval()
        return self

    def set_class_weights(self, weights: Sequence[float]) -> None:
        """Use other class weights, a number for each class."""
        self.class_weights.copy_(torch.tensor(weights))

    def teacher_decay(self, step: int) -> float:
        """Of the EMA after optimiser step number `step` (from 0): min(1 - 1 / (step + 1), teacher.decay)."""
        return min(1 - 1 / (step + 1), self.config.teacher.decay)

    @torch.no_grad()
    def update_teacher(self, step: int) -> None:
        """EMA of weights and buffers after optimiser step number `step` (from 0)."""
        decay = self.teacher_decay(step)
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
        """L_sup and L_dice alone."""
        feature = self.net.decode(self.net.encode(self.net.normalise(batch["labelled_image"])))
        terms = self.labelled_terms(self.net.classify(feature), batch["label"])
        return Base(terms, {}, [feature], {})

    def base(self, batch: dict[str, Tensor], ramp: Tensor | float) -> Base:
        """L_sup, L_dice, L_strong of each strong view and L_fp; `ramp` is s(t)."""
        config, net, preset = self.config, self.net, self.preset
        x, u_w, strong = batch["labelled_image"], batch["weak_image"], batch["strong_image"]

        # x and u_w share a pass; in the decoder, the clean and the perturbed features of u_w share it too.
        judge = self.judge or (self.teacher if config.has_teacher else None)
        shared = [x, u_w] if preset.weak_pass or preset.fp or judge is None else [x]
        maps = net.encode(net.normalise(torch.cat(shared)))
        if preset.fp:
            dropped = drop_channels([m[len(x) :] for m in maps], batch["channel_key"], config.method.dropout)
            maps = [torch.cat([m, d]) for m, d in zip(maps, dropped, strict=True)]
        feature = net.decode(maps)
        parts = shared + ([u_w] if preset.fp else [])
        logits_x, *logits_w = net.classify(feature).split([len(part) for part in parts])
        if judge is not None:
            with torch.no_grad():
                logits = judge(judge.normalise(u_w))
        else:
            logits = logits_w[0]
        weak = self.pseudo_labels(logits, batch, (judge or net).align_corners)

        # Every strong view has its own CutMix box, which is applied to image and pseudo-label.
        mixed = [cutmix(box, image, *weak) for box, image in zip(batch["box"], strong, strict=True)]
        u_s = [image for image, *_ in mixed]
        strong_labels = [PseudoLabels(*rest) for _, *rest in mixed]
        with batch_norm_mode(net, config.method.batch_norm):
            maps = net.encode(net.normalise(torch.cat(u_s)))
            if preset.complementary and config.method.complementary:
                maps = drop_complementary(maps, batch["channel_key"])
            feature_s = net.decode(maps)
        logits_s = net.classify(feature_s).split(len(u_w))

        terms = self.labelled_terms(logits_x, batch["label"])
        factor = ramp * config.method.w_unlabelled
        if config.method.counts_classes:
            self.classes.count_pseudo_labels(weak.classes(config.method.tau), logits.shape[-2:], self.ranks)
        weights = self.classes.weights() if config.method.class_balance else None
        for i, (logits, labels) in enumerate(zip(logits_s, strong_labels, strict=True)):
            name = f"strong{i + 1}" if len(u_s) > 1 else "strong"
            terms[name] = (factor * preset.strong, self.consistency(logits, labels, weights))
        if preset.fp:
            terms["fp"] = (factor * preset.fp, self.consistency(logits_w[1], weak, weights))
        figures = coverage(weak, config.method.tau, config.data.background)
        return Base(terms, figures, [feature, feature_s], {"weak": (u_w, weak), "strong": (u_s[0], strong_labels[0])})

    def pseudo_labels(self, logits: Tensor, batch: dict[str, Tensor], align_corners: bool) -> PseudoLabels:
        """Those of the weak views, from their logits."""
        method, valid, logits = self.config.method, batch["valid"], logits.detach()
        if method.align or method.counts_classes:
            self.classes.count_labels(batch["label"], logits.shape[-2:], self.ranks)
        if method.align:
            logits = self.classes.align(logits, valid, self.ranks)
        labels = pseudo_labels(logits, valid, align_corners)
        return self.classes.relative(labels, logits, self.ranks) if method.class_thresholds else labels

    def labelled_terms(self, logits: Tensor, y: Tensor) -> Terms:
        """L_sup and, with a weight, L_dice."""
        terms: Terms = {"sup": (self.preset.sup, self.supervised(logits, y))}
        if self.config.method.dice > 0:
            parts = dice_loss(logits, y, self.net.align_corners, self.ranks)
            terms["dice"] = (self.preset.sup * self.config.method.dice, Ratio(*parts))
        return terms

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
        if self.class_weights is None:
            return Ratio(torch.where(counted, error, 0).sum()[None], counted.sum()[None])
        weight = self.class_weights[torch.where(counted, y, 0).long()]
        counted = counted & (weight > 0)
        total = torch.where(counted, weight * error, 0).sum()
        return Ratio(total[None], torch.where(counted, weight, 0).sum()[None])

    def consistency(self, logits: Tensor, labels: PseudoLabels, weights: Tensor | None = None) -> Ratio:
        """L_strong and L_fp: the sum over confident pixels, divided by the number of valid pixels; `weights` (K,) of the
        classes."""
        target = labels.classes(self.config.method.tau)
        error = upsample_cross_entropy(self.adjusted(logits), target, align_corners=self.net.align_corners)
        if weights is not None:
            error = error * weights[target.clamp(max=self.num_classes - 1).long()]
        return Ratio(error.sum()[None], labels.valid.sum()[None])

    def total_loss(self, terms: Terms, figures: dict[str, Tensor], features: list[Tensor], gradients: bool) -> Output:
        """The weighted sum of all terms S / n; `features`: those of each pass, for `gradient_norms`."""
        counts = [ratio.count for _, ratio in terms.values()]
        if self.ranks > 1:
            # float64, because sums of class weights are no integers; the counts of pixels are exact in it.
            everywhere = all_reduce(torch.cat([count.double() for count in counts])).split([len(c) for c in counts])
            counts = [total.to(count.dtype) for total, count in zip(everywhere, counts, strict=True)]
        weighted = {
            name: self.ranks * weight * ratio.value(count)
            for (name, (weight, ratio)), count in zip(terms.items(), counts, strict=True)
        }
        loss = torch.stack(list(weighted.values())).sum()
        if gradients:
            figures = figures | gradient_norms(weighted, features, self.ranks)
            figures = figures | agreement(weighted, list(self.net.parameters()))
        return Output(loss, {name: value.detach() for name, value in weighted.items()}, figures)
