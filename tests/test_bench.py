"""The benchmarks run, refuse baselines with another result, and their JSON becomes a table."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench.report
from bench.comparison import OURS, Comparison, assert_equal, prepared
from bench.report import END, START
from bench.table import in_words, ratio_table


def run(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and "XDIST" not in k}
    environment["CMIM_BENCH_DRY_RUN"] = "1"  # small shapes
    result = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_from_the_command_to_the_table(tmp_path):
    path, readme = tmp_path / "results.json", tmp_path / "README.md"
    chosen = "(patch_labels or losses_are_equal) and not compiled"
    printed = run("pytest", "bench/test_ops.py", "bench/test_step.py", "-k", chosen, "--benchmark-json", str(path))
    assert "patch_labels; " in printed and "one-hot pooling" in printed
    content = json.loads(path.read_text())
    assert content["machine_info"]["torch"] == torch.__version__ and "node" not in content["machine_info"]
    readme.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    kept = Path("bench/README.md").read_text()
    run("bench.report", str(path))
    assert Path("bench/README.md").read_text() == kept
    run("bench.report", str(path), "--readme", str(readme))
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert re.search(r"\| patch_labels \| \d+\.\d\d \|  \| \d+\.\d\d \|  \|", text)
    rows = path.with_suffix(".md").read_text()
    assert rows.count("| patch_labels; ") == len({entry["group"] for entry in content["benchmarks"]})
    assert path.with_suffix(".png").stat().st_size > 0


IN_PART = """{"stage": "a", "item": "b", "status": "failed", "error": "c"}\n{"stage": "a", "item": "d"}"""


@pytest.mark.parametrize("name", ["results.json", "results.jsonl"])
@pytest.mark.parametrize("content", [None, "", "[]", '{"a": 1}', '{"benchmarks": 3}', "text", IN_PART])
def test_a_file_without_measurements_is_named_in_one_line(name, content, tmp_path, capsys):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        bench.report.main([str(path)])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("error: ") and str(path) in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == ([path] if content is not None else [])


@pytest.mark.parametrize("content", [None, f"no {END}", f"{END}{START}"])
def test_a_readme_without_markers_is_refused_before_anything_is_written(content, tmp_path, capsys):
    path, readme = tmp_path / "results.jsonl", tmp_path / "README.md"
    path.write_text('{"stage": "a", "item": "b", "status": "failed", "error": "c"}\n')
    if content is not None:
        readme.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        bench.report.main([str(path), "--readme", str(readme)])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("error: ") and str(readme) in said and said.count("\n") == 1
    assert not path.with_suffix(".md").exists()


def test_a_baseline_with_another_result_is_refused():
    double = lambda x: 2 * x  # noqa: E731
    comparison = Comparison([torch.arange(3.0)], {OURS: double, "sum": lambda x: x + x, "wrong": lambda x: 2.01 * x})
    with prepared(comparison, "sum") as function:
        assert torch.equal(function(*comparison.inputs), 2 * comparison.inputs[0])
    with pytest.raises(AssertionError, match="wrong differs"), prepared(comparison, "wrong"):
        pass
    comparison = Comparison([torch.arange(3.0)], {OURS: double, "sum": double, "detached": lambda x: 2 * x + 0 * x.detach()})
    with prepared(comparison, "detached", backward=True) as function:
        assert function(*comparison.inputs)[0].shape == (3,)


def test_what_is_timed_in_turn_with_ours_is_compared_with_that_time(tmp_path):
    from bench.report import Run, all_rows

    lines = [
        {"stage": "", "item": name, "status": "passed", "group": "op; forward", "stats": {"min": seconds},
         "extra_info": {"baseline": name, "comparable": name != "less", **info}}
        for name, seconds, info in (
            (OURS, 1.0, {}), ("same", 8.0, {"ours_beside": 4.0}), ("less", 2.0, {"ours_beside": 3.0}), ("other", 9.0, {}),
        )
    ]  # fmt: skip
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = Run(path)
    assert run.speed_ups() == {"op; forward": 2.0} and list(run.costs()) == [("op; forward", "less", 1.5)]
    assert "less: 0.67; same: 2.00; other: 9.00" in "".join(all_rows(run))
    table = list(ratio_table([("op", OURS, 1.0, {}), ("op", "same", 8.0, {"ours_beside": 4.0})]))
    assert any("same" in line and "( 2.00)" in line for line in table)


def test_our_function_is_called_in_turn():
    from bench.clock import time_calls

    class Benchmark:  # pytest-benchmark's does nothing in the processes of pytest-xdist
        def pedantic(self, function, arguments, setup, rounds):
            for _ in range(rounds):
                setup()
                function(*arguments)

    calls = []
    timing = time_calls(Benchmark(), lambda: calls.append("t"), [], ours=lambda: calls.append("o"))
    assert timing.ours_beside > 0
    measured = "".join(calls)[3:]  # after both have run once before
    assert len(measured) >= 10 and measured == "ot" * (len(measured) // 2)


def test_integers_and_shapes_have_to_be_equal():
    one = torch.ones(2, dtype=torch.int32)
    assert_equal("x", one, one.long(), 0)
    for other in (one + 1, one[:1]):
        with pytest.raises(AssertionError):
            assert_equal("x", other, one, 1.0)
    with pytest.raises(AssertionError, match="returns 1 tensors, expected 2"):
        assert_equal("x", one, (one, one), 0)


def test_lines_of_an_unfinished_run_become_a_table(tmp_path):
    lines = [
        {"stage": "device", "item": "v", "status": "passed", "machine": {"gpu": "A GPU", "torch": "2.11", "threads": 1}},
        {"stage": "ops", "item": "a", "status": "started"},
    ]
    for name, seconds, comparable in ((OURS, 1.0, True), ("slow", 3.0, True), ("fast", 2.0, True), ("blind", 0.1, False)):
        info = {"baseline": name, "comparable": comparable, "error": 1e-6, "share_of_target": 0.5}
        for shape, unit in (("VOC", 1.0), ("ADE", 0.5), ("tiny", 1e-5)):
            line = {"stage": "ops", "item": name + shape, "status": "passed", "stats": {"min": seconds**unit * min(1, unit)}}
            lines.append(line | {"extra_info": info, "group": f"op; {shape}; forward"})
    path, readme = tmp_path / "results.jsonl", tmp_path / "README.md"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"stage": "ops", "it')
    readme.write_text(f"{START}{END}")
    run("bench.report", str(path), "--readme", str(readme))
    summary = readme.read_text()
    assert "| op | 1.68 |  | 1.41 | 10 us |" in summary and "A GPU; torch 2.11" in summary  # (2 x 2 ** 0.5) ** 0.5
    assert "| all ops | 1.68 |  | | |" in summary and "| op; VOC; forward | blind | 10.00 |" in summary
    rows = path.with_suffix(".md").read_text()
    assert "| op; VOC; forward | 1 s | 2.00 | blind: 0.10; fast: 2.00; slow: 3.00 | 50% | 1.0e-06 |" in rows
    assert "- ops: a: started" in rows


def test_table():
    rows = [("a", OURS, 2e-3, {}), ("a", "other", 1e-3, {"host_waits": 9}), ("b", "alone", 5e-6, {"clock": "eager"})]
    text = "\n".join(ratio_table(rows))
    assert text.index("other") < text.index(OURS) and "( 0.50)" in text and "waits 9 times" in text
    assert "alone" in text and "called from Python" in text


@pytest.mark.parametrize("seconds, words", [(2.0, "2 s"), (1.5e-3, "1.5 ms"), (42e-6, "42 us"), (3e-9, "3 ns")])
def test_in_words(seconds, words):
    assert in_words(seconds) == words
