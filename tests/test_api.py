"""cmim.load and cmim.fit, and predictions of images of every kind and size."""

import csv
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import cmim
from cmim import predict
from cmim.config import config_from
from cmim.engine import prediction
from tests.tiny_runs import TINY


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return cmim.fit(output=tmp_path_factory.mktemp("api") / "run", settings=TINY | {"method.preset": "supervised"})


@pytest.fixture(scope="module")
def segmenter(folder):
    segmenter = cmim.load(folder)
    with torch.no_grad():  # weights of a few steps prefer one class everywhere
        segmenter.net.head.weight.mul_(30)
        image = torch.from_numpy(noise(0, (40, 40))).permute(2, 0, 1)[None]
        segmenter.net.head.bias.sub_(segmenter.net(segmenter.net.normalise(image)).mean((0, 2, 3)))
    return segmenter


def noise(seed, size):
    coarse = np.random.default_rng(seed).integers(0, 256, (-(-size[0] // 8), -(-size[1] // 8), 3), np.uint8)
    return coarse.repeat(8, 0).repeat(8, 1)[: size[0], : size[1]].copy()


def test_fit_from_a_file_a_mapping_and_a_config(folder, tmp_path):
    assert (folder / "result.json").exists() and "preset: supervised" in (folder / "config.yaml").read_text()
    values = {"data": {"format": "shapes", "crop": 32}, "method": {"preset": "supervised"}, "model": {"weights": "none"}}
    settings = {key: value for key, value in TINY.items() if key not in ("data.crop", "data.format")}
    for i, config in enumerate((values, config_from(values, "a test"))):
        run = cmim.fit(config, output=tmp_path / str(i), settings=settings)
        assert run == tmp_path / str(i) and cmim.load(run, "best").config.data.crop == 32
    assert cmim.fit(output=folder, resume=True, settings=TINY | {"method.preset": "supervised"}) == folder


def test_mistakes_are_one_line(folder, tmp_path):
    for call, said in (
        (lambda: cmim.load(tmp_path), "is not a run folder"),
        (lambda: cmim.load(folder, settings={"train.steps": 3}), "--train.steps has an effect only in training"),
        (lambda: cmim.fit({"train": {"stps": 3}}), r"^config: unknown key train.stps; did you mean train.steps\?"),
        (lambda: cmim.fit(settings={"train.stps": 3}), r"^settings: unknown key train.stps; did you mean train.steps\?"),
        (lambda: cmim.fit({"seed": 1}, settings={"seed": "x"}), r"^settings: seed: "),
        (lambda: cmim.fit(output=folder, settings=TINY), "holds a run; continue it with --resume"),
    ):
        with pytest.raises(cmim.UserError, match=said):
            call()


def test_every_kind_of_image_gives_the_same(segmenter, tmp_path):
    image = noise(1, (37, 50))
    Image.fromarray(image).save(tmp_path / "a.png")
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    want = segmenter.predict(image)
    assert want.classes.shape == want.confidence.shape == (37, 50) and len(np.unique(want.classes)) > 1
    assert (want.classes.dtype, want.confidence.dtype) == (np.uint8, np.float32) and 0 < want.confidence.min() <= 1
    several = [image, tensor, Image.fromarray(image), tmp_path / "a.png", str(tmp_path / "a.png")]
    for got in (*map(segmenter.predict, several), *segmenter.predict(several), *segmenter.predict(tensor[None])):
        assert (got.classes == want.classes).mean() > 0.999  # of several images together PyTorch may round otherwise
        np.testing.assert_allclose(got.confidence, want.confidence, atol=1e-4)
    sizes = [(37, 50), (16, 20), (37, 50)]
    mixed = segmenter.predict([noise(i, size) for i, size in enumerate(sizes)])
    assert [p.classes.shape for p in mixed] == sizes and segmenter.predict([]) == []
    assert len(segmenter.classes) == len(segmenter.colours) and segmenter.config.seed == 0


@pytest.mark.parametrize(
    "image, error, said",
    [
        (np.zeros((4, 4, 3)), TypeError, "dtype float64, expected uint8"),
        (np.zeros((4, 4), np.uint8), ValueError, r"shape \(4, 4, 1\) as \(H, W, C\), expected 3 channels"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "expected 3 channels and pixels"),
        (3, TypeError, "an image is a int"),
        ("nowhere.png", cmim.UserError, "cannot read nowhere.png"),
    ],
)
def test_what_is_no_image(segmenter, image, error, said):
    with pytest.raises(error, match=said):
        segmenter.predict(image)


def test_tiles_agree_with_the_whole_image(segmenter, monkeypatch):
    image = noise(2, (300, 420))
    whole = segmenter.predict(image)
    shown = []
    forward = segmenter.net.forward
    monkeypatch.setattr(segmenter.net, "forward", lambda x: shown.append(tuple(x.shape[2:])) or forward(x))
    monkeypatch.setattr(prediction, "MOST_PIXELS", 1000)
    monkeypatch.setattr(prediction, "TILE", 128)
    monkeypatch.setattr(prediction, "MARGIN", 96)
    tiled = segmenter.predict(image)
    assert len(shown) == 12 and max(side for size in shown for side in size) <= 128 + 2 * 96
    # The network pools over all it sees, so that a few pixels differ; shifted tiles would differ everywhere.
    assert (tiled.classes == whole.classes).mean() > 0.9 and (tiled.confidence > 0).all()


def test_which_images_share_a_pass(segmenter, monkeypatch):
    monkeypatch.setattr(prediction, "MOST_PIXELS", 100)
    sizes = [(5, 6)] * 10 + [(6, 5)] + [(20, 20)] * 2 + [(5, 6)]
    images = [np.zeros((*size, 3), np.uint8) for size in sizes]
    assert segmenter.config.evaluation.batch == 8
    groups = list(segmenter.groups(enumerate(images), lambda pair: pair[1]))
    assert [[i for i, _ in group] for group in groups] == [[*range(8)], [8, 9], [10], [11], [12], [13]]
    assert [p.classes.shape for p in segmenter.predict(images[-4:])] == sizes[-4:]


def test_a_large_result_of_a_small_input(folder, monkeypatch):
    segmenter = cmim.load(folder, settings={"data.size": [32, 48]})
    image = noise(3, (90, 140))
    whole = segmenter.predict(image)
    monkeypatch.setattr(prediction, "MOST_PIXELS", 1000)
    large = segmenter.predict(image)
    assert (large.classes == whole.classes).mean() > 0.97
    np.testing.assert_allclose(large.confidence, whole.confidence, atol=0.1)


def test_the_command_groups_images_and_writes_a_table(folder, tmp_path, monkeypatch, capsys):
    for name, size in (("a/1.png", (20, 30)), ("a/2.png", (20, 30)), ("b/3.png", (24, 30)), ("b/4.txt", None)):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(noise(5, size)).save(path) if size else path.write_text("no image")
    groups, real = [], prediction.TrainedSegmenter.predict
    monkeypatch.setattr(
        prediction.TrainedSegmenter, "predict", lambda self, images: groups.append(len(images)) or real(self, images)
    )
    out = tmp_path / "out"
    predict.main([str(folder), str(tmp_path / "a"), str(tmp_path / "*/3*"), "-o", str(out), "--confidence"])
    assert groups == [2, 1] and "3 images: " in capsys.readouterr().out
    written = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.png"))
    assert written == [
        f"{kind}/{name}.png" for kind in ("confidence", "masks", "overlays") for name in ("a/1", "a/2", "b/3")
    ]
    with open(out / "classes.csv", newline="") as file:
        head, *lines = csv.reader(file)
    assert head[:3] == ["image", "width", "height"] and head[3:] == cmim.load(folder).classes
    assert [line[:3] for line in lines] == [["a/1.png", "30", "20"], ["a/2.png", "30", "20"], ["b/3.png", "30", "24"]]
    for line in lines:
        classes = np.asarray(Image.open(out / "masks" / line[0]))
        assert [float(share) for share in line[3:]] == pytest.approx(
            [(classes == k).mean() for k in range(len(head) - 3)], abs=1e-6
        )
    confidence = np.asarray(Image.open(out / "confidence/b/3.png"))
    assert confidence.dtype == np.uint8 and confidence.shape == (24, 30) and confidence.min() > 0

    predict.main([str(folder), str(tmp_path / "a/1.png"), "-o", str(out)])  # over its own table
    (out / "classes.csv").write_text("somebody's figures")
    with pytest.raises(cmim.UserError, match=r"classes.csv would be overwritten, but predict did not write it"):
        predict.main([str(folder), str(tmp_path / "a/1.png"), "-o", str(out)])
    with pytest.raises(cmim.UserError, match="no image fits the pattern"):
        predict.main([str(folder), str(tmp_path / "*.jpg"), "-o", str(out)])


def test_importing_the_package_imports_no_pytorch():
    code = "import sys, cmim; assert 'load' in dir(cmim) and 'torch' not in sys.modules; cmim.load"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        cmim.nothing  # noqa: B018
