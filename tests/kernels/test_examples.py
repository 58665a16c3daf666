"""The programs of kernels/examples run, and their losses are the published ones."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cmim_kernels import class_centroids, pack_classes, random_mask

EXAMPLES = Path(__file__).parent.parent.parent / "kernels" / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_it_learns(name, capsys):
    load(name).main(steps=21)
    losses = [float(line.split()[3]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 2 and losses[-1] < 0.8 * losses[0]


@pytest.fixture
def images():
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def patchify(images, p):
    """(B, h w, p p 3), entries (row, column, channel)."""
    batch, channels, height, width = images.shape
    patches = images.view(batch, channels, height // p, p, width // p, p)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, p * p * channels)


def mask_of(images, p, ratio, block=1):
    side = images.shape[-1] // p
    return random_mask(len(images), side, side, ratio, block=block, generator=torch.Generator().manual_seed(1))


def test_mae_loss_is_the_published_one(images):
    mae, masked = load("mae"), mask_of(images, 8, 0.75)
    prediction = torch.randn(3, 64, 192)
    target = patchify(images, 8)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    error = ((prediction - target) ** 2).mean(-1)
    hidden = masked.flatten(1).float()
    torch.testing.assert_close(mae.mae_loss(prediction, images, masked, 8), (error * hidden).sum() / hidden.sum())


def test_mae_loss_is_that_of_transformers(images):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig(
        image_size=64, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=16,
        norm_pix_loss=True,
    )  # fmt: skip
    output = transformers.ViTMAEForPreTraining(config).eval()(images)
    masked = output.mask.bool().view(3, 8, 8)
    assert masked.sum() == 3 * 48
    torch.testing.assert_close(load("mae").mae_loss(output.logits, images, masked, 8), output.loss)


def test_mae_keeps_and_restores_by_ids(images):
    """Packing one class is MAE's shuffle: ids to keep, ids to restore, mask tokens in the gaps."""
    mae, masked = load("mae"), mask_of(images, 8, 0.75)
    torch.manual_seed(0)
    net = mae.MaskedAutoencoder().eval()
    tokens = net.embed(images).flatten(2).transpose(1, 2) + net.position
    shuffle = masked.flatten(1).long().argsort(stable=True)
    restore = shuffle.argsort()
    visible = tokens.gather(1, shuffle[:, :16, None].expand(-1, -1, 64))
    encoded = net.narrow(net.encoder(visible))
    everything = torch.cat([encoded, net.mask_token.expand(3, 48, -1)], 1).gather(1, restore[..., None].expand(-1, -1, 48))
    expected = net.predict(net.decoder(everything + net.decoder_position))
    torch.testing.assert_close(net(images, masked, num_masked=48), expected)


def test_simmim_loss_is_the_published_one(images):
    simmim, masked = load("simmim"), mask_of(images, 4, 0.6, block=4)
    prediction = torch.randn(3, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    hidden = masked.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].float()
    expected = (F.l1_loss(prediction, images, reduction="none") * hidden).sum() / (hidden.sum() + 1e-5) / 3
    torch.testing.assert_close(simmim.simmim_loss(prediction, images, masked, 4), expected)


def test_class_wise_decoding_mixes_no_classes(images):
    example, masked = load("class_wise"), mask_of(images, 4, 0.6, block=2)
    torch.manual_seed(0)
    decoder = example.ClassWiseDecoder(64, 4, 256)
    labels = torch.randint(0, 4, (3, 256), generator=torch.Generator().manual_seed(2))
    layout = pack_classes(labels, masked.flatten(1), 3)  # class 3 is unknown
    tokens = torch.randn(3, 256, 64)
    before = decoder(tokens, layout)
    tokens[labels == 1] = torch.nan
    after = decoder(tokens, layout)
    assert torch.equal(before[labels != 1], after[labels != 1])
    assert before[labels == 0].any()


def test_class_wise_losses_by_hand(images):
    example, masked = load("class_wise"), mask_of(images, 4, 0.6, block=2)
    torch.manual_seed(0)
    decoder, features = example.ClassWiseDecoder(64, 4, 256), torch.randn(3, 64, 16, 16)
    labels = torch.randint(0, 4, (3, 16, 16), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    classes = labels.repeat_interleave(4, 1).repeat_interleave(4, 2)
    pixels, distance = example.class_wise_losses(decoder, features, images, classes, masked, 3, 4)
    counted = masked.flatten(1) & (labels.flatten(1) < 3)
    prediction = decoder(features.flatten(2).transpose(1, 2), pack_classes(labels.flatten(1), masked.flatten(1), 3))
    torch.testing.assert_close(pixels, (prediction - patchify(images, 4)).abs().mean(-1)[counted].mean())
    centroids = class_centroids(features, labels, masked, 3).mean
    torch.testing.assert_close(distance, (1 - F.cosine_similarity(centroids[:, :, 0], centroids[:, :, 1], dim=-1)).mean())
