"""A few kernels compiled for GPUs that need not be here; `make cross-compile` compiles them all."""

import os
import subprocess
import sys

import pytest

ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], env=ENVIRONMENT, capture_output=True, text=True)


def test_a_common_case_of_each_op_compiles_without_faults():
    result = run("-m", "tests.backends.cross_compile", "--few", "--architectures", "90")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "one_hot_kernel" in result.stdout and result.stdout.endswith("\n0 faults\n")


def test_the_cases_make_every_launch_configuration():
    result = run("-m", "tests.backends.cross_compile", "--list-missing")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_every_configuration_compiles_without_faults():
    result = run("-m", "tests.backends.cross_compile")
    assert result.returncode == 0, result.stdout + result.stderr
