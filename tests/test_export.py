"""Exported files: against our own output on odd sizes, in an environment without PyTorch, in place of a run, and damaged."""

import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import cmim
from cmim import checkpoint, evaluate, export, predict
from cmim.config import config_from
from cmim.engine import card, exported, program_file
from cmim.engine.export import FORMATS, Exporter, describe
from cmim.engine.inference import full_logits
from cmim.engine.run import Run
from cmim.engine.trained import Trained, load_trained
from cmim.errors import UserError
from cmim.models.build import build_segmenter
from cmim.models.whole import WholeSegmenter
from tests.tiny_runs import FOLDER, read_metrics, run_tiny, write_folder

ROOT = Path(__file__).resolve().parents[1]
SIZES = ((1, 37, 53), (2, 64, 41), (3, 90, 33))
"""Other sizes than those that the command compares."""
with_onnx = pytest.mark.skipif(
    any(find_spec(module) is None for module in FORMATS["onnx"]), reason="onnx, onnxscript or onnxruntime is not installed"
)
HERE = [name for name in FORMATS if all(find_spec(module) for module in FORMATS[name])]


def undecided(run):
    """The run with a head that prefers no class, so that its predictions vary."""
    state = checkpoint.load(run.last)
    net = load_trained(run.folder, "last").net.eval()
    noise = torch.randint(0, 256, (2, net.mean.shape[1], 48, 48), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        state["objective"]["teacher.head.bias"] -= full_logits(net, noise).mean((0, 2, 3))
    checkpoint.save(state, run.last)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    root = write_folder(folder / "data", sizes=((40, 48), (31, 53)), val=3, test=3)
    settings = FOLDER | dict(data__root=str(root), train__evaluate_every=1, method__preset="cmim", train__picture_every=9)
    return undecided(run_tiny(folder / "a run", **settings))


@pytest.fixture(scope="module")
def files(run):
    """The folder with every format that can be written here."""
    return export.main([str(run.folder), "--formats", *HERE])


def images(batch, height, width, channels=3):
    generator = torch.Generator().manual_seed(height)
    coarse = torch.rand(batch, channels, 5, 4, generator=generator) * 255
    noise = torch.rand(batch, channels, height, width, generator=generator) * 60
    return (F.interpolate(coarse, (height, width), mode="bicubic") + noise).clamp(0, 255).round()


def plain(net, shown):
    """Logits by the definition, for a network without a size multiple."""
    with torch.inference_mode():
        logits = net((shown / 255 - net.mean) / net.std)
        return F.interpolate(logits, shown.shape[-2:], mode="bilinear", align_corners=net.align_corners)


def outputs(path, shown):
    """What a file gives, without any code of ours."""
    if path.suffix == ".pt2":
        with torch.inference_mode():
            return torch.export.load(path).module()(shown)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": shown.numpy()})[0])


@pytest.mark.parametrize("name", ["pt2", pytest.param("onnx", marks=with_onnx)])
def test_programs_give_our_logits_on_odd_sizes(run, files, name):
    net, seen = load_trained(run.folder, "last").net.eval(), set()
    for size in SIZES:
        expected, found = plain(net, images(*size)), outputs(files / f"model.{name}", images(*size))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert (found.argmax(1) == expected.argmax(1)).float().mean() > 0.999
        seen |= set(expected.argmax(1).unique().tolist())
    assert len(seen) > 1


def test_each_file_says_the_same_of_itself(run, files):
    about = json.loads((files / "model.json").read_text())
    assert about["classes"] == ["sky", "road", "tree"] and about["input"]["shape"] == ["batch", 3, "height", "width"]
    assert (about["size_multiple"], about["step"], about["checkpoint"]) == (1, 2, "last")
    assert np.allclose(about["mean"], load_trained(run.folder, "last").net.mean.flatten())
    test = next(line for line in read_metrics(run) if line.get("split") == "test")
    assert about["scores"] == test
    for name in HERE:
        assert exported.read_about(files / f"model.{name}") == about
        content = (files / f"model.{name}").read_bytes()
        for place in (run.folder.parent, ROOT, Path(torch.__file__).parent):
            assert str(place).encode() not in content and str(place) not in json.dumps(about)
    assert sorted(p.name for p in files.iterdir()) == sorted(["README.md", "model.json", *(f"model.{n}" for n in HERE)])


def test_the_reconstruction_decoder_is_not_in_it(run, files):
    from safetensors.torch import load_file

    net = load_trained(run.folder, "last").net
    weights = load_file(files / "model.safetensors")
    assert set(weights) == set(net.state_dict())
    assert any(name.startswith("reconstruction.") for name in checkpoint.load(run.last)["objective"])
    for name in HERE:
        assert (files / f"model.{name}").stat().st_size < 1.6e6 + sum(4 * w.numel() for w in weights.values())


def masks(folder):
    return {path.name: np.asarray(Image.open(path)) for path in sorted((folder / "masks").iterdir())}


@pytest.mark.parametrize("name", HERE)
def test_predict_and_evaluate_take_a_file_in_place_of_a_run(run, files, name, tmp_path, monkeypatch):
    file, root = files / f"model.{name}", run.folder.parent / "data"
    elsewhere = shutil.copy(file, tmp_path / f"taken.{name}")  # nothing beside the file is needed
    for i, source in enumerate((run.folder, elsewhere)):
        predict.main([str(source), str(root / "test/images"), "-o", str(tmp_path / f"out{i}"), "--evaluation.flip", "true"])
    ours, theirs = masks(tmp_path / "out0"), masks(tmp_path / "out1")
    assert list(ours) == list(theirs) and len(np.unique(np.concatenate([m.ravel() for m in ours.values()]))) > 1
    for image in ours:
        assert (ours[image] == theirs[image]).mean() > 0.999
    printed = []
    monkeypatch.setattr(evaluate, "print_table", lambda *table: printed.append(table[:3]))
    scales = ["--evaluation.scales", "[0.75, 1]"]
    for source in (run.folder, elsewhere):
        evaluate.main([str(source), "--data.root", str(root), *scales])
    (own, *_), (scores, names, title) = printed
    assert scores.miou == pytest.approx(own.miou, abs=2e-3) and names == ["sky", "road", "tree"]
    assert title == f"{elsewhere}, exported, step 2, test"
    segmenter, image = cmim.load(elsewhere), images(1, 33, 47)[0].to(torch.uint8)
    expected = cmim.load(run.folder).predict(image)
    assert np.abs(segmenter.predict(image).confidence - expected.confidence).max() < 1e-4
    assert segmenter.colours.tolist() == cmim.load(run.folder).colours.tolist()


def test_what_a_file_does_not_take(run, files):
    file = files / "model.pt2"
    for words, said in (
        (["--checkpoint", "best"], "--checkpoint best is for a run folder"),
        (["--train.precision", "bf16"], "--train.precision has no effect on"),
        (["--evaluation.weights", "student"], "--evaluation.weights has no effect on"),
        ([], r"data\.root is missing: give the data folder as --data\.root PATH"),
    ):
        with pytest.raises(UserError, match=said):
            evaluate.main([str(file), *words])
    with pytest.raises(UserError, match=r"there is no file .*gone\.onnx; python -m cmim\.export RUN writes it"):
        evaluate.main([str(files / "gone.onnx")])
    with pytest.raises(UserError, match=r"takes no images of 9 x 5 pixels; give larger ones"):
        cmim.load(file).predict(np.zeros((5, 9, 3), np.uint8))


PROGRAM = next(p for p in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "onnxruntime" in p)


@with_onnx
def test_the_program_of_the_readme_needs_no_torch(run, files, tmp_path):
    """In a process in which neither PyTorch nor cmim can be imported."""
    assert PROGRAM == card.PROGRAM and f"```python\n{PROGRAM}```" in (files / "README.md").read_text()
    assert len([line for line in PROGRAM.splitlines() if line]) <= 12
    refused = ("torch", "torchvision", "timm", "onnx", "onnxscript", "cmim", "cmim_kernels", "safetensors", "yaml")
    for name in refused:
        (tmp_path / "refused").mkdir(exist_ok=True)
        (tmp_path / "refused" / f"{name}.py").write_text(f"raise ImportError('{name} is not here')")
    shutil.copy(files / "model.onnx", tmp_path)
    shown = images(1, 45, 61)
    Image.fromarray(shown[0].permute(1, 2, 0).numpy().astype(np.uint8)).save(tmp_path / "photo.png")
    program = PROGRAM.replace("photo.jpg", "photo.png")  # lossless, so that the pixels are known
    check = "import sys\ntry:\n    import torch\nexcept ImportError:\n    print('no torch')\n"
    after = f"\nprint(sorted(set(sys.modules) & set({refused!r})))"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "refused")}
    done = subprocess.run(
        [sys.executable, "-c", check + program + after], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["no torch", "[]"]
    expected = plain(load_trained(run.folder, "last").net.eval(), shown)[0].argmax(0).numpy()
    with Image.open(tmp_path / "mask.png") as mask:
        assert (np.asarray(mask) == expected).mean() > 0.999
        assert mask.getpalette()[:9] == np.ravel(load_trained(run.folder, "last").colours).tolist()


def exporter_of(folder, channels=3, arch="deeplabv3plus", encoder="test_resnet", argmax=False, crop=64, **model):
    """An `Exporter` of a network with random weights."""
    config = config_from(
        {
            "data": {"format": "folder", "root": "data", "crop": crop, "channels": channels},
            "model": {"arch": arch, "encoder": encoder, "weights": "none", "decoder_width": 16, **model},
            "method": {"preset": "supervised"},
        },
        "a test",
    )
    torch.manual_seed(0)
    net = build_segmenter(config.model, 3, *config.data.normalisation()).eval()
    trained = Trained(net, config, ["a", "b", "c"], [[0, 0, 9], [0, 9, 0], [9, 0, 0]], 7)
    return Exporter(trained, describe(trained, "last", None), folder, argmax)


def test_other_numbers_of_channels(tmp_path):
    for channels in (1, 4):
        exporter = exporter_of(tmp_path / str(channels), channels)
        written = exporter.write("pt2")
        assert written.shape == ["batch", channels, "height", "width"] and written.difference < 1e-4
        shown = images(2, 51, 70, channels)
        torch.testing.assert_close(outputs(written.path, shown), plain(exporter.net, shown), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["pt2", pytest.param("onnx", marks=with_onnx)])
def test_classes_instead_of_logits(tmp_path, name):
    exporter = exporter_of(tmp_path, argmax=True)
    written = exporter.write(name)
    assert written.equal > 0.999 and written.about["output"]["shape"] == ["batch", "height", "width"]
    for size in SIZES[:2]:
        found, expected = outputs(written.path, images(*size)), plain(exporter.net, images(*size)).argmax(1)
        assert found.dtype == torch.uint8 and (found == expected).float().mean() > 0.999
    with pytest.raises(UserError, match=r"gives classes alone \(--argmax\), without their scores; give the file exported"):
        cmim.load(written.path)


def test_padding_that_depends_on_the_size_and_size_multiples(tmp_path):
    """The convolutions of TensorFlow's EfficientNet, and a network whose sides are multiples of 32."""
    for settings in (
        {"encoder": "tf_efficientnet_lite0", "atrous_rates": [1, 2]},
        {"arch": "smp:unet/resnet18", "decoder_width": None},
    ):
        exporter = exporter_of(tmp_path, **settings)
        for module in exporter.net.modules():  # random weights alone would hardly let the image through
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.uniform_(module.running_var, 0.3, 1.0)
        whole = WholeSegmenter(exporter.net)
        with torch.inference_mode():
            for size in ((1, 37, 53), (2, 64, 48), (1, 49, 96), (1, 97, 131)):
                expected = full_logits(exporter.net, images(*size))
                torch.testing.assert_close(whole(images(*size)), expected, rtol=1e-3, atol=1e-3)
                assert expected.std() > 1e-4


def test_sides_of_a_program_with_a_size_multiple(tmp_path):
    exporter = exporter_of(tmp_path, arch="smp:unet/resnet18", decoder_width=None)
    written = exporter.write("pt2")
    assert written.about["size_multiple"] == 32 and written.shape == ["batch", 3, "height", "width"]
    assert {(h % 2, w % 2) for _, h, w in written.sizes} >= {(1, 1)}


def test_where_sizes_are_not_free(tmp_path, monkeypatch):
    """The next best shape is taken, and said; predictions go through that size."""
    exporter = exporter_of(tmp_path)
    real, tried = Exporter._traced, []

    def traced(self, free):
        tried.append(free)
        if free:
            raise RuntimeError("data-dependent size")
        return real(self, free)

    monkeypatch.setattr(Exporter, "_traced", traced)
    written = exporter.write("pt2")
    assert tried == [(0, 2, 3), (0,), ()] and written.shape == [1, 3, 64, 64]
    assert written.about["output"]["shape"] == [1, 3, 64, 64] and {size for size in written.sizes} == {(1, 64, 64)}
    segmenter = cmim.load(written.path)
    shown = images(2, 50, 77)
    classes = [p.classes for p in segmenter.predict(list(shown.to(torch.uint8)))]
    small = F.interpolate(shown, (64, 64), mode="bilinear", align_corners=True)
    logits = F.interpolate(plain(exporter.net, small), (50, 77), mode="bilinear", align_corners=True)
    assert (np.stack(classes) == logits.argmax(1).numpy()).mean() > 0.999


def test_a_file_that_differs_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr("cmim.engine.export.FREE", ((),))  # which is the fastest
    exporter = exporter_of(tmp_path)
    exporter.write("pt2")
    before = (tmp_path / "model.pt2").read_bytes()
    real = Exporter._save_pt2
    for change in (lambda y: y + 0.5, lambda y: y.flip(1), lambda y: y * float("nan"), lambda y: y[..., :-1]):

        def save(self, *arguments, change=change):
            run = real(self, *arguments)
            return lambda x: change(run(x))

        monkeypatch.setattr(Exporter, "_save_pt2", save)
        with pytest.raises(UserError, match=r"does not give what the run gives|cannot hold this network"):
            exporter.write("pt2")
        assert [p.name for p in tmp_path.iterdir()] == ["model.pt2"] and (tmp_path / "model.pt2").read_bytes() == before


def test_what_the_command_refuses(run, files, tmp_path, monkeypatch):
    for words, said in (
        (["--evaluation.flip", "true"], r"--evaluation\.flip has no effect on an export; leave it out"),
        (["--formats", "onnxx"], r"--formats: invalid choice: 'onnxx'"),
        (["--formats", "safetensors", "--argmax"], r"--argmax has no effect on weights alone"),
    ):
        with pytest.raises(UserError, match=said):
            export.main([str(run.folder), "--output", str(tmp_path / "out"), *words])
    with pytest.raises(UserError, match=r"is an exported file already; give the run folder"):
        export.main([str(files / "model.pt2")])
    with pytest.raises(UserError, match=r"is not a run folder"):
        export.main([str(tmp_path), "--formats", "pt2"])
    monkeypatch.setattr("cmim.engine.export.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"onnx, onnxscript, onnxruntime not installed: pip install 'cmim\[export\]'"
    ) as told:
        export.main([str(run.folder), "--output", str(tmp_path / "out")])
    assert str(told.value).endswith("or leave ONNX out: --formats pt2") and not (tmp_path / "out").exists()


def test_a_card_that_was_changed_is_kept(run, tmp_path):
    out = tmp_path / "out"
    words = [str(run.folder), "--output", str(out), "--formats", "safetensors"]
    export.main(words)
    export.main(words)
    text = (out / "README.md").read_text()
    (out / "README.md").write_text(text + "We took the photographs.\n")
    with pytest.raises(UserError, match=r"README\.md was changed, or is not written by cmim\.export"):
        export.main(words)
    assert (out / "README.md").read_text().endswith("We took the photographs.\n")
    (out / "README.md").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors would be overwritten"):
        export.main(words)


def test_the_card(run, files):
    text = (files / "README.md").read_text()
    front, body = text.removeprefix("---\n").split("\n---\n", 1)
    assert "library_name: cmim" in front and "pipeline_tag: image-segmentation" in front
    result = json.loads(run.result.read_text())
    for name, iou in result["iou"].items():
        row = next(line for line in body.splitlines() if line.startswith("|") and f"| {name} |" in line)
        shown = "-" if iou is None else f"{100 * iou:.1f}"
        assert row.split(" | ")[3] == shown
    assert f"mIoU {100 * result['miou']:.1f} %" in body and "On `test`" in body
    assert "Trained with 2 labelled images" in body and "data.labelled: 2" in body
    assert all(f"`model.{name}`" in body for name in HERE) and str(run.folder.parent) not in text


def test_names_cannot_break_out_of_the_card():
    assert card._plain("a|b\n# c `d` <i> [e](f)") == r"a\|b \# c \`d\` \<i\> \[e\](f)"
    config = config_from({"data": {"format": "shapes"}, "model": {"encoder": "``` x\n````"}}, "test")
    assert card._settings(config).splitlines()[4] == "`````yaml"


def test_scores_of_the_best_checkpoint(run, tmp_path):
    export.main([str(run.folder), "--output", str(tmp_path), "--formats", "safetensors", "--checkpoint", "best"])
    about = json.loads((tmp_path / "model.json").read_text())
    step = checkpoint.load(run.best)["step"]
    assert (about["checkpoint"], about["step"], about["scores"]["step"]) == ("best", step, step)


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def rewritten(source, target, change):
    """A copy of an archive whose members {name: bytes} `change` alters."""
    with zipfile.ZipFile(source) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return target


def member(members, end):
    return next(name for name in members if name.endswith(end))


def pickled_weight(members):
    name = member(members, "model_weights_config.json")
    config = json.loads(members[name])
    payload = next(iter(config["config"].values()))
    payload["use_pickle"] = True
    members[name] = json.dumps(config).encode()
    members[member(members, payload["path_name"])] = pickle.dumps(Bomb())


def pickled_input(members):
    buffer = io.BytesIO()
    torch.save(Bomb(), buffer)
    members[member(members, "sample_inputs/model.pt")] = buffer.getvalue()


def library(members):
    members[member(members, "archive_format").replace("archive_format", "data/aotinductor/model/x.so")] = b"\x7fELF"


def in_model(before, after):
    def change(members):
        name = member(members, "models/model.json")
        text = members[name].decode()
        assert re.search(before, text)
        members[name] = re.sub(before, after, text, count=1).encode()

    return change


EVIL = "__import__('pathlib').Path('exploded').touch()"


@pytest.mark.parametrize(
    "change, said",
    [
        (pickled_weight, "holds more than a network: the pickle"),
        (pickled_input, r"is not a readable \.pt2 file \(UnpicklingError\)"),
        (library, r"holds more than a network: data/aotinductor"),
        (in_model(r'"expr_str": "[^"]*"', f'"expr_str": "{EVIL}"'), "holds more than a network: the expression"),
        (in_model(r'"guards_code": \["[^"]*"', f'"guards_code": ["{EVIL}"'), "holds more than a network: the expression"),
        (in_model(r'torch\.ops\.aten\.mean\.dim', "torch.serialization.load"), "the operator torch.serialization.load"),
        (in_model(r'torch\.ops\.aten\.mean\.dim', "torch.ops.aten.from_file.default"), "the operator torch.ops.aten.from"),
        (in_model(r"builtins\.tuple", "evil.type"), "types of its own"),
    ],
)  # fmt: skip
def test_a_program_cannot_bring_code(files, tmp_path, monkeypatch, change, said):
    monkeypatch.chdir(tmp_path)
    bad = rewritten(files / "model.pt2", tmp_path / "bad.pt2", change)
    with pytest.raises(UserError, match=said):
        cmim.load(bad)
    assert not Path("exploded").exists()


def test_expressions_of_sizes():
    good = (
        "Add(FloorDiv(Symbol('s54', positive=True, integer=True), Integer(2)), Integer(-1))",
        "2*(7 + L['images'].size()[3])",
    )
    assert all(map(program_file._is_of_sizes, (*good, "torch.sym_max(1, s3) != 1", "u0 >= 2.5")))
    bad = (
        EVIL,
        "().__class__",
        "torch.load('x')",
        "s3; import os",
        "L['images'].storage()",
        "(lambda: 1)()",
        'f"{s3}"',
        "s3.real",
    )
    assert not any(map(program_file._is_of_sizes, bad))


@pytest.mark.parametrize("name", HERE)
def test_damaged_files(files, tmp_path, name):
    content = (files / f"model.{name}").read_bytes()
    for i, bad in enumerate((b"", b"no model", content[: len(content) // 2])):
        path = tmp_path / f"{i}.{name}"
        path.write_bytes(bad)
        with pytest.raises(UserError, match=r"\d\.\w+ (is not|cannot be read)") as told:
            cmim.load(path)
        assert "\n" not in str(told.value)


def test_descriptions_that_fit_nothing(files, tmp_path):
    from safetensors.torch import load_file, save_file

    weights, about = load_file(files / "model.safetensors"), json.loads((files / "model.json").read_text())
    for change in (
        {"classes": []},
        {"colours": ["red"] * 3},
        {"mean": [0.5]},
        {"config": 3},
        {"input": None},
        {"step": "x"},
    ):
        save_file(weights, tmp_path / "bad.safetensors", {"cmim": json.dumps(about | change)})
        with pytest.raises(UserError, match=r"is not a file of cmim\.export, or damaged"):
            cmim.load(tmp_path / "bad.safetensors")
    save_file(weights, tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match=r"is not a file of cmim\.export"):
        cmim.load(tmp_path / "bad.safetensors")


def test_a_run_without_scores_has_a_card(run, tmp_path):
    copy = Run(shutil.copytree(run.folder, tmp_path / "copy"))
    copy.metrics.unlink()
    export.main([str(copy.folder), "--formats", "safetensors"])
    assert "The run holds no scores of this step" in (copy.export / "README.md").read_text()
