"""BatchNorm over the images of all processes."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cmim.engine.distributed import all_reduce
from cmim.models.segmenter import _snapshot


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose statistics in train mode are those of the images of all processes.

    One all-reduce of 2 C + 1 numbers forward and one backward. Unlike torch's own it runs on CPU tensors and compiles
    without a graph break. `drop` and `act` follow the normalisation, as in timm's BatchNormAct2d.
    """

    def __init__(self, like):
        """Takes over parameters, running statistics and options of the BatchNorm layer `like`."""
        super().__init__(like.num_features, like.eps, like.momentum, like.affine, like.track_running_stats)
        self.weight, self.bias = like.weight, like.bias
        self.running_mean, self.running_var = like.running_mean, like.running_var
        self.num_batches_tracked, self.training = like.num_batches_tracked, like.training
        self.drop, self.act = getattr(like, "drop", nn.Identity()), getattr(like, "act", nn.Identity())

    def forward(self, x):
        """(B, C, h, w), any float dtype; statistics and arithmetic in float32 (float64 for float64)."""
        return self.act(self.drop(self._over_all_processes(x) if self.training else super().forward(x)))

    def _over_all_processes(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
        # Sums of squares of distances from a common point: from zero they would cancel where the mean is large.
        origin = torch.zeros_like(mean) if self.running_mean is None else _snapshot([self.running_mean])[0].to(mean.dtype)
        offset, count = mean - origin, x.numel() / x.shape[1]
        sums = all_reduce(torch.cat([count * offset, count * (variance + offset.square()), mean.new_full((1,), count)]))
        total = sums[-1]
        offset, square = (sums[:-1] / total).chunk(2)
        mean, variance = origin + offset, (square - offset.square()).clamp(min=0)
        if self.track_running_stats:
            self._track(mean.detach(), variance.detach() * total / (total - 1).clamp(min=1))
        y = (wide - mean[:, None, None]) * (variance + self.eps).rsqrt()[:, None, None]
        if self.affine:
            y = y * self.weight[:, None, None] + self.bias[:, None, None]
        return y.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean, variance):
        self.num_batches_tracked.add_(1)
        momentum = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)


def synchronise_batch_norm(module):
    """Replace every BatchNorm layer inside `module` by a `SyncBatchNorm2d` with the same parameters and names."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            setattr(module, name, SyncBatchNorm2d(child))
        else:
            synchronise_batch_norm(child)
