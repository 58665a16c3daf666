"""`python -m bench.gpu`: what fails, hangs or crashes is recorded and passed over; a second call goes on."""

import argparse
import os
import subprocess
import sys
import time

import pytest

from bench import gpu
from bench.recorder import last_of_each, read

TESTS = """
import os, signal, time
import pytest

def test_measures(record_property):
    record_property("value", 3)

def test_fails():
    assert 1 == 2, "one is not two"

def test_crashes():
    os.kill(os.getpid(), signal.SIGSEGV)

def test_after_a_crash():
    pass

def test_breaks_the_device():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_in_a_new_process():
    assert not os.path.exists(__file__ + str(os.getpid()))

def test_hangs():
    time.sleep(600)

def test_is_skipped():
    pytest.skip("not here")

def test_last():
    pass
"""


@pytest.fixture
def call(tmp_path, monkeypatch):
    """call(**options) runs a stage of the tests above and returns item -> last line."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    path = tmp_path / "test_things.py"
    path.write_text(TESTS)

    def call(*, again=False, budget=100.0, arguments="", item_seconds=20):
        options = argparse.Namespace(dry_run=False, again=again, budget=budget, wheels=None, data=None)
        run = gpu.Run(tmp_path, options)
        stage = gpu.Stage("things", f"{path} --rootdir {tmp_path} {arguments}", "", 100, item_seconds)
        run.run(stage)
        return {item.split("::")[-1]: line for (_, item), line in last_of_each(read(run.results)).items()}

    return call


def test_whatever_happens_the_rest_goes_on(call, tmp_path):
    lines = call()
    status = {name: line["status"] for name, line in lines.items()}
    assert status == {
        "test_measures": "passed", "test_fails": "failed", "test_crashes": "failed", "test_after_a_crash": "passed",
        "test_breaks_the_device": "failed", "test_in_a_new_process": "passed", "test_hangs": "failed",
        "test_is_skipped": "skipped", "test_last": "passed",
    }  # fmt: skip
    assert lines["test_measures"]["value"] == 3
    assert "one is not two" in lines["test_fails"]["error"]
    assert "SIGSEGV" in lines["test_crashes"]["error"]
    assert "without a result" in lines["test_hangs"]["error"]
    assert lines["test_is_skipped"]["error"].endswith("not here")
    before = (tmp_path / "results.jsonl").read_text()
    assert call() == lines and (tmp_path / "results.jsonl").read_text() == before
    again = call(again=True, arguments="-k fails")
    assert again["test_fails"]["time"] > lines["test_fails"]["time"] and again["test_last"] == lines["test_last"]


def test_a_stage_that_cannot_start_is_recorded(call):
    lines = call(arguments="--no-such-option")
    assert lines["the stage"]["status"] == "failed" and "--no-such-option" in lines["the stage"]["error"]


def test_what_there_was_no_time_for_is_not_a_failure(call):
    lines = call(budget=6.0, arguments="-k 'hangs or last'", item_seconds=60)
    assert lines["test_hangs"]["status"] == "started" and "test_last" not in lines


def run(out, *arguments, wait=True):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and "XDIST" not in k}
    command = [sys.executable, "-m", "bench.gpu", str(out), "--dry-run", *arguments]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    return process.communicate()[0] if wait else process


def test_a_call_that_is_killed_leaves_results_and_the_next_goes_on(tmp_path):
    stages = ("--stage", "device", "--stage", "ops")
    first = run(tmp_path, *stages, wait=False)
    results = tmp_path / "results.jsonl"
    started = lambda stage: [x for x in read(results) if x.get("stage") == stage and x["status"] == "passed"]  # noqa: E731
    while not started("ops"):
        assert first.poll() is None
        time.sleep(0.05)
    first.kill()
    first.wait()
    time.sleep(1)  # a test that was at work ends or is cut
    kept = last_of_each(read(results))
    assert run(tmp_path, *stages).splitlines()[-1].startswith("0 failed; ")
    lines = last_of_each(read(results))
    assert {item: line for item, line in lines.items() if item in kept and kept[item]["status"] != "started"} == {
        item: line for item, line in kept.items() if line["status"] != "started"
    }
    assert {line["status"] for line in lines.values()} <= {"passed", "skipped"}
    measured = [line for line in lines.values() if "stats" in line]
    assert len(measured) == 4 and all(line["stats"]["min"] > 0 for line in measured)
    assert any(line.get("machine", {}).get("torch") for line in lines.values())


@pytest.mark.slow
def test_a_dry_run_of_everything(tmp_path):
    pytest.importorskip("pydantic")
    printed = run(tmp_path, "--budget", "1500")
    assert printed.splitlines()[-1].startswith("0 failed; "), printed
    stages = {stage for stage, _ in last_of_each(read(tmp_path / "results.jsonl"))}
    assert stages == {stage.name for stage in gpu.STAGES}
