import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from cmim_kernels import ClassLayout, gather_class_tokens, pack_classes, random_mask, scatter_class_tokens
from cmim_kernels.reference import pack_classes as reference

from .op_checks import check_registration


def make(batch=2, tokens=7, classes=3, ratio=0.5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-1, classes + 1, (batch, tokens), generator=g), torch.rand(batch, tokens, generator=g) < ratio


def brute_force(labels, masked, classes):
    """Each image's tokens put into one list for each segment."""
    order, inverse, segment, offsets, cu_seqlens = [], [], [], [], []
    for b, image in enumerate(labels.tolist()):
        lists = [[] for _ in range(2 * classes + 1)]
        for n, c in enumerate(image):
            lists[2 * c + int(masked[b, n]) if 0 <= c < classes else 2 * classes].append(n)
        order.append([n for members in lists for n in members])
        segment.append([s for s, members in enumerate(lists) for _ in members])
        inverse.append([order[-1].index(n) for n in range(len(image))])
        offsets.append([sum(map(len, lists[:s])) for s in range(2 * classes + 2)])
        cu_seqlens += [b * len(image) + offsets[-1][2 * k] for k in range(classes + 1)]
    cu_seqlens.append(labels.numel())
    return order, inverse, segment, offsets, cu_seqlens


def assert_layout(layout, labels, masked, classes):
    batch, tokens = labels.shape
    shapes = [(batch, tokens)] * 3 + [(batch, 2 * classes + 2), (batch * (classes + 1) + 1,)]
    assert isinstance(layout, ClassLayout)
    for got, want, shape in zip(layout, brute_force(labels, masked, classes), shapes, strict=True):
        assert got.tolist() == want and got.shape == shape and got.dtype == torch.int32 and got.is_contiguous()


@given(
    batch=st.integers(0, 3), tokens=st.integers(0, 12), classes=st.integers(1, 5),
    ratio=st.sampled_from([0, 0.5, 1]), seed=st.integers(0, 99),
)  # fmt: skip
def test_matches_brute_force(batch, tokens, classes, ratio, seed):
    labels, masked = make(batch, tokens, classes, ratio, seed)
    assert_layout(pack_classes(labels, masked, classes), labels, masked, classes)


def test_all_ignored():
    labels, masked = make()
    assert_layout(pack_classes(torch.full_like(labels, -1), masked, 3), torch.full_like(labels, -1), masked, 3)


def test_stable_over_many_tokens():
    labels, masked = make(batch=1, tokens=5000, classes=2)
    assert_layout(pack_classes(labels, masked, 2), labels, masked, 2)


@given(batch=st.integers(1, 3), side=st.integers(1, 5), ratio=st.sampled_from([0, 0.25, 0.6, 1]), seed=st.integers(0, 99))
def test_one_class_is_the_shuffle_of_a_masked_autoencoder(batch, side, ratio, seed):
    g = torch.Generator().manual_seed(seed)
    masked = random_mask(batch, side, side, ratio, generator=g).flatten(1)
    visible = side * side - round(ratio * side * side)
    layout = pack_classes(torch.zeros(batch, side * side, dtype=torch.uint8), masked, 1)
    ids_keep = torch.stack([(~m).nonzero()[:, 0] for m in masked])
    assert torch.equal(layout.order[:, :visible].long(), ids_keep)

    tokens, mask_token = torch.randn(batch, side * side, 3, generator=g), torch.randn(3, generator=g)
    kept = gather_class_tokens(tokens, layout, length=visible)
    assert torch.equal(kept, torch.stack([image[~m] for image, m in zip(tokens, masked, strict=True)]))
    restored = scatter_class_tokens(kept, layout, mask_token=mask_token)
    assert torch.equal(restored, torch.where(masked[..., None], mask_token, tokens))
    assert torch.equal(scatter_class_tokens(gather_class_tokens(tokens, layout), layout), tokens)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_label_dtypes_and_strides(dtype):
    labels, masked = make()
    labels = labels.clamp(min=0).to(dtype)
    assert_layout(pack_classes(labels.T.contiguous().T, masked.T.contiguous().T, 3), labels, masked, 3)
    assert_layout(pack_classes(labels, masked, 300), labels, masked, 300)


def test_no_wide_label_wraps_into_range():
    labels = torch.tensor([[2**32, 2**31 + 1, 0]])
    assert pack_classes(labels, torch.zeros(1, 3, dtype=torch.bool), 2).segment.tolist() == [[0, 4, 4]]


def test_registration():
    labels, masked = make()
    check_registration(lambda labels, masked: pack_classes(labels, masked, 3), [labels, masked], gradient=False)
    check_registration(lambda labels, masked: pack_classes(labels.T, masked.T, 3), [labels, masked], gradient=False)


def test_no_host_sync():
    """A fake tensor has no data: whatever would wait for the device to read some raises."""
    with FakeTensorMode():
        labels = torch.zeros(2, 7, dtype=torch.int64, device="cuda")
        reference.pack_classes_forward(labels, labels > 0, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(labels=torch.zeros(2, 3)), TypeError, "labels has dtype float32"),
        (dict(labels=torch.zeros(6, dtype=torch.int64)), ValueError, r"labels has shape \(6,\), expected \(B, N\)"),
        (dict(masked=torch.zeros(2, 3)), TypeError, "masked has dtype float32, expected one of bool"),
        (dict(masked=torch.zeros(2, 4, dtype=torch.bool)), ValueError, r"masked has shape \(2, 4\), expected \(2, 3\)"),
        (dict(masked=torch.zeros(2, 3, dtype=torch.bool, device="meta")), ValueError, "masked is on meta"),
        (dict(num_classes=0), ValueError, "num_classes is 0"),
        (
            dict(
                labels=torch.zeros(1, 1, dtype=torch.uint8).expand(2**16, 2**15),
                masked=torch.zeros(1, 1, dtype=torch.bool).expand(2**16, 2**15),
            ),
            ValueError,
            "expected fewer than 2\\*\\*31",
        ),
    ],
)
def test_wrong_arguments(change, error, message):
    labels = torch.zeros(2, 3, dtype=torch.int64)
    arguments = dict(labels=labels, masked=labels > 0, num_classes=2) | change
    with pytest.raises(error, match=message):
        pack_classes(**arguments)
