import pytest
import torch

from tests.kernels.conftest import poisoned_empty  # noqa: F401
from tests.triton.against_torch import DEVICE, INTERPRETED


def pytest_collection_modifyitems(items):
    """On a device every test of this folder is a test of the device."""
    here = [item for item in items if "tests/triton" in item.path.as_posix()]
    if not INTERPRETED:
        for item in here:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason=f"TRITON_INTERPRET=0 and no {DEVICE} device"))
