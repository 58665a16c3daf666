"""The library of csrc/ compiled by g++ for the CPU: host/ stands in for CUDA's headers."""

import functools
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("csrc_build", ROOT / "csrc/build.py")
csrc = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(csrc)

HOST = Path(__file__).parent / "host"
FLAGS = (
    "-x", "c++", "-std=c++17", "-O1", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror",
    "-Wno-unknown-pragmas", "-Wno-clobbered", "-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error",
    "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DCMIM_DISPATCH_KEY=CPU",
)  # fmt: skip


def implemented(source):
    """Names of the ops that a library.cpp implements."""
    return re.findall(r"CMIM_IMPLEMENT\((\w+)\);", source.read_text())


def check_installation(folder, library, code, said, **variables):
    """Check that `setup.py build` in a copy of the sources, with these environment variables, ends with `code` and says
    `said`. If it succeeds, it must remove an older file `library` and keep the reason beside it."""
    shutil.copy(ROOT / "setup.py", folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    stale = folder / "lib" / "cmim_kernels" / library
    stale.parent.mkdir(parents=True)
    stale.touch()
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-lib", "lib"], cwd=folder, capture_output=True, text=True,
        env=os.environ | {name: str(value) for name, value in variables.items()},
    )  # fmt: skip
    assert result.returncode == code and said in result.stderr, result.stderr
    if code == 0:
        assert said.removeprefix("CPU kernels ") in stale.with_suffix(".txt").read_text() and not stale.exists()


@functools.cache
def cpu_library():
    """The path of the library for the CPU, compiled where it is older than its sources; None without a C++ compiler, and on
    machines that it is not for. A source that does not compile is an error."""
    try:
        csrc.find_compiler()
    except csrc.BuildError:
        return None
    if platform.machine() not in csrc.INSTRUCTION_SETS or platform.system() != "Linux":
        return None
    folder = ROOT / "build" / "cpu"
    library, new = folder / "libcmim_cpu.so", folder / f"libcmim_cpu.{os.getpid()}"  # other processes test, too
    csrc.build_cpu(new, folder, torch=Path(torch.__file__).parent)
    new.rename(library)  # another process may have loaded the one that was there
    return library


@functools.cache
def emulated_library():
    """The path of the library, compiled where it is older than its sources; None without a C++ compiler."""
    if shutil.which("g++") is None:
        return None
    torch_folder = Path(torch.__file__).parent
    folder = ROOT / "build" / "emulation"
    compiler = ["g++", *FLAGS, "-I", HOST, "-I", csrc.CSRC, "-isystem", torch_folder / "include"]
    objects = csrc.compile_sources(compiler, [*csrc.sources(), csrc.CSRC / "library.cpp"], folder, headers=[HOST])
    library = folder / "libcmim_kernels.so"
    link = ["g++", "-shared", *objects, f"-L{torch_folder}/lib", "-lc10", "-ltorch_cpu", "-o"]
    with csrc.alone_in(folder):
        csrc.run([*link, library.with_suffix(".new")], folder / "link.log")
        library.with_suffix(".new").rename(library)  # another process may have loaded the one that was there
    return library
