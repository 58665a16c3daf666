"""What a C++ compiler makes of csrc/cpu/: what it exports, that a new process can call it, how an installation decides."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cmim_kernels.ops.library import KERNELS

from .emulation import ROOT, check_installation, cpu_library, csrc, implemented

OPS = implemented(csrc.CSRC / "cpu/library.cpp")
FOLDER = ROOT / "build" / "cpu"


@pytest.fixture(scope="module")
def library():
    built = cpu_library()
    if built is None:
        pytest.skip("no C++ compiler, or no kernels for this machine")
    return built


def test_no_source_warns(library):
    logs = list(FOLDER.glob("**/*.cpp.log"))
    assert len(logs) > len(csrc.cpu_sources())
    assert [log for log in logs if "warning" in log.read_text()] == []


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_instruction_sets_share_no_symbol(library):
    """Of two equal symbols the linker keeps one, which might be that of a later machine."""
    defined = {}
    for objects in FOLDER.glob("*/*.cpp.o"):
        said = subprocess.run(["nm", "--defined-only", objects], capture_output=True, text=True, check=True).stdout
        found = [line.split()[-2:] for line in said.splitlines()]
        assert [name for kind, name in found if kind in "WVu"] == [], objects
        defined.setdefault(objects.parent.name, set()).update(name for kind, name in found if kind.isupper())
    names = sorted(defined)
    assert len(names) == len(csrc.INSTRUCTION_SETS[os.uname().machine])
    assert all(not defined[a] & defined[b] for a in names for b in names if a != b)


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_it_needs_pytorch_and_nothing_of_python(library):
    said = subprocess.run(["readelf", "--wide", "--dynamic", "--dyn-syms", library], capture_output=True, text=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.*?)\.so", said))
    assert {"libc10", "libtorch_cpu"} <= needed
    assert not any(name.startswith(("libpython", "libtorch_python", "libgomp")) for name in needed)
    assert not re.search(r" UND _?Py", said)


CALL_EVERYTHING = """
import sys, torch
from pathlib import Path
import cmim_kernels
from cmim_kernels import libraries
from cmim_kernels.backends import use_backend
libraries.cpu.file = Path(sys.argv[1])
torch.set_flush_denormal(False)
with use_backend("cpu"):
    labels, masked = torch.randint(3, (2, 2000)), torch.rand(2, 2000) < 0.5
    x, p = torch.rand(2, 2000, 8, requires_grad=True), torch.rand(8, requires_grad=True)
    layout = cmim_kernels.pack_classes(labels, masked, 3)
    cmim_kernels.gather_class_tokens(x, layout, mask_token=p).sum().backward()
    cmim_kernels.scatter_class_tokens(x[:, :9], layout, mask_token=p).sum().backward()
    cmim_kernels.class_centroids(x, labels, masked, 3).mean.sum().backward()
    image, pred = torch.rand(2, 3, 80, 100), torch.rand(2, 2000, 12, requires_grad=True)
    cmim_kernels.masked_patch_loss(pred, image, masked, labels, 3, patch_size=2).loss.backward()
    grid, weight = x.view(2, 8, 40, 50), torch.rand(8, 3, 3, requires_grad=True)
    cmim_kernels.same_class_conv2d(grid, labels.view(2, 40, 50), weight, num_classes=3).sum().backward()
    logits, pixels = torch.rand(2, 3, 20, 25, requires_grad=True), labels.view(2, 40, 50)
    cmim_kernels.upsample_cross_entropy(logits, pixels).sum().backward()
    cmim_kernels.upsample_pseudo_labels(logits, (40, 50))
    cmim_kernels.patch_labels(pixels, 2, 3)
    heads = torch.rand(2, 2, 2000, 4, requires_grad=True)
    cmim_kernels.class_attention(heads, heads, heads, layout).sum().backward()
assert torch.tensor([1e-38]).mul(1e-3).item() > 0, "denormal numbers are flushed"
print(all(t.grad.isfinite().all() and t.grad.any() for t in (x, p, pred, weight, logits, heads)))
"""


def test_every_op_can_be_called_in_a_new_process(library):
    result = subprocess.run([sys.executable, "-c", CALL_EVERYTHING, library], capture_output=True, text=True)
    assert result.stdout == "True\n", result.stderr
    ops = {name.rpartition("_")[0] for name, backends in KERNELS.items() if "cpu" in backends}
    assert not {op for op in ops if f"cmim_kernels.{op}(" not in CALL_EVERYTHING}, (
        "CALL_EVERYTHING above does not call these"
    )


def test_the_sanitizers_run_every_op():
    driver = Path(__file__).with_name("cpu_driver.cpp").read_text()
    missing = [op for op in OPS if f"kernels.{op}(" not in driver]
    assert not missing, "tests/csrc/cpu_driver.cpp does not run these ops of csrc/cpu/library.cpp"


@pytest.mark.parametrize(
    ("compiler", "wanted", "code", "said"),
    [
        (None, "auto", 0, "CPU kernels not built: CXX is {}, which is not there"),
        (None, "1", 1, "CMIM_BUILD_CPU is 1, but CXX is {}, which is not there"),
        ("exit 1", "1", 1, "CMIM_BUILD_CPU is 1, but "),
        ("echo 'x.cpp:1: error: no'; exit 1", "auto", 0, "CPU kernels not built: x.cpp:1: error: no"),
        ("echo 'x.cpp:1: error: no'; exit 1", "1", 1, "CMIM_BUILD_CPU is 1, but x.cpp:1: error: no"),
        ("exit 1", "0", 0, "CPU kernels not built: CMIM_BUILD_CPU is 0"),
        ('exec c++ "$@"', "0", 0, "CPU kernels not built: CMIM_BUILD_CPU is 0"),
        (None, "yes", 1, "CMIM_BUILD_CPU is 'yes', expected auto, 0 or 1"),
    ],
)
def test_an_installation_without_the_kernels_says_why(compiler, wanted, code, said, tmp_path):
    pytest.importorskip("setuptools")
    command = tmp_path / "compiler"
    if compiler is not None:
        command.write_text(f"#!/bin/sh\n{compiler}\n")
        command.chmod(0o755)
    check_installation(
        tmp_path, "libcmim_cpu.so", code, said.format(command), CMIM_BUILD_CPU=wanted, CMIM_BUILD_CUDA=0, CXX=command
    )


def test_a_machine_without_kernels(tmp_path):
    with pytest.raises(csrc.BuildError, match="there are kernels for Linux on x86_64 and aarch64, not for linux on riscv64"):
        csrc.build_cpu(tmp_path / "a.so", tmp_path, torch=Path(torch.__file__).parent, machine="riscv64")
