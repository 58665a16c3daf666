"""The terms of masked views, L_pix, L_feat and L_sem; `cmim.method.objective` has their formulas and names."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmim.data.datasets import IGNORED
from cmim.method import masking
from cmim.method.diagnostics import hidden_accuracy, mean_colour_error, separation, share_in_reach, token_purity
from cmim.method.pseudo_labels import PseudoLabels
from cmim.method.terms import Ratio, Terms
from cmim.models.batch_norm import batch_norm_mode
from cmim.models.pixel_tokens import PixelTokens
from cmim.models.reconstruction import build_reconstruction, of_visible_classes
from cmim.models.segmenter import Segmenter
from cmim.settings import Config, Preset
from cmim_kernels import centroid_distance, class_centroids, masked_patch_loss, patch_labels, upsample_cross_entropy


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


class MaskedTerms(nn.Module):
    """The part of the objective that masked views need; `Objective` sets the attributes and calls `masked_terms`."""

    config: Config
    preset: Preset
    net: Segmenter
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    ranks: int
    stride: int
    """Side of a token of `reconstruction.tokens` in pixels."""
    centroid_stride: int
    """Side of a token of `centroids.features` in pixels."""

    def add_masked_parts(self) -> None:
        """Create the modules that the preset's masked terms need."""
        config = self.config
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
                self.num_classes if self.preset.class_wise else 1,
                image_channels=len(self.mean),
            )

    def maps_of_masked(self) -> set[str]:
        """Which feature maps the masked terms use, by their names in the settings."""
        of_terms = {"pix": self.config.reconstruction.tokens, "feat": self.config.centroid_features}
        return {name for term, name in of_terms.items() if term in self.preset.masked}

    def masked_terms(
        self, batch: dict[str, Tensor], views: dict[str, tuple[Tensor, PseudoLabels]], diagnostics: bool
    ) -> tuple[Terms, dict[str, Tensor], list[Tensor]]:
        """The terms L_pix, L_feat and L_sem that the preset has, figures for the log, and the maps that they use."""
        masked = self.masked_views(batch, views)
        maps = self.masked_pass(self.apply_mask(masked.image, masked.classes, masked.mask))
        terms, figures = {}, {"valid_tokens": (masked.token_classes >= 0).float().mean()}
        wanted, visible = self.preset.masked, None
        if diagnostics:
            hidden = masking.expand(masked.mask, self.stride)
            figures["hidden_accuracy"] = hidden_accuracy(maps.logits, masked.classes, hidden, self.net.align_corners)
            figures["token_purity"] = token_purity(masked.classes, masked.token_classes, self.stride)
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
        known = of_visible_classes(labels, visible)
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
        reached = self.reconstruction.in_reach(result.groups.view_as(views.mask), views.mask)
        return Ratio(total, count), {
            "pix_vs_mean_colour": patches.loss.detach() / guess.clamp(min=1e-8),
            "in_reach": share_in_reach(reached, views.token_classes, views.mask),
        }

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

    def adjusted(self, logits: Tensor) -> Tensor:
        """The logits of an unlabelled view, as its cross-entropy takes them."""
        return self.classes.adjust(logits) if self.config.method.logit_adjustment else logits

    def semantic_terms(self, views: MaskedViews, logits: Tensor) -> Terms:
        """L_sem, one term for each view."""
        terms: Terms = {}
        names, sizes = self.config.mim.views, views.sizes
        if self.config.method.logit_adjustment:
            of_views = zip(names, logits.split(sizes), strict=True)
            logits = torch.cat([part if name == "labelled" else self.adjusted(part) for name, part in of_views])
        error = upsample_cross_entropy(logits, views.classes, align_corners=self.net.align_corners)
        for name, part, valid in zip(names, error.split(sizes), views.valid.split(sizes), strict=True):
            share = 0.5 if name == "labelled" else 0.25
            terms[f"sem_{name}"] = (self.config.mim.w_sem * share, Ratio(part.sum()[None], valid.sum()[None]))
        return terms
