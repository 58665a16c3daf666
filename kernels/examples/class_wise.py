"""Class-wise masked image modelling on `cmim_kernels`: pixels of a hidden token are decoded from its own class only.

    python kernels/examples/class_wise.py

Given features of a masked image and the class of every pixel: tokens are packed by (image, class), attend within their
class, and two losses are taken, of the hidden pixels and of the distance between the hidden and the visible centroid of a
class. The cost does not depend on the number of classes.
"""

import torch
from torch import nn

from cmim_kernels import (
    centroid_distance,
    class_attention,
    class_centroids,
    gather_class_tokens,
    masked_patch_loss,
    pack_classes,
    patch_labels,
    random_mask,
    scatter_class_tokens,
)


class ClassWiseDecoder(nn.Module):
    def __init__(self, width, patch_size, tokens, num_heads=4):
        super().__init__()
        self.num_heads = num_heads
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02)
        self.position = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.norm, self.qkv, self.merge = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.predict = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU())
        self.to_pixels = nn.Linear(4 * width, patch_size**2 * 3)

    def forward(self, tokens, layout):
        """tokens (B, N, width) in their places, `layout` their packing -> pixels (B, N, p p 3); those of
        unknown tokens mean nothing."""
        packed = gather_class_tokens(tokens, layout, mask_token=self.mask_token, position=self.position)
        q, k, v = self.qkv(self.norm(packed)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        packed = packed + self.merge(class_attention(q, k, v, layout).transpose(1, 2).flatten(2))
        return scatter_class_tokens(self.to_pixels(self.predict(packed)), layout)


def class_wise_losses(decoder, features, images, classes, masked, num_classes, patch_size):
    """features (B, C, h, w) of the masked images; images (B, 3, H, W) float; classes (B, H, W), outside [0, num_classes):
    unknown; masked (B, h, w) bool -> reconstruction loss and centroid distance."""
    labels, hidden = patch_labels(classes, patch_size, num_classes).flatten(1), masked.flatten(1)
    layout = pack_classes(labels, hidden, num_classes)
    prediction = decoder(features.flatten(2).transpose(1, 2), layout)
    pixels = masked_patch_loss(prediction, images, hidden, labels, num_classes, patch_size=patch_size)
    centroids = class_centroids(features, labels, hidden, num_classes, layout=layout)
    return pixels.loss, centroid_distance(centroids, min_tokens=2).loss


def main(steps=60):
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    patch_size, side, num_classes = 4, 16, 5
    encoder = nn.Conv2d(3, 64, patch_size, stride=patch_size).to(device)
    decoder = ClassWiseDecoder(64, patch_size, side**2).to(device)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters()], lr=1e-3)
    classes = torch.randint(0, num_classes, (8, 1, 4, 4), device=device).float()
    classes = nn.functional.interpolate(classes, size=64).to(torch.uint8)[:, 0]
    colours = torch.rand(num_classes, 3, device=device)
    images = colours[classes.long()].permute(0, 3, 1, 2) + torch.randn(8, 3, 64, 64, device=device) * 0.1
    for step in range(steps):
        masked = random_mask(8, side, side, 0.6, block=2, device=device)
        hidden = masked.repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)
        features = encoder(torch.where(hidden[:, None], 0, images))
        pixels, distance = class_wise_losses(decoder, features, images, classes, masked, num_classes, patch_size)
        (pixels + 0.1 * distance).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:3}  pixels {pixels.item():.4f}  centroids {distance.item():.4f}")


if __name__ == "__main__":
    main()
