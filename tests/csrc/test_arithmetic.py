"""Index arithmetic and per-element math of the CUDA kernels, compiled for the CPU: arithmetic.cpp."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_against_brute_force(tmp_path):
    program = tmp_path / "arithmetic"
    flags = (
        "-std=c++17",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fsanitize=undefined",
        "-fsanitize-undefined-trap-on-error",
    )
    subprocess.run(["g++", *flags, "-I", ROOT / "csrc", ROOT / "tests/csrc/arithmetic.cpp", "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
