"""What every network promises, whatever its architecture and encoder."""

import copy
import warnings
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F

from cmim.models.build import ARCHITECTURES, build_segmenter, geometry, normalisation
from cmim.settings import ModelSettings

TINY_DEEPLAB = dict(decoder_width=8, low_level_width=4, atrous_rates=(1, 2))
RESNET = "tu-test_resnet.r160_in1k"
MODELS = {
    # name: (side of the images, settings)
    "deeplabv3plus-byobnet": (64, dict(encoder="test_byobnet", **TINY_DEEPLAB)),
    "deeplabv3plus-resnet-8": (64, dict(encoder="test_resnet", output_stride=8, **TINY_DEEPLAB)),
    "deeplabv3plus-convnext": (64, dict(encoder="test_convnext", **TINY_DEEPLAB)),
    "dpt-16": (64, dict(arch="dpt", encoder="test_vit")),
    "dpt-14-rope": (56, dict(arch="dpt", encoder="eva02_tiny_patch14_224", decoder_width=8)),
    **{
        f"smp-{arch}": (128 if arch == "pan" else 64, dict(arch=f"smp:{arch}/{RESNET}"))
        for arch in ("unet", "unetplusplus", "manet", "linknet", "fpn", "pspnet", "pan", "deeplabv3", "deeplabv3plus")
    },
    "smp-upernet-empty-map": (64, dict(arch="smp:upernet/tu-test_convnext.r160_in1k")),
    "smp-segformer-own-encoder": (64, dict(arch="smp:segformer/mit_b0")),
    "smp-pspnet-cut-encoder": (64, dict(arch="smp:pspnet/resnet18")),
}
SMALL = ("deeplabv3plus-byobnet", "dpt-16", "smp-fpn", "smp-upernet-empty-map")
COMPILED = ("deeplabv3plus-resnet-8", "dpt-16", "smp-pspnet-cut-encoder", "smp-upernet-empty-map")
OWN_LAYOUT = ("smp-fpn", "smp-segformer-own-encoder")
"""Whose code in smp, a stack and a reshape, ends the layout of channels-last images."""


def arch_of(name):
    return MODELS[name][1].get("arch", "deeplabv3plus")


def test_every_architecture_is_among_them():
    for table in (MODELS, COMPILED):
        missing = set(ARCHITECTURES) - {arch_of(name).partition(":")[0] for name in table}
        assert not missing, "MODELS or COMPILED above has no network of these architectures"


@pytest.mark.parametrize("name", [n for n in MODELS if "smp" not in n or "/tu-" in arch_of(n)])  # smp's own ask the network
def test_it_is_known_what_pretrained_weights_expect(name):
    """The name of the encoder is read once more for it; without an answer the images would be normalised as ImageNet's."""
    assert normalisation(settings(name).model_copy(update={"weights": "timm"}), 3) is not None


def settings(name, **more):
    return ModelSettings(weights="none", **MODELS[name][1], **more)


def build(name, classes=3, channels=3, **more):
    torch.manual_seed(0)
    return build_segmenter(settings(name, **more), classes, (0.5,) * channels, (0.25,) * channels)


@lru_cache(maxsize=1)  # pytest groups the tests of a module-wide parameter
def built(name):
    return build(name)


@pytest.fixture(params=MODELS, scope="module")
def name(request):
    return request.param


@pytest.fixture
def net(name):
    return copy.deepcopy(built(name)).train()


def images_of(name, channels=3, batch=2):
    side = MODELS[name][0]
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(1))


def learns(net):
    return [p for p in net.parameters() if p.requires_grad]


def test_shapes_are_those_of_the_geometry(name, net):
    side, form = MODELS[name][0], geometry(settings(name))
    assert (net.feature_stride, net.encoder_stride, net.size_multiple, net.fine_stride) == form
    images = images_of(name)
    maps = net.encode(images)
    assert isinstance(maps, tuple) and all(m.shape[:1] == (2,) and m.shape[1] > 0 and m.is_floating_point() for m in maps)
    assert all(m.data_ptr() != images.data_ptr() for m in maps)  # dropout of features must not meet the image
    fine = side // form.fine_stride
    assert maps[net.fine_map].shape == (2, net.fine_channels, fine, fine)
    assert form.fine_stride >= 4 or form.fine_stride == form.encoder_stride
    assert maps[-1].shape == (2, net.encoder_channels, side // form.encoder_stride, side // form.encoder_stride)
    feature = net.decode(maps)
    cells = int(side / form.feature_stride)
    assert feature.shape == (2, net.feature_channels, cells, cells)
    assert net.classify(feature).shape == (2, 3, cells, cells)


def test_the_parts_compose(name, net):
    net.eval()
    images = images_of(name)
    with torch.no_grad():
        assert torch.equal(net(images), net.classify(net.decode(net.encode(images))))


def test_a_gradient_reaches_whatever_learns(name, net):
    net(images_of(name)).square().mean().backward()
    assert len(learns(net)) > 10 and all(p.grad is not None and p.grad.isfinite().all() for p in learns(net))
    still = [key for key, p in net.named_parameters() if not p.requires_grad]
    assert bool(still) == (name == "smp-pspnet-cut-encoder")  # layers past its last map
    assert all(key.startswith(("encoder.layer3", "encoder.layer4")) for key in still)


def test_other_sizes_are_refused_where_they_do_not_fit(name, net):
    side, multiple = MODELS[name][0], net.size_multiple
    images = torch.randn(2, 3, side, side + 1)
    if multiple == 1:
        assert net(images).shape[:3] == (2, 3, side // 4)
        return
    with pytest.raises(ValueError, match=rf"images are {side} x {side + 1}, expected multiples of {multiple}"):
        net(images)
    wide = torch.randn(2, 3, side, side + multiple)
    assert net(wide).shape[2:] == (side / net.feature_stride, (side + multiple) / net.feature_stride)


@pytest.mark.parametrize("name", [n for n in MODELS if n not in OWN_LAYOUT])
def test_channels_last_images_keep_their_layout(name):
    net = build(name).train().to(memory_format=torch.channels_last)
    maps = net.encode(images_of(name).to(memory_format=torch.channels_last))
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)
    assert net.decode(maps).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", [n if n in COMPILED else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_it_compiles_into_one_graph(name):
    torch._dynamo.reset()
    images, net = images_of(name), build(name).train()
    eager = copy.deepcopy(net)
    with warnings.catch_warnings(action="ignore"):
        compiled = torch.compile(net, fullgraph=True, dynamic=False, backend="aot_eager")
        torch.manual_seed(2)  # of dropout in some decoders
        got = compiled(images)
    torch.manual_seed(2)
    want = eager(images)
    got.square().mean().backward()
    want.square().mean().backward()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    for p, q in zip(learns(net), learns(eager), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3)


def test_a_state_dict_goes_round(name, net):
    other = build(name)
    for p in other.parameters():
        torch.nn.init.normal_(p)
    other.load_state_dict(net.state_dict())
    images = images_of(name)
    with torch.no_grad():
        assert torch.equal(other.eval()(images), net.eval()(images))


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_and_classes(name, channels):
    net = build(name, classes=7, channels=channels)
    side = MODELS[name][0]
    images = torch.randint(0, 256, (2, channels, side, side), dtype=torch.uint8)
    assert net(net.normalise(images)).shape[1] == 7


def test_a_frozen_encoder_keeps_everything(name):
    net = build(name, freeze_encoder=True).train()
    before = copy.deepcopy(net.encoder.state_dict())
    optimizer = torch.optim.SGD(learns(net), lr=1.0, weight_decay=0.1)
    net(images_of(name)).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(before[key], value) for key, value in net.encoder.state_dict().items())
    assert net.decoder.training and not any(m.training for m in net.encoder.modules())
    assert all(p.grad is not None for p in net.decoder.parameters()) and learns(net.encoder) == []


def whole_encoder(net):
    """The timm model inside."""
    return getattr(net.encoder, "model", net.encoder)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("channels", [3, 1, 4])
def test_weights_from_a_file(name, channels, tmp_path):
    """An encoder saved by itself comes back; its first convolution is adapted to other channels."""
    first = build(name).eval()
    for p in first.encoder.parameters():
        torch.nn.init.normal_(p, std=0.1)
    torch.save(whole_encoder(first).state_dict(), tmp_path / "encoder.pt")
    options = settings(name).model_copy(update={"weights": str(tmp_path / "encoder.pt")})
    second = build_segmenter(options, 3, (0.5,) * channels, (0.25,) * channels).eval()
    adapted = 0
    for key, ours in whole_encoder(second).state_dict().items():
        theirs = whole_encoder(first).state_dict()[key]
        if theirs.shape != ours.shape:
            adapted += 1
            colours = theirs.sum(1, keepdim=True) if channels == 1 else theirs[:, [0, 1, 2, 0]] * 3 / 4
            torch.testing.assert_close(ours, colours)
        else:
            assert torch.equal(theirs, ours), key
    assert adapted == (0 if channels == 3 else 1)


@pytest.mark.parametrize("name", [n for n in MODELS if n.startswith("smp")])
def test_a_network_of_smp_is_what_smp_computes(name):
    import segmentation_models_pytorch as smp

    net = build(name).eval()
    arch, encoder = MODELS[name][1]["arch"].removeprefix("smp:").split("/")
    theirs = smp.create_model(arch, encoder, encoder_weights=None, classes=3).eval()
    names = {"head.weight": "segmentation_head.0.weight", "head.bias": "segmentation_head.0.bias"}
    theirs.load_state_dict({names.get(key, key): value for key, value in net.state_dict().items()})
    images = images_of(name)
    with torch.no_grad():
        logits = F.interpolate(net(images), size=images.shape[-2:], mode="bilinear", align_corners=net.align_corners)
        torch.testing.assert_close(logits, theirs(images), rtol=1e-4, atol=1e-4)
