"""Every kernel goes to the stub driver as it would go to a GPU: run by `test_stub_driver.py`, without TRITON_INTERPRET."""

import functools

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.nvidia import driver as nvidia
from triton.runtime.errors import OutOfResources

from cmim_kernels.backends import use_backend
from cmim_kernels.ops.library import KERNELS
from tests.backends import launches
from tests.backends.calls import CALLS, call
from tests.backends.stub_driver import device
from tests.kernels.op_checks import run

pytestmark = pytest.mark.filterwarnings("ignore:CUDA initialization")  # autograd asks the stub for devices
DECLARED = {name for name, kernels in KERNELS.items() if "triton" in kernels}

LAUNCHES = {
    "pack": (3, 0),
    "gather": (1, 2),  # the second sums the gradient of the mask token
    "gather alone": (1, 1),
    "scatter": (1, 2),
    "scatter alone": (1, 1),
    "loss": (2, 1),
    "centroids": (2, 1),
    "centroids of many classes": (2, 1),
    "centroids that sort": (2 + 3, 1),
    "centroids of images": (2, 1),
    "patch labels": (1, 0),
    "convolution": (2, 4),  # the labels' frame; then those of x, of the weight, and sums
    "cross-entropy": (1, 1),
    "pseudo-labels": (1, 0),
    "attention": (1, 2),
}
"""How many launches a call makes forward and backward, at most."""
COPIES = {"convolution": (1, 1)}  # of the weight, which the kernels want by tap
"""And how many of PyTorch's kernels its launchers run besides."""


def made_by(name, dtype=torch.bfloat16, **sizes):
    """The record of a public call, forward and backward, on tensors that nobody has seen before."""
    function, inputs = call(name, dtype, "cpu", **sizes)
    with use_backend("triton"), device.record() as record:
        run(function, inputs)
    return record


@pytest.mark.parametrize("name", CALLS)
def test_no_more_launches_than_needed(name):
    record = made_by(name)
    for i, direction in enumerate(("forward", "backward")):
        of_it = lambda items: sum(item[0].endswith(direction) for item in items)  # noqa: B023, E731
        assert of_it(record.launches) == LAUNCHES[name][i]
        assert of_it(record.copies) == COPIES.get(name, (0, 0))[i]


@pytest.mark.parametrize("name", CALLS)
def test_the_same_shapes_compile_nothing_twice(name):
    made_by(name)
    assert made_by(name).compiled == []


@pytest.mark.parametrize("name", CALLS)
def test_another_batch_compiles_nothing(name):
    """Of 8 images or more: fewer have tiles of fewer images."""
    made_by(name, batch=8)
    for batch in (9, 12, 16, 17, 32, 40):
        assert made_by(name, batch=batch).compiled == []


@pytest.mark.parametrize("name", CALLS)
def test_another_size_of_images_compiles_nothing(name):
    """Where rows of 16 elements stay rows of 16 elements."""
    made_by(name)
    for side in (20, 28, 44):
        assert made_by(name, side=side).compiled == []


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_sizes_that_fit_no_16_elements_share_one_variant(name):
    made_by(name, side=21)
    for side in (23, 25, 29):
        assert made_by(name, side=side).compiled == []


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes(name, dtype):
    assert made_by(name, dtype).launches and not made_by(name, dtype).compiled


CASES = launches.cases(few=True)


def test_the_cases_call_every_declared_launcher():
    with device.record() as record:
        for cases in CASES.values():
            cases[0]()
    assert set(record.ops) == DECLARED
    assert {launch.op for launch in record.launches} == DECLARED


@pytest.mark.parametrize("op", CASES)
def test_seventy_thousand_images(op):
    """Beyond what a grid has along y and z, and beyond 2**31 elements, on tensors without memory."""
    (common,) = CASES[op]
    many = functools.partial(common.func, **common.keywords | {"batch": 70_000})
    with device.record() as record:
        many()
    assert record.launches
    with device.record() as record:
        many()
    assert not record.compiled


FAR = [op if op in ("pack_classes", "class_attention") else pytest.param(op, marks=pytest.mark.slow) for op in CASES]


@pytest.mark.parametrize("op", FAR)
def test_images_more_than_2_to_the_31_elements_apart(op, monkeypatch):
    """The distance arrives whole, for each tensor that the kernels take as it lies."""
    distance, contiguous = 2**31 + 2**10, launches.meta

    def meta(*shape, **options):
        x = contiguous(*shape, **options)
        return (
            x if len(shape) == 1 else torch.empty_strided(shape, (distance, *x.stride()[1:]), dtype=x.dtype, device="meta")
        )

    monkeypatch.setattr(launches, "meta", meta)
    (common,) = CASES[op]
    with device.record() as record:
        common.func(**common.keywords | {"batch": 2})
    far = lambda value: isinstance(value, torch.Tensor) and distance in value.stride()  # noqa: E731
    tensors = [sum(far(value) for _, value in launch.arguments) for launch in record.launches]
    strides = [sum(argument == ("i64", distance) for argument in launch.arguments) for launch in record.launches]
    assert strides == tensors and any(tensors)


@pytest.mark.slow
@pytest.mark.parametrize("op", CASES)
def test_every_dtype_and_layout(op):
    cases = launches.cases()[op]
    for case in cases:
        case()
    with device.record() as record:
        for case in cases:
            case()
    assert record.launches and not record.compiled


@triton.jit
def _fill_kernel(x, n: tl.int32, step, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i * step, 1.0, mask=i < n)


@triton.jit
def _product_kernel(x, out, LENGTH: tl.constexpr):
    """x @ x.T of (16, LENGTH): both operands in shared memory."""
    i, j = tl.arange(0, 16), tl.arange(0, LENGTH)
    rows = tl.load(x + i[:, None] * LENGTH + j[None, :])
    columns = tl.load(x + j[:, None] + i[None, :] * LENGTH)
    tl.store(out + i[:, None] * 16 + i[None, :], tl.dot(rows, columns))


def fill(grid=(1,), n=100, step=3, x=None):
    return _fill_kernel[grid](torch.empty(100, device="meta") if x is None else x, n, step, BLOCK=128)


def multiply(length):
    x, out = (torch.empty(16, n, device="meta", dtype=d) for n, d in ((length, torch.bfloat16), (16, torch.float32)))
    return _product_kernel[(1,)](x, out, LENGTH=length)


def launch(compiled, *arguments, warps=4, shared=0):
    """Past Triton's own checks."""
    compiled.run(1, 1, 1, 0, compiled.function, (warps, 1, shared), None, None, None, *arguments)


class TestTheStubItself:
    """A launch that is wrong on purpose does not pass."""

    def test_one_that_is_right(self):
        with device.record() as record:
            fill((2, 65_535, 65_535 // 4), step=2**31)  # 2**31 programs less a few
        (made,) = record.launches
        assert made.grid == (2, 65_535, 65_535 // 4)
        assert [value for _, value in made.arguments[1:]] == [100, 2**31] and made.arguments[2][0] == "i64"

    @pytest.mark.parametrize(
        ("grid", "said"), [((1, 65_536), "65536 along y"), ((1, 1, 70_000), "70000 along z"), ((0, 1), "no launch")]
    )
    def test_a_wrong_grid(self, grid, said):
        with device.record() as record, pytest.raises((RuntimeError, device.WrongLaunch), match=said):
            fill(grid)
        assert not record.launches

    def test_a_grid_of_more_programs_than_an_int_counts(self):
        """Triton's launcher multiplies ints and leaves out what is not positive."""
        with pytest.raises(device.WrongLaunch, match="no launch of grid 65536 x 65535 x 1 arrived"):
            fill((65_536, 65_535))
        with pytest.raises(OverflowError):
            fill((2**31,))

    def test_an_argument_wider_than_its_type(self):
        with pytest.raises((device.WrongLaunch, OverflowError)):  # Triton 3.8 keeps the lower half, 3.6 says so
            fill(n=2**32 + 100)

    @pytest.mark.parametrize("change", [dict(n=99), dict(step=4), dict(x="elsewhere")], ids=str)
    def test_an_argument_that_arrives_as_another(self, change, monkeypatch):
        original = nvidia.CudaLauncher.__call__

        def exchanging(self, *arguments):
            *front, x, n, step, block = arguments
            x = torch.empty(100, device="meta") if "x" in change else x
            original(self, *front, x, change.get("n", n), change.get("step", step), block)

        fill()
        monkeypatch.setattr(nvidia.CudaLauncher, "__call__", exchanging)
        with pytest.raises(device.WrongLaunch, match=r"parameter \d, .* arrived as"):
            fill()

    def test_a_pointer_to_memory_of_the_host(self):
        class Host(torch.Tensor):
            data_ptr = lambda self: 0x7F0000000000  # noqa: E731

        with pytest.raises(ValueError, match="cpu tensor"):
            fill(x=Host(torch.empty(100)))

    def test_too_much_shared_memory(self):
        with pytest.raises(OutOfResources, match="shared memory"):
            multiply(4096)

    def test_more_shared_memory_than_was_opted_in_to(self):
        x = torch.empty(128, 128, device="meta", dtype=torch.float32)
        with pytest.raises(RuntimeError, match="50000 bytes of shared memory, 49152 were opted in to"):
            launch(fill(x=x), x, 100, 3, 128, shared=50_000)
        large = multiply(1024)
        assert large.metadata.shared > 49_152
        launch(large, x, x, 1024, shared=227 * 1024)
        with pytest.raises(RuntimeError, match="232449 bytes"):
            launch(large, x, x, 1024, shared=227 * 1024 + 1)

    def test_a_block_that_is_not_the_kernels(self):
        x = torch.empty(100, device="meta")
        with pytest.raises(RuntimeError, match="a block of 256 threads, the kernel has 128"):
            launch(fill(x=x), x, 100, 3, 128, warps=8)
