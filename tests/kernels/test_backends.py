import os
import subprocess
import sys

import pytest
import torch

from cmim_kernels import backends, info, libraries, pack_classes
from cmim_kernels.libraries import cuda
from cmim_kernels.ops.library import KERNELS

CPU = torch.device("cpu")


def in_a_process(program, **environment):
    """Last line of what a new process with these variables prints or says at its end."""
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "CMIM_KERNELS_BACKEND")}
    result = subprocess.run([sys.executable, "-c", program], env=clean | environment, capture_output=True, text=True)
    return (result.stdout + result.stderr).strip().splitlines()[-1]


PACK = "import torch, sys; from cmim_kernels import *; x = torch.zeros(1, 3, dtype=torch.int64); "
PACK += "print(pack_classes(x, x > 0, 2).order.tolist(), 'cmim_kernels.triton_kernels' in sys.modules)"


def test_automatic_choice_on_the_cpu_is_pytorch_and_imports_no_kernels():
    assert in_a_process(PACK) == "[[0, 1, 2]] False"
    assert in_a_process(PACK, TRITON_INTERPRET="1") == "[[0, 1, 2]] False"


def test_triton_by_name_runs_interpreted_or_says_why_not():
    assert in_a_process(PACK, CMIM_KERNELS_BACKEND="triton", TRITON_INTERPRET="1") == "[[0, 1, 2]] True"
    assert in_a_process(PACK, CMIM_KERNELS_BACKEND="triton") == (
        "RuntimeError: CMIM_KERNELS_BACKEND=triton cannot run on cpu: no GPU; set TRITON_INTERPRET=1 to interpret the "
        "kernels on the CPU"
    )


def test_cuda_by_name_says_why_it_cannot_run_on_the_cpu():
    said = in_a_process(PACK, CMIM_KERNELS_BACKEND="cuda")
    reason = "no GPU" if cuda.file.exists() else f"the CUDA kernels were {cuda.build_report()}"
    assert said == f"RuntimeError: CMIM_KERNELS_BACKEND=cuda cannot run on cpu: {reason}"


def test_a_library_that_does_not_load_says_why(tmp_path):
    library = libraries.Library("CUDA", tmp_path / "libcmim_kernels.so", ("cpu",))
    assert library.unavailable_reason(CPU) == "the CUDA kernels were not built: this copy was never installed"
    library.file.write_bytes(b"no library")
    assert library.unavailable_reason(CPU).startswith(f"{library.file} could not be loaded: ")


def test_an_unknown_backend():
    message = "CMIM_KERNELS_BACKEND is 'gpu', expected one of auto, cpu, cuda, triton, torch"
    assert in_a_process("import cmim_kernels", CMIM_KERNELS_BACKEND="gpu") == f"ValueError: {message}"
    with pytest.raises(ValueError, match=message), backends.use_backend("gpu"):
        pass


@pytest.mark.parametrize(
    ("version", "capability", "expected"),
    [
        ("13.0", (9, 0), ("triton", "the device supports it")),
        ("13.0", (7, 5), ("torch", "compute capability 7.5 is below 8.0")),
        (None, (9, 4), ("torch", "this PyTorch is not built for CUDA")),
    ],
)
def test_automatic_choice_on_a_device(version, capability, expected, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    backends._choose.cache_clear()
    try:
        device = torch.device("cuda", 0)
        with backends.use_backend("auto"):
            assert backends.choose({"triton"}, device) == expected
            assert backends.choose({"triton", "cuda"}, device).backend == expected[0]
            assert backends.choose(set(), device) == ("torch", "has no kernels for Triton")
        with backends.use_backend("cuda"):
            assert backends.choose({"triton"}, device) == expected
        with backends.use_backend("torch"):
            assert backends.choose({"triton", "cuda"}, device) == ("torch", "asked for")
    finally:
        backends._choose.cache_clear()


def test_use_backend_ends():
    before = backends.requested()
    with pytest.raises(ZeroDivisionError), backends.use_backend("torch"):
        assert backends.requested() == "torch"
        raise ZeroDivisionError
    assert backends.requested() == before


def test_float64_runs_in_pytorch(monkeypatch):
    from cmim_kernels import gather_class_tokens

    x = torch.zeros(1, 3, dtype=torch.int64)
    layout, tokens = pack_classes(x, x > 0, 2), torch.rand(1, 3, 2)
    monkeypatch.setattr(backends, "choose", lambda kernels, device: pytest.fail("float64 asks for no choice"))
    assert gather_class_tokens(tokens.double(), layout).dtype == torch.float64
    assert gather_class_tokens(tokens, layout, mask_token=torch.zeros(2, dtype=torch.float64)).dtype == torch.float32


def test_the_report_names_every_op_and_why():
    lines = info.report()
    for name, kernels in KERNELS.items():
        (line,) = [line for line in lines if line.startswith(f"{name} ")]
        assert ("has no kernels for" in line) != (("cpu" if not torch.cuda.is_available() else "triton") in kernels)
    assert any(line.startswith("device: ") for line in lines)


def test_a_reader_of_the_report_may_leave():
    reads, writes = os.pipe()
    os.close(reads)
    result = subprocess.run([sys.executable, "-m", "cmim_kernels.info"], stdout=writes, stderr=subprocess.PIPE, text=True)
    os.close(writes)
    assert result.returncode == 0 and result.stderr == ""
