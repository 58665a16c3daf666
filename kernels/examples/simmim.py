"""SimMIM (Xie et al. 2022, arXiv 2111.09886) on `cmim_kernels`.

    python kernels/examples/simmim.py

All tokens go through the encoder, hidden ones as a mask token, and one linear layer predicts an image; the loss is the L1
distance over hidden pixels. The prediction keeps the shape of an image: no patches are formed on either side.
"""

import torch
from torch import nn

from cmim_kernels import masked_patch_loss, random_mask


class SimMIM(nn.Module):
    def __init__(self, image_size=64, patch_size=4, width=64, depth=2, num_heads=4):
        super().__init__()
        self.patch_size, self.side = patch_size, image_size // patch_size
        self.embed = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02)
        self.position = nn.Parameter(torch.randn(self.side**2, width) * 0.02)
        block = nn.TransformerEncoderLayer(width, num_heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(block, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.predict = nn.Sequential(nn.Conv2d(width, 3 * patch_size**2, 1), nn.PixelShuffle(patch_size))

    def forward(self, images, masked):
        """images (B, 3, H, W) float, masked (B, h, w) bool -> (B, 3, H, W)."""
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        tokens = torch.where(masked.flatten(1)[..., None], self.mask_token, tokens) + self.position
        return self.predict(self.encoder(tokens).transpose(1, 2).unflatten(2, (self.side, self.side)))


def simmim_loss(prediction, images, masked, patch_size):
    """Mean absolute error over the hidden pixels."""
    return masked_patch_loss(prediction, images, masked.flatten(1), patch_size=patch_size, distance="l1").loss


def main(steps=60):
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = SimMIM().to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    coarse = torch.rand(16, 3, 8, 8, device=device)
    images = nn.functional.interpolate(coarse, size=64, mode="bicubic")
    for step in range(steps):
        masked = random_mask(16, 16, 16, 0.6, block=4, device=device)  # blocks of 4 x 4 tokens
        loss = simmim_loss(net(images, masked), images, masked, net.patch_size)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:3}  loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
