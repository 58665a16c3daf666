"""Reconstruction loss over masked patches, per class.

    e[b, n] = mean over the p p c entries of distance(prediction - target)    for masked tokens with a valid label

summed per class. The loss is the mean of e over all those tokens (balance "token"), or the mean over the classes that
have any of the per-class means ("class"). Other tokens are excluded by selection and not by multiplication with zero.
"""

import torch

from cmim_kernels.numerics import accumulation_dtype, class_ids, empty_like_layout, segment_count, segment_sum


def masked_patch_loss(
    pred, image, masked, labels=None, num_classes=1, *,
    patch_size, distance="l1", normalize=False, balance="token", mean=None, std=None,
):  # fmt: skip
    """The definition, differentiable by autograd. Arguments as in `cmim_kernels.masked_patch_loss`."""
    batch = image.shape[0]
    ids = _token_classes(image, masked, labels, num_classes, patch_size)
    difference = _difference(pred, image, ids < num_classes, patch_size, normalize, mean, std)
    error = _DISTANCE[distance](difference).mean(dim=(1, 3, 5))
    # Sum by (image, class) first, because shorter sums round less. The last segment of an image collects its other tokens.
    shape = (batch, num_classes + 1)
    segment = (ids.flatten(1) + torch.arange(batch, device=ids.device)[:, None] * shape[1]).flatten()
    class_sum = segment_sum(error.flatten(), segment, batch * shape[1]).view(shape).sum(dim=0)[:-1]
    class_count = segment_count(segment, batch * shape[1]).view(shape).sum(dim=0, dtype=torch.int32)[:-1]
    return (class_sum * _class_weight(class_count, balance, class_sum.dtype)).sum(), class_sum, class_count


def masked_patch_loss_forward(
    pred, image, masked, labels, num_classes, patch_size, distance, normalize, balance, mean, std
):  # fmt: skip
    loss, class_sum, class_count = masked_patch_loss(
        pred, image, masked, labels, num_classes,
        patch_size=patch_size, distance=distance, normalize=normalize, balance=balance, mean=mean, std=std,
    )  # fmt: skip
    return loss, class_sum.clone(), class_count.clone()


def masked_patch_loss_backward(
    grad_loss, grad_class_sum, class_count, pred, image, masked, labels,
    num_classes, patch_size, distance, normalize, balance, mean, std,
):  # fmt: skip
    """Gradient of pred; the target is recomputed."""
    dtype = accumulation_dtype(pred, image)
    ids = _token_classes(image, masked, labels, num_classes, patch_size)
    difference = _difference(pred, image, ids < num_classes, patch_size, normalize, mean, std)
    weight = grad_class_sum.to(dtype) + grad_loss.to(dtype) * _class_weight(class_count, balance, dtype)
    weight = weight / (patch_size * patch_size * image.shape[1])
    weight = torch.cat([weight, weight.new_zeros(1)])[ids]
    grad = empty_like_layout(pred)
    _patches(grad, image, patch_size).copy_(_DERIVATIVE[distance](difference) * _spread(weight))
    return grad


_DISTANCE = {
    "l1": torch.abs,
    "mse": torch.square,
    "smooth_l1": lambda d: torch.where(d.abs() < 1, d * d / 2, d.abs() - 0.5),
}
_DERIVATIVE = {
    "l1": torch.sign,
    "mse": lambda d: 2 * d,
    "smooth_l1": lambda d: d.clamp(-1, 1),
}


def _class_weight(class_count, balance, dtype):
    """d loss / d class_sum: (K,)."""
    count = class_count.to(dtype)
    if balance == "token":
        return (1 / count.sum().clamp(min=1)).expand_as(count)
    return 1 / (count.clamp(min=1) * (count > 0).sum().clamp(min=1))


def _token_classes(image, masked, labels, num_classes, patch_size):
    """(B, h, w) int64: the class of each token that counts, `num_classes` elsewhere."""
    batch, _, height, width = image.shape
    ids = torch.zeros_like(masked, dtype=torch.int64) if labels is None else class_ids(labels, num_classes)
    return torch.where(masked, ids, num_classes).view(batch, height // patch_size, width // patch_size)


def _difference(pred, image, chosen, patch_size, normalize, mean, std):
    """Prediction minus target as (B, c, h, p, w, p), zero outside the `chosen` (B, h, w) tokens."""
    dtype = accumulation_dtype(pred, image)
    target = image.to(dtype)
    if image.dtype == torch.uint8:  # by channel: a tensor of mean and std would have to be copied from the host
        channels = zip(target.unbind(1), mean, std, strict=True)
        target = torch.stack([(channel / 255 - m) / s for channel, m, s in channels], dim=1)
    target = _patches(target, image, patch_size)
    if normalize and target.numel():  # var_mean warns about empty tensors
        variance, centre = torch.var_mean(target, dim=(1, 3, 5), correction=1, keepdim=True)
        target = (target - centre) / (variance + 1e-6).sqrt()
    return torch.where(_spread(chosen), _patches(pred, image, patch_size).to(dtype) - target, 0)


def _patches(x, image, patch_size):
    """A view (B, c, h, p, w, p) of images (B, c, H, W) or of tokens (B, N, p p c) ordered (row, column, channel)."""
    channels, height, width = image.shape[1:]
    grid = (height // patch_size, width // patch_size)
    if x.dim() == 3:
        x = x.unflatten(2, (patch_size, patch_size, channels)).unflatten(1, grid)
        return x.permute(0, 5, 1, 3, 2, 4)
    return x.unflatten(3, (grid[1], patch_size)).unflatten(2, (grid[0], patch_size))


def _spread(tokens):
    """(B, h, w) to a view that broadcasts over (B, c, h, p, w, p)."""
    return tokens[:, None, :, None, :, None]
