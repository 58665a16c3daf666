"""A few kernels compiled for GPUs that need not be here; `make cross-compile` compiles them all."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.backends import machine_code

ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], env=ENVIRONMENT, capture_output=True, text=True)


def test_a_common_case_of_each_op_compiles_without_faults():
    result = run("-m", "tests.backends.cross_compile", "--few", "--architectures", "90")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "one_hot_kernel" in result.stdout and result.stdout.endswith("\n0 faults\n")


WORSE = """
from tests.backends.cross_compile import worse
table = {"kernel": {"warps": 16, "instructions": 100}}
print(*worse("kernel", {"warps": 16, "instructions": 100}, table))
print(*worse("kernel", {"warps": 24, "instructions": 90}, table))
print(*worse("kernel", {"warps": 12, "instructions": 101}, table), sep="; ")
print(*worse("other", {"warps": 12, "instructions": 101}, table))
"""


def test_a_kernel_that_compiles_to_something_worse_is_named():
    said = run("-c", WORSE).stdout.splitlines()
    assert said[:2] == ["", ""] and said[3].startswith("is not in compiled.json")
    assert said[2] == "12 warps at a time on a multiprocessor, 16 before; 101 instructions in the hot loop, 100 before"


RESIDENT = """
from types import SimpleNamespace
from tests.backends.cross_compile import Compiled, RESIDENT, faults
for name, resident in RESIDENT.items():
    launch = SimpleNamespace(name=name, kwargs={"CHANNELS": 128, "SIZE": 7, "num_warps": 4})
    wanted = resident(launch.kwargs)
    most = 65536 // (wanted * 128) // 8 * 8  # a multiprocessor gives out registers in portions of 8 a thread
    for registers in (most, most + 8):
        print(wanted, *faults(launch, 90, Compiled(registers, 0, 16384, "", b"", warps=4)))
"""


def test_a_launcher_that_counts_on_too_many_programs_is_named():
    said = run("-c", RESIDENT).stdout.splitlines()
    assert len(said) == 10
    for fits, does_not in zip(said[::2], said[1::2], strict=True):
        wanted = int(fits)
        fault = f"lets a multiprocessor hold {wanted - 1} programs at a time, its launcher counts on {wanted}"
        assert does_not == f"{wanted} {fault}"


def test_the_table_is_of_the_triton_that_is_installed():
    """Else no kernel is compared: write it anew with `python -m tests.backends.cross_compile --few --update`."""
    constraints = (Path(__file__).parents[2] / "constraints.txt").read_text()
    pinned = re.search(r"^triton==(\S+)", constraints, re.M)[1]
    table = json.loads(Path(__file__).with_name("compiled.json").read_text())
    assert table["triton"] == pinned and len(table["kernels"]) > 20


def test_loops_and_warps_are_read_from_machine_code():
    code = """
.L_x_0:
        /*0000*/                   MOV R1, 0x10 ;
.L_x_1:
        /*0010*/                   LDG.E R2, desc[UR4][R4.64] ;
.L_x_2:
        /*0020*/                   FFMA R2, R2, R3, R2 ;
        /*0030*/               @P0 FFMA.FTZ R5, R2, R3, R5 ;
        /*0040*/               @P1 BRA `(.L_x_2) ;
        /*0050*/              @!P2 BRA `(.L_x_1) ;
        /*0060*/                   EXIT ;
.L_x_3:
        /*0070*/                   BRA `(.L_x_3);
"""
    function = machine_code.parse(code)
    assert function.loops == [(1, 5), (2, 4)]
    loop, counts = function.hot_loop()
    assert loop == (2, 4) and counts == {"FFMA": 2, "BRA": 1}
    assert [i.conditional for i in function.instructions] == [False, False, False, True, True, True, False, False]
    # 163 registers and 37,328 bytes: CUDA's occupancy calculator has three programs of four warps.
    assert machine_code.resident_warps(163, 37328, 4) == 12
    assert machine_code.resident_warps(32, 0, 4) == 64 and machine_code.resident_warps(32, 100_000, 4) == 8


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
