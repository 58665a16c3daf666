import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cmim.models.build import build_segmenter
from cmim.models.deeplabv3plus import AtrousPyramid, DeepLabV3PlusDecoder
from cmim.settings import IMAGENET_MEAN, IMAGENET_STD, ModelSettings


def tiny(encoder="test_byobnet", output_stride=16, **options):
    settings = dict(weights="none", decoder_width=8, low_level_width=4, atrous_rates=(1, 2)) | options
    settings = ModelSettings(encoder=encoder, output_stride=output_stride, **settings)
    return build_segmenter(settings, 3, IMAGENET_MEAN, IMAGENET_STD)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_parameter_count_of_the_published_network():
    """The 59.5 M of UniMatch's DeepLabV3+ with ResNet-101, counted by hand: convolutions before BatchNorm have no
    bias, BatchNorm has two parameters a channel."""

    def conv(inputs, outputs, size):
        return inputs * outputs * size * size + 2 * outputs

    stem = conv(3, 64, 3) + conv(64, 64, 3) + conv(64, 128, 3)
    encoder, channels = stem, 128
    for width, blocks in ((64, 3), (128, 4), (256, 23), (512, 3)):
        encoder += conv(channels, 4 * width, 1)  # the shortcut of the first block
        for _ in range(blocks):
            encoder += conv(channels, width, 1) + conv(width, width, 3) + conv(width, 4 * width, 1)
            channels = 4 * width
    pyramid = 2 * conv(2048, 256, 1) + 3 * conv(2048, 256, 3) + conv(5 * 256, 256, 1)
    fuse = conv(256, 48, 1) + conv(48 + 256, 256, 3) + conv(256, 256, 3)
    head = 256 * 21 + 21

    with torch.device("meta"):
        net = build_segmenter(ModelSettings(weights="none"), 21, IMAGENET_MEAN, IMAGENET_STD)
    assert parameters(net.encoder) == encoder == 42_623_936
    assert parameters(net.decoder) == pyramid + fuse
    assert parameters(net) == encoder + pyramid + fuse + head == 59_468_085
    assert not any(isinstance(m, nn.Dropout | nn.Dropout2d) for m in net.modules())


def test_the_last_stage_trades_stride_for_dilation():
    with torch.device("meta"):
        net = build_segmenter(ModelSettings(encoder="resnet50s", weights="none"), 2, IMAGENET_MEAN, IMAGENET_STD)
    layer4 = [m for n, m in net.encoder.named_modules() if n.startswith("layer4") and n.endswith("conv2")]
    assert [(m.stride, m.dilation) for m in layer4] == [((1, 1), (1, 1)), ((1, 1), (2, 2)), ((1, 1), (2, 2))]
    layer3 = [m for n, m in net.encoder.named_modules() if n.startswith("layer3") and n.endswith("conv2")]
    assert all(m.dilation == (1, 1) for m in layer3) and layer3[0].stride == (2, 2)


def test_pyramid_by_hand():
    """Every branch is a convolution, BatchNorm and ReLU; the mean of the map joins as a constant map, last."""
    torch.manual_seed(0)
    pyramid = AtrousPyramid(3, 4, (1, 2)).double()
    for m in pyramid.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.weight, m.bias, m.running_mean):
                nn.init.normal_(t)
            nn.init.uniform_(m.running_var, 0.5, 2)
    pyramid.eval()
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64)

    def layer(sequence, x, padding=0, dilation=1):
        conv, norm, _ = sequence
        x = F.conv2d(x, conv.weight, padding=padding, dilation=dilation)
        x = (x - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + norm.eps).sqrt()
        return (x * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp(min=0)

    maps = [layer(pyramid.branches[0], x)] + [layer(pyramid.branches[i], x, i, i) for i in (1, 2)]
    maps.append(layer(pyramid.pool, x.mean((2, 3), keepdim=True)).expand(-1, -1, 5, 7))
    torch.testing.assert_close(pyramid(x), layer(pyramid.project, torch.cat(maps, 1)))


def test_decoder_aligns_corners():
    """With the map at stride 4 silenced and every layer the identity, the feature is the upsampled pyramid."""
    decoder = DeepLabV3PlusDecoder(2, 3, width=2, low_level_width=1, atrous_rates=()).double().eval()
    decoder.pyramid = nn.Identity()
    decoder.fuse = nn.Identity()
    low, deep = torch.zeros(1, 3, 5, 7, dtype=torch.float64), torch.rand(1, 2, 3, 4, dtype=torch.float64)
    feature = decoder((low, deep))[:, 1:]
    assert torch.equal(feature[..., ::4, ::6], deep[..., ::2, ::3])  # the four corners are kept
    torch.testing.assert_close(feature[..., ::2, ::2], deep)  # 5 x 7 has exactly a cell between each two of 3 x 4


@pytest.mark.parametrize(
    ("encoder", "output_stride"),
    [("test_byobnet", 8), ("test_byobnet", 16), ("test_resnet", 16), ("test_efficientnet", 16), ("test_convnext", 8)],
)
def test_any_encoder_and_image_size(encoder, output_stride):
    net = tiny(encoder, output_stride).to(memory_format=torch.channels_last).eval()
    images = torch.randn(1, 3, 50, 67).to(memory_format=torch.channels_last)
    maps = net.encode(images)
    assert len(maps) == 2
    low_level = (12, 16) if "convnext" in encoder else (13, 17)  # a patch stem drops what is less than a patch
    assert maps[0].shape[-2:] == low_level
    assert maps[1].shape[1:] == (net.encoder_channels, *(-(-side * 4 // output_stride) for side in low_level))
    feature = net.decode(maps)
    assert feature.shape == (1, 8, *low_level) and feature.is_contiguous(memory_format=torch.channels_last)
    assert net(images).shape == (1, 3, *low_level)


def test_channels_last_reaches_every_convolution():
    net = tiny().to(memory_format=torch.channels_last).train()
    met = []
    for m in net.decoder.modules():
        if isinstance(m, nn.Conv2d):
            m.register_forward_pre_hook(lambda _, x: met.append(x[0].is_contiguous(memory_format=torch.channels_last)))
    net(torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last))
    assert len(met) == 8 and all(met)


def test_gradients_reach_every_parameter():
    net = tiny().train()
    net(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
