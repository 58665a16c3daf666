import subprocess
import sys

import numpy as np
import pytest
import torch

from cmim.randomness import key, numpy_generator, torch_generator, uniform


def test_a_key_is_stable_across_processes_and_versions():
    code = "from cmim.randomness import key; print(key(3, 14, 'strong 1'))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == key(3, 14, "strong 1") == 8214018515834455089


def test_seed_position_and_purpose_all_count():
    keys = [key(s, p, w) for s in range(20) for p in range(20) for w in ("weak", "strong", "weak ")]
    assert len(set(keys)) == len(keys) and min(keys) >= 0 and max(keys) < 2**63
    assert key(1, 11, "x") != key(11, 1, "x")
    draws = {float(numpy_generator(*a).random()) for a in [(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b")]}
    assert len(draws) == 4


def test_generators_repeat():
    assert numpy_generator(1, 2, "x").random() == numpy_generator(1, 2, "x").random()
    a, b = (torch.rand(4, generator=torch_generator(1, p, "x")) for p in (2, 3))
    assert torch.equal(a, torch.rand(4, generator=torch_generator(1, 2, "x"))) and not torch.equal(a, b)


def uniform_in_python(key, count):
    """The formula in Python's unbounded integers."""

    def mix(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    return [(mix(mix(2**64 - 1 - key) ^ mix(i)) >> 40) / 2**24 for i in range(1, count + 1)]


def test_uniform_matches_unbounded_integers():
    keys = [0, 1, 2, 2**63 - 1, key(0, 0, "a"), key(5, 9, "b")]
    got = uniform(torch.tensor(keys), 7)
    assert got.dtype == torch.float32 and got.tolist() == [uniform_in_python(k, 7) for k in keys]


@pytest.mark.parametrize("keys", [torch.arange(400), torch.tensor([key(0, p, "x") for p in range(400)])])
def test_uniform_is_uniform_and_keys_are_independent(keys):
    u = uniform(keys, 500)
    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u, 50, 0, 1)
    assert float(((counts - 4000) ** 2 / 4000).sum()) < 90  # chi-square of 49 degrees: 1 in 3000
    for pair in (u, u.T):  # between keys and between counters: 400 x 500 products of standard deviation 1/12
        assert abs(float(((pair[1:] - 0.5) * (pair[:-1] - 0.5)).mean())) < 4 / 12 / len(u.flatten()) ** 0.5
    assert len(torch.unique(u)) > 0.98 * u.numel()


def test_uniform_compiled():
    keys = torch.tensor([key(0, p, "x") for p in range(5)])
    compiled = torch.compile(uniform, fullgraph=True)
    for count in (33, 40):  # with a tail beside whole vectors; the second with dynamic shapes
        assert torch.equal(compiled(keys, count), uniform(keys, count))
    assert uniform(keys[:0], 3).shape == (0, 3) and uniform(keys, 0).shape == (5, 0)


def test_a_prefix_does_not_depend_on_the_count():
    keys = torch.tensor([7, 8])
    assert torch.equal(uniform(keys, 100)[:, :10], uniform(keys, 10))
    assert np.allclose(uniform(keys.flip(0), 10).flip(0), uniform(keys, 10))
