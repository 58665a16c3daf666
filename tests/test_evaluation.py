"""Class probabilities in every mode, and shares of an evaluation, against plain computations."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cmim import distributed
from cmim.config import config_from
from cmim.engine import evaluation, logging
from cmim.engine.evaluation import evaluate
from cmim.engine.inference import probabilities
from cmim.errors import UserError
from cmim.models.segmenter import Segmenter

CPU = torch.device("cpu")


class Net(nn.Module):
    """Logits of K classes on a grid of 4 pixels that depend on the surroundings; keeps the shapes it was shown."""

    accepted_size = Segmenter.accepted_size

    def __init__(self, classes=3, channels=2, multiple=1, align_corners=True):
        super().__init__()
        self.size_multiple, self.align_corners, self.shapes = multiple, align_corners, []
        generator = torch.Generator().manual_seed(classes)
        self.weight = torch.randn(classes, channels, 9, 9, generator=generator)

    def normalise(self, images):
        return images.float() / 128 - 1

    def forward(self, images):
        self.shapes.append(tuple(images.shape))
        assert not any(side % self.size_multiple for side in images.shape[-2:])
        return F.conv2d(images, self.weight, stride=4, padding=4)


class PixelNet(Net):
    """Logits that depend on the pixel alone."""

    def forward(self, images):
        self.shapes.append(tuple(images.shape))
        return F.conv2d(images, self.weight[:, :, 4:5, 4:5])


def config(**settings):
    return config_from({"data": {"format": "shapes", "crop": 12}, "mask": {"block": 4}, "evaluation": settings}, "test")


def random_images(count, height, width, channels=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, height, width), generator=generator, dtype=torch.uint8)


def shown(images, size, net):
    """What `net` is to see of images at a size."""
    return F.interpolate(images.float(), size, mode="bilinear", align_corners=net.align_corners)


def plain(net, images, size):
    """Probabilities of images that the network takes as they are, in one pass."""
    logits = net(images.float() / 128 - 1)
    return F.interpolate(logits, size, mode="bilinear", align_corners=net.align_corners).softmax(1)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("align_corners", [True, False])
def test_by_default_it_is_the_softmax_of_the_upsampled_logits(dtype, align_corners):
    """To the bit, image by image: figures that were published hang on it. Of several images at a time PyTorch may round
    otherwise, where its threads divide them."""
    net, images = Net(align_corners=align_corners), random_images(3, 30, 21)
    sizes = [(30, 21), (17, 40), (30, 21)]
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        found = list(probabilities(net, images, sizes, config()))
        logits = net(net.normalise(images))
    assert logits.dtype == (dtype or torch.float32) and net.shapes == [(3, 2, 30, 21)] * 2
    for i, size in enumerate(sizes):
        one = logits[i : i + 1].float()
        expected = F.interpolate(one, size, mode="bilinear", align_corners=align_corners).softmax(1)[0]
        assert found[i].dtype == torch.float32 and torch.equal(found[i], expected)


def slid(net, image, window, stride):
    """(K, H, W): pixel by pixel the mean over the windows that hold it, windows walked as one walks along a wall."""
    height, width = image.shape[1:]
    total, count = torch.zeros(len(net.weight), height, width), torch.zeros(height, width)
    row = 0
    while True:
        column = 0
        while True:
            part = image[:, row : row + window, column : column + window]
            total[:, row : row + window, column : column + window] += plain(net, part[None], part.shape[1:])[0]
            count[row : row + window, column : column + window] += 1
            if column + window >= width:
                break
            column = min(column + stride, width - window)
        if row + window >= height:
            break
        row = min(row + stride, height - window)
    return total / count


@given(
    height=st.integers(1, 30), width=st.integers(1, 30), window=st.integers(1, 20), gap=st.integers(0, 19),
    batch=st.integers(1, 5), align_corners=st.booleans(),
)  # fmt: skip
def test_sliding_windows_equal_a_plain_loop(height, width, window, gap, batch, align_corners):
    stride = max(1, window - gap)
    net, images = Net(align_corners=align_corners), random_images(2, height, width)
    settings = config(mode="slide", window=window, stride=stride, batch=batch)
    found = list(probabilities(net, images, [(height, width)] * 2, settings))
    shapes = {shape[1:] for shape in net.shapes}
    assert shapes == {(2, min(window, height), min(window, width))} and max(shape[0] for shape in net.shapes) <= batch
    for image, probability in zip(images, found, strict=True):
        torch.testing.assert_close(probability, slid(net, image, window, stride), rtol=1e-5, atol=1e-6)


def test_windows_are_crops_with_a_third_of_overlap_by_default():
    net, images = Net(), random_images(1, 29, 41)
    (found,) = probabilities(net, images, [(29, 41)], config(mode="slide"))
    torch.testing.assert_close(found, slid(net, images[0], 12, 8), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, plain(net, images, (29, 41))[0], atol=1e-2)


def test_windows_of_a_resized_image_are_joined_before_it_gets_its_size_back():
    net, images = Net(), random_images(1, 20, 25)
    (found,) = probabilities(net, images, [(31, 18)], config(mode="slide", scales=[1.5]))
    joined = slid(net, shown(images, (30, 38), net)[0], 12, 8)  # 37.5 rounds up
    torch.testing.assert_close(found, shown(joined[None], (31, 18), net)[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.sum(0), torch.ones(31, 18))


@pytest.mark.parametrize("align_corners", [True, False])
def test_flip_and_scales_are_averaged(align_corners):
    net, images = Net(align_corners=align_corners), random_images(2, 22, 31)
    sizes = [(22, 31), (40, 27)]
    found = list(probabilities(net, images, sizes, config(flip=True, scales=[0.5, 1.0, 1.75])))
    for i, size in enumerate(sizes):
        parts = []
        for seen in ((11, 16), (22, 31), (39, 54)):
            resized = images[i : i + 1].float() if seen == (22, 31) else shown(images[i : i + 1], seen, net)
            mirrored = resized[..., torch.arange(seen[1] - 1, -1, -1)]
            parts += [plain(net, resized, size), plain(net, mirrored, size)[..., torch.arange(size[1] - 1, -1, -1)]]
        assert not torch.allclose(parts[0], parts[1], atol=1e-2)
        torch.testing.assert_close(found[i], torch.cat(parts).mean(0), rtol=1e-5, atol=1e-6)


@given(
    mode=st.sampled_from(["whole", "slide"]), flip=st.booleans(), height=st.integers(1, 25), width=st.integers(1, 25),
    window=st.integers(2, 12), constant=st.booleans(),
)  # fmt: skip
def test_a_network_that_sees_single_pixels_says_the_same_in_every_mode(mode, flip, height, width, window, constant):
    """At several scales too where all pixels are equal."""
    net, images = PixelNet(classes=5), random_images(1, height, width)
    if constant:
        images[:] = images[:, :, :1, :1]
    settings = config(mode=mode, flip=flip, window=window, stride=window - 1, scales=[0.4, 1, 2] if constant else [1])
    (found,) = probabilities(net, images, [(height, width)], settings)
    torch.testing.assert_close(found, plain(net, images, (height, width))[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("align_corners", [True, False])
def test_sides_become_the_nearest_multiples(align_corners):
    net = Net(multiple=14, align_corners=align_corners)
    for size, seen in (((61, 63), (56, 70)), ((5, 28), (14, 28)), ((62, 90), (56, 84))):
        net.shapes.clear()
        images = random_images(2, *size)
        found = torch.stack(list(probabilities(net, images, [size, size], config())))
        assert net.shapes == [(2, 2, *seen)]
        torch.testing.assert_close(found, plain(net, shown(images, seen, net), size), rtol=1e-5, atol=1e-6)
    # One resize only, to the multiple that is nearest to the scaled side: 61 x 0.7 = 42.7, 63 x 0.7 = 44.1.
    images = random_images(1, 61, 63)
    (found,) = probabilities(net, images, [(61, 63)], config(scales=[0.7]))
    torch.testing.assert_close(found, plain(net, shown(images, (42, 42), net), (61, 63))[0], rtol=1e-5, atol=1e-6)


def test_windows_of_other_sizes_become_multiples_one_by_one():
    net, images = Net(multiple=14), random_images(1, 30, 41)
    (found,) = probabilities(net, images, [(30, 41)], config(mode="slide", window=20, stride=15, batch=3))
    assert {shape[2:] for shape in net.shapes} == {(14, 14)} and [shape[0] for shape in net.shapes] == [3, 3]
    total, count = torch.zeros(3, 30, 41), torch.zeros(30, 41)
    for row in (0, 10):
        for column in (0, 15, 21):
            part = images[:, :, row : row + 20, column : column + 20]
            total[:, row : row + 20, column : column + 20] += plain(net, shown(part, (14, 14), net), (20, 20))[0]
            count[row : row + 20, column : column + 20] += 1
    torch.testing.assert_close(found, total / count, rtol=1e-5, atol=1e-6)


class Images:
    """An `ImageSet` of arrays of several sizes."""

    def __init__(self, count):
        rng = np.random.default_rng(count)
        sizes = [((20, 16), (20, 16), (13, 31))[i % 3] for i in range(count)]
        self.images = [rng.integers(0, 256, (*size, 2), np.uint8) for size in sizes]
        self.labels = [rng.choice(np.array([0, 1, 2, 255], np.uint8), size) for size in sizes]

    def __len__(self):
        return len(self.images)

    def name(self, i):
        return str(i)

    def image(self, i):
        return self.images[i]

    def label(self, i):
        return self.labels[i]


def full_config(**settings):
    data = {"root": "unused", "crop": 12, "workers": 0, "channels": 2, "background": 0}
    return config_from({"data": data, "mask": {"block": 4}, "method": {"tau": 0.7}, "evaluation": settings}, "test")


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("count", [2, 7])
def test_shares_add_up_to_the_whole(ranks, count, monkeypatch):
    """Also where a process has nothing to do; every process returns the result of all."""
    image_set, net = Images(count), Net()
    settings = full_config(mode="slide", batch=2)
    alone = evaluate(net, image_set, settings, 3, CPU, None, "val")

    def share(rank, summed):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "size", lambda: ranks)
        monkeypatch.setattr(distributed, "sum_over_ranks", summed)
        return evaluate(net, image_set, settings, 3, CPU, None, "val")

    seen = [[] for _ in range(ranks)]
    for rank in range(ranks):
        share(rank, lambda tensor, own=seen[rank]: own.append(tensor.clone()))
    totals = [sum(parts) for parts in zip(*seen, strict=True)]
    assert int(totals[0].sum()) == sum(int((label < 255).sum()) for label in image_set.labels)
    for rank in range(ranks):
        left = iter(totals)
        assert share(rank, lambda tensor, left=left: tensor.copy_(next(left))) == alone
    assert alone.scores.miou > 0 and 0 < alone.pseudo_labels["pseudo_label_coverage"] < 1


def test_evaluation_obeys_its_settings():
    """By the confusion of plainly averaged probabilities."""
    image_set, net = Images(4), Net()
    matrix = torch.zeros(3, 3)
    for image, label in zip(image_set.images, image_set.labels, strict=True):
        images = torch.from_numpy(image).permute(2, 0, 1)[None]
        both = [slid(net, images[0], 12, 8), slid(net, images[0].flip(-1), 12, 8).flip(-1)]
        for t, p in zip(label.flatten().tolist(), sum(both).argmax(0).flatten().tolist(), strict=True):
            if t < 255:
                matrix[t, p] += 1
    found = evaluate(net, image_set, full_config(mode="slide", flip=True), 3, CPU, None, "val").scores
    assert found.pixel_accuracy == pytest.approx(float(matrix.trace() / matrix.sum()))
    assert found.mean_accuracy == pytest.approx(float((matrix.diag() / matrix.sum(1)).mean()))
    union = matrix.sum(0) + matrix.sum(1) - matrix.diag()
    assert found.iou == pytest.approx((matrix.diag() / union).tolist())


def test_an_image_without_a_class_does_not_count_in_the_mean_over_images():
    image_set, net = Images(4), Net()
    image_set.labels[1][:] = 255
    each = []
    for i in (0, 2, 3):
        one = Images(4)
        one.images, one.labels = one.images[i : i + 1], image_set.labels[i : i + 1]
        each.append(evaluate(net, one, full_config(), 3, CPU, None, "val").scores.miou)
    found = evaluate(net, image_set, full_config(batch=1), 3, CPU, None, "val").scores
    assert found.image_miou == pytest.approx(sum(each) / 3) and found.image_miou != pytest.approx(found.miou)


def test_evaluation_turns_cudnn_benchmark_off(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    evaluate(Net(), Images(1), full_config(), 3, CPU, None, "val")
    assert not torch.backends.cudnn.benchmark


def test_a_long_evaluation_says_how_far_it_is(monkeypatch, capsys):
    now = [0.0]

    def one_at_a_time(*arguments, **options):
        for batch in loader(*arguments, **options):
            now[0] += 13.0
            yield batch

    loader = evaluation.evaluation_loader
    monkeypatch.setattr(logging, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    evaluate(Net(), Images(2), full_config(batch=1), 3, CPU, None, "val")
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(evaluation, "evaluation_loader", one_at_a_time)
    evaluate(Net(), Images(7), full_config(batch=1), 3, CPU, None, "val")
    assert capsys.readouterr().out.splitlines() == [
        "val  3/7 images  0.1 images/s  0:00:52 left",
        "val  6/7 images  0.1 images/s  0:00:13 left",
    ]


def test_outputs_that_are_not_finite_are_no_result():
    class Broken(Net):
        def forward(self, images):
            return super().forward(images) * float("nan")

    with pytest.raises(
        UserError, match=r"the outputs of the network are not finite; lower optimizer.lr, use --train.precision fp32"
    ):
        evaluate(Broken(), Images(2), full_config(), 3, CPU, None, "test")


@pytest.mark.parametrize("background", [0, None])
def test_pseudo_labels_by_class_and_the_confusion_matrix(background):
    """By counting pixel by pixel; class 3 of four never occurs and is never predicted."""
    image_set, net = Images(3), Net(classes=3)
    net.weight = torch.cat([net.weight, torch.zeros_like(net.weight[:1])])
    of_all = net.forward
    net.forward = lambda images: of_all(images) - torch.tensor([0, 0, 0, 1e4]).view(1, 4, 1, 1)
    settings = full_config()
    settings = settings.model_copy(update={"data": settings.data.model_copy(update={"background": background})})
    found = evaluate(net, image_set, settings, 4, CPU, None, "val")
    counts, sure = np.zeros((4, 4), int), np.zeros((4, 4), int)
    for image, label in zip(image_set.images, image_set.labels, strict=True):
        images = torch.from_numpy(image).permute(2, 0, 1)[None]
        (probability,) = probabilities(net, images, [label.shape], settings)
        confidence, classes = (part.flatten().tolist() for part in probability.max(0))
        for t, c, k in zip(label.flatten().tolist(), confidence, classes, strict=True):
            if t < 4:
                counts[t, k] += 1
                sure[t, k] += c >= 0.7
    assert found.confusion == counts.tolist() and 0 < sure.sum() < counts.sum()
    share = lambda a, b: [x / y if y else None for x, y in zip(a.tolist(), b.tolist(), strict=True)]  # noqa: E731
    assert found.pseudo_label_classes == {
        "pseudo_label_class_coverage": share(sure.sum(0), counts.sum(0)),
        "pseudo_label_class_accuracy": share(sure.diagonal(), sure.sum(0)),
    }
    expected = {"pseudo_label_coverage": sure.sum() / counts.sum(), "pseudo_label_accuracy": sure.trace() / sure.sum()}
    if background is not None:
        expected["pseudo_label_coverage_foreground"] = sure[1:].sum() / counts[1:].sum()
        expected["pseudo_label_accuracy_foreground"] = sure[1:, 1:].trace() / sure[1:].sum()
    assert found.pseudo_labels == pytest.approx(expected)
    assert found.pseudo_label_classes["pseudo_label_class_coverage"][3] is None
