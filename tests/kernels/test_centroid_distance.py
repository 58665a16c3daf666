import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from cmim_kernels import ClassCentroids, centroid_distance
from cmim_kernels.reference import centroid_distance as reference

from .op_checks import assert_equal, assert_repeatable, check_registration, run

DISTANCES, SIDES = ["cosine", "l2"], ["visible", "masked", "none"]


def make(batch=2, classes=3, channels=4, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    count = torch.randint(0, 5, (batch, classes, 2), dtype=torch.int32, generator=g)
    return torch.randn(batch, classes, 2, channels, dtype=dtype, generator=g), count


@given(
    batch=st.integers(0, 2), classes=st.integers(1, 4), channels=st.integers(1, 5), distance=st.sampled_from(DISTANCES),
    detach=st.sampled_from(SIDES), min_tokens=st.integers(1, 6), seed=st.integers(0, 99),
)  # fmt: skip
def test_matches_brute_force(batch, classes, channels, distance, detach, min_tokens, seed):
    mean, count = make(batch, classes, channels, seed=seed)
    options = dict(distance=distance, detach=detach, min_tokens=min_tokens)

    def brute_force(mean):
        each = []
        for b in range(batch):
            for k in range(classes):
                visible, masked = mean[b, k]
                visible = visible.detach() if detach == "visible" else visible
                masked = masked.detach() if detach == "masked" else masked
                if count[b, k].min() < min_tokens:
                    continue
                if distance == "cosine":
                    each.append(1 - F.cosine_similarity(visible, masked, dim=0, eps=1e-8))
                else:
                    each.append(F.mse_loss(visible, masked))
        total = sum(each, mean.sum() * 0)
        return total / max(1, len(each)), total, torch.tensor(len(each), dtype=torch.int32)

    got = run(lambda mean: centroid_distance(ClassCentroids(mean, count), **options), [mean])
    assert_equal(got, run(brute_force, [mean]))
    assert_equal(got, run(lambda mean: reference.centroid_distance(mean, count, **options), [mean]))


@pytest.mark.parametrize("distance", DISTANCES)
def test_gradients(distance):
    mean, count = make()
    op = lambda mean: centroid_distance((mean, count), distance=distance, detach="none")  # noqa: E731
    torch.autograd.gradcheck(op, [mean.requires_grad_()])


@pytest.mark.parametrize(("detach", "index"), [("visible", 0), ("masked", 1)])
def test_no_gradient_to_the_detached_side(detach, index):
    mean, count = make()
    (grad,) = run(lambda mean: centroid_distance((mean, count), detach=detach), [mean])[1]
    assert not grad[:, :, index].any() and grad[:, :, 1 - index].any()


@pytest.mark.parametrize(("distance", "detach"), [("cosine", "visible"), ("l2", "masked"), ("l2", "none")])
def test_registration(distance, detach):
    mean, count = make(dtype=torch.float32)
    op = lambda mean, count: centroid_distance(  # noqa: E731
        ClassCentroids(mean, count), distance=distance, detach=detach, min_tokens=2
    )
    check_registration(op, [mean, count])


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
def test_other_centroids_do_not_matter(distance, poison):
    mean, count = make()
    idle = (count < 2).any(dim=2)[..., None, None].expand_as(mean)
    op = lambda mean: centroid_distance((mean, count), distance=distance, detach="none", min_tokens=2)  # noqa: E731
    want = run(op, [mean])
    assert want[0][2] == (~idle[..., 0, 0]).sum() > 0
    dirty = torch.where(idle, poison, mean)
    assert_equal(run(op, [dirty]), want, rtol=0, atol=0)
    definition = lambda mean: reference.centroid_distance(  # noqa: E731
        mean, count, distance=distance, detach="none", min_tokens=2
    )
    assert_equal(run(definition, [dirty]), want)


@pytest.mark.parametrize("distance", DISTANCES)
def test_zero_centroids_are_finite(distance):
    mean, count = torch.zeros(1, 2, 2, 3), torch.ones(1, 2, 2, dtype=torch.int32)
    mean[0, 0, 1] = 1
    (loss, total, pairs), (grad,) = run(lambda m: centroid_distance((m, count), distance=distance, detach="none"), [mean])
    assert loss.isfinite() and grad.isfinite().all() and pairs == 2
    assert total == (2 if distance == "cosine" else 1)


def test_a_clamped_norm_is_a_constant():
    mean, count = make(batch=1, classes=1)
    mean[0, 0, 0] *= 1e-10
    op = lambda mean: centroid_distance((mean, count.clamp(min=1)), detach="none")[1]  # noqa: E731
    (total,), (grad,) = run(op, [mean])
    visible, masked = mean[0, 0]
    torch.testing.assert_close(total, 1 - visible @ masked / masked.norm() / 1e-8)
    torch.testing.assert_close(grad[0, 0, 0] / 1e8, -masked / masked.norm() / 2)  # `run` weighs a lone output by a half
    definition = lambda mean: reference.centroid_distance(mean, count.clamp(min=1), detach="none")[1]  # noqa: E731
    assert_equal(([total], [grad]), run(definition, [mean]))


def test_no_pair_is_a_zero_that_stays_connected():
    mean, count = make()
    (loss, total, pairs), (grad,) = run(lambda mean: centroid_distance((mean, count), min_tokens=9), [mean])
    assert loss == 0 and total == 0 and pairs == 0 and torch.equal(grad, torch.zeros_like(mean))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_repeatability(dtype):
    mean, count = make(dtype=dtype)
    op = lambda mean: centroid_distance((mean, count))  # noqa: E731
    assert_repeatable(op, [mean])
    (loss, _, pairs), (grad,) = run(op, [mean])
    assert loss.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype and pairs.dtype == torch.int32


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(centroids=torch.zeros(2, 3, 2, 4)), TypeError, "centroids must be a ClassCentroids, got Tensor"),
        (dict(centroids=(torch.zeros(2, 3, 4), make()[1])), ValueError, r"mean .* expected \(B, K, 2, C\)"),
        (dict(centroids=(make()[0], make()[1][:1])), ValueError, r"count has shape \(1, 3, 2\), expected \(2, 3, 2\)"),
        (dict(centroids=(make()[0], make()[1].float())), TypeError, "centroids.count has dtype float32"),
        (dict(distance="l1"), ValueError, "distance is 'l1'"),
        (dict(detach=None), ValueError, "detach is None, expected one of 'visible', 'masked', 'none'"),
        (dict(min_tokens=0), ValueError, "min_tokens is 0, expected at least 1"),
    ],
)  # fmt: skip
def test_wrong_arguments(change, error, message):
    with pytest.raises(error, match=message):
        centroid_distance(**(dict(centroids=ClassCentroids(*make())) | change))
