"""Every value of reconstruction.attention gives the results and the gradients of class_attention.

On the CPU the ops of xformers and of torch.nn.attention.varlen are replaced by plain ones that read what they are given: the
materialised mask, or the bounds of the segments.
"""

import itertools
import logging
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import varlen as torch_varlen

from cmim.config import config_from
from cmim.errors import UserError
from cmim.models import attention
from cmim.models.attention import ATTENTIONS, check_attention
from cmim.models.reconstruction import build_reconstruction
from cmim.settings import ReconstructionSettings
from cmim_kernels import pack_classes

CLASSES = 3
ON_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def layout_of(seed=0, batch=2, tokens=12, device="cpu"):
    """Some tokens are ignored; class 2 has none in the first image."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, CLASSES, (batch, tokens), generator=g)
    labels[:1][labels[:1] == 2] = 0
    return pack_classes(labels.to(device), (torch.rand(batch, tokens, generator=g) < 0.5).to(device), CLASSES)


def inputs(seed=1, batch=2, heads=2, tokens=12, dim=8, dtype=torch.float64, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, tokens, dim, generator=g, dtype=torch.float64).to(device, dtype) for _ in range(4)]


def results(attend, layout, q, k, v, weight):
    """Output and gradients, where ignored tokens are not used, as in a decoder."""
    used = (layout.segment < 2 * CLASSES)[:, None, :, None]
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    out = torch.where(used, attend(q, k, v), 0)
    return out.detach(), *torch.autograd.grad((out * weight).sum(), (q, k, v))


def assert_equal_results(name, layout, values, **options):
    got = results(ATTENTIONS[name](layout, **options), layout, *values)
    want = results(ATTENTIONS["class_attention"](layout), layout, *values)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    ignored = (layout.segment == 2 * CLASSES)[:, None, :, None].expand_as(got[0])
    assert ignored.any() and not any(x[ignored].any() for x in got)


def test_sdpa_equals_class_attention():
    assert_equal_results("sdpa", layout_of(), inputs())


def segmentwise(q, k, v, starts_q, starts_k, longest_q, longest_k, *, window_size=(-1, -1)):
    """varlen_attn by its documentation: (T, heads, d), a softmax within each segment."""
    assert starts_q is starts_k and starts_q.dtype == torch.int32 and longest_q == longest_k
    out = torch.zeros_like(q)
    for start, stop in itertools.pairwise(starts_q.tolist()):
        assert stop - start <= longest_q and (window_size == (-1, -1) or min(window_size) >= stop - start)
        part = slice(start, stop)
        if stop > start:
            q_, k_, v_ = (x[part].transpose(0, 1) for x in (q, k, v))
            out[part] = F.scaled_dot_product_attention(q_, k_, v_).transpose(0, 1)
    return out


@pytest.mark.parametrize("options", [{}, {"full_window": True}, {"longest": 9}])
def test_varlen_equals_class_attention(options, monkeypatch):
    windows = []
    monkeypatch.setattr(
        torch_varlen, "varlen_attn", lambda *a, **o: windows.append(o.get("window_size")) or segmentwise(*a, **o)
    )
    assert_equal_results("varlen", layout_of(), inputs(), **options)
    assert windows == [(12, 12) if "full_window" in options else None]


def test_varlen_computes_float32_in_bfloat16(monkeypatch):
    seen = []
    monkeypatch.setattr(torch_varlen, "varlen_attn", lambda q, *a, **o: seen.append(q.dtype) or segmentwise(q, *a, **o))
    values = inputs(dtype=torch.float32)
    layout = layout_of()
    got = results(ATTENTIONS["varlen"](layout), layout, *values)
    assert seen == [torch.bfloat16] and {x.dtype for x in got} == {torch.float32}
    torch.testing.assert_close(got[0], ATTENTIONS["class_attention"](layout)(*values[:3]), rtol=0.05, atol=0.05)


@pytest.fixture
def xformers_ops():
    if not attention.importlib.util.find_spec("xformers"):
        pytest.skip("xformers is not installed")
    return attention._xformers_ops()


def test_xformers_equals_class_attention(xformers_ops, monkeypatch):
    masks = []

    def with_the_mask(q, k, v, attn_bias):
        """(1, T, heads, d), as memory_efficient_attention takes them."""
        masks.append(attn_bias.materialize((q.shape[1], q.shape[1]), dtype=q.dtype))
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=masks[-1])
        return out.transpose(1, 2)

    monkeypatch.setattr(xformers_ops, "memory_efficient_attention", with_the_mask)
    layout = layout_of()
    assert_equal_results("xformers", layout, inputs())
    group = torch.arange(2)[:, None] * (CLASSES + 1) + layout.segment // 2  # of each token of the batch, in packed order
    same = group.flatten()[:, None] == group.flatten()
    assert torch.equal(masks[0], torch.where(same, 0.0, -torch.inf).double())


def test_xformers_without_tokens(xformers_ops):
    layout = layout_of(tokens=0)
    assert ATTENTIONS["xformers"](layout)(*inputs(tokens=0)[:3]).shape == (2, 2, 0, 8)


def test_xformers_itself_needs_cuda(xformers_ops):
    """What a run on the CPU would meet, if it were not refused before."""
    with pytest.raises(NotImplementedError):
        ATTENTIONS["xformers"](layout_of())(*inputs()[:3])


def test_its_import_is_silent(xformers_ops):
    assert logging.getLogger("xformers").level == logging.NOTSET
    program = "from cmim.models import attention; attention._xformers_ops()"
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("name", ATTENTIONS)
def test_the_decoder_asks_for_it_once_a_pass(name, monkeypatch):
    asked = []
    monkeypatch.setitem(
        ATTENTIONS, name, lambda layout, real=ATTENTIONS["class_attention"]: asked.append(layout) or real(layout)
    )
    settings = ReconstructionSettings(decoder="attention", attention=name, width=16, depth=3, num_heads=2)
    decoder = build_reconstruction(settings, 6, 2, CLASSES)
    decoder(torch.randn(2, 6, 3, 4), torch.zeros(2, 3, 4, dtype=torch.int32), torch.zeros(2, 3, 4, dtype=torch.bool))
    assert len(asked) == 1


def test_the_decoder_of_sdpa_equals_that_of_class_attention():
    settings = ReconstructionSettings(decoder="attention", width=16, depth=2, num_heads=2)
    decoder = build_reconstruction(settings, 6, 2, CLASSES).double()
    g = torch.Generator().manual_seed(0)
    features = torch.randn(2, 6, 3, 4, generator=g, dtype=torch.float64)
    labels, masked = torch.randint(-1, CLASSES, (2, 3, 4), generator=g), torch.rand(2, 3, 4, generator=g) < 0.5
    want = decoder(features, labels, masked)
    decoder.attention = "sdpa"
    torch.testing.assert_close(decoder(features, labels, masked), want, rtol=1e-10, atol=1e-12)


def test_the_setting_has_these_values():
    assert set(ReconstructionSettings.model_fields["attention"].annotation.__args__) == set(ATTENTIONS)


def config_of(name, **sections):
    reconstruction = {"decoder": "attention", "attention": name, "width": 64}
    return config_from({"data": {"format": "shapes"}, "reconstruction": reconstruction} | sections, "test")


@pytest.mark.parametrize(
    "name, on_cuda, sections, installed, said",
    [
        ("varlen", False, {}, True, "reconstruction.attention varlen runs on CUDA only, and this run is on the CPU; use"),
        ("xformers", False, {}, True, "reconstruction.attention xformers runs on CUDA only"),
        (
            "xformers",
            True,
            {},
            False,
            "reconstruction.attention: xformers is not installed: pip install 'cmim[xformers]', or",
        ),
        (
            "varlen",
            True,
            {"train": {"precision": "fp32"}},
            True,
            "varlen computes in bf16 or fp16, but train.precision is fp32",
        ),
        ("xformers", True, {"train": {"precision": "fp32"}}, True, None),
        ("varlen", True, {}, False, None),
        ("sdpa", False, {"train": {"precision": "fp32"}}, False, None),
        ("xformers", False, {"method": {"preset": "fixmatch"}}, False, None),  # which has no decoder
    ],
)
def test_what_cannot_be_used_is_refused_before_a_run(name, on_cuda, sections, installed, said, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if installed else None)
    if said is None:
        return check_attention(config_of(name, **sections), on_cuda)
    with pytest.raises(UserError) as caught:
        check_attention(config_of(name, **sections), on_cuda)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "sections, said",
    [
        ({"train": {"compile": True}}, "reconstruction.attention xformers does not work with train.compile"),
        (
            {"reconstruction": {"attention": "sdpa"}},
            "attention is sdpa, but the conv decoder has no attention; leave it out",
        ),
        (
            {"reconstruction": {"decoder": "attention", "attention": "varlen", "width": 96}},
            "reconstruction.attention varlen needs reconstruction.width to be a multiple of 8 x reconstruction.num_heads",
        ),
    ],
)
def test_settings_that_do_not_go_together(sections, said):
    with pytest.raises(UserError) as caught:
        config_of("xformers", **sections)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "name, options", [("sdpa", {}), ("xformers", {}), ("varlen", {}), ("varlen", {"full_window": True})]
)
@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=ON_CUDA), pytest.param(torch.float16, marks=ON_CUDA)])
def test_on_cuda_they_equal_class_attention(name, options, dtype):
    """512 tokens an image, enough for PyTorch to choose cuDNN where it can."""
    if name == "xformers" and not attention.importlib.util.find_spec("xformers"):
        pytest.skip("xformers is not installed")
    layout = layout_of(tokens=512, device="cuda")
    values = inputs(tokens=512, dim=64, dtype=dtype, device="cuda")
    got = results(ATTENTIONS[name](layout, **options), layout, *values)
    want = results(ATTENTIONS["class_attention"](layout), layout, *(x.double() for x in values))
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).abs().max() <= 0.03 * b.abs().max()
