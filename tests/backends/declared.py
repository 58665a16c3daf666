"""What the tests of kernels must cover, from what `cmim_kernels` declares, and what is missing from a list of theirs."""

from cmim_kernels.ops.library import KERNELS


def ops(kernels):
    """Name of each op, without `_forward` and `_backward` -> the backends besides PyTorch that have kernels of it."""
    found = {}
    for name, backends in kernels.items():
        if backends:
            op = name.removesuffix("_forward").removesuffix("_backward")
            found[op] = found.get(op, frozenset()) | backends
    return found


OPS = ops(KERNELS)


def pairs(kernels):
    return {(op, backend) for op, backends in ops(kernels).items() for backend in backends}
