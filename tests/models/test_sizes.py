"""What sides of images networks take: measured on several shapes, or refused."""

import pytest
import torch

from cmim.errors import UserError
from cmim.models.build import build_segmenter, geometry
from cmim.settings import ModelSettings

pytest.importorskip("segmentation_models_pytorch")
MEAN, STD = (0.5,) * 3, (0.25,) * 3


def settings(encoder, arch="unet"):
    return ModelSettings(arch=f"smp:{arch}/{encoder}", weights="none")


@pytest.mark.parametrize(
    "encoder, multiple", [("resnet18", 32), ("tu-maxvit_pico_rw_256", 256), ("tu-halonet26t", 256), ("tu-nextvit_small", 32)]
)
def test_the_multiple_is_one_that_works(encoder, multiple):
    assert geometry(settings(encoder)).multiple == multiple


def test_images_of_the_multiple_pass():
    net = build_segmenter(settings("tu-halonet26t"), 3, MEAN, STD).eval()
    with torch.inference_mode():
        assert net(torch.zeros(1, 3, 256, 512)).shape == (1, 3, 256, 512)


@pytest.mark.parametrize("encoder", ["tu-botnet26t_256", "tu-mvitv2_tiny"])
def test_networks_of_one_size_are_refused(encoder):
    with pytest.raises(UserError, match=rf"model.arch: .*{encoder}.*; choose another encoder"):
        build_segmenter(settings(encoder), 3, MEAN, STD)
