"""What every op is put through, whatever it computes. Test files give the op and its inputs."""

import torch


def check_registration(function, inputs, *, gradient=True):
    """Outside torch.compile and inside it (fullgraph, static and dynamic), a public function gives the same values
    and the same gradients, and each registered op that it calls passes `torch.library.opcheck`."""
    calls = record_ops(function, inputs, gradient)
    assert calls, "the function calls no registered op"
    for op, args in calls:
        torch.library.opcheck(op, args)
    for dynamic in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        assert_equal(run(compiled, inputs, gradient), run(function, inputs, gradient))
    if gradient:
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert_equal(run(compiled, inputs, False), run(function, inputs, False))


def record_ops(function, inputs, gradient):
    """The `cmim_kernels` ops that one forward and backward call, with detached arguments."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.namespace == "cmim_kernels":
                calls.append((op, tuple(a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args)))
            return op(*args, **(kwargs or {}))

    with Recorder():
        run(function, inputs, gradient)
    return calls


def run(function, inputs, gradient=True):
    """Outputs of function(*inputs) and the gradients of its float inputs for a fixed, uneven output gradient, which is not
    contiguous where that is possible: autograd promises no layout."""
    inputs = [
        x.detach().requires_grad_(gradient) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs
    ]
    outputs = function(*inputs)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    differentiable = [o for o in outputs if o.requires_grad]
    gradients = []
    if gradient and differentiable:
        weights = [torch.linspace(0.5, 1.5, o.numel(), dtype=o.dtype, device=o.device).view(o.shape) for o in differentiable]
        weights = [w.mT.contiguous().mT if w.dim() > 1 else w for w in weights]
        wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
        gradients = list(torch.autograd.grad(differentiable, wanted, weights, allow_unused=True))
    return outputs, gradients


def assert_equal(got, want, **tolerance):
    for a, b in zip(got[0] + got[1], want[0] + want[1], strict=True):
        if a is None or b is None:
            assert a is b
        else:
            torch.testing.assert_close(a, b, **tolerance)


def assert_repeatable(function, inputs):
    """Two calls agree to the last bit, values and gradients."""
    assert_equal(run(function, inputs), run(function, inputs), rtol=0, atol=0)
