import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmim_kernels import masked_patch_loss
from cmim_kernels.reference import masked_patch_loss as reference

from .op_checks import assert_equal, assert_repeatable, check_registration, run

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
DISTANCES = ["l1", "mse", "smooth_l1"]


def make(batch=2, grid=(2, 3), size=2, channels=3, classes=3, dtype=torch.float64, as_image=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    image = torch.randn(batch, channels, grid[0] * size, grid[1] * size, dtype=dtype, generator=g)
    tokens = grid[0] * grid[1]
    shape = image.shape if as_image else (batch, tokens, size * size * channels)
    pred = 2 * torch.randn(shape, dtype=dtype, generator=g)
    masked = torch.rand(batch, tokens, generator=g) < 0.6
    return pred, image, masked, torch.randint(-1, classes + 1, (batch, tokens), generator=g)


def to_image(tokens, image, size):
    """Tokens to pixels, one at a time, in the order (row, column, channel)."""
    out, columns = torch.empty_like(image), image.shape[3] // size
    for b, n, e in torch.cartesian_prod(*[torch.arange(s) for s in tokens.shape]).view(-1, 3).tolist():
        row, rest = divmod(e, size * image.shape[1])
        column, channel = divmod(rest, image.shape[1])
        out[b, channel, n // columns * size + row, n % columns * size + column] = tokens[b, n, e]
    return out


def brute_force(pred, image, masked, labels, classes, size, distance, normalize, balance):
    if pred.dim() == 3:
        pred = to_image(pred, image, size)
    errors, columns = [[] for _ in range(classes)], image.shape[3] // size
    for b in range(len(image)):
        for n in range(masked.shape[1]):
            label = 0 if labels is None else int(labels[b, n])
            if not masked[b, n] or not 0 <= label < classes:
                continue
            i, j = n // columns * size, n % columns * size
            p, t = (x[b, :, i : i + size, j : j + size].flatten() for x in (pred, image))
            if normalize:
                t = (t - t.mean()) / (((t - t.mean()) ** 2).sum() / (t.numel() - 1) + 1e-6) ** 0.5
            d = [abs(v) for v in (p - t).tolist()]
            if distance == "mse":
                d = [v * v for v in d]
            elif distance == "smooth_l1":
                d = [v * v / 2 if v < 1 else v - 0.5 for v in d]
            errors[label].append(sum(d) / len(d))
    means = [sum(e) / len(e) for e in errors if e]
    every = [v for e in errors for v in e]
    loss = sum(means) / max(1, len(means)) if balance == "class" else sum(every) / max(1, len(every))
    return loss, [sum(e) for e in errors], [len(e) for e in errors]


@given(
    batch=st.integers(0, 2), grid=st.tuples(st.integers(0, 3), st.integers(1, 3)), size=st.integers(1, 3),
    channels=st.integers(2, 3), classes=st.integers(1, 4), labelled=st.booleans(), as_image=st.booleans(),
    distance=st.sampled_from(DISTANCES), normalize=st.booleans(), balance=st.sampled_from(["token", "class"]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_matches_brute_force(
    batch, grid, size, channels, classes, labelled, as_image, distance, normalize, balance, seed
):  # fmt: skip
    pred, image, masked, labels = make(batch, grid, size, channels, classes, as_image=as_image, seed=seed)
    labels, classes = (labels, classes) if labelled else (None, 1)
    got = masked_patch_loss(
        pred, image, masked, labels, classes if labelled else None,
        patch_size=size, distance=distance, normalize=normalize, balance=balance,
    )  # fmt: skip
    loss, class_sum, class_count = brute_force(pred, image, masked, labels, classes, size, distance, normalize, balance)
    torch.testing.assert_close(got.loss, torch.tensor(loss, dtype=torch.float64))
    torch.testing.assert_close(got.class_sum, torch.tensor(class_sum, dtype=torch.float64))
    assert torch.equal(got.class_count, torch.tensor(class_count, dtype=torch.int32))


@pytest.mark.parametrize("as_image", [False, True])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(("normalize", "balance"), [(False, "token"), (True, "class")])
def test_gradients(as_image, distance, normalize, balance):
    pred, image, masked, labels = make(as_image=as_image)
    options = dict(patch_size=2, distance=distance, normalize=normalize, balance=balance)
    op = lambda pred: masked_patch_loss(pred, image, masked, labels, 3, **options)  # noqa: E731
    torch.autograd.gradcheck(op, [pred.clone().requires_grad_()])
    definition = lambda pred: reference.masked_patch_loss(pred, image, masked, labels, 3, **options)  # noqa: E731
    assert_equal(run(op, [pred]), run(definition, [pred]))
    for output in (0, 1):  # each output alone
        alone = lambda pred: op(pred)[output]  # noqa: E731, B023
        definition_alone = lambda pred: definition(pred)[output]  # noqa: E731, B023
        assert_equal(run(alone, [pred]), run(definition_alone, [pred]))


@pytest.mark.parametrize(("as_image", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_registration(as_image, dtype):
    pred, image, masked, labels = make(as_image=as_image, dtype=dtype)
    image = image.float()  # captured: it gets no gradient
    op = lambda pred, masked, labels: masked_patch_loss(  # noqa: E731
        pred, image, masked, labels, 3, patch_size=2, balance="class", normalize=True
    )
    check_registration(op, [pred, masked, labels])


def test_registration_of_bytes_without_labels():
    pred, image, masked, _ = make(dtype=torch.float32)
    image = (image.sigmoid() * 255).to(torch.uint8)
    op = lambda *a: masked_patch_loss(*a, patch_size=2, mean=MEAN, std=STD)  # noqa: E731
    check_registration(op, [pred, image, masked])


@pytest.mark.parametrize("normalize", [False, True])
def test_bytes_equal_the_floats_they_stand_for(normalize):
    pred, image, masked, labels = make()
    image = (image.sigmoid() * 255).to(torch.uint8)
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (MEAN, STD))
    op = lambda image, **numbers: run(  # noqa: E731
        lambda p: masked_patch_loss(p, image, masked, labels, 3, patch_size=2, normalize=normalize, **numbers), [pred]
    )
    got = op(image, mean=MEAN, std=STD)
    want = op((image.double() / 255 - mean) / std)
    assert_equal(got, want)


def test_the_image_gets_no_gradient():
    pred, image, masked, labels = make()
    image.requires_grad_()
    masked_patch_loss(pred.requires_grad_(), image, masked, labels, 3, patch_size=2).loss.backward()
    assert image.grad is None and pred.grad is not None


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("as_image", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("distance", ["l1", "mse"])
def test_other_tokens_do_not_matter(poison, as_image, normalize, distance):
    pred, image, masked, labels = make(as_image=as_image)
    idle = ~masked | (labels < 0) | (labels >= 3)
    entries = idle[..., None].expand(-1, -1, 12)
    pixels = to_image(entries, torch.empty_like(image, dtype=torch.bool), 2)
    op = lambda p, i: run(  # noqa: E731
        lambda p: masked_patch_loss(p, i, masked, labels, 3, patch_size=2, normalize=normalize, distance=distance), [p]
    )
    want = op(pred, image)
    got = op(torch.where(pixels if as_image else entries, poison, pred), torch.where(pixels, poison, image))
    assert_equal(got, want, rtol=0, atol=0)
    assert (want[1][0][pixels if as_image else entries] == 0).all()


def test_a_class_keeps_its_nan_to_itself():
    pred, image, masked, labels = make()
    pred = torch.where((labels == 1)[..., None], float("nan"), pred)
    got = masked_patch_loss(pred, image, masked, labels, 3, patch_size=2).class_sum
    assert got.isnan().tolist() == [False, True, False]


def test_channels_last_pred_gets_a_channels_last_gradient():
    pred, image, masked, labels = make(as_image=True)
    op = lambda p: masked_patch_loss(p, image, masked, labels, 3, patch_size=2)  # noqa: E731
    got = run(op, [pred.to(memory_format=torch.channels_last)])
    assert got[1][0].is_contiguous(memory_format=torch.channels_last)
    assert_equal(got, run(op, [pred]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_float32(dtype):
    pred, image, masked, labels = make(grid=(6, 6), dtype=torch.float32)
    pred = pred.to(dtype)
    op = lambda p: masked_patch_loss(p, image.to(p.dtype), masked, labels, 3, patch_size=2)  # noqa: E731
    (loss, class_sum, _), (grad,) = run(op, [pred])
    assert loss.dtype == class_sum.dtype == torch.float32 and grad.dtype == dtype
    exact = masked_patch_loss(pred.double(), image.to(dtype).double(), masked, labels, 3, patch_size=2)
    torch.testing.assert_close(class_sum.double(), exact.class_sum, rtol=1e-6, atol=1e-6)
    assert exact.loss.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_label_dtypes_and_repeatability(dtype):
    pred, image, masked, labels = make(batch=3, grid=(8, 8), dtype=torch.float32)
    labels = torch.where(labels < 0, 255, labels).to(dtype)
    op = lambda p: masked_patch_loss(p, image, masked, labels, 300, patch_size=2)  # noqa: E731
    assert_repeatable(op, [pred])
    assert int(op(pred).class_count[255 if 255 in labels else 0]) == int((masked & (labels == 255)).sum())


@pytest.mark.parametrize("balance", ["token", "class"])
def test_nothing_masked_is_a_zero_that_stays_connected(balance):
    pred, image, masked, labels = make()
    op = lambda p: masked_patch_loss(p, image, masked & False, labels, 3, patch_size=2, balance=balance)  # noqa: E731
    (loss, class_sum, class_count), (grad,) = run(op, [pred])
    assert loss == 0 and not class_sum.any() and not class_count.any() and torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(pred=torch.zeros(2, 6, 11)), ValueError, r"pred .* expected \(2, 6, 12\) or \(2, 3, 4, 6\)"),
        (dict(pred=torch.zeros(2, 6, 12, dtype=torch.int32)), TypeError, "pred has dtype int32"),
        (dict(image=torch.zeros(2, 3, 4, 7)), ValueError, "image has size 4 x 7, expected multiples of patch_size 2"),
        (dict(image=torch.zeros(2, 3, 4, 6, dtype=torch.uint8)), ValueError, "mean is None, expected 3 numbers"),
        (dict(mean=MEAN, std=STD), ValueError, "mean is given, expected None for a float32 image"),
        (dict(masked=torch.zeros(2, 6)), TypeError, "masked has dtype float32"),
        (dict(masked=torch.zeros(2, 2, 3, dtype=torch.bool)), ValueError, r"shape \(2, 2, 3\), expected \(2, 6\)"),
        (dict(labels=None), ValueError, "labels and num_classes must be given together, got only num_classes"),
        (dict(num_classes=None), ValueError, "labels and num_classes must be given together, got only labels"),
        (dict(labels=torch.zeros(2, 5, dtype=torch.int64)), ValueError, "labels has shape"),
        (dict(num_classes=0), ValueError, "num_classes is 0"),
        (dict(patch_size=0), ValueError, "patch_size is 0"),
        (dict(distance="l2"), ValueError, "distance is 'l2', expected one of 'l1', 'mse', 'smooth_l1'"),
        (dict(balance="pixel"), ValueError, "balance is 'pixel'"),
        (dict(normalize=1), TypeError, "normalize must be a bool"),
    ],
)  # fmt: skip
def test_wrong_arguments(change, error, message):
    pred, image, masked, labels = make(dtype=torch.float32)
    arguments = dict(pred=pred, image=image, masked=masked, labels=labels, num_classes=3, patch_size=2) | change
    with pytest.raises(error, match=message):
        masked_patch_loss(**arguments)


@pytest.mark.parametrize(
    ("mean", "std", "error", "message"),
    [
        (MEAN[:2], STD, ValueError, "mean has 2 numbers, expected 3"),
        (MEAN, (0.2, 0.0, 0.2), ValueError, "expected positive numbers"),
        (MEAN, (True, 0.2, 0.2), TypeError, "std must be a sequence of numbers"),
        (torch.tensor(MEAN), STD, TypeError, "mean must be a sequence of numbers"),
    ],
)
def test_wrong_mean_or_std(mean, std, error, message):
    pred, image, masked, _ = make(dtype=torch.float32)
    with pytest.raises(error, match=message):
        masked_patch_loss(pred, image.to(torch.uint8), masked, patch_size=2, mean=mean, std=std)


def test_a_patch_of_one_entry_cannot_be_normalised():
    with pytest.raises(ValueError, match="at least 2 entries"):
        masked_patch_loss(
            torch.zeros(1, 4, 1), torch.zeros(1, 1, 2, 2), torch.ones(1, 4).bool(), patch_size=1, normalize=True
        )
