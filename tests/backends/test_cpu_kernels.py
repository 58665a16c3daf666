"""What only the kernels for the CPU have: instruction sets, threads, and a library that checks what it relies on."""

import functools

import pytest
import torch

from cmim_kernels import (
    class_attention,
    class_centroids,
    gather_class_tokens,
    masked_patch_loss,
    pack_classes,
    patch_labels,
    same_class_conv2d,
    scatter_class_tokens,
    upsample_cross_entropy,
    upsample_pseudo_labels,
)
from cmim_kernels.backends import use_backend
from cmim_kernels.ops.library import KERNELS, _launcher
from tests.csrc.emulation import csrc, implemented
from tests.kernels.op_checks import assert_equal, check_registration, record_ops, run

from . import declared
from .against_torch import DTYPES, TOLERANCE, assert_like_torch, random_labels

BACKENDS = ["cpu"]
random = lambda *shape, seed=0: torch.randn(shape, generator=torch.Generator().manual_seed(seed))  # noqa: E731


def calls(side=24, channels=37, classes=5, patch=4):
    """Name of an op -> (function, inputs): more than one item of work for each, and channels that fill no vector. The
    inputs are floats, of which some tests take every type."""
    labels, masked = (x.view(2, side, side) for x in random_labels((2, side * side), classes))
    labels = labels.repeat_interleave(5, 1).repeat_interleave(5, 2)[:, :side, :side].contiguous()  # runs
    rows, hidden = labels.flatten(1), masked.flatten(1)
    layout, tokens = pack_classes(rows, hidden, classes), random(2, side * side, channels)
    grid = random(2, channels, side, side, seed=1).to(memory_format=torch.channels_last)
    pixels = labels.repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    position, mask_token = random(side * side, channels, seed=2), random(channels, seed=3)
    image, pred = random(2, 3, side * patch, side * patch), random(2, side * side, 3 * patch * patch, seed=4)
    logits = random(2, classes, side, side, seed=5)
    loss = functools.partial(masked_patch_loss, masked=hidden, labels=rows, num_classes=classes, patch_size=patch)
    return {
        "pack_classes": (lambda x: pack_classes(rows, hidden, classes), [tokens]),
        "gather_class_tokens": (
            lambda x, m, p: gather_class_tokens(x, layout, mask_token=m, position=p, length=side * side // 2),
            [tokens, mask_token, position],
        ),
        "scatter_class_tokens": (
            lambda x, m, p: scatter_class_tokens(x, layout, mask_token=m, position=p),
            [tokens[:, : side * side // 2], mask_token, position],
        ),
        "class_attention": (
            lambda q, k, v: class_attention(q, k, v, layout), [random(2, 3, side * side, 20, seed=i) for i in range(3)],
        ),
        "class_centroids": (lambda x: class_centroids(x, rows, hidden, classes), [tokens]),
        "same_class_conv2d": (
            lambda x, w, b: same_class_conv2d(x, labels, w, b, num_classes=classes) / side,
            [grid, random(channels, 7, 7), random(channels)],
        ),
        "masked_patch_loss": (lambda x: loss(x, image, normalize=True).loss, [pred]),
        "patch_labels": (lambda x: patch_labels(pixels, patch, classes), [tokens]),
        "upsample_cross_entropy": (lambda x: upsample_cross_entropy(x, pixels), [logits]),
        "upsample_pseudo_labels": (lambda x: upsample_pseudo_labels(x, tuple(pixels.shape[1:])), [logits]),
    }  # fmt: skip


COMPILED_OPS = sorted(op for op, backends in declared.OPS.items() if "cpu" in backends)


def test_every_op_with_kernels_for_the_cpu_is_tested_here():
    assert sorted(calls()) == COMPILED_OPS, "`calls` above is to hold one call of each op that declares kernels for the CPU"


@pytest.fixture(params=["avx512", "avx2", "baseline"])
def instruction_set(request):
    choose = torch.ops.cmim_cpu.instruction_set.default
    before = choose("")
    try:
        choose(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param
    choose(before)


@pytest.mark.parametrize("op", COMPILED_OPS)
def test_every_instruction_set_of_this_machine(op, instruction_set):
    function, inputs = calls()[op]
    for dtype in DTYPES:
        # Gradients of attention are small differences of large sums, of an output that was rounded to 16 bits.
        tolerance = dict(TOLERANCE[dtype])
        if op == "class_attention":
            tolerance["atol"] = max(1e-5, torch.finfo(dtype).eps / 4)
        assert_like_torch(function, [x.to(dtype) for x in inputs], tolerance=TOLERANCE | {dtype: tolerance})


@pytest.mark.parametrize("op", COMPILED_OPS)
def test_the_number_of_threads_changes_no_bit(op, instruction_set):
    function, inputs = calls(side=40, channels=70)[op]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with use_backend("cpu"):
                results.append(run(function, inputs))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_equal(other, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("op", COMPILED_OPS)
def test_registration(op):
    function, inputs = calls(side=8, channels=5)[op]
    with use_backend("cpu"):
        check_registration(function, inputs, gradient=f"{op}_backward" in KERNELS)


def recorded_calls():
    """(op of the library, its arguments) of one call of every op."""
    from torch.utils._python_dispatch import TorchDispatchMode

    recorded = {}

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            if op.namespace == "cmim_cpu":
                recorded[op] = args
            return out

    for function, inputs in calls(side=8, channels=5).values():
        for op, arguments in record_ops(function, inputs, True):
            with Recorder():
                _launcher("cpu", op._schema.name.split("::")[1])(*arguments)
    return recorded


def test_the_library_checks_what_it_relies_on():
    """What an op writes is refused in another dtype or another shape, and what it reads in another shape."""
    recorded = recorded_calls()
    written = {"grad_mask_token", "grad_position", "grad_bias", "grad_x", "grad_logits", "grad", "out"}
    assert {op._schema.name.split("::")[1] for op in recorded} == set(implemented(csrc.CSRC / "cpu/library.cpp"))
    for op, arguments in recorded.items():
        for i, (argument, value) in enumerate(zip(op._schema.arguments, arguments, strict=True)):
            if not isinstance(value, torch.Tensor) or value.dim() == 0:
                continue
            wrong = [value[None, None], torch.cat([value, value], dim=0)]
            if argument.is_write and argument.name not in written:
                wrong += [value.half(), value.to(torch.int64)]
            for bad in wrong:
                with pytest.raises(RuntimeError, match=r"of the wrong kind|more than 4 dimensions"):
                    op(*arguments[:i], bad, *arguments[i + 1 :])


def test_the_library_refuses_options_that_it_does_not_know():
    op = torch.ops.cmim_cpu.patch_loss_forward.default
    arguments = list(recorded_calls()[op])
    place = [a.name for a in op._schema.arguments].index
    for name, value, said in (("distance", 3, "distance"), ("mean", [0.5], "mean or std"), ("patch_size", 5, "patch_size")):
        with pytest.raises(RuntimeError, match=f"{said} is of the wrong kind"):
            op(*arguments[: place(name)], value, *arguments[place(name) + 1 :])
    with pytest.raises(RuntimeError, match="has no mmx"):
        torch.ops.cmim_cpu.instruction_set.default("mmx")


def test_logits_whose_exponentials_overflow_leave_no_trace_at_ignored_pixels(instruction_set):
    """Each size of the logits gives another pattern of bits where an exponential would be infinite."""
    target = torch.full((1, 8, 8), -1)
    target[:, ::2, ::2] = 1
    for size in (88.0, 88.9, 89.1, 177.5, 3e4, 3e38):
        _, (grad,) = assert_like_torch(lambda x: upsample_cross_entropy(x, target), [torch.full((1, 3, 4, 4), size)])
        assert grad.isfinite().all()
