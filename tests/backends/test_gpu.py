"""What only a device shows: compiled graphs, captured graphs, addresses beyond 32 bits, streams, and errors against
float64. The other tests of this folder run on the device too where there is one."""

import pytest
import torch

from cmim_kernels import (
    class_attention,
    class_centroids,
    gather_class_tokens,
    masked_patch_loss,
    pack_classes,
    scatter_class_tokens,
    upsample_cross_entropy,
    upsample_pseudo_labels,
)
from cmim_kernels.backends import use_backend
from tests.kernels.op_checks import assert_equal, run

from . import declared
from .against_torch import INTERPRETED, random_labels
from .calls import CLASSES, PAIRS, call

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device without TRITON_INTERPRET"),
]
OPS = declared.OPS
each_call = pytest.mark.parametrize(("name", "backend"), PAIRS, indirect=["backend"])


def test_automatic_choice_runs_the_kernels(monkeypatch):
    from cmim_kernels.triton_kernels import rows

    for launch in (rows.forward_launch, rows.backward_launch):
        launch.cache_clear()
    seen = []
    original = rows._widths
    monkeypatch.setattr(rows, "_widths", lambda *a, **options: seen.append(a) or original(*a, **options))
    function, inputs = call("gather")
    with use_backend("auto"):
        run(function, inputs)
    assert len(seen) == 2


@each_call
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_at_most_twice_the_error_of_pytorch(name, dtype, backend):
    """Against float64, each output and gradient has at most twice the error of the same formulas on the same inputs in
    PyTorch, or one rounding of its own dtype."""
    function, inputs = call(name, dtype)
    as_float64 = [x.double() if x.is_floating_point() else x for x in inputs]
    with use_backend("torch"):
        theirs, exact = run(function, inputs), run(function, as_float64)
    with use_backend(backend):
        ours = run(function, inputs)
    for a, b, c in zip(ours[0] + ours[1], theirs[0] + theirs[1], exact[0] + exact[1], strict=True):
        if a is not None and a.is_floating_point():
            error = lambda x: (x.double() - c.double()).abs().max()  # noqa: B023, E731
            assert error(a) <= 2 * error(b) + torch.finfo(a.dtype).eps * c.abs().max()
        elif a is not None:
            assert torch.equal(a, b)


@each_call
@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor(name, dynamic, backend):
    function, inputs = call(name)
    torch._dynamo.reset()
    with use_backend(backend):
        compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
        assert_equal(run(compiled, inputs), run(function, inputs))


@each_call
def test_graph_capture_and_replay(name, backend):
    """A captured graph, forward and backward, replays to the bits of an eager run on inputs that it has not seen."""
    function, inputs = call(name)
    fresh = [x.flip(0) if x.is_floating_point() else x.clone() for x in inputs]
    with use_backend(backend):
        want = run(function, fresh)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run(function, inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = run(function, inputs)
        for x, y in zip(inputs, fresh, strict=True):
            x.copy_(y)
        graph.replay()
        torch.cuda.synchronize()
    assert_equal(got, want, rtol=0, atol=0)


@each_call
def test_two_streams(name, backend):
    function, inputs = call(name)
    with use_backend(backend):
        want = run(function, inputs)
        torch.cuda.synchronize()
        streams, results = [torch.cuda.Stream(), torch.cuda.Stream()], []
        for _ in range(5):
            for stream in streams:
                with torch.cuda.stream(stream):
                    results.append(run(function, inputs))
        torch.cuda.synchronize()
    for got in results:
        assert_equal(got, want, rtol=0, atol=0)


@each_call
def test_autocast_changes_nothing(name, backend):
    function, inputs = call(name)
    with use_backend(backend):
        want = run(function, inputs)
        with torch.autocast("cuda", torch.bfloat16):
            got = run(function, inputs)
    assert_equal(got, want, rtol=0, atol=0)


def bias(got, exact):
    """Mean error, relative to what float64 gives: what rounds up as often as down is not in it."""
    return ((got.double() - exact) / exact).mean().abs().item()


MANY = 40_000


def around_one(*shape, device="cuda"):
    """Sums of it grow with every term, so that cutting off what does not fit makes each of them smaller."""
    return 1 + 0.01 * torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def bias_of_centroids(x, classes=1):
    labels = torch.arange(x.shape[1], device=x.device)[None] % classes
    mean = class_centroids(x, labels, labels < 0, classes).mean[:, :, 0]
    return bias(mean, torch.stack([x.double()[:, k::classes].mean(1) for k in range(classes)], 1))


def bias_of_attention(v, grad):
    """Of its output and of the gradient of v, where all weights are the same: what both mean is known."""
    labels = torch.zeros(v.shape[0], v.shape[2], dtype=torch.int64, device=v.device)
    q, v = torch.zeros_like(v), v.requires_grad_()
    out = class_attention(q, q, v, pack_classes(labels, labels < 0, 1))
    (grad_v,) = torch.autograd.grad(out, v, grad)
    mean = lambda x: x.detach().double().mean(2, keepdim=True).expand_as(x)  # noqa: E731
    return bias(out.detach(), mean(v)), bias(grad_v, mean(grad))


@pytest.mark.parametrize("classes", [1, 21, 40])
def test_centroids_of_many_tokens_have_no_bias(classes, backend):
    with use_backend(backend):
        assert bias_of_centroids(around_one(1, MANY, 64), classes) < 1e-6
        assert bias_of_centroids(around_one(16, MANY // 4, 512), classes) < 1e-6  # fewer, longer sums in one program


def test_attention_over_many_tokens_has_no_bias():
    with use_backend("triton"):
        for error in bias_of_attention(around_one(1, 1, MANY, 64), around_one(1, 1, MANY, 64)):
            assert error < 1e-6


def needs(gibibytes):
    if torch.cuda.mem_get_info()[0] < gibibytes * 2**30:
        pytest.skip(f"needs {gibibytes} GiB of free memory on the device")


@pytest.mark.xdist_group("memory")
def test_more_than_2_to_the_31_tokens_times_channels(backend):
    """The last image of tensors beyond 2**31 elements gets what it gets alone."""
    needs(40)
    batch, tokens, channels = 9, 2**18, 1024
    labels, masked = random_labels((batch, tokens), CLASSES)
    x = torch.zeros(batch, tokens, channels, dtype=torch.bfloat16, device="cuda")
    x[-1].normal_()
    assert x.numel() > 2**31
    with use_backend(backend):
        layout, alone = (pack_classes(labels[i], masked[i], CLASSES) for i in (slice(None), slice(-1, None)))
        assert torch.equal(layout.order[-1:], alone.order)
        packed = gather_class_tokens(x, layout)
        assert torch.equal(packed[-1:], gather_class_tokens(x[-1:], alone))
        assert torch.equal(scatter_class_tokens(packed, layout)[-1], x[-1])
        del packed
        for classes in (CLASSES, 100):
            mean = class_centroids(x, labels, masked, classes).mean[-1:]
            torch.testing.assert_close(mean, class_centroids(x[-1:], labels[-1:], masked[-1:], classes).mean)


@pytest.mark.xdist_group("memory")
def test_more_than_2_to_the_31_entries_of_queries():
    """Forward and backward; the last image gets what it gets alone."""
    needs(40)
    batch, heads, tokens, dim, classes = 9, 16, 2**18, 64, 1000
    labels, masked = random_labels((batch, tokens), classes)
    x = torch.zeros(batch, heads, tokens, dim, dtype=torch.bfloat16, device="cuda")
    x[-1].normal_()
    assert x.numel() > 2**31

    def attend(i):
        q = x[i].requires_grad_()
        out = class_attention(q, q, q, pack_classes(labels[i], masked[i], classes))
        return out.detach()[-1], torch.autograd.grad(out, q, q.detach())[0][-1]

    with use_backend("triton"):
        for got, want in zip(attend(slice(None)), attend(slice(-1, None)), strict=True):
            assert torch.equal(got, want)


@pytest.mark.xdist_group("memory")
def test_more_than_2_to_the_31_predicted_entries(backend):
    needs(24)
    batch, side, size = 3, 16384, 16  # 3 x 3 x 16384 x 16384 entries
    image = torch.zeros(batch, 3, side, side, dtype=torch.uint8, device="cuda").to(memory_format=torch.channels_last)
    image[-1].random_(256)
    pred = torch.zeros(batch, (side // size) ** 2, 3 * size * size, dtype=torch.bfloat16, device="cuda")
    assert pred.numel() > 2**31
    labels, masked = random_labels(pred.shape[:2], CLASSES)
    masked[:-1] = False
    options = dict(patch_size=size, mean=[0.5] * 3, std=[0.25] * 3)
    with use_backend(backend):
        got = run(lambda p: masked_patch_loss(p, image, masked, labels, CLASSES, **options), [pred])
        want = run(lambda p: masked_patch_loss(p, image[-1:], masked[-1:], labels[-1:], CLASSES, **options), [pred[-1:]])
    assert_equal((got[0], [got[1][0][-1:]]), want)
    assert not got[1][0][:-1].any()


@pytest.mark.xdist_group("memory")
def test_more_than_2_to_the_31_logits():
    """The last image, and its last class, get what they get alone."""
    needs(32)
    batch, classes, side = 3, 1024, 1024
    logits = torch.zeros(batch, classes, side, side, dtype=torch.bfloat16, device="cuda")
    logits[-1].normal_()
    assert logits.numel() > 2**31
    target, _ = random_labels((batch, side, side), classes)
    target[:-1] = -1
    target[-1, ::2] = classes - 1

    def everything(logits, target):
        logits = logits.detach().requires_grad_()
        loss = upsample_cross_entropy(logits, target)
        return *upsample_pseudo_labels(logits, (side, side)), loss.detach(), *torch.autograd.grad(loss.sum(), logits)

    with use_backend("triton"):
        got, want = everything(logits, target), everything(logits[-1:], target[-1:])
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a[-1:], b)
    assert not got[2][:-1].any() and not got[3][:-1].any() and got[3][-1, -1].any()
