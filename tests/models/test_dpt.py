"""The dense prediction transformer against a plain rendering of its formulas, and the published sizes."""

import pytest
import timm
import torch
import torch.nn.functional as F

from cmim.errors import UserError
from cmim.models.build import build_segmenter
from cmim.models.dpt import DPTDecoder, TransformerEncoder, decoder_widths, taken_layers
from cmim.models.weights import create_transformer
from cmim.settings import IMAGENET_MEAN, IMAGENET_STD, ModelSettings


def dpt(encoder, **options):
    settings = ModelSettings(arch="dpt", encoder=encoder, **{"weights": "none"} | options)
    return build_segmenter(settings, 21, IMAGENET_MEAN, IMAGENET_STD)


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("encoder", "channels", "width", "levels", "published"),
    [
        ("vit_small_patch14_dinov2.lvd142m", 384, 64, (48, 96, 192, 384), 24.8),
        ("vit_base_patch14_dinov2.lvd142m", 768, 128, (96, 192, 384, 768), 97.5),
    ],
)
def test_parameter_count_of_the_published_networks(encoder, channels, width, levels, published):
    """UniMatch V2's network, counted by hand, less its mask token and the residual unit that it never uses."""

    def conv(inputs, outputs, size, bias=True):
        return inputs * outputs * size * size + bias * outputs

    block = 4 * channels * channels + 4 * channels  # attention
    block += 8 * channels * channels + 5 * channels  # MLP
    block += 2 * 2 * channels + 2 * channels  # two LayerNorms, two LayerScales
    transformer = conv(3, channels, 14) + (1 + 1 + 37 * 37) * channels + 12 * block + 2 * channels
    decoder = sum(conv(channels, level, 1) + conv(level, width, 3, bias=False) for level in levels)
    decoder += conv(levels[0], levels[0], 4) + conv(levels[1], levels[1], 2) + conv(levels[3], levels[3], 3)
    unit = 2 * conv(width, width, 3)
    decoder += 4 * (2 * unit + conv(width, width, 1)) + conv(width, width, 3)
    head = conv(width, 21, 1)
    assert round((transformer + channels + decoder + head) / 1e6, 1) == published

    with torch.device("meta"):
        net = dpt(encoder)
    assert count(net.encoder) == transformer
    assert count(net.decoder) == decoder - unit
    assert count(net.head) == head
    assert (net.feature_channels, net.feature_stride, net.encoder_stride, net.size_multiple) == (width, 1.75, 14, 14)


@pytest.mark.parametrize(
    ("channels", "width", "levels"),
    [
        (1024, 256, (256, 512, 1024, 1024)),
        (1536, 384, (1536, 1536, 1536, 1536)),
        (192, 64, (24, 48, 96, 192)),
        (1280, 384, (1536, 1536, 1536, 1536)),
    ],
)
def test_widths(channels, width, levels):
    assert decoder_widths(channels) == (width, levels)


def test_the_width_is_a_setting():
    net = dpt("test_vit", decoder_width=24)
    assert net.feature_channels == 24 and [m.out_channels for m in net.decoder.project] == [8, 16, 32, 64]


@pytest.mark.parametrize(
    ("depth", "layers"), [(12, [2, 5, 8, 11]), (24, [4, 11, 17, 23]), (40, [9, 19, 29, 39]), (6, [0, 2, 3, 5])]
)
def test_taken_layers(depth, layers):
    assert taken_layers(depth) == layers


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "eva02_tiny_patch14_224"])
def test_maps_are_tokens_after_the_final_norm(name):
    """Against timm's own list of all blocks, normalised here."""
    model = create_transformer(name, "none").eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    patch = model.patch_embed.patch_size[0]
    images = torch.randn(2, 3, 3 * patch, 5 * patch)
    with torch.no_grad():
        blocks = model.forward_intermediates(images, intermediates_only=True)
        want = [model.norm(m.flatten(2).mT) for m in (blocks[i] for i in taken_layers(len(blocks)))]
        got = TransformerEncoder(model)(images)
    assert len(got) == 4
    for g, w in zip(got, want, strict=True):
        assert g.shape[2:] == (3, 5)
        torch.testing.assert_close(g.flatten(2).mT, w)


def test_decoder_by_hand():
    """Every step by its formula, in the order of UniMatch V2: the 1 x 1 convolution after the upsampling."""
    torch.manual_seed(0)
    decoder = DPTDecoder(6, width=4, levels=(2, 3, 4, 5)).double()
    maps = [torch.randn(2, 6, 5, 3, dtype=torch.float64) for _ in range(4)]
    weights = dict(decoder.named_parameters())

    def conv(x, name, **options):
        return F.conv2d(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), **options)

    def unit(x, name):
        return x + conv(conv(x.clamp(min=0), f"{name}.first", padding=1).clamp(min=0), f"{name}.second", padding=1)

    levels = [conv(m, f"project.{i}") for i, m in enumerate(maps)]
    for i, factor in ((0, 4), (1, 2)):  # kernel and stride alike: every pixel becomes a tile of its own
        weight, bias = weights[f"resize.{i}.weight"], weights[f"resize.{i}.bias"]
        tiles = torch.einsum("bchw,cdij->bdhiwj", levels[i], weight)
        levels[i] = tiles.reshape(2, -1, 5 * factor, 3 * factor) + bias[:, None, None]
    levels[3] = conv(levels[3], "resize.3", stride=2, padding=1)
    assert [tuple(level.shape[2:]) for level in levels] == [(20, 12), (10, 6), (5, 3), (3, 2)]
    levels = [conv(level, f"narrow.{i}", padding=1) for i, level in enumerate(levels)]

    x, sizes = torch.zeros_like(levels[3]), [(40, 24), (20, 12), (10, 6), (5, 3)]
    for i in (3, 2, 1, 0):
        x = x + (levels[3] if i == 3 else unit(levels[i], f"fuse.{i}.join"))
        x = F.interpolate(unit(x, f"fuse.{i}.refine"), size=sizes[i], mode="bilinear", align_corners=True)
        x = conv(x, f"fuse.{i}.project")
    want = conv(x, "output.0", padding=1).clamp(min=0)
    torch.testing.assert_close(decoder(maps), want)
    assert len([name for name in weights if ".join." in name]) == 3 * 4  # none in the deepest block


def test_names_and_positions_of_the_authors(tmp_path):
    """A checkpoint as DINOv2 publishes it: a mask token, registers, and positions for another image size."""
    theirs = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, img_size=56, depth=4).state_dict()
    state = {key: torch.randn_like(value) for key, value in theirs.items()}
    official = dict(state) | {"mask_token": torch.randn(1, 384), "register_tokens": state["reg_token"]}
    del official["reg_token"]
    official["pos_embed"] = torch.cat([torch.ones(1, 1, 384), state["pos_embed"]], dim=1)
    model = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, img_size=56, depth=4)
    torch.save(official, tmp_path / "dinov2.pth")

    from cmim.models.weights import load_timm_file

    load_timm_file(model, "vit_small_patch14_reg4_dinov2", tmp_path / "dinov2.pth")
    loaded = model.state_dict()
    assert torch.equal(loaded["reg_token"], state["reg_token"]) and torch.equal(loaded["pos_embed"], state["pos_embed"])
    assert torch.equal(loaded["cls_token"], state["cls_token"] + 1)
    assert torch.equal(loaded["blocks.3.mlp.fc1.weight"], state["blocks.3.mlp.fc1.weight"])

    larger = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, img_size=112, depth=4)
    load_timm_file(larger, "vit_small_patch14_reg4_dinov2", tmp_path / "dinov2.pth")
    assert larger.state_dict()["pos_embed"].shape == (1, 64, 384)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("norm.weight"), r"it lacks norm.weight \(1 in all\)"),
        (lambda s: s.update(rubbish=torch.zeros(1)), "it has unknown rubbish"),
        (lambda s: s.update({"blocks.0.norm1.weight": torch.zeros(3)}), "it has other shapes of blocks.0.norm1.weight"),
        (lambda s: s.update(pos_embed=torch.zeros(1, 7, 64)), r"does not fit test_vit"),
    ],
)
def test_a_file_that_does_not_fit(tmp_path, change, message):
    state = timm.create_model("test_vit", num_classes=5).state_dict()
    change(state)
    torch.save(state, tmp_path / "vit.pt")
    with pytest.raises(UserError, match=message):
        dpt("test_vit", weights=str(tmp_path / "vit.pt"))


def test_a_whole_transformer_as_a_file(tmp_path):
    model = timm.create_model("test_vit", num_classes=5)
    torch.save(model.state_dict(), tmp_path / "vit.pt")
    encoder = dpt("test_vit", weights=str(tmp_path / "vit.pt")).encoder.model
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ("vit_base_patch14_dinov3.lvd142m", "no model vit_base_patch14_dinov3.lvd142m; did you mean vit_base_patch1"),
        ("resnet18", "model.encoder: resnet18 cannot serve dpt .*choose a DINOv2"),
        ("swin_tiny_patch4_window7_224", "swin_tiny_patch4_window7_224 is no plain vision transformer"),
    ],
)
def test_encoders_that_cannot_serve(encoder, message):
    with pytest.raises(UserError, match=message):
        dpt(encoder)
