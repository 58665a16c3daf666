"""Ctrl-C and SIGTERM: a checkpoint at the end of the step, the command that continues, and an end equal to the bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cmim import checkpoint, train
from cmim.engine import evaluation, trainer
from cmim.engine.run import Run
from cmim.errors import Stopped, UserError, run_command
from tests.test_resume import assert_same_run
from tests.tiny_runs import read_metrics, run_tiny, tiny

CHECKOUT = Path(__file__).parent.parent
SETTINGS = dict(
    method__preset="supervised", train__steps=6, train__log_every=3, train__checkpoint_every=6, train__evaluate_every=3
)


def send_at(monkeypatch, step, number, times=1):
    """The process sends itself a signal while it computes this step."""
    write = trainer.set_learning_rate
    seen = []

    def set_learning_rate(*arguments):
        seen.append(1)
        if len(seen) == step:
            for _ in range(times):
                os.kill(os.getpid(), number)
        write(*arguments)

    monkeypatch.setattr(trainer, "set_learning_rate", set_learning_rate)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run_tiny(tmp_path_factory.mktemp("whole") / "run", **SETTINGS)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [1, 2, 3, 5, 6])
def test_a_stopped_run_ends_as_an_undisturbed_one(step, number, whole, tmp_path, monkeypatch, capsys):
    run = Run(tmp_path / "run")
    with monkeypatch.context() as patch:
        send_at(patch, step, number)
        with pytest.raises(Stopped) as stopped:
            run_tiny(run.folder, **SETTINGS)
    assert stopped.value.code == 128 + number and checkpoint.load(run.last)["step"] == step
    said = capsys.readouterr().out.splitlines()[-1]
    command = f"python -m cmim.train --output {run.folder} --resume"
    assert said == f"stopped after step {step}; continue with: {command}"
    train.main(command.split()[3:])
    assert_same_run(whole, run)


def test_a_signal_in_an_evaluation_does_not_wait_for_its_end(whole, tmp_path, monkeypatch):
    run, calls = Run(tmp_path / "run"), []

    def interrupted(*arguments):
        calls.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        raise AssertionError("the evaluation went on")

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "probabilities", interrupted)
        with pytest.raises(Stopped):
            run_tiny(run.folder, **SETTINGS)
    assert len(calls) == 1 and checkpoint.load(run.last)["step"] == 3
    run_tiny(run.folder, "--resume", **SETTINGS)
    assert_same_run(whole, run)


def test_a_second_ctrl_c_stops_at_once(tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT)  # that of a shell's background job ignores it
    send_at(monkeypatch, 2, signal.SIGINT, times=2)
    with pytest.raises(KeyboardInterrupt):
        run_tiny(tmp_path / "run", **SETTINGS)
    assert not Run(tmp_path / "run").last.exists()
    assert signal.getsignal(signal.SIGINT) is before


def test_other_commands_end_with_the_code_of_the_signal(capfd):
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        with pytest.raises(SystemExit) as stop:
            run_command(lambda n=number: (os.kill(os.getpid(), n), time.sleep(5)))
        assert stop.value.code == code and capfd.readouterr().err == ""


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_modules_are_imported(number, code):
    program = (
        f"import os\nfrom cmim import early\nearly.begin('train', '')\nos.kill(os.getpid(), {int(number)})\nimport torch"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=CHECKOUT)
    assert (result.returncode, result.stderr) == (code, "")


def test_a_signal_to_the_whole_group_with_workers(tmp_path):
    """As a terminal or a container sends it: the loader's processes get it too."""
    run = Run(tmp_path / "run")
    words = tiny(run.folder, **SETTINGS | {"data__workers": 1, "train__steps": 100_000, "train__log_every": 1})
    process = subprocess.Popen(
        [sys.executable, "-m", "cmim.train", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=CHECKOUT, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not run.metrics.exists() or run.metrics.read_text().count("\n") < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (143, "")
    step = checkpoint.load(run.last)["step"]
    assert out.splitlines()[-1].startswith(f"stopped after step {step}; continue with: ")
    assert max(line["step"] for line in read_metrics(run)) in (step - 1, step)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_who_catches_every_exception_does_not_catch_a_signal(number, code):
    def main():
        try:
            os.kill(os.getpid(), number)
            time.sleep(1)
        except Exception:
            raise UserError("cannot read it") from None

    with pytest.raises(SystemExit) as stop:
        run_command(main)
    assert stop.value.code == code
