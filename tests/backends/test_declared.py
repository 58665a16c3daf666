"""No declared kernel goes untested: what the tests run through is derived from, or held against, the declarations.

That every declared op has a case of its Triton launch is a test of `test_cross_compile.py`.
"""

import importlib
from pathlib import Path

import pytest

from cmim_kernels.ops.library import KERNELS

from . import calls, declared
from .conftest import backends_of

MODULES = [importlib.import_module(f"{__package__}.{path.stem}") for path in sorted(Path(__file__).parent.glob("test_*.py"))]
GENERAL = {"test_gpu"}  # what it asks of each op does not depend on what the op computes
NEW = {"new_op_forward": frozenset({"triton", "cuda"})}


def without_tests(kernels):
    """No test_*.py of this folder names these ops in its OPS, so that nothing tests what these backends compute."""
    tested = {
        (op, backend)
        for module in MODULES
        if module.__name__.rsplit(".")[-1] not in GENERAL
        for op in getattr(module, "OPS", ())
        for backend in backends_of(module)
    }
    return {(op, backend) for op, backends in declared.ops(kernels).items() for backend in backends} - tested


def without_calls(kernels):
    """CALLS of calls.py, which the tests of all ops go through, has no call of these."""
    called = {(calls.CALLS[name][0], backend) for name, backend in calls.PAIRS}
    return {(op, backend) for op, backends in declared.ops(kernels).items() for backend in backends} - called


@pytest.mark.parametrize("missing", [without_tests, without_calls])
def test_every_declared_kernel_has_tests(missing):
    assert not missing(KERNELS), missing.__doc__
    assert missing(KERNELS | NEW) == {("new_op", "triton"), ("new_op", "cuda")}
    assert missing(KERNELS | {"patch_labels_forward": frozenset({"triton", "cuda"})}) == {("patch_labels", "cuda")}


def test_a_declared_op_is_tested_with_each_of_its_backends():
    for module in MODULES:
        for op in getattr(module, "OPS", ()):
            assert declared.OPS[op] <= set(backends_of(module))
