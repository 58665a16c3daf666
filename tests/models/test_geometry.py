"""Strides without a network, and what is said of networks that do not exist; names and files of smp."""

import builtins
import subprocess
import sys

import pytest
import torch

from cmim.errors import UserError
from cmim.models.build import build_segmenter, geometry
from cmim.models.geometry import Geometry
from cmim.settings import IMAGENET_MEAN, IMAGENET_STD, ModelSettings

TU = "tu-test_resnet.r160_in1k"


def build(**options):
    return build_segmenter(ModelSettings(**{"weights": "none"} | options), 3, IMAGENET_MEAN, IMAGENET_STD)


@pytest.mark.parametrize(
    ("options", "form"),
    [
        ({}, (4, 16, 1, 4)),
        ({"output_stride": 8}, (4, 8, 1, 4)),
        ({"arch": "dpt", "encoder": "vit_base_patch14_dinov2.lvd142m"}, (1.75, 14, 14, 14)),
        ({"arch": "dpt", "encoder": "vit_giant_patch14_reg4_dinov2.lvd142m"}, (1.75, 14, 14, 14)),
        ({"arch": "dpt", "encoder": "vit_small_patch16_dinov3.lvd1689m"}, (2, 16, 16, 16)),
        ({"arch": f"smp:unet/{TU}"}, (1, 32, 32, 4)),
        ({"arch": f"smp:pan/{TU}"}, (4, 16, 16, 4)),
        ({"arch": f"smp:pspnet/{TU}"}, (8, 8, 8, 4)),
    ],
)
def test_geometry(options, form):
    assert geometry(ModelSettings(**options)) == Geometry(*form)


def test_whole_strides_are_integers():
    assert isinstance(geometry(ModelSettings(arch="dpt", encoder="test_vit")).feature_stride, int)


def test_reading_settings_imports_no_library_of_networks():
    code = "import sys; from cmim.config import config_from; config_from({'data': {'format': 'shapes'}}, 'x'); "
    code += "assert not {'timm', 'segmentation_models_pytorch'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_asking_draws_no_random_numbers():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    geometry(ModelSettings(arch="smp:fpn/mit_b0"))  # of the few that are built on the CPU for it
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("deeplabv3", "model.arch: unknown architecture deeplabv3; did you mean deeplabv3plus?"),
        ("qqqqq", "unknown architecture qqqqq; expected deeplabv3plus, dpt or smp:ARCH/ENCODER"),
        ("smp:unet", "smp:unet is not of the form smp:ARCH/ENCODER"),
        ("smp:unett/resnet18", r"no unett; did you mean smp:unet/resnet18\?"),
        ("smp:unet/resnet181", r"no encoder resnet181; did you mean smp:unet/resnet18\?"),
        ("smp:unet/convnext_tiny", r"no encoder convnext_tiny; did you mean smp:unet/tu-convnext_tiny\?"),
        ("smp:unet/tu-resnet181", "timm has no model resnet181; did you mean resnet18"),
        ("smp:dpt/tu-vit_base_patch14_dinov2", "give --model.arch dpt --model.encoder vit_base_patch14_dinov2"),
        ("smp:linknet/mit_b0", "cannot build smp:linknet/mit_b0 .Encoder `mit_b0` is not supported for Linknet"),
        ("smp:deeplabv3plus/tu-test_vit", "cannot build smp:deeplabv3plus/tu-test_vit"),
    ],
)
def test_unknown_networks_are_the_same_line_asked_and_built(arch, message):
    with pytest.raises(UserError, match=message) as asked:
        geometry(ModelSettings(arch=arch))
    with pytest.raises(UserError) as built:
        build(arch=arch)
    assert str(asked.value) == str(built.value)


def test_a_missing_library_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("segmentation_models_pytorch"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="pip install segmentation-models-pytorch"):
        build(arch="smp:manet/resnet18")


def test_swin_takes_crops_of_any_size():
    net = build(arch="smp:upernet/tu-swin_tiny_patch4_window7_224").eval()
    with torch.no_grad():
        assert net(torch.randn(1, 3, 64, 96)).shape == (1, 3, 16, 24)


def test_weights_of_an_encoder_of_smp_from_a_file(tmp_path):
    """With a classifier, as its authors publish it."""
    state = build(arch="smp:fpn/resnet18").encoder.state_dict()
    torch.save(state | {"fc.weight": torch.zeros(10, 512), "fc.bias": torch.zeros(10)}, tmp_path / "resnet.pt")
    net = build(arch="smp:pspnet/resnet18", weights=str(tmp_path / "resnet.pt"))
    assert all(torch.equal(value, state[key]) for key, value in net.encoder.state_dict().items())
    del state["conv1.weight"]
    torch.save(state, tmp_path / "resnet.pt")
    with pytest.raises(UserError, match=r"resnet.pt does not fit resnet18: it lacks conv1.weight \(1 in all\)"):
        build(arch="smp:pspnet/resnet18", weights=str(tmp_path / "resnet.pt"))


@pytest.mark.parametrize("encoder", ["resnet18", TU])
def test_weights_of_smp_that_cannot_be_fetched(monkeypatch, tmp_path, encoder):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=f"could not fetch the weights of {encoder}.*--model.weights PATH"):
        build(arch=f"smp:fpn/{encoder}", weights="timm")
