"""Compiles csrc/ into the shared libraries of `cmim_kernels`: the CUDA kernels with nvcc, those for the CPU in C++.

An installation does it. `python csrc/build.py [--architectures native]` does it for a checkout that is not installed, and
`python csrc/build.py --cpu` for the CPU's kernels alone.

Standard library only, and PyTorch is never imported: pip builds in an environment of its own, where PyTorch cannot be
imported but its headers lie in the site-packages that the result is installed into.
"""

import argparse
import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).resolve().parent
ARCHITECTURES = "8.0;9.0;10.0+PTX"
FLAGS = (
    "-std=c++17", "-O3", "-DTORCH_TARGET_VERSION=0x020b000000000000",  # the stable ABI of PyTorch 2.11
    "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra", "-Xptxas", "-v",
)  # fmt: skip


class BuildError(Exception):
    """Why there is no library."""


def build(library, folder, *, architectures=None, torch=None, dispatch_key="CUDA"):
    """Compile csrc/ into the file `library`; return in a few words what was built.

    `folder` keeps an object and a log of the compiler for each source. An object is used again while its source, all
    headers and the command stay the same.

    Args:
        library, folder: paths.
        architectures: as TORCH_CUDA_ARCH_LIST, which is the default.
        torch: the folder of the PyTorch to compile for; by default that of this Python's site-packages.
        dispatch_key: of the tensors that the ops take. With "CPU" a test can call them where there is no GPU.

    Raises:
        BuildError: there is no nvcc or no PyTorch, or a compiler fails.
    """
    nvcc, torch = find_nvcc(), torch or find_torch()
    architectures = architectures or os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
    compiler, folder, library = [nvcc, *FLAGS, *code_flags(architectures)], Path(folder), Path(library)
    objects = compile_sources(compiler, sources(), folder)
    compiler += [f"-DCMIM_DISPATCH_KEY={dispatch_key}", "-isystem", f"{torch}/include"]
    objects += compile_sources(compiler, [CSRC / "library.cpp"], folder / dispatch_key)
    library.parent.mkdir(parents=True, exist_ok=True)
    link = [nvcc, "-shared", "-nodlink", "-cudart", "static", *objects, f"-L{torch}/lib", "-lc10", "-ltorch_cpu"]
    run([*link, "-o", library], folder / "link.log")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout.split("release ")[-1].split(",")[0]
    return f"built by nvcc {version} for {architectures}"


INSTRUCTION_SETS = {
    "x86_64": {"baseline": ["-march=x86-64"], "avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4"]},
    "aarch64": {"baseline": ["-march=armv8-a"]},
}
"""Machine -> name of an instruction set -> the compiler's flags. Which one runs is decided where it runs."""
CPU_FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast", "-Wall", "-Wextra",
    "-Wno-psabi", "-DTORCH_TARGET_VERSION=0x020b000000000000",
)  # fmt: skip


def build_cpu(library, folder, *, torch=None, compiler=None, machine=None, flags=()):
    """Compile csrc/cpu/ into the file `library`, as `build` does csrc/.

    Args:
        compiler: the command of a C++17 compiler; by default CXX, c++, g++ or clang++.
        machine: what `uname -m` says where the library will run; by default here.
        flags: more flags, for all of it.
    """
    machine, folder, library = machine or platform.machine(), Path(folder), Path(library)
    if machine not in INSTRUCTION_SETS or sys.platform != "linux":
        raise BuildError(
            f"there are kernels for Linux on {' and '.join(INSTRUCTION_SETS)}, not for {sys.platform} on {machine}"
        )
    compiler, torch = [compiler or find_compiler(), *CPU_FLAGS, *flags], torch or find_torch()
    objects = []
    for name, architecture in INSTRUCTION_SETS[machine].items():
        command = [*compiler, *architecture, f"-DCMIM_ISA={name}", "-fno-exceptions"]
        objects += compile_sources(command, cpu_sources(), folder / name)
    command = [*compiler, "-isystem", f"{torch}/include"]
    objects += compile_sources(command, [CSRC / "cpu/library.cpp"], folder)
    library.parent.mkdir(parents=True, exist_ok=True)
    run([*compiler, "-shared", *objects, f"-L{torch}/lib", "-lc10", "-ltorch_cpu", "-o", library], folder / "link.log")
    return f"built by {Path(compiler[0]).name} for {machine}: {', '.join(INSTRUCTION_SETS[machine])}"


def find_compiler():
    wanted = os.environ.get("CXX")
    found = shutil.which(wanted) if wanted else next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if found is None:
        raise BuildError(f"CXX is {wanted}, which is not there" if wanted else "no C++ compiler: no c++, g++ or clang++")
    return found


def cpu_sources():
    """The kernels for the CPU, which know no PyTorch."""
    return sorted(source for source in (CSRC / "cpu").glob("*.cpp") if source.name != "library.cpp")


def sources():
    """The kernels, which know no PyTorch. The longest first: it takes the longest."""
    return sorted(CSRC.glob("*.cu"), key=lambda source: -source.stat().st_size)


def find_nvcc():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=f"{home}/bin" if home else f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
    if found is None:
        raise BuildError(f"no nvcc in {home}/bin" if home else "no nvcc on PATH or in /usr/local/cuda/bin")
    return found


def find_torch():
    torch = Path(sysconfig.get_path("platlib")) / "torch"
    if not (torch / "include/torch/csrc/stable/library.h").exists():
        raise BuildError(f"no PyTorch in {torch.parent} to compile for; install it, then install this again")
    return torch


def code_flags(architectures):
    """nvcc's flags for a list like "8.0;9.0;10.0+PTX"."""
    flags = []
    for architecture in architectures.replace(" ", ";").split(";"):
        number = architecture.removesuffix("+PTX").replace(".", "")
        if not number[:-1].isdigit():
            raise BuildError(f"TORCH_CUDA_ARCH_LIST has {architecture!r}, expected numbers like 9.0 or 10.0+PTX")
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if architecture.endswith("+PTX"):
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


def compile_sources(compiler, sources, folder, *, headers=()):
    """Compile each source, as many at once as there are processors (or MAX_JOBS): the paths of the objects.

    `headers` are folders with headers besides csrc/.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    included = [
        file for place in (CSRC, CSRC / "cpu", *headers) for file in sorted(place.iterdir()) if file.suffix in (".h", ".cuh")
    ]
    included = b"".join(file.read_bytes() for file in included)

    def compile_one(source):
        target, stamp = folder / f"{source.name}.o", folder / f"{source.name}.stamp"
        command = [*compiler, "-c", source, "-o", target]
        key = hashlib.sha256(repr(command).encode() + included + source.read_bytes()).hexdigest()
        if not (target.exists() and stamp.exists() and stamp.read_text() == key):
            stamp.unlink(missing_ok=True)
            run(command, folder / f"{source.name}.log")
            stamp.write_text(key)
        return target

    with alone_in(folder), ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))) as pool:
        return list(pool.map(compile_one, sources))


@contextlib.contextmanager
def alone_in(folder):
    """Other processes that compile into the same folder wait, and then find the objects made."""
    import fcntl  # where nvcc is, not on Windows, where an installation only finds out that there is none

    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run(command, log):
    """Run a compiler and keep what it says."""
    command = [str(c) for c in command]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log.write_text(" ".join(command) + "\n" + result.stdout)
    if result.returncode:
        said = [line for line in result.stdout.splitlines() if "error" in line] or result.stdout.splitlines()[-3:]
        raise BuildError(f"{' '.join(said[:3])} (all of it in {log.resolve()})")


def native_architecture():
    """Of the GPUs of this machine, as the driver says."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"the driver names no architecture: {error}") from error
    return ";".join(sorted(set(said)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--architectures", default=None, help="like TORCH_CUDA_ARCH_LIST, or native: of this machine's GPUs")
    parser.add_argument("--cpu", action="store_true", help="the kernels for the CPU instead of those for CUDA")
    options = parser.parse_args()
    library = CSRC.parent / "kernels/cmim_kernels" / ("libcmim_cpu.so" if options.cpu else "libcmim_kernels.so")
    try:
        wanted = native_architecture() if options.architectures == "native" else options.architectures
        if options.cpu:
            outcome = build_cpu(library, CSRC.parent / "build/cpu")
        else:
            outcome = build(library, CSRC.parent / "build/cuda", architectures=wanted)
    except BuildError as error:
        raise SystemExit(f"error: {error}") from error
    library.with_suffix(".txt").write_text(outcome + "\n")
    print(outcome)


if __name__ == "__main__":
    main()
