"""Autograd and `torch.func` for the ops, which have a first derivative; a second derivative raises an error."""

import functools

import torch
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable


class Function(torch.autograd.Function):
    """An `autograd.Function` for which `torch.vmap` loops over the samples."""

    generate_vmap_rule = True


def first_derivative(backward):
    """Decorator for `Function.backward`: differentiating its result raises an error. Under `torch.func`,
    `once_differentiable` alone would give zeros."""
    backward = once_differentiable(backward)

    @staticmethod
    @functools.wraps(backward)
    def checked(ctx, *grads):
        # The highest level is that of the transform that runs this pass; any lower level differentiates its result.
        if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
            return backward(ctx, *grads)
        if len(set().union(*map(_levels, (*grads, *ctx.saved_tensors)))) > 1:
            raise RuntimeError("cmim_kernels: the ops have no second derivative, but torch.func needs it here")
        return backward(ctx, *grads)

    return checked


def _levels(x):
    """The levels of the `torch.func` transforms that track gradients of x."""
    levels = set()
    while isinstance(x, torch.Tensor) and _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_gradtrackingtensor(x):
            levels.add(_functorch.maybe_get_level(x))
        x = _functorch.get_unwrapped(x)
    return levels


def differentiable(function, *arguments):
    """`function.apply(*arguments)` of a `Function`, or only its forward if no gradient is needed: `torch.compile` fails on
    an `autograd.Function` with `setup_context` if none of its inputs requires a gradient."""
    if not _follows(arguments):
        return function.forward(*arguments)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    return _quick(function).apply(*arguments)


@functools.cache
def _quick(function):
    """The same `Function` in the older form, whose `forward` gets the context. In the form with `setup_context`, each
    `apply` reads the signature of `forward`, which takes most of the time of a small call. `torch.func` and `torch.compile`
    support only that form."""

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
    if torch.is_grad_enabled():
        for a in arguments:
            if isinstance(a, torch.Tensor) and a.requires_grad:
                return True
    if torch.compiler.is_compiling():
        return False
    # Inside a transform, requires_grad of tensors does not show whether they are tracked; forward AD does not use it.
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
