import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmim.models.pixel_tokens import PixelTokens
from cmim.models.reconstruction import (
    ClassAttentionDecoder,
    ClassConvDecoder,
    build_reconstruction,
    decode_per_class,
    receptive_warning,
    sine_cosine_positions,
)
from cmim.settings import ReconstructionSettings

CHANNELS, PATCH = 6, 2
KINDS = ["conv", "attention"]


def make_decoder(kind, classes=3, mask_token=True, dtype=torch.float64, width=8):
    torch.manual_seed(0)
    options = dict(num_classes=classes, width=width, depth=2, mask_token=mask_token)
    if kind == "conv":
        decoder = ClassConvDecoder(CHANNELS, PATCH, kernel_size=3, **options)
    else:
        decoder = ClassAttentionDecoder(CHANNELS, PATCH, num_heads=2, **options)
    return decoder.to(dtype)


def make_inputs(seed=0, batch=2, height=4, width=5, classes=3, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, CHANNELS, height, width, generator=g, dtype=dtype)
    labels = torch.randint(-1, classes + 1, (batch, height, width), generator=g)
    masked = torch.rand(batch, height, width, generator=g) < 0.5
    return features, labels, masked


def gradients(decode, decoder, features, labels, masked):
    features = features.clone().requires_grad_()
    pixels = decode(features, labels, masked)
    weight = torch.linspace(-1, 1, pixels.numel(), dtype=pixels.dtype).sin().view_as(pixels)
    wanted = [features, *decoder.parameters()]
    return pixels, torch.autograd.grad((pixels * weight).sum(), wanted)


def tokens_of(pixels, where):
    return pixels[where.flatten(1)]


@pytest.mark.parametrize("kind", KINDS)
@given(
    seed=st.integers(0, 99),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    classes=st.integers(1, 4),
    mask_token=st.booleans(),
)
def test_one_pass_equals_one_pass_per_class(kind, seed, height, width, classes, mask_token):
    decoder = make_decoder(kind, classes, mask_token)
    inputs = make_inputs(seed, 2, height, width, classes)
    pixels, grads = gradients(decoder, decoder, *inputs)
    expected, expected_grads = gradients(lambda *a: decode_per_class(decoder, *a), decoder, *inputs)
    assert pixels.shape == (2, height * width, PATCH * PATCH * 3)
    torch.testing.assert_close(pixels, expected, rtol=1e-9, atol=1e-11)
    for name, got, want in zip(["features", *dict(decoder.named_parameters())], grads, expected_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("mask_token", [True, False])
@pytest.mark.parametrize("poison", [1e4, float("inf"), float("nan")])
@pytest.mark.parametrize("kind", KINDS)
def test_no_feature_reaches_another_class(kind, poison, mask_token, per_class):
    decoder = make_decoder(kind, mask_token=mask_token, dtype=torch.float32)
    decode = (lambda *a: decode_per_class(decoder, *a)) if per_class else decoder
    features, labels, masked = make_inputs(dtype=torch.float32)
    clean = decode(features, labels, masked)
    for changed in (labels == 1, labels == -1, labels == 3):
        assert changed.any()
        dirty = decode(torch.where(changed[:, None], poison, features), labels, masked)
        assert torch.equal(tokens_of(dirty, ~changed), tokens_of(clean, ~changed))
    dirty = decode(torch.where((labels == 1)[:, None], poison, features), labels, masked)
    assert not torch.equal(tokens_of(dirty, labels == 1), tokens_of(clean, labels == 1))


@pytest.mark.parametrize("mask_token", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_what_nobody_may_see_reaches_no_gradient(kind, mask_token):
    decoder = make_decoder(kind, mask_token=mask_token)
    features, labels, masked = make_inputs()
    hidden = (masked & mask_token) | (labels < 0) | (labels > 2)
    _, clean = gradients(decoder, decoder, features, labels, masked)
    dirty_features = torch.where(hidden[:, None], float("nan"), features)
    _, dirty = gradients(decoder, decoder, dirty_features, labels, masked)
    for got, want in zip(dirty, clean, strict=True):
        assert torch.equal(got, want)
    assert not dirty[0][hidden[:, None].expand_as(features)].any()


@pytest.mark.parametrize("kind", KINDS)
def test_visible_tokens_of_the_class_reach_masked_ones(kind):
    decoder = make_decoder(kind)
    features, labels, masked = make_inputs()
    labels.fill_(1)
    masked.fill_(True)[:, 1, 2] = False
    clean = decoder(features, labels, masked)
    dirty = decoder(features + 1, labels, masked)
    changed = (clean != dirty).any(-1).view(2, 4, 5)
    assert changed[:, 0, 0].all() and changed[:, 3, 4].all()  # two steps of a 3 x 3 window from (1, 2)
    other = decoder(features[:1], labels[:1], masked[:1])
    torch.testing.assert_close(other, clean[:1])  # images do not mix


@pytest.mark.parametrize("kind", KINDS)
def test_masked_tokens_are_told_apart_by_place_only(kind):
    features, labels, masked = make_inputs()
    labels.zero_()
    decoder = make_decoder(kind)
    everything = torch.ones_like(masked)
    assert torch.equal(decoder(features, labels, everything), decoder(features + 1, labels, everything))
    seeing = make_decoder(kind, mask_token=False)
    assert not torch.equal(seeing(features, labels, everything), seeing(features + 1, labels, everything))
    assert torch.equal(seeing(features, labels, everything), seeing(features, labels, ~everything))


@pytest.mark.parametrize("kind", KINDS)
def test_ignored_tokens_and_label_dtypes(kind):
    decoder = make_decoder(kind)
    features, labels, masked = make_inputs()
    pixels = decoder(features, labels, masked)
    ignored = (labels < 0) | (labels > 2)
    assert not tokens_of(pixels, ignored).any() and tokens_of(pixels, ~ignored).any(-1).all()
    for dtype in (torch.uint8, torch.int32):  # -1 becomes 255 in uint8, ignored as well
        assert torch.equal(decoder(features, labels.to(dtype), masked), pixels)
    assert not decoder(features, torch.full_like(labels, -1), masked).any()


@pytest.mark.parametrize("classes", [256, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_more_classes_than_a_uint8_holds(kind, classes):
    decoder = make_decoder(kind, classes)
    features, labels, masked = make_inputs()
    labels = torch.where(labels < 0, 200, labels)
    pixels = decoder(features, labels, masked)
    assert pixels.any(-1).all()
    assert torch.equal(decoder(features, labels.to(torch.uint8), masked), pixels)
    torch.testing.assert_close(decode_per_class(decoder, features, labels.to(torch.uint8), masked), pixels)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_grid(kind):
    decoder = make_decoder(kind)
    for height, width in ((0, 5), (4, 0)):
        inputs = make_inputs(height=height, width=width)
        shape = (2, 0, PATCH * PATCH * 3)
        assert decoder(*inputs).shape == decode_per_class(decoder, *inputs).shape == shape


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_equals_eager(kind):
    torch._dynamo.reset()
    decoder = make_decoder(kind)
    inputs = make_inputs()
    compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")
    pixels, grads = gradients(compiled, decoder, *inputs)
    expected, expected_grads = gradients(decoder, decoder, *inputs)
    torch.testing.assert_close(pixels, expected)
    for got, want in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_and_channels_last(kind):
    decoder = make_decoder(kind, dtype=torch.float32)
    features, labels, masked = make_inputs(dtype=torch.float32)
    expected, expected_grads = gradients(decoder, decoder, features, labels, masked)
    channels_last = features.to(memory_format=torch.channels_last)
    torch.testing.assert_close(decoder(channels_last, labels, masked), expected)
    with torch.autocast("cpu", torch.bfloat16):
        pixels = decoder(channels_last.bfloat16(), labels, masked)
        _, grads = gradients(decoder, decoder, features, labels, masked)
    assert pixels.dtype == torch.bfloat16
    torch.testing.assert_close(pixels.float(), expected, rtol=0.05, atol=0.05)
    for got, want in zip(grads, expected_grads, strict=True):
        assert got.dtype == torch.float32 and (got - want).norm() <= 0.05 * want.norm()


def test_positions():
    position = sine_cosine_positions(torch.zeros(1, 3, 5, 8, dtype=torch.float64)).view(3, 5, 8)
    row, column = 2.0, 4.0
    angles = torch.tensor([row, row / 100, column, column / 100], dtype=torch.float64)  # 10000 ** (1 / 2) = 100
    sines, cosines = angles.sin().view(2, 2), angles.cos().view(2, 2)
    expected = torch.cat([sines[0], cosines[0], sines[1], cosines[1]])
    torch.testing.assert_close(position[2, 4], expected)
    assert len(position.view(15, 8).unique(dim=0)) == 15


def test_attention_decoder_uses_positions():
    decoder = make_decoder("attention", mask_token=False)
    features, labels, masked = make_inputs()
    same = torch.ones_like(features)
    pixels = decoder(same, labels.zero_(), masked)[0]
    assert len(pixels.unique(dim=0)) == len(pixels)


def test_attention_decoder_refuses_a_width():
    for width, heads in ((10, 5), (12, 8)):
        with pytest.raises(ValueError, match=f"width is {width}"):
            ClassAttentionDecoder(4, 2, num_classes=2, width=width, depth=1, num_heads=heads)


def test_conv_decoder_refuses_an_even_kernel():
    with pytest.raises(ValueError, match="kernel_size is 4, expected an odd number"):
        ClassConvDecoder(4, 2, num_classes=2, width=8, depth=1, kernel_size=4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(features=torch.zeros(2, 5, 4, 5)), ValueError, r"features has shape .* expected \(B, 6, h, w\)"),
        (dict(labels=torch.zeros(2, 20).long()), ValueError, r"labels has shape \(2, 20\), expected \(2, 4, 5\)"),
        (dict(labels=torch.zeros(2, 4, 5)), TypeError, "labels has dtype float32"),
        (dict(masked=torch.zeros(1, 4, 5).bool()), ValueError, r"masked has shape \(1, 4, 5\), expected \(2, 4, 5\)"),
        (dict(masked=torch.zeros(2, 4, 5).long()), TypeError, "masked has dtype int64"),
    ],
)
def test_wrong_arguments(kind, change, error, message):
    arguments = dict(zip(("features", "labels", "masked"), make_inputs(), strict=True)) | change
    with pytest.raises(error, match=f"Decoder: {message}"):
        make_decoder(kind)(**arguments)


def test_copies_and_state_dicts_are_ordinary():
    for kind in KINDS:
        decoder = make_decoder(kind)
        other = copy.deepcopy(decoder)
        for p in other.parameters():
            p.data.add_(1)
        other.load_state_dict(decoder.state_dict())
        inputs = make_inputs()
        assert torch.equal(decoder(*inputs), other(*inputs))
        assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in decoder.modules())


def test_receptive_warning():
    assert receptive_warning(4, 7, 32, 4) is None  # 12 tokens of reach for blocks of 8
    assert "reaches 6 tokens" in receptive_warning(2, 7, 32, 4)
    assert receptive_warning(2, 7, 16, 4) is None  # 6 for blocks of 4: above 5
    assert "reaches 4 tokens" in receptive_warning(4, 3, 16, 4)
    assert receptive_warning(5, 3, 16, 4) is None  # exactly 5


@pytest.mark.parametrize("kind", [ClassConvDecoder, ClassAttentionDecoder])
@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels(kind, channels):
    own = {"kernel_size": 3} if kind is ClassConvDecoder else {"num_heads": 2}
    decoder = kind(5, PATCH, num_classes=3, width=8, depth=1, image_channels=channels, **own)
    features, labels = torch.randn(2, 5, 4, 3), torch.zeros(2, 4, 3, dtype=torch.int32)
    assert decoder(features, labels, labels > 0).shape == (2, 4 * 3, PATCH * PATCH * channels)


def test_the_decoder_of_the_settings():
    for decoder, kind in (("conv", ClassConvDecoder), ("attention", ClassAttentionDecoder)):
        settings = ReconstructionSettings(decoder=decoder, width=16, num_heads=2, depth=1, mask_token=False)
        built = build_reconstruction(settings, 5, PATCH, 3, image_channels=4)
        assert type(built) is kind and built.mask_token is None and built.project.out_features == 16
        assert built.predict.out_features == PATCH * PATCH * 4


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_tokens_of_the_fine_map_are_not_mixed(poison):
    torch.manual_seed(0)
    tokens = PixelTokens(5, 7, 6)
    fine, deepest = torch.randn(2, 5, 8, 8), torch.randn(2, 7, 2, 2)
    before = tokens(fine, deepest)
    assert before.shape == (2, 6, 8, 8) and before.is_contiguous(memory_format=torch.channels_last)
    fine[0, :, 3, 4] = poison
    changed = (tokens(fine, deepest) != before).any(1)
    assert changed[0, 3, 4] and changed.sum() == 1


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 99), height=st.integers(1, 9), width=st.integers(1, 9), classes=st.integers(1, 4))
def test_tokens_in_reach_are_those_with_a_gradient_at_a_visible_token(kind, seed, height, width, classes):
    decoder = make_decoder(kind, classes)
    features, labels, masked = make_inputs(seed, 1, height, width, classes)
    pixels = decoder(features.requires_grad_(), labels, masked)[0]
    # The mask token takes the place of hidden features, so that all gradients are those of visible ones.
    of_tokens = [torch.autograd.grad(p.square().sum(), features, retain_graph=True)[0] for p in pixels]
    assert decoder.in_reach(labels, masked).flatten().tolist() == [bool(gradient.any()) for gradient in of_tokens]
