import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmim_kernels import random_mask


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@given(
    batch=st.integers(0, 3), height=st.integers(0, 9), width=st.integers(0, 9), block=st.integers(1, 4),
    ratio=st.sampled_from([0, 0.1, 0.25, 0.5, 0.6, 0.75, 1]), seed=st.integers(0, 99),
)  # fmt: skip
def test_whole_blocks_and_exact_count(batch, height, width, block, ratio, seed):
    mask = random_mask(batch, height, width, ratio, block=block, generator=generator(seed))
    assert mask.shape == (batch, height, width) and mask.dtype == torch.bool
    blocks = math.ceil(height / block) * math.ceil(width / block)
    for image in mask:
        masked = 0
        for i in range(0, height, block):
            for j in range(0, width, block):
                values = set(image[i : i + block, j : j + block].flatten().tolist())
                assert len(values) == 1
                masked += values == {True}
        assert masked == round(ratio * blocks)


@pytest.mark.parametrize(("height", "width", "ratio"), [(3, 30, 0.05), (6, 15, 0.05), (15, 30, 0.03), (35, 30, 0.01)])
@pytest.mark.parametrize("block", [1, 2])
def test_the_count_is_rounded_once(height, width, ratio, block):
    mask = random_mask(1, height * block, width * block, ratio, block=block, generator=generator())
    assert int(mask.sum()) == round(ratio * (height * width)) * block**2


class SecondGPU(torch.Generator):
    device = torch.device("cuda", 1)


def test_every_block_is_equally_likely_and_images_differ():
    mask = random_mask(4000, 2, 3, 0.5, generator=generator())
    assert (mask.float().mean(dim=0) - 0.5).abs().max() < 0.05
    assert len(mask.flatten(1).unique(dim=0)) == math.comb(6, 3)


def test_generator_decides():
    first, again, other = (random_mask(2, 8, 8, 0.6, generator=generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_blocks_of_smallest_noise_are_masked():
    noise = torch.tensor([[[0.1, 0.9, 0.8], [0.7, 0.2, 0.3]]])
    mask = torch.ops.cmim_kernels.random_mask_forward(noise, 3, 5, 0.5, 2)
    assert mask.int().tolist() == [[[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]]]


def test_registration():
    mask = random_mask(2, 5, 7, 0.6, block=2, generator=generator())
    noise = torch.rand(2, 3, 4, generator=generator())
    op = torch.ops.cmim_kernels.random_mask_forward.default
    assert torch.equal(op(noise, 5, 7, 0.6, 2), mask)
    torch.library.opcheck(op, (noise, 5, 7, 0.6, 2))
    for dynamic in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda x: random_mask(len(x), *x.shape[1:], 0.6, block=2), fullgraph=True, dynamic=dynamic, backend="aot_eager"
        )
        torch.manual_seed(0)
        got = compiled(torch.zeros(2, 5, 7))
        torch.manual_seed(0)
        assert torch.equal(got, random_mask(2, 5, 7, 0.6, block=2))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(batch=-1), ValueError, "batch is -1"),
        (dict(height=2.0), TypeError, "height must be an int"),
        (dict(ratio=1.1), ValueError, "ratio is 1.1, expected a value from 0 to 1"),
        (dict(ratio="half"), TypeError, "ratio must be a number"),
        (dict(block=0), ValueError, "block is 0"),
        (dict(generator=3), TypeError, "generator must be a torch.Generator, got int"),
        (dict(generator=generator(), device="meta"), ValueError, "generator is on cpu, expected device meta"),
        (dict(generator=SecondGPU(), device="cuda:0"), ValueError, "generator is on cuda:1, expected device cuda:0"),
        (dict(device="gpu"), ValueError, "device is 'gpu', expected a torch.device"),
        (dict(device=0.5), TypeError, "device is 0.5, expected a torch.device"),
    ],
)
def test_wrong_arguments(change, error, message):
    arguments = dict(batch=1, height=4, width=4, ratio=0.5) | change
    with pytest.raises(error, match=message):
        random_mask(**arguments)


@pytest.mark.parametrize("device", ["cpu", "cpu:0", torch.device("cpu")])
def test_a_generator_and_its_device(device):
    assert torch.equal(
        random_mask(1, 4, 4, 0.5, generator=generator(), device=device), random_mask(1, 4, 4, 0.5, generator=generator())
    )
