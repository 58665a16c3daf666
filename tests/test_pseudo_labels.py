import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from cmim.method.class_statistics import ClassStatistics
from cmim.method.perturbations import cutmix, drop_channels, drop_complementary
from cmim.method.pseudo_labels import PseudoLabels, pseudo_labels


def keys(count, seed=0):
    return torch.randint(0, 2**62, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("align_corners", [True, False])
def test_pseudo_labels_are_those_of_the_upsampled_logits(align_corners):
    logits = (3 * torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))).requires_grad_()
    valid = torch.ones(2, 12, 20, dtype=torch.bool)
    valid[1, 7:] = False
    labels = pseudo_labels(logits, valid, align_corners)
    probability = F.interpolate(logits, size=(12, 20), mode="bilinear", align_corners=align_corners).softmax(1)
    confidence, label = probability.max(1)
    assert torch.equal(labels.label, label.int()) and labels.label.dtype == torch.int32
    torch.testing.assert_close(labels.confidence, confidence.detach())
    assert torch.equal(labels.valid, valid) and not labels.confidence.requires_grad


def test_a_confidence_of_exactly_tau_is_enough_and_padding_never():
    tau = 0.75
    confidence = torch.tensor([[[0.5, 0.75, 1.0, 1.0]]])
    labels = PseudoLabels(
        torch.tensor([[[3, 2, 1, 1]]], dtype=torch.int32), confidence, torch.tensor([[[True, True, True, False]]])
    )
    assert labels.classes(tau).tolist() == [[[255, 2, 1, 255]]]
    assert labels.classes(0.0).tolist() == [[[3, 2, 1, 255]]]
    assert labels.classes(1.0).tolist() == [[[255, 255, 1, 255]]]


def boxes(size):
    edge = st.tuples(st.integers(0, size), st.integers(0, size)).map(sorted)
    return st.tuples(edge, edge).map(lambda e: [e[0][0], e[1][0], e[0][1], e[1][1]])


@given(box=st.lists(boxes(6), min_size=4, max_size=4), seed=st.integers(0, 99))
def test_cutmix_pastes_the_partners_box(box, seed):
    g = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (4, 3, 6, 6), generator=g, dtype=torch.uint8)
    label, confidence = torch.randint(0, 9, (4, 6, 6), generator=g), torch.rand(4, 6, 6, generator=g)
    valid = torch.rand(4, 6, 6, generator=g) < 0.5
    before = [image, label, confidence, valid]
    after = cutmix(torch.tensor(box), *before)
    for old, new in zip(before, after, strict=True):
        assert new.dtype == old.dtype
        for i, (top, left, bottom, right) in enumerate(box):
            for row in range(6):
                for column in range(6):
                    inside = top <= row < bottom and left <= column < right
                    source = [1, 0, 3, 2][i] if inside else i
                    assert torch.equal(new[i, ..., row, column], old[source, ..., row, column])


@pytest.mark.parametrize("box", [[0, 0, 0, 0], [3, 2, 3, 5], [2, 4, 5, 4]])
def test_an_empty_box_pastes_nothing(box):
    image = torch.arange(2 * 3 * 36).view(2, 3, 6, 6)
    (mixed,) = cutmix(torch.tensor([box, box]), image)
    assert torch.equal(mixed, image)


@pytest.mark.parametrize("probability", [0.0, 0.3, 0.5])
def test_dropped_channels(probability):
    drawn = keys(50)
    maps = [torch.ones(50, 40, 2, 3, requires_grad=True), torch.ones(50, 60, 1, 1, requires_grad=True)]
    dropped = drop_channels(maps, drawn, probability)
    assert [d.shape for d in dropped] == [m.shape for m in maps]
    share = []
    for d in dropped:
        zero = d == 0
        assert torch.equal(zero.flatten(2).any(2), zero.flatten(2).all(2))  # whole channels
        torch.testing.assert_close(d[~zero], torch.full_like(d[~zero], 1 / (1 - probability)))
        share.append(zero[:, :, 0, 0].float())
    assert abs(torch.cat(share, 1).mean() - probability) < 0.03
    sum(d.sum() for d in dropped).backward()
    for m, d in zip(maps, dropped, strict=True):
        assert torch.equal(m.grad, d)
    if probability:
        assert not torch.equal(share[0], share[1][:, :40])  # every map draws its own
        assert len(share[0].unique(dim=0)) == 50  # and every sample


def test_dropped_channels_depend_on_the_key_alone():
    drawn = keys(6)
    maps = [torch.randn(6, 8, 2, 2, generator=torch.Generator().manual_seed(0)), torch.ones(6, 9, 1, 1)]
    whole = drop_channels(maps, drawn, 0.5)
    order = torch.tensor([4, 1])
    some = drop_channels([m[order] for m in maps], drawn[order], 0.5)
    for a, b in zip(some, whole, strict=True):
        assert torch.equal(a, b[order])
    half = drop_channels([m.bfloat16() for m in maps], drawn, 0.5)
    assert all(torch.equal(h, w.bfloat16()) for h, w in zip(half, whole, strict=True))


def test_complementary_channels():
    drawn = keys(200)
    maps = [torch.ones(400, 30, 2, 1), torch.ones(400, 30, 1, 1), torch.ones(400, 8, 1, 1)]
    first, second = zip(*(d.split(200) for d in drop_complementary(maps, drawn)), strict=True)
    whole = (first[0] == 1).flatten(1).all(1)
    assert 70 < whole.sum() < 130  # about half of the images
    for a, b, m in zip(first, second, maps, strict=True):
        assert torch.equal(a + b, 2 * m[:200])
        assert torch.equal((a == 1).flatten(1).all(1), whole)
        assert set(a[~whole].unique().tolist()) == {0.0, 2.0}
        assert torch.equal(a.flatten(2).amin(2), a.flatten(2).amax(2))  # whole channels
        assert torch.equal(a[:, :, 0, 0], first[0][:, : a.shape[1], 0, 0])  # the same in maps of equal width
    assert 0.45 < (first[0][~whole] == 0).float().mean() < 0.55
    assert len(first[0][~whole].flatten(1).unique(dim=0)) == (~whole).sum()  # every image draws its own
    order = torch.tensor([7, 3, 207, 203])
    some = drop_complementary([m[order] for m in maps], drawn[order[:2]])
    assert torch.equal(some[0], torch.cat([first[0], second[0]])[order])


def test_statistics_remember_earlier_steps():
    statistics = ClassStatistics(2)
    logits, labels = torch.zeros(1, 2, 4, 4), torch.zeros(1, 8, 8, dtype=torch.uint8)
    labels[:, :, 6:], valid = 1, torch.ones(1, 8, 8, dtype=torch.bool)
    valid[:, 4:] = False
    for _ in range(2):
        statistics.count_labels(labels, logits.shape[-2:], ranks=1)
        aligned = statistics.align(logits, valid, ranks=1)
    # 12 and 4 of 16 labels; half of each of the 8 valid predictions. What the step before counted weighs 0.99.
    assert torch.allclose(statistics.labelled, 1.99 * torch.tensor([12.0, 4.0]))
    assert torch.allclose(statistics.predicted, 1.99 * torch.tensor([4.0, 4.0]))
    ratio = torch.tensor([(1.99 * 12 + 1) / (1.99 * 4 + 1), 1.0]) * (2 * (1.99 * 4 + 1)) / (1.99 * 16 + 2)
    assert torch.allclose(aligned[0, :, 0, 0], ratio.log()) and torch.equal(
        aligned, aligned[:, :, :1, :1].expand_as(aligned)
    )


def test_a_class_that_is_less_confident_gets_a_lower_threshold():
    statistics = ClassStatistics(3)
    logits = torch.tensor([[2.0, 0.0, -9.0], [0.0, 1.0, -9.0]]).log_softmax(1).T.view(1, 3, 1, 2)
    valid = torch.ones(1, 1, 2, dtype=torch.bool)
    labels = statistics.relative(pseudo_labels(logits, valid, align_corners=True), logits, ranks=1)
    # The mean confidence of each class is that of its one pixel, so that both are as sure as the most confident class.
    assert labels.label.tolist() == [[[0, 1]]] and torch.allclose(labels.confidence, logits[0, 0, 0, 0].exp())


def test_a_class_without_pseudo_labels_is_not_unlearnt():
    statistics = ClassStatistics(3)
    labels = torch.tensor([0, 1, 2]).repeat(4096).view(1, 96, 128)
    for _ in range(5):
        statistics.count_labels(labels, labels.shape[1:], ranks=1)
        statistics.count_pseudo_labels(torch.where(labels == 2, 255, labels), labels.shape[1:], ranks=1)
    logits = torch.zeros(1, 3, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    adjusted = statistics.adjust(logits)
    assert adjusted.dtype == torch.float32 and torch.equal(adjusted[0, 0], adjusted[0, 1])
    torch.nn.functional.cross_entropy(adjusted.view(1, 3), torch.tensor([0])).backward()
    gradient = logits.grad.flatten().tolist()  # without the adjustment -2/3, 1/3 and 1/3
    assert gradient[0] == pytest.approx(-0.5, abs=1e-2) and 0 < gradient[2] < 1e-3
