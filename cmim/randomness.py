"""Randomness keyed by (seed, global sample position, purpose).

No draw uses a generator that other code advances too, so the results do not depend on the number of workers or ranks,
or on resuming. A purpose is a short text ("strong 0", "labelled mask"); draws with different purposes are independent.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor


def key(seed: int, position: int, purpose: str) -> int:
    """A non-negative 63-bit integer, the same in every process and on every machine."""
    digest = hashlib.blake2b(f"{seed}/{position}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def numpy_generator(seed: int, position: int, purpose: str) -> np.random.Generator:
    """A fresh `np.random.Generator`."""
    return np.random.Generator(np.random.PCG64(key(seed, position, purpose)))


def torch_generator(seed: int, position: int, purpose: str) -> torch.Generator:
    """A fresh CPU `torch.Generator`."""
    return torch.Generator().manual_seed(key(seed, position, purpose))


def uniform(keys: Tensor, count: int) -> Tensor:
    """Uniform random numbers on a device: row b holds the first `count` numbers of the generator with the key `keys[b]`.
    Keys come from `key`, with a different purpose for every draw.

    The numbers are hashes of key and counter, made by the finaliser of SplitMix64 (Steele, Lea and Flood 2014). It uses
    integer arithmetic only, so the values are the same on every device, inside and outside `torch.compile`.

    Args:
        keys: (B,) int64.
        count: number of values per key.

    Returns:
        (B, count) float32 in [0, 1), multiples of 2^-24.
    """
    # The counter is mixed and not multiplied: compiled C++ assumes that products of indices do not overflow.
    counter = _mix(torch.arange(1, count + 1, device=keys.device))
    bits = _mix(_mix(~keys)[:, None] ^ counter)  # inverted, or else (key 3, counter 5) would equal (key 5, counter 3)
    return _shift(bits, 40).to(torch.float32) * 2.0**-24


def _mix(z):
    """A bijection of the 64-bit integers that maps neighbours far apart; products wrap around."""
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def _shift(z, bits):
    """Logical right shift; the operator `>>` of torch is arithmetic."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(unsigned):
    return unsigned - (1 << 64) if unsigned >= 1 << 63 else unsigned
