"""The tests of `stub_driver/on_the_stub.py`, in a process whose Triton is not interpreted and whose device is the stub."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.backends.calls import CALLS

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests" / "backends" / "stub_driver" / "on_the_stub.py"
OLDEST_TRITON = ROOT / "build" / "triton-3.6.0"

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc to compile the stub and Triton's launchers")


def run(*arguments, path=()):
    environment = {k: v for k, v in os.environ.items() if k != "PYTEST_ADDOPTS"} | {"TRITON_INTERPRET": "0"}
    environment["PYTHONPATH"] = os.pathsep.join([*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", *arguments, TESTS]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout + result.stderr


def test_common_launches():
    run()


@pytest.mark.slow
def test_every_launch():
    run("-m", "slow")


@pytest.mark.slow
def test_host_time():
    command = [sys.executable, "-m", "tests.backends.stub_driver.host_time"]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    lines = result.stdout.splitlines()
    assert result.returncode == 0 and len(lines) == len(CALLS), result.stderr
    assert all(re.fullmatch(r".{26} +\d+   launches \d+(, \d+)*", line) for line in lines)


@pytest.mark.slow
@pytest.mark.skipif(not OLDEST_TRITON.exists(), reason="make build/triton-3.6.0/installed fetches it")
def test_every_launch_with_the_oldest_triton():
    run("-m", "slow or not slow", path=[OLDEST_TRITON])
