import pytest
import torch

from tests.backends import against_torch
from tests.backends.against_torch import DEVICE, INTERPRETED
from tests.kernels.conftest import poisoned_empty  # noqa: F401

BACKENDS = {
    name: ["triton", "cuda"]
    for name in (
        "test_pack_classes", "test_gather_scatter", "test_masked_patch_loss", "test_class_centroids",
        "test_same_class_conv2d", "test_gpu",
    )
} | {"test_cuda_kernels": ["cuda"]}  # fmt: skip
"""The backends that a module tests, where Triton is not the only one."""
ON_THE_CPU = {"test_pack_classes", "test_masked_patch_loss", "test_patch_labels", "test_gather_scatter", "test_class_centroids", "test_same_class_conv2d", "test_upsample_cross_entropy", "test_upsample_pseudo_labels"}
"""The modules that test the kernels for the CPU as well."""


def pytest_generate_tests(metafunc):
    module = metafunc.module.__name__.rsplit(".")[-1]
    backends = BACKENDS.get(module, ["triton"]) + ["cpu"] * (module in ON_THE_CPU)
    metafunc.parametrize("backend", backends, indirect=True, scope="module")


@pytest.fixture(scope="module", autouse=True)
def backend(request):
    """The backend whose kernels `assert_like_torch` holds against PyTorch."""
    reason = against_torch.missing(request.param)
    if reason is not None:
        pytest.skip(reason)
    against_torch.kernels_of = request.param
    yield request.param
    against_torch.kernels_of = "triton"


def pytest_collection_modifyitems(items):
    """On a device every test of this folder is a test of the device."""
    here = [item for item in items if "tests/backends" in item.path.as_posix()]
    if not INTERPRETED:
        for item in here:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason=f"TRITON_INTERPRET=0 and no {DEVICE} device"))
