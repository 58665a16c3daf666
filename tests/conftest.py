"""Shared by all tests: where Triton's kernels run, and a hypothesis profile without deadlines."""

import os
import shutil
import tempfile

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton: it cannot be switched later

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # as many processes as cores are at work


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own():
    """What runs keep of the files of their data goes into a folder of the tests."""
    folder = os.environ["CMIM_CACHE"] = tempfile.mkdtemp(prefix="cmim-cache-")
    yield
    shutil.rmtree(folder, ignore_errors=True)


settings.register_profile("cmim", deadline=None, max_examples=40, derandomize=True, print_blob=True)
settings.load_profile("cmim")


def pytest_collection_modifyitems(config, items):
    """Slow tests run where -m names them. Another expression, such as `-m gpu`, only replaces the one of pyproject.toml."""
    if "slow" not in config.getoption("markexpr"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
