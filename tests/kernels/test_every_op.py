"""Every declared op can be imported and found, is tested, and is measured where it has kernels."""

import re
from pathlib import Path

import pytest

import cmim_kernels
from cmim_kernels.ops.library import KERNELS

ROOT = Path(__file__).parents[2]
OPS = sorted({name.removesuffix("_forward").removesuffix("_backward") for name in KERNELS})


@pytest.mark.parametrize("op", OPS)
def test_no_step_is_left_out(op):
    assert op in cmim_kernels.__all__, "kernels/cmim_kernels/__init__.py does not import it"
    assert f"`{op}`" in (ROOT / "kernels/README.md").read_text(), "kernels/README.md has no row of it"
    tests = Path(__file__).with_name(f"test_{op}.py")
    assert tests.exists(), f"there is no {tests.relative_to(ROOT)}"
    assert re.search(r"check_registration\(|opcheck\(", tests.read_text()), f"{tests.name} calls no check_registration"
    if f"{op}_backward" in KERNELS:
        assert "gradcheck(" in tests.read_text(), f"{tests.name} calls no gradcheck"
    if any(KERNELS.get(f"{op}_{part}") for part in ("forward", "backward")):
        assert f'"{op}' in (ROOT / "bench/test_ops.py").read_text(), "bench/test_ops.py has no line of it in OPS"
