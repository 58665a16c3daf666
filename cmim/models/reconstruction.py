"""Decoders that reconstruct the pixels of every token from the tokens of its own class.

`decode_per_class` defines the result: one pass of an ordinary decoder for each class, with all other tokens set to zero. The
decoders here need a single pass, because every operation is token-wise or mixes tokens of one class only.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from cmim.models.attention import ATTENTIONS
from cmim.settings import ReconstructionSettings
from cmim_kernels import (
    checks,
    class_centroids,
    gather_class_tokens,
    pack_classes,
    same_class_conv2d,
    scatter_class_tokens,
)


class _ClassDecoder(nn.Module):
    """Shared parts of the decoders: the projection to `width`, the mask token, and the layers that predict the pixels."""

    def __init__(self, in_channels, patch_size, num_classes, width, mask_token, image_channels):
        super().__init__()
        self.num_classes = num_classes
        self.project = nn.Linear(in_channels, width)
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02) if mask_token else None
        self.norm = nn.LayerNorm(width)
        self.predict = nn.Linear(width, patch_size * patch_size * image_channels)

    def forward(self, features: Tensor, labels: Tensor, masked: Tensor) -> Tensor:
        """Pixels of every token.

        Args:
            features: (B, C, h, w) float.
            labels: (B, h, w) class of each token, uint8, int32 or int64; values outside [0, num_classes) are ignored.
            masked: (B, h, w) bool, true where the pixels of a token were hidden.

        Returns:
            (B, h w, p p c), a patch's entries in the order (row, column, channel); zero at ignored tokens.

        Raises:
            TypeError, ValueError: an argument has a wrong type, dtype, shape or device (the message names it).
        """
        if checks.enabled():
            name = type(self).__name__
            channels = self.project.in_features
            checks.tensor(name, "features", features, dtypes=checks.FLOATS, shape=("B", channels, "h", "w"))
            grid = (len(features), *features.shape[2:])
            checks.tensor(name, "labels", labels, dtypes=checks.LABELS, shape=grid, like=features)
            checks.tensor(name, "masked", masked, dtypes=(torch.bool,), shape=grid, like=features)
        valid = _valid(labels, self.num_classes)
        tokens = self.mix(self.embed(features, valid, masked), labels, masked)
        return torch.where(valid[..., None], self.predict(self.norm(tokens)), 0).flatten(1, 2)

    def embed(self, features: Tensor, valid: Tensor, masked: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, h, w, width). Features that must not be used are set to zero first, so that not even NaN
        reaches a gradient."""
        seen = valid if self.mask_token is None else valid & ~masked
        return self.project(torch.where(seen[..., None], features.permute(0, 2, 3, 1), 0))


class ClassConvDecoder(_ClassDecoder):
    """ConvNeXt blocks (Liu et al. 2022, arXiv 2201.03545) whose depthwise convolution only sees the class of the centre.

    Args:
        in_channels: channels C of the features.
        patch_size: pixels p per side of a token.
        num_classes: number of classes K; 1, with all labels zero, gives a class-blind decoder.
        width: channels of the blocks.
        depth: number of blocks.
        kernel_size: side of the depthwise convolution, odd.
        mask_token: replace the features of masked tokens by a learned token.
        image_channels: channels c of the images.
        checkpointing: keep only the inputs of the blocks' MLPs for the backward pass, which computes the rest again.
    """

    def __init__(
        self,
        in_channels: int,
        patch_size: int,
        *,
        num_classes: int,
        width: int,
        depth: int,
        kernel_size: int,
        mask_token: bool = True,
        image_channels: int = 3,
        checkpointing: bool = False,
    ):
        if kernel_size % 2 == 0:
            raise ValueError(f"ClassConvDecoder: kernel_size is {kernel_size}, expected an odd number")
        super().__init__(in_channels, patch_size, num_classes, width, mask_token, image_channels)
        self.blocks = nn.ModuleList([_ConvBlock(width, kernel_size, checkpointing) for _ in range(depth)])

    def mix(self, tokens: Tensor, labels: Tensor, masked: Tensor) -> Tensor:
        if self.mask_token is not None:
            tokens = torch.where(masked[..., None], self.mask_token.to(tokens.dtype), tokens)
        for block in self.blocks:
            tokens = block(tokens, labels, self.num_classes)
        return tokens

    @torch.no_grad()
    def in_reach(self, labels: Tensor, masked: Tensor) -> Tensor:
        """(B, h, w) bool, the tokens whose pixels are predicted from a visible one; arguments as of `forward`."""
        reached = _valid(labels, self.num_classes) & ~masked
        window = torch.ones(1, *self.blocks[0].weight.shape[1:], device=labels.device)
        for _ in self.blocks:
            near = same_class_conv2d(reached[:, None].float(), labels, window, num_classes=self.num_classes)
            reached = near[:, 0] > 0
        return reached

    def mix_one_class(self, tokens: Tensor, own: Tensor, masked: Tensor) -> Tensor:
        """`mix` as a decoder of one class does it, with ordinary layers; used at the tokens of `own` only."""
        if self.mask_token is not None:
            tokens = torch.where(masked[..., None], self.mask_token, tokens)
        for block in self.blocks:
            x = torch.where(own[..., None], tokens, 0).permute(0, 3, 1, 2)
            weight = block.weight[:, None]
            x = F.conv2d(x, weight, block.bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
            tokens = tokens + block.mlp(x.permute(0, 2, 3, 1))
        return tokens


class _ConvBlock(nn.Module):
    def __init__(self, width, kernel_size, checkpointing):
        super().__init__()
        depthwise = nn.Conv2d(width, width, kernel_size, groups=width)  # gives the usual initialisation
        self.weight = nn.Parameter(depthwise.weight.detach()[:, 0].clone())
        self.bias = nn.Parameter(depthwise.bias.detach())
        self.mlp, self.checkpointing = _mlp(width), checkpointing

    def forward(self, tokens, labels, num_classes):
        x = tokens.permute(0, 3, 1, 2)  # a channels-last view, without a copy
        x = same_class_conv2d(x, labels, self.weight, self.bias, num_classes=num_classes)
        return tokens + _call(self.mlp, x.permute(0, 2, 3, 1), self.checkpointing)


class ClassAttentionDecoder(_ClassDecoder):
    """Pre-norm transformer blocks in which a token attends to the tokens of its own image and class.

    Args:
        in_channels, patch_size, num_classes, width, depth, mask_token, image_channels, checkpointing: see
            `ClassConvDecoder`.
        num_heads: attention heads; `width` must be a multiple of this number and of 4.
        attention: what computes the attention, one of `cmim.models.attention.ATTENTIONS`.
    """

    def __init__(
        self,
        in_channels: int,
        patch_size: int,
        *,
        num_classes: int,
        width: int,
        depth: int,
        num_heads: int,
        attention: str = "class_attention",
        mask_token: bool = True,
        image_channels: int = 3,
        checkpointing: bool = False,
    ):
        if width % num_heads or width % 4:
            raise ValueError(
                f"ClassAttentionDecoder: width is {width}, expected a multiple of num_heads {num_heads} and of 4"
            )
        super().__init__(in_channels, patch_size, num_classes, width, mask_token, image_channels)
        self.attention = attention
        self.blocks = nn.ModuleList([_AttentionBlock(width, num_heads, checkpointing) for _ in range(depth)])

    def mix(self, tokens: Tensor, labels: Tensor, masked: Tensor) -> Tensor:
        batch, height, width, channels = tokens.shape
        layout = pack_classes(labels.flatten(1), masked.flatten(1), self.num_classes)
        packed = gather_class_tokens(
            tokens.flatten(1, 2), layout, mask_token=self.mask_token, position=sine_cosine_positions(tokens)
        )
        attend = ATTENTIONS[self.attention](layout)
        for block in self.blocks:
            packed = block(packed, attend)
        return scatter_class_tokens(packed, layout).view(batch, height, width, channels)

    @torch.no_grad()
    def in_reach(self, labels: Tensor, masked: Tensor) -> Tensor:
        """(B, h, w) bool, the tokens whose pixels are predicted from a visible one; arguments as of `forward`."""
        tokens, hidden = labels.flatten(1), masked.flatten(1)
        count = class_centroids(masked[:, None].float(), tokens, hidden, self.num_classes).count
        return of_visible_classes(tokens, count[:, :, 0]).view_as(labels)

    def mix_one_class(self, tokens: Tensor, own: Tensor, masked: Tensor) -> Tensor:
        """`mix` as a decoder of one class does it, with ordinary layers; used at the tokens of `own` only."""
        batch, height, width, channels = tokens.shape
        if self.mask_token is not None:
            tokens = torch.where(masked[..., None], self.mask_token, tokens)
        tokens = tokens.flatten(1, 2) + sine_cosine_positions(tokens)
        own = own.flatten(1)
        # Tokens outside the class attend to themselves, because a softmax over no tokens would be NaN.
        visible = own[:, None, None, :] | torch.eye(height * width, dtype=torch.bool, device=own.device)

        def attention(q, k, v):
            q, k, v = (torch.where(own[:, None, :, None], x, 0) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)

        for block in self.blocks:
            tokens = block(tokens, attention)
        return tokens.view(batch, height, width, channels)


class _AttentionBlock(nn.Module):
    def __init__(self, width, num_heads, checkpointing):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)
        self.mlp, self.checkpointing = _mlp(width), checkpointing

    def forward(self, tokens, attention):
        """tokens (B, N, width); `attention` mixes q, k, v (B, heads, N, width / heads)."""
        q, k, v = self.qkv(self.norm(tokens)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        tokens = tokens + self.merge(attention(q, k, v).transpose(1, 2).flatten(2))
        return tokens + _call(self.mlp, tokens, self.checkpointing)


def of_visible_classes(labels: Tensor, visible: Tensor) -> Tensor:
    """(B, N) bool, the tokens whose class has a visible token in their image.

    Args:
        labels: (B, N) class of each token; values outside [0, K) are none.
        visible: (B, K) number of visible tokens of each class.
    """
    valid = _valid(labels, visible.shape[1])
    return valid & (visible > 0).gather(1, torch.where(valid, labels, 0).long())


def decode_per_class(decoder: nn.Module, features: Tensor, labels: Tensor, masked: Tensor) -> Tensor:
    """The definition of the result of `decoder`, which is slow: one pass per class with ordinary layers.

    In the pass of class k, all tokens of other classes are set to zero before every operation that mixes tokens, and the
    output is kept at the tokens of class k. Arguments and result are those of `decoder(features, labels, masked)`.
    """
    embedded = decoder.embed(features, _valid(labels, decoder.num_classes), masked)
    batch, height, width, _ = embedded.shape
    pixels = embedded.new_zeros(batch, height, width, decoder.predict.out_features)
    if labels.numel() == 0:  # F.conv2d refuses an empty grid
        return pixels.flatten(1, 2)
    for k in range(decoder.num_classes):
        own = labels.long() == k
        tokens = decoder.mix_one_class(embedded, own, masked)
        pixels = torch.where(own[..., None], decoder.predict(decoder.norm(tokens)), pixels)
    return pixels.flatten(1, 2)


def build_reconstruction(
    settings: ReconstructionSettings, in_channels: int, patch_size: int, num_classes: int, image_channels: int = 3
) -> nn.Module:
    """The decoder of a `ReconstructionSettings`."""
    common = dict(
        num_classes=num_classes, width=settings.width, depth=settings.depth, mask_token=settings.mask_token,
        image_channels=image_channels, checkpointing=settings.checkpointing,
    )  # fmt: skip
    if settings.decoder == "conv":
        return ClassConvDecoder(in_channels, patch_size, kernel_size=settings.kernel_size, **common)
    return ClassAttentionDecoder(
        in_channels, patch_size, num_heads=settings.num_heads, attention=settings.attention, **common
    )


def receptive_warning(depth: int, kernel_size: int, block: int, stride: int) -> str | None:
    """A warning if visible tokens are outside the receptive field of many masked tokens in the conv decoder, else None.

    Args:
        depth, kernel_size: of `ClassConvDecoder`; its receptive field is depth x (kernel_size // 2) tokens to each side.
        block: side of a mask block in pixels. A token inside a cluster of hidden blocks needs a reach of about 1.25 blocks.
        stride: pixels per side of a token.
    """
    reach, needed = depth * (kernel_size // 2), 1.25 * block / stride
    if reach >= needed:
        return None
    return (
        f"the reconstruction decoder reaches {reach} tokens, but tokens inside mask blocks of {block // stride} need "
        f"about {needed:g}: many cannot see a visible token (raise reconstruction.depth or reconstruction.kernel_size)"
    )


def sine_cosine_positions(tokens: Tensor) -> Tensor:
    """Fixed positions (h w, width) for tokens (B, h, w, width), float32 (float64 for float64).

    Each of these has a quarter of the channels: sine and cosine of the row and of the column, with wavelengths from
    2 pi to just under 20,000 pi tokens (Vaswani et al. 2017, arXiv 1706.03762, in two dimensions as of MAE, arXiv
    2111.06377).
    """
    _, height, width, channels = tokens.shape
    quarter = channels // 4
    exponent = torch.arange(quarter, device=tokens.device, dtype=torch.float64) / quarter
    frequency = 10_000.0**-exponent
    rows = torch.arange(height, device=tokens.device)[:, None, None].expand(-1, width, -1) * frequency
    columns = torch.arange(width, device=tokens.device)[:, None].expand(height, -1, -1) * frequency
    position = torch.cat([rows.sin(), rows.cos(), columns.sin(), columns.cos()], dim=-1)
    return position.flatten(0, 1).to(torch.promote_types(tokens.dtype, torch.float32))


def _mlp(width):
    """The MLP of a block with the LayerNorm before it."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def _call(module, x, checkpointing):
    """module(x); with `checkpointing`, x and the parameters are all that is kept for the backward pass."""
    if not (checkpointing and torch.is_grad_enabled()):
        return module(x)
    # The backward pass computes with these parameters, even if by then the module has others: so it is where the decoder
    # itself is called by functional_call. There are no random numbers to restore, and to read their state would wait for
    # the device.
    compute = functools.partial(functional_call, module, dict(module.named_parameters()))
    return checkpoint(compute, x, use_reentrant=False, preserve_rng_state=False)


def _valid(labels, num_classes):
    labels = labels.long()  # PyTorch wraps the bound of `uint8 < 300` to 44
    return (labels >= 0) & (labels < num_classes)
