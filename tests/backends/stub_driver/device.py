"""The stub driver as Triton's device: importing this module makes it so, for the whole process.

Triton specialises, compiles and launches as it would on an H100; the launch ends in `driver.c`. Tensors on the meta device
and on the CPU stand for tensors on the GPU: kernels get addresses of the imaginary device. `record()` tells what happened.

Runs without TRITON_INTERPRET, in a process of its own.
"""

import contextlib
import ctypes
import functools
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    sys.exit("error: unset TRITON_INTERPRET: interpreted kernels reach no driver")

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

from cmim_kernels import backends
from tests.backends import declared

SOURCE = Path(__file__).with_name("driver.c")
LIBRARY = SOURCE.parents[3] / "build" / "stub_driver" / "libcuda.so.1"
DEVICE_MEMORY = 2**52
"""Added to the address of a tensor: see `driver.c`."""
PARAMETERS = 128
WIDTHS = {"i1": 1, "u1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "fp32": 4}
"""Bytes of the types that kernels have as parameters, pointers aside."""


class WrongLaunch(AssertionError):
    """What arrived at the driver is not what the launcher was given."""


def build():
    """Compile the stub where it is older than its source."""
    if LIBRARY.exists() and LIBRARY.stat().st_mtime > SOURCE.stat().st_mtime:
        return
    LIBRARY.parent.mkdir(parents=True, exist_ok=True)
    unfinished = LIBRARY.with_suffix(f".{os.getpid()}")  # another process may be at it too
    include = Path(nvidia.__file__).parent / "include"
    flags = ("-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-shared", "-fPIC")
    soname = "-Wl,-soname,libcuda.so.1"  # so that it answers whoever opens that name later
    subprocess.run([shutil.which("gcc"), *flags, "-isystem", include, soname, "-o", unfinished, SOURCE], check=True)
    unfinished.replace(LIBRARY)


class _Launch(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char * 256),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("parameters", ctypes.c_uint32),
        ("sizes", ctypes.c_uint32 * PARAMETERS),
        ("values", ctypes.c_uint8 * 16 * PARAMETERS),
    ]


build()
os.environ["TRITON_LIBCUDA_PATH"] = str(LIBRARY.parent)  # where Triton's helpers are linked
stub = ctypes.CDLL(str(LIBRARY), ctypes.RTLD_GLOBAL)
stub.stub_launches.restype = ctypes.c_uint64
stub.stub_launch.restype = ctypes.POINTER(_Launch)
stub.stub_launch.argtypes = [ctypes.c_uint64]


class Launch(NamedTuple):
    """A launch that the driver took."""

    op: str | None
    """The declared op whose launcher made it."""
    kernel: str
    variant: int
    """Which compiled variant of the kernel."""
    grid: tuple
    arguments: tuple
    """(type, value) of each parameter."""


class Record:
    def __init__(self):
        self.launches = []
        self.compiled = []
        """(kernel, key) of every compilation."""
        self.copies = []
        """(op, name) of PyTorch's own ops in launchers that run a kernel on a device, such as a copy."""
        self.ops = []
        """The declared ops whose launchers ran."""

    def kernels(self, op):
        return [launch.kernel for launch in self.launches if launch.op == op]


_records = []
_ops = [None]


@contextlib.contextmanager
def record():
    """Yields a `Record` of what happens meanwhile."""
    _records.append(Record())
    try:
        yield _records[-1]
    finally:
        _records.pop()


def _note(name, value):
    for each in _records:
        getattr(each, name).append(value)


class _Launcher(nvidia.CudaLauncher):
    """Triton's launcher, whose every launch is compared with what the driver got."""

    count = 0

    def __init__(self, source, metadata):
        super().__init__(source, metadata)
        self.kernel, self.types = source.fn.__name__.strip("_"), tuple(source.signature.values())
        _Launcher.count += 1
        self.variant = _Launcher.count

    def __call__(self, x, y, z, stream, function, *rest):
        before = stub.stub_launches()
        super().__call__(x, y, z, stream, function, *rest)
        if stub.stub_launches() != before + 1:  # Triton leaves out a grid whose size is not positive as an int
            raise WrongLaunch(f"{self.kernel}: no launch of grid {x} x {y} x {z} arrived")
        got = stub.stub_launch(before).contents
        if tuple(got.grid) != (x, y, z):
            raise WrongLaunch(f"{self.kernel}: grid {tuple(got.grid)} instead of {(x, y, z)}")
        arguments = tuple(_flat(self.types, rest[4:]))  # behind metadata and hooks
        _compare(self.kernel, arguments, got)
        _note("launches", Launch(_ops[:2][-1], self.kernel, self.variant, (x, y, z), arguments))


def _flat(types, values):
    for type_, value in zip(types, values, strict=True):
        if isinstance(type_, tuple):
            yield from _flat(type_, value)
        elif type_ != "constexpr":
            yield type_, value


def _compare(kernel, arguments, got):
    """The kernel's parameters are as wide as the types it was compiled for, and hold what the launcher was given."""
    sizes = list(got.sizes[: got.parameters])
    widths = [8 if type_[0] == "*" else WIDTHS[type_] for type_, _ in arguments] + [8, 8]  # Triton's own two
    if sizes != widths:
        raise WrongLaunch(f"{kernel}: parameters of {sizes} bytes, expected {widths}")
    for i, (type_, value) in enumerate(arguments):
        arrived = bytes(got.values[i][: sizes[i]])
        if arrived != _bytes(type_, value):
            raise WrongLaunch(f"{kernel}: parameter {i}, {type_} {value!r}, arrived as {arrived.hex()}")


def _bytes(type_, value):
    if type_[0] == "*":
        return (value if isinstance(value, int) else value.data_ptr()).to_bytes(8, "little")
    if type_ == "fp32":
        return struct.pack("<f", value)
    try:
        return int(value).to_bytes(WIDTHS[type_], "little", signed=type_[0] == "i" and type_ != "i1")
    except OverflowError:
        return None


class _Driver(nvidia.CudaDriver):
    def __init__(self):
        self.utils, self.launcher_cls = nvidia.CudaUtils(), _Launcher
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0
        self.set_current_device = lambda device: None
        self.get_device_capability = lambda device: (9, 0)

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


class _Copies(TorchDispatchMode):
    """Notes PyTorch's ops that neither make a view nor only allocate."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns)
        if not view and "empty" not in op.name():
            _note("copies", (_ops[:2][-1], op.name().removeprefix("aten::").split(".")[0]))
        return op(*args, **(kwargs or {}))


def _noted(name, launcher):
    @functools.wraps(launcher)
    def noted(*arguments):
        _ops.append(name)
        _note("ops", name)
        try:
            with _Copies():
                return launcher(*arguments)
        finally:
            _ops.pop()

    return noted


def _device_address(original, tensor):
    if tensor.is_meta:  # as far apart as the objects that stand for memory, and as aligned as memory is
        return DEVICE_MEMORY + 16 * tensor.untyped_storage()._cdata + tensor.storage_offset() * tensor.itemsize
    return DEVICE_MEMORY + original(tensor)


def _install():
    triton.runtime.driver.set_active(_Driver())
    triton.knobs.runtime.jit_post_compile_hook = lambda **compilation: _note(
        "compiled", (compilation["fn"].jit_function.__name__.strip("_"), compilation["compile"]["key"])
    )
    original = torch.Tensor.data_ptr
    torch.Tensor.data_ptr = lambda tensor: _device_address(original, tensor)
    backends.UNAVAILABLE_REASONS["triton"] = lambda device: None
    for module, name in declared.triton_launchers():
        setattr(module, name, _noted(name, getattr(module, name)))


_install()
