"""What the tests of kernels must cover, read from what `cmim_kernels` declares."""

import importlib
import pkgutil

from cmim_kernels import triton_kernels
from cmim_kernels.ops.library import KERNELS


def ops(kernels):
    """Name of each op that has kernels, without `_forward` and `_backward` -> the backends that have them."""
    found = {}
    for name, backends in kernels.items():
        if backends:
            op = name.removesuffix("_forward").removesuffix("_backward")
            found[op] = found.get(op, frozenset()) | backends
    return found


OPS = ops(KERNELS)


def triton_launchers():
    """(module, name) of every launcher of the Triton kernels, where it is defined."""
    for info in pkgutil.iter_modules(triton_kernels.__path__):
        module = importlib.import_module(f"{triton_kernels.__name__}.{info.name}")
        for name in (f"{info.name}_forward", f"{info.name}_backward"):
            if hasattr(module, name):
                yield module, name
