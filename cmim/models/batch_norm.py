"""BatchNorm over the images of all processes, and its modes for the masked pass."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cmim.distributed import all_reduce
from cmim.errors import UserError


class _Synchronised(_BatchNorm):
    """A BatchNorm layer that computes its statistics in train mode over the images of all processes.

    It needs one all-reduce of 2 C + 1 numbers forward and one backward. Unlike torch's SyncBatchNorm it supports CPU tensors
    and compiles without a graph break. `drop` and `act` follow the normalisation, as in timm's BatchNormAct2d.
    """

    def __init__(self, like: _BatchNorm):
        """A layer with the parameters, running statistics and options of the BatchNorm layer `like`."""
        super().__init__(like.num_features, like.eps, like.momentum, like.affine, like.track_running_stats)
        self.weight, self.bias = like.weight, like.bias
        self.running_mean, self.running_var = like.running_mean, like.running_var
        self.num_batches_tracked, self.training = like.num_batches_tracked, like.training
        self.drop, self.act = getattr(like, "drop", nn.Identity()), getattr(like, "act", nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...), any float dtype; statistics and arithmetic in float32 (float64 for float64)."""
        return self.act(self.drop(self._over_all_processes(x) if self.training else super().forward(x)))

    def _over_all_processes(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        # Sums are in float64: in float32, digits cancel if the mean is large.
        others = [0, *range(2, wide.dim())]
        variance, mean = (s.double() for s in torch.var_mean(wide, others, correction=0))
        origin = torch.zeros_like(mean) if self.running_mean is None else _snapshot([self.running_mean])[0].to(mean.dtype)
        offset, count = mean - origin, x.numel() / x.shape[1]
        sums = all_reduce(torch.cat([count * offset, count * (variance + offset.square()), mean.new_full((1,), count)]))
        total = sums[-1]
        offset, square = (sums[:-1] / total).chunk(2)
        mean, variance = (s.to(wide.dtype) for s in (origin + offset, (square - offset.square()).clamp(min=0)))
        if self.track_running_stats:
            self._track(mean.detach(), variance.detach() * (total / (total - 1).clamp(min=1)).to(variance.dtype))
        along = (-1, *(1,) * (wide.dim() - 2))
        y = (wide - mean.view(along)) * (variance + self.eps).rsqrt().view(along)
        if self.affine:
            y = y * self.weight.view(along) + self.bias.view(along)
        return y.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean, variance):
        self.num_batches_tracked.add_(1)
        momentum = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)


class SyncBatchNorm1d(_Synchronised, nn.BatchNorm1d):
    """(B, C) or (B, C, n)."""


class SyncBatchNorm2d(_Synchronised, nn.BatchNorm2d):
    """(B, C, h, w)."""


class SyncBatchNorm3d(_Synchronised, nn.BatchNorm3d):
    """(B, C, d, h, w)."""


def synchronise_batch_norm(module: nn.Module) -> None:
    """Replace every BatchNorm layer inside `module` by a synchronised one with the same parameters and names."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            kinds = {nn.BatchNorm1d: SyncBatchNorm1d, nn.BatchNorm3d: SyncBatchNorm3d}
            made = next((made for kind, made in kinds.items() if isinstance(child, kind)), SyncBatchNorm2d)
            setattr(module, name, made(child))
        else:
            synchronise_batch_norm(child)


@contextmanager
def batch_norm_mode(net: nn.Module, mode: str) -> Iterator[None]:
    """Sets which statistics the BatchNorm layers of a network in train mode use inside the `with` block.

    Args:
        net: any module; only BatchNorm layers in train mode are changed.
        mode: `batch`: batch statistics, without updating the running statistics; `shared`: batch statistics, with updating,
            as in train mode; `running`: running statistics, as in eval mode.
    """
    if mode not in ("batch", "shared", "running"):
        raise ValueError(f"batch_norm_mode: mode is {mode!r}, expected 'batch', 'shared' or 'running'")
    layers = [m for m in _batch_norms(net) if m.training and m.track_running_stats]
    buffers = [(m.running_mean, m.running_var) for m in layers]
    copies = _snapshot([b for pair in buffers for b in pair]) if mode == "running" and layers else []
    try:
        for i, layer in enumerate(layers):
            if mode == "batch":
                # Momentum 0 would still count batches, and turn an infinite batch statistic into NaN.
                layer.track_running_stats = False
            elif mode == "running":
                layer.training = False
                layer.running_mean, layer.running_var = copies[2 * i], copies[2 * i + 1]
        yield
    finally:
        for layer, (mean, variance) in zip(layers, buffers, strict=True):
            if mode == "batch":
                layer.track_running_stats = True
            elif mode == "running":
                layer.training = True
                layer.running_mean, layer.running_var = mean, variance


@torch.library.custom_op("cmim::snapshot", mutates_args=())
def _snapshot(tensors: list[Tensor]) -> list[Tensor]:
    """Copies of tensors. Backward reads the running statistics again, when a later pass in train mode may have changed them,
    which raises no error. The op is opaque because a compiler would remove a plain clone and read the changed original."""
    return [t.clone() for t in tensors]


@_snapshot.register_fake
def _(tensors):
    return [torch.empty_like(t) for t in tensors]


def _batch_norms(module):
    """All BatchNorm layers. `module.modules()` also visits their children, which fails under a compiler after flags
    changed."""
    if isinstance(module, _BatchNorm):
        return [module]
    return [layer for child in module.children() for layer in _batch_norms(child)]


@contextmanager
def explain_single_values() -> Iterator[None]:
    """Explain in one line why BatchNorm failed: a network that pools one image to one pixel has one value per channel."""
    try:
        yield
    except Exception as error:  # its type depends on torch.compile
        if "Expected more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            "BatchNorm needs more than one value per channel, but a pass has only one image; raise train.labelled_batch or "
            "train.unlabelled_batch to 2 or more for each process"
        ) from error
