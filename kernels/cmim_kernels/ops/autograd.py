"""How the ops take part in autograd and in the transforms of `torch.func`: a first derivative, or an error."""

import functools

import torch
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable


class Function(torch.autograd.Function):
    """An `autograd.Function` that `torch.vmap` runs sample by sample."""

    generate_vmap_rule = True


def first_derivative(backward):
    """For `Function.backward`: differentiating its result raises an error, under `torch.func` too, where
    `once_differentiable` alone gives zeros."""
    backward = once_differentiable(backward)

    @staticmethod
    @functools.wraps(backward)
    def checked(ctx, *grads):
        # The largest level is that of the transform that asks for this pass; one below it differentiates its result.
        if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
            return backward(ctx, *grads)
        if len(set().union(*map(_levels, (*grads, *ctx.saved_tensors)))) > 1:
            raise RuntimeError("cmim_kernels: the ops have no second derivative, as torch.func asks for here")
        return backward(ctx, *grads)

    return checked


def _levels(x):
    """The levels of the transforms of `torch.func` that follow x with gradients."""
    levels = set()
    while isinstance(x, torch.Tensor) and _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_gradtrackingtensor(x):
            levels.add(_functorch.maybe_get_level(x))
        x = _functorch.get_unwrapped(x)
    return levels


def differentiable(function, *arguments):
    """`function.apply(*arguments)` of a `Function`, or its forward alone where nobody asks for a gradient: `torch.compile`
    fails on an `autograd.Function` with `setup_context` that none of whose inputs requires one."""
    if not _follows(arguments):
        return function.forward(*arguments)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    return _quick(function).apply(*arguments)


@functools.cache
def _quick(function):
    """The same `Function` in the older form, whose `forward` gets the context: to call `setup_context`, `apply` of the other
    form reads the signature of `forward` each time, which takes longer than all else of a small call. `torch.func` and
    `torch.compile` know only the other form."""

    class Quick(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            output = function.forward(*arguments)
            function.setup_context(ctx, arguments, output)
            return output

        backward = staticmethod(function.backward)

    Quick.__name__ = Quick.__qualname__ = function.__name__
    return Quick


def _follows(arguments):
    if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in arguments):
        return True
    if torch.compiler.is_compiling():
        return False
    # Inside a transform tensors do not say that they are followed; forward AD follows them without requires_grad.
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
