import numpy as np
import pytest
import torch

from cmim.config import config_from
from cmim.data import load_splits
from cmim.data.batches import TrainBatches, evaluation_loader, train_loader
from cmim.data.datasets import Splits
from cmim.distributed import available_cores, loader_workers
from cmim.errors import UserError
from cmim.method.masking import expand
from cmim.randomness import torch_generator
from cmim.settings import Config
from cmim_kernels import random_mask


class Numbered:
    """Image i has the flat colour i; its label is i % 3 at `detail` times the resolution."""

    def __init__(self, sizes, detail=1, labelled=True, channels=3):
        self.sizes, self.detail, self.labelled, self.channels = list(sizes), detail, labelled, channels

    def __len__(self):
        return len(self.sizes)

    def name(self, i):
        return str(i)

    def image(self, i):
        return np.full((*self.sizes[i][::-1], self.channels), i % 256, np.uint8)

    def label(self, i):
        assert self.labelled, "the label of an unlabelled image was read"
        width, height = self.sizes[i]
        return np.full((height * self.detail, width * self.detail), i % 3, np.uint8)


class Broken(Numbered):
    def label(self, i):
        raise UserError(f"/data/mask_{i}.png holds the value 77: map it with data.label_map")


def settings(preset="cmim", seed=0, labelled=2, unlabelled=4, **data):
    data = {"format": "shapes", "crop": 32, "shapes": {"labelled": 5, "unlabelled": 7, "val": 3, "test": 3}} | data
    return Config(
        seed=seed,
        data=data,
        method={"preset": preset},
        mask={"block": 8},
        train={"labelled_batch": labelled, "unlabelled_batch": unlabelled},
    )


def numbered(labelled=5, unlabelled=7, channels=3, **options):
    return Splits(
        Numbered([(32, 32)] * labelled, channels=channels, **options),
        Numbered([(32, 32)] * unlabelled, labelled=False, channels=channels),
        None, None, (), None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def splits():
    return load_splits(settings().data)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


SUPERVISED = {"labelled_image", "label"}
UNLABELLED = SUPERVISED | {"weak_image", "valid", "channel_key", "strong_image", "box"}
VIEWS = ("labelled", "weak", "strong")
MASKED = UNLABELLED | {f"{view}_{name}" for view in VIEWS for name in ("mask", "mask_key", "class_key")}


@pytest.mark.parametrize(
    ("preset", "names", "views"),
    [
        ("supervised", SUPERVISED, 0),
        ("fixmatch", UNLABELLED, 1),
        ("fixmatch_fp", UNLABELLED, 1),
        ("semantic", MASKED, 1),
        ("unimatch", UNLABELLED, 2),
        ("unimatch_v2", UNLABELLED, 2),
        ("mim", MASKED, 1),
        ("cmim", MASKED, 1),
    ],
)
def test_contents(splits, preset, names, views):
    batch = TrainBatches(splits, settings(preset))[3]
    assert set(batch) == names
    expected = {
        "labelled_image": ((2, 3, 32, 32), torch.uint8),
        "label": ((2, 32, 32), torch.uint8),
        "weak_image": ((4, 3, 32, 32), torch.uint8),
        "valid": ((4, 32, 32), torch.bool),
        "channel_key": ((4,), torch.int64),
        "strong_image": ((views, 4, 3, 32, 32), torch.uint8),
        "box": ((views, 4, 4), torch.int64),
    }
    for view, count in zip(VIEWS, (2, 4, 4), strict=True):
        expected[f"{view}_mask"] = (count, 4, 4), torch.bool
        expected[f"{view}_mask_key"] = expected[f"{view}_class_key"] = (count,), torch.int64
    assert {name: (tuple(x.shape), x.dtype) for name, x in batch.items()} == {name: expected[name] for name in names}
    for name in names & {"labelled_mask", "weak_mask", "strong_mask"}:
        assert (batch[name].sum((1, 2)) == 10).all()  # round(0.6 x 16)


def test_masks_of_blocks_are_masks_of_tokens_at_a_lower_resolution(splits):
    """The draw is one number for each block: at any resolution the generator of a sample draws the same blocks."""
    batch = TrainBatches(splits, settings("cmim"))[3]
    for view, batch_size in zip(VIEWS, (2, 4, 4), strict=True):
        for i, mask in enumerate(batch[f"{view}_mask"]):
            generator = torch_generator(0, 3 * batch_size + i, f"{view} mask")
            tokens = random_mask(1, 8, 8, 0.6, block=2, generator=generator)
            assert torch.equal(expand(mask[None], 2), tokens)


def test_presets_share_their_draws(splits):
    small, large = TrainBatches(splits, settings("supervised"))[2], TrainBatches(splits, settings("cmim"))[2]
    assert all(torch.equal(small[name], large[name]) for name in small)


def test_draws_differ_between_samples_purposes_and_seeds(splits):
    a, b = TrainBatches(splits, settings("unimatch"))[0], TrainBatches(splits, settings("unimatch", seed=1))[0]
    assert not torch.equal(a["strong_image"][0], a["strong_image"][1]) and not torch.equal(a["box"][0], a["box"][1])
    assert not torch.equal(a["weak_image"], b["weak_image"])
    batches = [TrainBatches(splits, settings(seed=seed))[0] for seed in (0, 1)]
    keys = torch.cat([x for batch in batches for name, x in batch.items() if name.endswith("_key")])
    assert len(torch.unique(keys)) == len(keys) == 2 * (4 + 2 * (2 + 4 + 4))
    masks = batches[0]
    masks = torch.cat([masks[name] for name in ("labelled_mask", "weak_mask", "strong_mask")])
    assert len(torch.unique(masks.flatten(1), dim=0)) == 10


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_and_resume_change_nothing(splits, workers):
    batches = TrainBatches(splits, settings())
    before = torch.get_rng_state()
    loaded = list(train_loader(batches, 3, 8, workers))
    assert torch.equal(torch.get_rng_state(), before)
    assert len(loaded) == 5 and all(equal(a, batches[m]) for a, m in zip(loaded, range(3, 8), strict=True))
    assert equal(next(iter(train_loader(batches, 5, 6, 0))), loaded[2])
    assert not equal(loaded[0], loaded[1])


@pytest.mark.parametrize("preset", ["unimatch", "cmim"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_change_nothing(splits, preset, ranks):
    config = settings(preset, labelled=4, unlabelled=8)
    one = TrainBatches(splits, config)
    for step in (0, 5):
        parts = [TrainBatches(splits, config, rank, ranks)[step] for rank in range(ranks)]
        assert all(len(part["label"]) == 4 // ranks and len(part["channel_key"]) == 8 // ranks for part in parts)
        joined = {
            name: torch.cat([p[name] for p in parts], dim=1 if name in ("strong_image", "box") else 0) for name in parts[0]
        }
        assert equal(one[step], joined)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_keep_the_partners_of_cutmix(splits, ranks):
    def partners(world_size, step):
        """Pairs of global positions by their keys; image i is mixed with image i XOR 1 of the local batch."""
        keys = [
            TrainBatches(splits, settings(labelled=4, unlabelled=8), r, world_size)[step]["channel_key"].tolist()
            for r in range(world_size)
        ]
        return {frozenset((local[i], local[i ^ 1])) for local in keys for i in range(len(local))}

    assert partners(ranks, 3) == partners(1, 3) and len(partners(1, 3)) == 4


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_other_numbers_of_channels(channels):
    batch = TrainBatches(numbered(channels=channels), settings("cmim", scale=(1, 1), size=(24, 20)))[0]
    for name, shape in (("labelled_image", (2,)), ("weak_image", (4,)), ("strong_image", (1, 4))):
        assert batch[name].shape == (*shape, channels, 32, 32) and batch[name].dtype == torch.uint8
    assert (batch["weak_image"] == batch["weak_image"][:, :1]).all()
    images, _, _ = next(evaluation_loader(Numbered([(8, 6)] * 3, channels=channels), settings(size=(12, 10)).data, 2, 0))
    assert images.shape == (2, channels, 12, 10) and (images[1] == 1).all()


def test_every_epoch_is_a_permutation():
    batches = TrainBatches(numbered(), settings("fixmatch", scale=(1, 1)))
    labelled = torch.cat([batches[m]["labelled_image"][:, 0, 0, 0] for m in range(10)]).tolist()  # 20 = 4 epochs of 5
    epochs = [labelled[i : i + 5] for i in range(0, 20, 5)]
    assert all(sorted(e) == list(range(5)) for e in epochs) and len({tuple(e) for e in epochs}) > 1
    unlabelled = torch.cat([batches[m]["weak_image"][:, 0, 0, 0] for m in range(7)]).tolist()  # 28 = 4 epochs of 7
    assert all(sorted(unlabelled[i : i + 7]) == list(range(7)) for i in range(0, 28, 7))
    other = TrainBatches(numbered(), settings("fixmatch", seed=1, scale=(1, 1)))
    assert torch.cat([other[m]["labelled_image"][:, 0, 0, 0] for m in range(10)]).tolist() != labelled


def test_a_batch_larger_than_the_set():
    batch = TrainBatches(numbered(labelled=1, unlabelled=1), settings("fixmatch"))[0]
    assert not batch["labelled_image"].any() and len(batch["weak_image"]) == 4


def test_label_belongs_to_its_image():
    batches = TrainBatches(numbered(detail=2), settings("supervised", size=(20, 24), scale=(1, 1)))
    for m in range(4):
        batch = batches[m]
        inside = batch["label"] != 255
        assert (inside.sum((1, 2)) == 20 * 24).all()  # resized by data.size, then padded to 32
        assert torch.equal(batch["label"][inside], (batch["labelled_image"][:, 0] % 3)[inside])
        assert not batch["labelled_image"].permute(0, 2, 3, 1)[~inside].any()


def test_valid_is_what_is_not_padded():
    splits = Splits(*[Numbered([(20, 10)] * 300, labelled=flag) for flag in (True, False)], None, None, (), None)
    batch = TrainBatches(splits, settings("fixmatch", scale=(1, 1)))[30]
    assert (batch["valid"].sum((1, 2)) == 200).all()
    seen = batch["weak_image"][:, 0] > 0
    assert torch.equal(seen | (batch["weak_image"].amax((1, 2, 3)) == 0)[:, None, None], batch["valid"])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_users_mistake_in_a_worker_stays_one_line(workers):
    splits = Splits(Broken([(32, 32)] * 3), Numbered([(32, 32)] * 3), None, None, (), None)
    message = ""
    try:
        list(train_loader(TrainBatches(splits, settings("supervised", labelled=1)), 0, 2, workers))
    except UserError as error:
        message = str(error)
        error.__traceback__ = None  # it would keep the loader alive until the garbage collector waits for its workers
    assert message.startswith("/data/mask_") and message.endswith("data.label_map")


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_groups_images_of_equal_size(workers):
    sizes = [(8, 6), (8, 6), (8, 6), (6, 8), (8, 6), (8, 6)]
    groups = list(evaluation_loader(Numbered(sizes, detail=2), settings().data, 2, workers))
    assert [indices for _, _, indices in groups] == [[0, 1], [2], [3], [4, 5]]
    for images, labels, indices in groups:
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, *sizes[indices[0]][::-1])
        for image, label, i in zip(images, labels, indices, strict=True):
            assert (image == i).all() and (label == i % 3).all()
            assert label.dtype == torch.uint8 and label.shape == (2 * sizes[i][1], 2 * sizes[i][0])


def test_evaluation_resizes_images_but_not_labels():
    sizes = [(8, 6), (6, 8)]
    ((images, labels, indices),) = evaluation_loader(Numbered(sizes), settings(size=(12, 10)).data, 8, 0)
    assert images.shape == (2, 3, 12, 10) and indices == [0, 1]
    assert [tuple(label.shape) for label in labels] == [(6, 8), (8, 6)]


@pytest.mark.parametrize(("images", "ranks"), [(7, 2), (7, 3), (2, 4), (8, 4)])
def test_every_image_is_evaluated_on_one_rank(images, ranks):
    seen = []
    for rank in range(ranks):
        groups = list(evaluation_loader(Numbered([(8, 6)] * images), settings().data, 2, 0, rank, ranks))
        assert all((image == i).all() for batch, _, indices in groups for image, i in zip(batch, indices, strict=True))
        seen += [i for _, _, indices in groups for i in indices]
        assert abs(len(seen) - images * (rank + 1) / ranks) < ranks
    assert sorted(seen) == list(range(images))


def test_workers_that_are_not_given(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert loader_workers() == min(available_cores() - 1, 8)
    for cores, processes, workers in ((1, 1, 0), (64, 1, 8), (16, 4, 3), (16, 2, 7), (64, 4, 8), (2, 8, 0)):
        monkeypatch.setattr("cmim.distributed.available_cores", lambda cores=cores: cores)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert loader_workers() == workers and loader_workers(5) == 5


def test_flips_and_turns_belong_to_the_sample():
    """They differ between samples, and do not depend on the number of processes."""
    image_set = Numbered([(32, 32)] * 8)
    image_set.image = lambda i: np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
    splits = Splits(image_set, image_set, None, None, (), None)
    options = dict(labelled=8, unlabelled=8, scale=(1, 1))
    plain, turned = (TrainBatches(splits, settings(**options, **more))[0] for more in ({}, TURNS))
    for name in ("labelled_image", "weak_image"):
        orientations = [
            next(k for k, view in enumerate(eight_views(a)) if torch.equal(view, b))
            for a, b in zip(plain[name], turned[name], strict=True)
        ]
        assert len(set(orientations)) > 2
    halves = [TrainBatches(splits, settings(**options, **TURNS), rank, 2)[0] for rank in (0, 1)]
    assert torch.equal(torch.cat([half["weak_image"] for half in halves]), turned["weak_image"])


TURNS = {"flips": ["horizontal", "vertical"], "rotate90": True}


def test_colour_jitter_of_strong_views():
    """On images of a flat colour, which blur leaves alone."""
    splits = numbered()
    plain, usual = (TrainBatches(splits, settings(scale=(1, 1), colour_jitter=colour), 0, 1)[0] for colour in (0.0, 1.0))
    assert torch.equal(plain["weak_image"], usual["weak_image"])
    assert all(torch.equal(view, plain["weak_image"]) for view in plain["strong_image"])
    assert not any(torch.equal(view, usual["weak_image"]) for view in usual["strong_image"])


def eight_views(image):
    return [side.rot90(turns, (1, 2)) for side in (image, image.flip(-1)) for turns in range(4)]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"flips": ["vertical", "vertical"]}, "data.flips names a flip twice: vertical, vertical"),
        ({"flips": ["diagonal"]}, "data.flips.0"),
    ],
)
def test_flips_that_are_refused(change, said):
    with pytest.raises(UserError) as caught:
        config_from({"data": {"format": "shapes"} | change}, "test")
    assert said.removesuffix(".0") in str(caught.value)
