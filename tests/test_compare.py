"""compare: the runs it starts, what it keeps, and the table."""

import contextlib
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from cmim import checkpoint, compare, train
from cmim.config import config_from, dump_config, load_config
from cmim.engine import study
from cmim.engine.run import Run
from cmim.errors import UserError, run_command
from cmim.settings import PRESETS
from tests.tiny_runs import TINY, words


def compared(output, *more, **settings):
    settings = TINY | {"train.picture_every": 9} | {key.replace("__", "."): value for key, value in settings.items()}
    compare.main(["--output", str(output), *words(settings), *more])


def in_this_process(started):
    """A stand-in for subprocess.run that spares each run the start of Python."""

    def call(command, stdout, stderr, env):
        assert command[:3] == [sys.executable, "-m", "cmim.train"] and stderr is stdout and env == os.environ
        (output,) = (word.removeprefix("--output=") for word in command if word.startswith("--output="))
        started.append(output)
        code = 0
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stdout):
            try:
                run_command(lambda: train.main(command[3:]))
            except SystemExit as stop:
                code = stop.code
        return SimpleNamespace(returncode=code)

    return call


def test_compare_makes_a_table_and_keeps_what_is_finished(tmp_path, monkeypatch, capsys):
    started, wanted = [], ["--presets", "supervised", "fixmatch", "--seeds", "0", "7"]
    monkeypatch.setattr(compare.subprocess, "run", in_this_process(started))
    compared(tmp_path / "table", *wanted)
    folders = [str(tmp_path / "table" / name) for name in ("supervised-0", "fixmatch-0", "supervised-7", "fixmatch-7")]
    assert started == folders
    rows = [line.split("|")[1:-1] for line in (tmp_path / "table/table.md").read_text().splitlines()]
    assert [cell.strip() for cell in rows[0]] == [
        "variant", "seed 0", "seed 7", "last on test, mean ± sd", "best on val, mean ± sd",
        "minus supervised", "val minus supervised", "val at its time", "s/step",
    ]  # fmt: skip
    for row, preset in zip(rows[2:], ("supervised", "fixmatch"), strict=True):
        runs = [Run(tmp_path / "table" / f"{preset}-{seed}") for seed in (0, 7)]
        last, best = ([100 * json.loads(run.result.read_text())[key] for run in runs] for key in ("miou", "best_miou"))
        both = (f"{(a + b) / 2:.2f} ± {abs(a - b) / 2**0.5:.2f}" for a, b in (last, best))
        assert [cell.strip() for cell in row][:5] == [preset, *(f"{v:.2f}" for v in last), *both]
        assert {checkpoint.load(run.last)["step"] for run in runs} == {2}
    assert (tmp_path / "table/table.md").read_text() in capsys.readouterr().out

    before = (tmp_path / "table/table.md").read_text()
    compared(tmp_path / "table", *wanted)
    assert started == folders and (tmp_path / "table/table.md").read_text() == before

    # What was interrupted is run again; more steps continue; other settings are refused, not taken for the old ones.
    Run(folders[1]).result.unlink()
    (tmp_path / "table/results/fixmatch-0.json").unlink()
    compared(tmp_path / "table", *wanted)
    assert started[4:] == [folders[1]] and (tmp_path / "table/table.md").read_text() == before
    with pytest.raises(UserError, match=r"supervised-0.json is the result of other settings; remove it"):
        compared(tmp_path / "table", "--presets", "supervised", "--seeds", "0", train__steps=3)
    (tmp_path / "table/results/supervised-0.json").unlink()
    compared(tmp_path / "table", "--presets", "supervised", "--seeds", "0", train__steps=3)
    assert started[5:] == [folders[0]] and json.loads(Run(folders[0]).result.read_text())["step"] == 3
    (tmp_path / "table/results/fixmatch-7.json").unlink()
    with pytest.raises(UserError, match=r"fixmatch, seed 7 stopped with exit code 2: error: optimizer.lr differs"):
        compared(tmp_path / "table", "--presets", "fixmatch", "--seeds", "7", optimizer__lr=0.5)


def test_variants_of_a_file_and_what_is_kept_of_them(tmp_path, monkeypatch, capsys):
    started, variants = [], tmp_path / "variants.yaml"
    monkeypatch.setattr(compare.subprocess, "run", in_this_process(started))
    variants.write_text("plain: {method.preset: supervised}\nwide: {method.preset: fixmatch, data.scale: [0.5, 1.0]}\n")
    wanted = ["--variants", str(variants), "--seeds", "3", "4", "--draw-splits", "--base", "plain"]
    wanted += ["--results", str(tmp_path / "kept")]
    compared(tmp_path / "table", *wanted)
    assert "4 of 4 runs, about 0:00:00 left" in capsys.readouterr().out
    config = load_config(Run(tmp_path / "table/wide-4").config)
    assert (config.seed, config.data.split_seed, config.data.scale) == (4, 4, (0.5, 1.0))
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        "plain-3.json", "plain-4.json", "wide-3.json", "wide-4.json",
    ]  # fmt: skip
    kept = json.loads((tmp_path / "kept/wide-4.json").read_text())
    summary = json.loads(Run(tmp_path / "table/wide-4").result.read_text())
    assert (kept["miou"], kept["iou"], kept["seed"], kept["val"][-1][0]) == (summary["miou"], summary["iou"], 4, 2)
    assert kept["seconds_per_step"] > 0 and "root" not in kept["config"].get("data", {})
    table, plot = (tmp_path / "table/table.md").read_text(), (tmp_path / "table/plot.png").read_bytes()
    assert table.splitlines()[0].count("minus plain") == 2 and plot.startswith(b"\x89PNG")
    page = (tmp_path / "table/report.html").read_text()
    cells = [cell.strip() for cell in table.splitlines()[3].split("|")]
    assert cells[4] in page and all(
        f'href="{name}-{seed}/report.html"' in page for name in ("plain", "wide") for seed in (3, 4)
    )

    # The kept results stand for the run folders, on another machine too, but not for other settings.
    compared(tmp_path / "elsewhere", *wanted, data__workers=1)
    assert len(started) == 4 and (tmp_path / "elsewhere/table.md").read_text() == table
    variants.write_text("plain: {method.preset: supervised}\nwide: {method.preset: fixmatch, data.scale: [0.5, 1.5]}\n")
    with pytest.raises(UserError, match=r"wide-3.json is the result of other settings"):
        compared(tmp_path / "elsewhere", *wanted)
    (tmp_path / "kept/wide-3.json").write_text("{}")
    with pytest.raises(UserError, match=r"wide-3.json is no result of cmim.compare"):
        compared(tmp_path / "elsewhere", *wanted)


@pytest.mark.parametrize("seed, taken", [("{seed}", "first-7"), ("0", "first-0")])
def test_a_variant_that_takes_its_pseudo_labels_from_the_run_of_another(seed, taken, tmp_path, monkeypatch):
    started, output, variants = [], tmp_path / "study", tmp_path / "variants.yaml"
    monkeypatch.setattr(compare.subprocess, "run", in_this_process(started))
    variants.write_text(
        f"student: {{method.preset: fixmatch, teacher.run: '{{output}}/first-{seed}'}}\n"
        "first: {method.preset: supervised}\n"
    )
    wanted = ["--variants", str(variants), "--seeds", "0", "7"]
    compared(output, *wanted)
    assert [name.rpartition("/")[2] for name in started] == ["first-0", "first-7", "student-0", "student-7"]
    assert load_config(output / "student-7/config.yaml").teacher.run == output / taken
    kept = (output / "results/student-7.json").read_text()
    assert json.loads(kept)["config"]["teacher"]["run"] == taken and str(tmp_path) not in kept
    compared(output, *wanted)
    assert len(started) == 4


def test_a_run_that_another_variant_needs_is_trained_again_where_only_its_result_was_kept(tmp_path, monkeypatch, capsys):
    started, kept, variants = [], tmp_path / "kept", tmp_path / "variants.yaml"
    monkeypatch.setattr(compare.subprocess, "run", in_this_process(started))
    variants.write_text(
        "first: {method.preset: supervised}\nfirst-1: {method.preset: supervised, optimizer.lr: 0.002}\n"
        "longer: {method.preset: supervised, model.init_from: '{output}/first-{seed}'}\n"
    )
    wanted = ["--variants", str(variants), "--results", str(kept), "--seeds", "0", "1"]
    compared(tmp_path / "here", *wanted)
    assert len(started) == 6
    said = (tmp_path / "here/longer-1.log").read_text()
    assert f"starting with the weights of {tmp_path / 'here/first-1'}" in said.replace("\n", "") and "pretrained" not in said
    compared(tmp_path / "elsewhere", *wanted)  # with every result, no run is needed
    assert len(started) == 6 and not (tmp_path / "elsewhere/first-0").exists()
    path = kept / "first-1.json"
    path.write_text(path.read_text().replace('"machine": "', '"machine": "another, '))
    (kept / "longer-1.json").unlink()
    capsys.readouterr()
    compared(tmp_path / "elsewhere", *wanted)
    assert [name.rpartition("/")[2] for name in started[6:]] == ["first-1", "longer-1"]
    assert "first, seed 1: only its result is there" in capsys.readouterr().out
    assert "another" in path.read_text() and (kept / "longer-1.json").exists()  # a result that was kept stays as it is


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "names no variant"),
        ("a/b: {seed: 3}", "'a/b' names a folder"),
        ("a: 3", "a is 3, expected overrides"),
        ("a: {seed: 3}", "--seed is set for each run"),
        ("a: {data.split_seed: 3}", "--data.split_seed is set for each run"),
        ("a: {train.steps: 3}", "--train.steps is set for each run; leave it away, or out of a"),
        (
            "a: {optimizer.lr: 1}\nc: {train.stps: 3}",
            "variants.yaml: c: unknown key train.stps; did you mean train.steps?",
        ),
        ("a: {optimizer.lr: small}", "variants.yaml: a: optimizer.lr: "),
        ("a: {data.workers: 0}\nb: {}", "--base c is none of the variants: a, b"),
    ],
)
def test_files_of_variants_that_are_refused(text, said, tmp_path):
    (tmp_path / "variants.yaml").write_text(text)
    base = ["--base", "c"] if "\n" in text else []
    with pytest.raises(UserError) as caught:
        compared(tmp_path / "table", "--variants", str(tmp_path / "variants.yaml"), "--draw-splits", *base)
    assert said in str(caught.value) and not (tmp_path / "table").exists()


def test_mistakes_beside_a_file_of_variants_are_not_said_to_be_in_it(tmp_path):
    (tmp_path / "variants.yaml").write_text("a: {optimizer.lr: 0.1}")
    for wrong, said in [
        ("--train.stps=3", "command line: "),
        ("--variants=none.yaml", "cannot read the file of variants none.yaml: "),
    ]:
        with pytest.raises(UserError) as caught:
            compared(tmp_path / "table", "--variants", str(tmp_path / "variants.yaml"), wrong)
        assert str(caught.value).startswith(said)


def test_a_mistake_that_only_a_preset_makes_one(tmp_path):
    (tmp_path / "config.yaml").write_text("{data: {format: shapes}, method: {preset: supervised}}")
    with pytest.raises(UserError, match=r"^train.unlabelled_batch is 3"):
        compared(tmp_path / "table", str(tmp_path / "config.yaml"), "--presets", "fixmatch", train__unlabelled_batch=3)


def result(miou, val, seconds=1.0, seed=0):
    return study.Result("v", seed, miou, 0.5, "test", val, {}, seconds, "a machine", {})


def test_paired_differences_and_their_interval():
    # Differences 1, 2, 3 and 6: mean 3, standard deviation sqrt(14 / 3), t of 3 degrees of freedom 3.182.
    mean, half = study.difference([11, 22, 33, 46], [10, 20, 30, 40])
    assert mean == 3 and half == pytest.approx(3.182 * (14 / 3) ** 0.5 / 2)
    assert study.interval([5.0], [3.0]) == "+2.00" and study.interval([3, 5], [2, 2]) == "+2.00 [-10.71, +14.71]"
    assert study.interval([math.nan, 1], [2, 2]) == "-"


def test_what_is_kept_holds_no_paths_of_this_machine(tmp_path):
    def config(place):
        return config_from(
            {
                "data": {"format": "folder", "root": f"{place}/data", "split": f"{place}/split", "workers": 3},
                "model": {"init_from": f"{place}/first"}, "teacher": {"run": f"{place}/large"}, "train": {"device": "cpu"},
            },
            "a test",
        )  # fmt: skip

    here = study.portable(config(tmp_path))
    assert here == study.portable(config("/elsewhere")) and str(tmp_path) not in here.model_dump_json()
    other = study.portable(config_from({"data": {"format": "folder", "root": "x", "split": "other"}}, "a test"))
    assert here.data.split.name == "split" and other.data.split != here.data.split


def test_the_seconds_of_a_step_are_the_mean_over_the_run(tmp_path):
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    run.result.write_text(json.dumps({"miou": 0.5, "best_miou": 0.6, "split": "test", "step": 4, "iou": {}}))
    lines = [
        {"step": 2, "images_per_second": 8},
        {"step": 2, "split": "val", "miou": 0.6},
        {"step": 4, "images_per_second": 4},
    ]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for preset, seconds in (("supervised", 4 * (1 / 8 + 1 / 4) / 2), ("fixmatch", 8 * (1 / 8 + 1 / 4) / 2)):
        values = {"labelled_batch": 4, "unlabelled_batch": 4}
        config = config_from({"data": {"format": "shapes"}, "method": {"preset": preset}, "train": values}, "a test")
        kept = study.keep_result(tmp_path / "kept.json", preset, 0, run, config)
        assert kept.seconds_per_step == pytest.approx(seconds, abs=1e-4) and kept.val == [(2, 0.6)]


def test_val_at_the_time_of_the_base():
    base = result(0.5, [(10, 0.3), (20, 0.4)], seconds=1.0)
    assert study.at_equal_time(result(0.5, [(5, 0.1), (10, 0.2), (15, 0.9)], seconds=2.0), base) == 0.2
    assert math.isnan(study.at_equal_time(result(0.5, [(15, 0.9)], seconds=2.0), base))


def test_a_variant_minus_the_base():
    """On test, on val, and on val after the base's 10 seconds, which the variant spends on half of its steps."""
    base = [result(0.5, [(5, 0.1), (10, 0.3)])]
    variant = [result(0.6, [(5, 0.2), (10, 0.7)], seconds=2.0)]
    assert study.differences(variant, base) == ["+10.00", "+40.00", "-10.00"]
    both = {"base": base, "variant": variant}
    assert study.summary(both, "variant", "base") == ["60.00", "50.00", "+10.00", "+40.00", "-10.00", "2.00"]
    assert study.summary(both, "base", "base") == ["50.00", "50.00", "", "", "", "1.00"]
    assert study.summary({"base": base}, "base", "base") == ["50.00", "50.00", "1.00"]


def test_compare_starts_real_processes(tmp_path, monkeypatch):
    real, codes = subprocess.run, []

    def call(*arguments, **options):
        done = real(*arguments, **options)
        codes.append(done.returncode)
        return done

    monkeypatch.setattr(compare.subprocess, "run", call)
    compared(tmp_path, "--presets", "supervised", "--seeds", "3", "--jobs", "2", train__steps=1)
    assert codes == [0] and "| supervised |" in (tmp_path / "table.md").read_text()
    assert "seed 3" in (tmp_path / "table.md").read_text() and "±" not in (tmp_path / "table.md").read_text().splitlines()[2]
    assert "supervised, step 1, test" in (tmp_path / "supervised-3.log").read_text()
    assert "seed: 3" in Run(tmp_path / "supervised-3").config.read_text()


def test_compare_of_several_gpus_goes_through_torchrun(tmp_path, monkeypatch):
    called = []

    def call(command, stdout, stderr, env):
        called.append((command, env.get("OMP_NUM_THREADS")))
        stdout.write("error: train.labelled_batch is 2\n" if len(called) == 2 else "")
        stdout.write("Root Cause: a report\n=====\n")
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(compare, "available_cores", lambda: 24)
    monkeypatch.setattr(compare.subprocess, "run", call)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    wanted = ["--presets", "fixmatch", "--seeds", "4", "--gpus", "3"]
    with pytest.raises(UserError, match="exit code 1: ====="):
        compared(tmp_path, *wanted)
    with pytest.raises(UserError, match=r"exit code 1: error: train.labelled_batch is 2 \(see"):
        compared(tmp_path, *wanted, "--jobs", "2")
    with pytest.raises(UserError, match="exit code 1: ====="):  # what an earlier attempt said is past
        compared(tmp_path, *wanted)
    command = called[0][0]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "-m", "cmim.train"]
    assert command[1:7] == launcher and command[8:10] == [f"--output={tmp_path / 'fixmatch-4'}", "--resume"]
    assert [threads for _, threads in called] == [None, "4", None]


@pytest.mark.parametrize(
    "settings, result, done",
    [
        ({"train": {"steps": 3}}, {"step": 3, "epochs": None}, True),
        ({"train": {"steps": 3}}, {"step": 2, "epochs": None}, False),
        ({}, {"step": 40_000, "epochs": None}, True),
        ({}, {"step": 3, "epochs": None}, False),
        ({"train": {"epochs": 2}}, {"step": 7, "epochs": 2.0}, True),
        ({"train": {"epochs": 2}}, {"step": 7, "epochs": 1.0}, False),
        ({"train": {"epochs": 2}}, {"step": 7}, False),  # of a version that knew no epochs
        ({"train": {"steps": 3}, "seed": 5}, {"step": 3, "epochs": None}, False),
    ],
)
def test_what_compare_takes_for_finished(settings, result, done, tmp_path):
    run = Run(tmp_path)
    config = config_from({"data": {"format": "shapes"}, **settings}, "test")
    assert not compare.finished(run, config)
    run.config.write_text(dump_config(config.model_copy(update={"seed": 0})))
    run.result.write_text(json.dumps({"miou": 0.5, "best_miou": 0.5, "split": "test"} | result))
    assert compare.finished(run, config) == done


def test_compare_knows_every_preset():
    assert "unimatch_v2" in PRESETS
    for preset in PRESETS:
        assert config_from({"data": {"format": "shapes"}, "method": {"preset": preset}}, "test").method.preset == preset


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--seed", "4"], "--seed is set for each run"),
        (["--method.preset=cmim"], "--method.preset is set for each run"),
        (["--jobs", "0"], "--jobs is 0, expected at least 1"),
        (["--gpus", "0"], "--gpus is 0, expected at least 1"),
        (["--presets", "wrong"], "--presets: invalid choice: 'wrong'"),
        (["--train.stps", "4"], "did you mean train.steps?"),
    ],
)
def test_compare_refuses_before_it_starts(arguments, said, tmp_path):
    with pytest.raises(UserError) as caught:
        compare.main(["--output", str(tmp_path / "table"), *arguments])
    assert said in str(caught.value) and not (tmp_path / "table").exists()


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"step": 3, "miou": null, "best_miou": 0, "split": "test"}'])
def test_a_damaged_result(text, tmp_path):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(
        UserError, match=r"result.json is not a result of cmim.train; remove it, and the run will write it again"
    ):
        compare.read_result(Run(tmp_path))
