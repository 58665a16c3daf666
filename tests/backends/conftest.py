import pytest
import torch

from cmim_kernels.libraries import cpu, cuda
from tests.backends import against_torch
from tests.backends.against_torch import DEVICE, INTERPRETED
from tests.backends.declared import OPS
from tests.kernels.conftest import poisoned_empty  # noqa: F401

NOT_ON_A_DEVICE = ("test_cross_compile", "test_declared", "test_stub_driver")


def backends_of(module):
    """The backends that have kernels of a module's `OPS`, or those that it names itself; it is run with each."""
    found = set().union(*(OPS.get(op, ()) for op in getattr(module, "OPS", ())))
    return sorted(getattr(module, "BACKENDS", found), reverse=True)


def pytest_generate_tests(metafunc):
    chosen = any("backend" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    backends = backends_of(metafunc.module)
    if backends and not chosen:
        metafunc.parametrize("backend", backends, indirect=True, scope="module")


@pytest.fixture(scope="module", autouse=True)
def backend(request):
    """The backend whose kernels `assert_like_torch` holds against PyTorch. Libraries that stand in for others are gone
    behind it: other tests of this process ask for the real ones."""
    if not hasattr(request, "param"):
        yield None
        return
    with pytest.MonkeyPatch.context() as patch:
        for library, name in ((cpu, "file"), (cuda, "file"), (cuda, "devices")):
            patch.setattr(library, name, getattr(library, name))
        reason = against_torch.missing(request.param)
        if reason is not None:
            pytest.skip(reason)
        patch.setattr(against_torch, "kernels_of", request.param)
        yield request.param


def pytest_collection_modifyitems(items):
    """On a device every test of this folder that runs kernels is a test of the device."""
    here = [i for i in items if "tests/backends" in i.path.as_posix() and i.path.stem not in NOT_ON_A_DEVICE]
    if not INTERPRETED:
        for item in here:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason=f"TRITON_INTERPRET=0 and no {DEVICE} device"))
