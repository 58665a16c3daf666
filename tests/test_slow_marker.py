"""`-m gpu` replaces the `not slow` of pyproject.toml, and yet picks no slow tests."""

import os
import subprocess
import sys


def test_slow_tests_run_only_by_their_name():
    files = ("tests/backends/test_gpu.py", "tests/backends/test_cross_compile.py", "tests/backends/test_stub_driver.py")
    command = [sys.executable, "-m", "pytest", "--collect-only", *files, "-m"]
    environment = os.environ | {"TRITON_INTERPRET": "0"}  # as on a device, where all that runs kernels is marked gpu
    output = subprocess.run([*command, "gpu or not gpu"], env=environment, capture_output=True, text=True).stdout
    assert "test_graph_capture_and_replay[gather-triton]" in output and "test_common_launches" in output
    assert "test_every_configuration" not in output and "test_every_launch" not in output
