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


LIST_MISSING = """
import sys
from tests.backends import cross_compile
cross_compile.KERNELS = cross_compile.KERNELS | dict.fromkeys(["new_op_forward", "patch_labels_backward"], {"triton"})
sys.argv.append("--list-missing")
sys.exit(cross_compile.main())
"""


def test_the_cases_make_every_declared_op_and_every_launch_configuration():
    """Only what is declared here besides is missing."""
    result = run("-c", LIST_MISSING)
    said = [f"{op}: no case in CASES of tests/backends/launches.py" for op in ("new_op_forward", "patch_labels_backward")]
    assert result.stdout.splitlines() == said, result.stdout + result.stderr
    assert result.returncode == 1


@pytest.mark.slow
def test_every_configuration_compiles_without_faults():
    result = run("-m", "tests.backends.cross_compile")
    assert result.returncode == 0, result.stdout + result.stderr
