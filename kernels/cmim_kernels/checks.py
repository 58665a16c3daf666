"""Argument checks of the public functions. Error messages are one line: the argument, what it is, and what was expected.

The checks read metadata only (no host sync) and are skipped while `torch.compile` traces.
"""

import math

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LABELS = (torch.uint8, torch.int32, torch.int64)
enabled = lambda: not torch.compiler.is_compiling()  # noqa: E731


def tensor(op, name, value, *, dtypes, shape=None, like=None):
    """Check that `value` is a tensor with one of `dtypes`, with `shape`, on the device of `like`.

    `shape` is a tuple of ints (exact sizes) and strings (any size; a name for the message): `("B", 3, "H", "W")`.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        expected = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{op}: {name} has dtype {str(value.dtype).removeprefix('torch.')}, expected one of {expected}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{op}: {name} is on {value.device}, expected {like.device} like the first argument")
    if shape is not None and value.shape != shape and not _fits(value.shape, shape):  # most need no loop
        expected = "(" + ", ".join(map(str, shape)) + (",)" if len(shape) == 1 else ")")
        raise ValueError(f"{op}: {name} has shape {tuple(value.shape)}, expected {expected}")


def _fits(sizes, shape):
    if len(sizes) != len(shape):
        return False
    for want, have in zip(shape, sizes, strict=True):  # noqa: SIM110 - a generator would take longer, in every call
        if want != have and type(want) is not str:
            return False
    return True


def choice(op, name, value, options):
    if value not in options:
        raise ValueError(f"{op}: {name} is {value!r}, expected one of {', '.join(map(repr, options))}")


def integer(op, name, value, *, at_least=1):
    """Check an int (bool excluded) of at least `at_least`."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if value < at_least:
        raise ValueError(f"{op}: {name} is {value}, expected at least {at_least}")


def number(op, name, value, *, low, high):
    """Check a number in the closed interval [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{op}: {name} is {value}, expected a value from {low} to {high}")


def flag(op, name, value):
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a bool, got {type(value).__name__}")


def numbers(op, name, value, *, length, positive=False):
    """Check a sequence of `length` finite numbers (bool excluded)."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{op}: {name} must be a sequence of numbers, got {value!r}")
    for v in value:
        if type(v) is not float and (isinstance(v, bool) or not isinstance(v, (int, float))):
            raise TypeError(f"{op}: {name} must be a sequence of numbers, got {value!r}")
    if len(value) != length:
        raise ValueError(f"{op}: {name} has {len(value)} numbers, expected {length}")
    for v in value:
        if not math.isfinite(v) or (positive and v <= 0):
            raise ValueError(f"{op}: {name} is {value!r}, expected {'positive' if positive else 'finite'} numbers")


def device(op, name, value):
    """Check that `torch.device` accepts the value."""
    try:
        torch.device(value)
    except (RuntimeError, TypeError) as error:
        kind = ValueError if isinstance(error, RuntimeError) else TypeError
        raise kind(f"{op}: {name} is {value!r}, expected a torch.device or its name") from error


def upsampling(op, logits, size):
    """Check that (B, K, h, w) logits are not empty if there are pixels to compute from them."""
    if 0 not in (logits.shape[0], *size) and 0 in logits.shape[1:]:
        raise ValueError(f"{op}: logits has shape {tuple(logits.shape)}, expected no empty dimension but B")
