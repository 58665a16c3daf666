"""A masked autoencoder (MAE, He et al. 2022, arXiv 2111.06377) on `cmim_kernels`.

    python kernels/examples/mae.py

A mask is one class in which every token is visible or masked: packing it gives MAE's shuffle. The encoder sees the
visible tokens, the decoder all of them with a mask token in the gaps, and the loss compares normalised patches where
they were hidden.
"""

import torch
from torch import nn

from cmim_kernels import gather_class_tokens, masked_patch_loss, pack_classes, random_mask, scatter_class_tokens


class MaskedAutoencoder(nn.Module):
    def __init__(self, image_size=64, patch_size=8, width=64, depth=2, decoder_width=48, decoder_depth=1, num_heads=4):
        super().__init__()
        self.patch_size, tokens = patch_size, (image_size // patch_size) ** 2
        self.embed = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.position = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.encoder = transformer(width, depth, num_heads)
        self.narrow = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.randn(decoder_width) * 0.02)
        self.decoder_position = nn.Parameter(torch.randn(tokens, decoder_width) * 0.02)
        self.decoder = transformer(decoder_width, decoder_depth, num_heads)
        self.predict = nn.Linear(decoder_width, patch_size**2 * 3)

    def forward(self, images, masked, num_masked):
        """images (B, 3, H, W) float, masked (B, h, w) bool with `num_masked` tokens hidden in every image -> pixels of
        every patch, (B, h w, p p 3)."""
        layout = pack_classes(torch.zeros_like(masked, dtype=torch.uint8).flatten(1), masked.flatten(1), 1)
        tokens = self.embed(images).flatten(2).transpose(1, 2) + self.position
        visible = gather_class_tokens(tokens, layout, length=tokens.shape[1] - num_masked)
        encoded = self.narrow(self.encoder(visible))
        everything = scatter_class_tokens(encoded, layout, mask_token=self.mask_token, position=self.decoder_position)
        return self.predict(self.decoder(everything))


def transformer(width, depth, num_heads):
    block = nn.TransformerEncoderLayer(width, num_heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
    return nn.TransformerEncoder(block, depth, nn.LayerNorm(width), enable_nested_tensor=False)


def mae_loss(prediction, images, masked, patch_size):
    """Mean squared error of normalised patches, over hidden ones."""
    return masked_patch_loss(
        prediction, images, masked.flatten(1), patch_size=patch_size, distance="mse", normalize=True
    ).loss


def main(steps=100):
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = MaskedAutoencoder().to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    coarse = torch.rand(16, 3, 8, 8, device=device)
    images = nn.functional.interpolate(coarse, size=64, mode="bicubic")
    for step in range(steps):
        masked = random_mask(16, 8, 8, 0.75, device=device)
        loss = mae_loss(net(images, masked, num_masked=48), images, masked, net.patch_size)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:3}  loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
