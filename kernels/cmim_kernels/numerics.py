"""Shared code of the ops and their backends: dtypes, memory layouts, sums and precision."""

import contextlib
import threading

import torch


def multiprocessors(tensor):
    """The number of multiprocessors of the GPU, which decides into how many parts to split the work. On the CPU, where
    kernels are interpreted or emulated, it is that of an H200."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 132


def empty_like_layout(x, dtype=None):
    """An uninitialised tensor with the shape of x: channels-last if x is 4-D and channels-last, else contiguous.

    Without a memory format, `torch.empty_like` would also copy other permuted strides, which every kernel would then have to
    support. It takes half as long as `new_empty`.
    """
    channels_last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty_like(x, dtype=dtype, memory_format=memory_format)


def empty_contiguous(x, dtype=None):
    """An uninitialised contiguous tensor with the shape of x."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def as_layout(value, like):
    """A copy of `value` with the dtype of `like` and the memory layout of `empty_like_layout(like)`."""
    return empty_like_layout(like).copy_(value)


def accumulation_dtype(*tensors):
    """float64 if any tensor is float64, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def class_ids(labels, num_classes):
    """int64 labels in which every ignored value is replaced by `num_classes`.

    They are converted before the comparison, because PyTorch wraps the bound of `uint8 < 300` to 44.
    """
    labels = labels.to(torch.int64)
    return torch.where((labels >= 0) & (labels < num_classes), labels, num_classes)


def segment_sum(rows, segment, num_segments):
    """Sums of float `rows` (n, ...) by `segment` (n,) int64, deterministic on both devices: (num_segments, ...).

    An inf or NaN affects its own segment only; a product with a one-hot matrix would spread it to all segments.
    """
    out = rows.new_zeros(num_segments, *rows.shape[1:])
    if rows.is_cuda:  # index_put_ sorts by index; index_add_ would use float atomics here
        return out.index_put_((segment,), rows, accumulate=True)
    # index_add_ adds row by row (index_put_ would use float atomics here); in float32, long sums would lose a digit.
    return out.double().index_add_(0, segment, rows.double()).to(rows.dtype)


def segment_count(segment, num_segments):
    """The number of entries of `segment` (n,) int64 for each segment: (num_segments,) int32."""
    ones = torch.ones_like(segment, dtype=torch.int32)
    return ones.new_zeros(num_segments).index_add_(0, segment, ones)


class _FullPrecision:
    """Turns TF32 off for float32 products and convolutions while at least one thread needs it.

    The settings are global for the process: the first thread that enters saves them, and the last one that leaves restores
    them.
    """

    def __init__(self):
        self.lock, self.users, self.kept = threading.Lock(), 0, []

    def __enter__(self):
        with self.lock:
            self.users += 1
            if self.users == 1:
                self.settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv)
                self.kept = [setting.fp32_precision for setting in self.settings]
                for setting in self.settings:
                    setting.fp32_precision = "ieee"

    def __exit__(self, *error):
        with self.lock:
            self.users -= 1
            if self.users:
                return
            # "none" means inherited. Writing back an inherited precision would detach the setting from later global changes.
            for setting, precision in zip(self.settings, self.kept, strict=True):
                setting.fp32_precision = "none"
                if setting.fp32_precision != precision:
                    setting.fp32_precision = precision


_full_precision = _FullPrecision()


@contextlib.contextmanager
def full_float32(device):
    """Inside the `with` block, float32 products and convolutions are computed in float32, without autocast and TF32."""
    with _full_precision, torch.autocast(device.type, enabled=False):
        yield
