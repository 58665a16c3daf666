"""What nvcc makes of csrc/, that it loads without a GPU, and how an installation decides about it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cmim_kernels.libraries import cuda

from .emulation import ROOT, check_installation, csrc, implemented

OPS = implemented(csrc.CSRC / "library.cpp")


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """build(dispatch_key) -> the library, and the folder of its logs: compiled for all architectures where the installation
    did so, which left its objects, else for one."""
    installed = cuda.build_report().startswith("built")
    folder, architectures = (ROOT / "build/cuda", None) if installed else (ROOT / "build/cuda-9.0", "9.0")
    try:
        csrc.find_nvcc()
    except csrc.BuildError as error:
        pytest.skip(str(error))

    def build(dispatch_key):
        library = tmp_path_factory.mktemp("library") / cuda.file.name
        torch_folder = Path(torch.__file__).parent
        csrc.build(library, folder, architectures=architectures, torch=torch_folder, dispatch_key=dispatch_key)
        return library, folder

    return build


@pytest.fixture(scope="module")
def built(build):
    return build("CUDA")


def test_no_kernel_spills_and_no_source_warns(built):
    assert "warning" not in (built[1] / "CUDA/library.cpp.log").read_text()
    for source in csrc.sources():
        log = (built[1] / f"{source.name}.log").read_text()
        assert "warning" not in log, log
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
        kernels = re.findall(r"Compiling entry function '(\w+)' for '(sm_\d+)'", log)
        assert kernels and len(kernels) == len(frames)
        assert [k for k, f in zip(kernels, frames, strict=True) if f != ("0", "0", "0")] == []


@pytest.mark.parametrize("kernel", ["convolve_kernel", "weight_kernel"])
def test_three_of_five_instructions_of_a_convolution_are_multiply_adds(built, tmp_path, kernel):
    """In the loop over rows, for k = 7 on sm_90."""
    from tests.backends import machine_code

    cubin = machine_code.cubin_of(built[1] / "same_class_conv2d.cu.o", 90)
    functions = [f for name, f in machine_code.disassemble(cubin).items() if kernel in name and "Li7E" in name]
    assert len(functions) == 3  # of float32, float16 and bfloat16
    for function in functions:
        _, counts = function.hot_loop("FFMA")
        assert counts["FFMA"] == 2 * 4 * 7 * 7  # two rows of a thread's four columns
        assert counts["FFMA"] >= 0.6 * counts.total()


def test_it_loads_without_a_gpu_and_registers_its_ops(built):
    program = f"""
import torch
torch.ops.load_library({str(built[0])!r})
for op in {OPS}:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("cmim_cuda::" + op, "CUDA"), op
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("cmim_cuda::" + op, "CPU"), op
try:
    torch.ops.cmim_cuda.sum_rows(0, torch.zeros(1, 1), torch.zeros(1), None, None)
except NotImplementedError as error:
    print("from the 'CPU' backend" in str(error))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "True\n", result.stderr
    assert "pack_classes" in OPS


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_it_needs_pytorch_and_nothing_of_cuda_or_python(built):
    said = subprocess.run(["readelf", "--wide", "--dynamic", "--dyn-syms", built[0]], capture_output=True, text=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.*?)\.so", said))
    assert {"libc10", "libtorch_cpu"} <= needed
    assert not any(name.startswith(("libcuda", "libpython", "libtorch_cuda", "libtorch_python")) for name in needed)
    assert not re.search(r" UND (_?Py|\w*cuda)", said)


# The launchers go on where a launch fails, so that every op of the library is called.
CALL_EVERYTHING = """
import sys, torch
import cmim_kernels
from cmim_kernels import backends, cuda_kernels
from cmim_kernels.libraries import cuda
cuda.file, cuda.devices = __import__("pathlib").Path(sys.argv[1]), ("cpu",)
real, said = cuda_kernels.launch, {}
def launch(op, *arguments):
    try:
        real(op, *arguments)
    except RuntimeError as error:
        said.setdefault(op, str(error).splitlines()[0])
for name, module in list(sys.modules.items()):
    if getattr(module, "launch", None) is real:
        module.launch = launch
cuda_kernels.launch = launch
backends._requested = "cuda"
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
for op, message in said.items():
    print(op, message)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="pointers of the CPU would go to a GPU")
def test_every_op_can_be_called_and_its_launch_fails_with_a_message(build):
    """The library as nvcc makes it, in a new process without a driver: each op comes as far as CUDA's own error."""
    result = subprocess.run([sys.executable, "-c", CALL_EVERYTHING, build("CPU")[0]], capture_output=True, text=True)
    assert result.returncode == 0, (result.returncode, result.stderr)
    said = dict(line.split(" ", 1) for line in result.stdout.splitlines())
    assert set(said) == set(OPS), "CALL_EVERYTHING above calls others than csrc/library.cpp implements"
    for message in said.values():
        assert message.startswith("cmim_cuda: ") and "CUDA" in message, said


def test_architectures():
    assert csrc.code_flags("8.0;9.0a 10.0+PTX")[1::2] == [
        "arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a",
        "arch=compute_100,code=sm_100", "arch=compute_100,code=compute_100",
    ]  # fmt: skip
    with pytest.raises(csrc.BuildError, match="TORCH_CUDA_ARCH_LIST has 'Hopper'"):
        csrc.code_flags("8.0;Hopper")


def test_only_what_changed_is_compiled_again(tmp_path, monkeypatch):
    compiler, source = tmp_path / "compiler", tmp_path / "a.cu"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nfor last; do :; done\ntouch "$last"\n')
    compiler.chmod(0o755)
    headers = tmp_path / "headers"
    headers.mkdir()
    calls = lambda: len((tmp_path / "calls").read_text().splitlines())  # noqa: E731
    compile_ = lambda *flags: csrc.compile_sources([compiler, *flags], [source], tmp_path / "o", headers=[headers])  # noqa: E731
    source.write_text("1")
    for change in (lambda: None, lambda: source.write_text("2"), lambda: (headers / "a.h").write_text("3")):
        change()
        before = calls() if (tmp_path / "calls").exists() else 0
        assert compile_() == compile_() == [tmp_path / "o/a.cu.o"]
        assert calls() == before + 1
    compile_("-g")
    assert calls() == 4


@pytest.mark.parametrize(
    ("nvcc", "wanted", "code", "said"),
    [
        (None, "auto", 0, "not built: no nvcc in"),
        (None, "1", 1, "CMIM_BUILD_CUDA is 1, but no nvcc in"),
        ("echo 'x.cu(1): error: no'; exit 1", "auto", 0, "not built: x.cu(1): error: no"),
        ("echo 'x.cu(1): error: no'; exit 1", "1", 1, "CMIM_BUILD_CUDA is 1, but x.cu(1): error: no"),
        ("exit 1", "0", 0, "not built: CMIM_BUILD_CUDA is 0"),
        (None, "yes", 1, "CMIM_BUILD_CUDA is 'yes', expected auto, 0 or 1"),
    ],
)
def test_an_installation_without_the_kernels_says_why(nvcc, wanted, code, said, tmp_path):
    pytest.importorskip("setuptools")
    (tmp_path / "home/bin").mkdir(parents=True)
    if nvcc is not None:
        (tmp_path / "home/bin/nvcc").write_text(f"#!/bin/sh\n{nvcc}\n")
        (tmp_path / "home/bin/nvcc").chmod(0o755)
    check_installation(
        tmp_path, cuda.file.name, code, said, CMIM_BUILD_CUDA=wanted, CUDA_HOME=tmp_path / "home", CMIM_BUILD_CPU=0
    )
