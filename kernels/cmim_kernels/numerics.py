"""Dtypes, layouts, sums and precision: what the ops and their backends share."""

import contextlib
import threading

import torch


def multiprocessors(tensor):
    """How many programs or blocks run at least at once, to decide how finely to cut the work. The CPU, where kernels are
    interpreted or emulated, gets an H200's number."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 132


def empty_like_layout(x, dtype=None):
    """An uninitialised tensor of x's shape: channels-last where a 4-D x is channels-last, else contiguous.

    `torch.empty_like` would also copy arbitrary permuted strides, which a kernel then has to honour.
    """
    channels_last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device, memory_format=memory_format)


def as_layout(value, like):
    """`value` in the dtype of `like`, laid out as `empty_like_layout(like)` promises, never an alias of an input."""
    return empty_like_layout(like).copy_(value)


def accumulation_dtype(*tensors):
    """float64 if any tensor is float64, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def class_ids(labels, num_classes):
    """int64 labels in which `num_classes` stands for every ignored value.

    Widened before the comparison: PyTorch wraps the bound of `uint8 < 300` to 44.
    """
    labels = labels.to(torch.int64)
    return torch.where((labels >= 0) & (labels < num_classes), labels, num_classes)


def segment_sum(rows, segment, num_segments):
    """Sums of float `rows` (n, ...) by `segment` (n,) int64, deterministic on both devices: (num_segments, ...).

    Adding selects: an inf or NaN stays in its own segment, where a one-hot product would spread it.
    """
    out = rows.new_zeros(num_segments, *rows.shape[1:])
    if rows.is_cuda:  # sorts by index; index_add_ would use float atomics here
        return out.index_put_((segment,), rows, accumulate=True)
    # One row after the other (index_put_ would use float atomics here): float32 would lose a digit in long sums.
    return out.double().index_add_(0, segment, rows.double()).to(rows.dtype)


def segment_count(segment, num_segments):
    """How many entries of `segment` (n,) int64 name each segment: (num_segments,) int32."""
    ones = torch.ones_like(segment, dtype=torch.int32)
    return ones.new_zeros(num_segments).index_add_(0, segment, ones)


class _FullPrecision:
    """Products and convolutions of float32 without TF32, as long as some thread asks for it.

    The settings belong to the process. The first thread that comes keeps them, the last that goes puts them back.
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
            # "none" inherits. Writing back an inherited precision would cut the setting off from later global changes.
            for setting, precision in zip(self.settings, self.kept, strict=True):
                setting.fp32_precision = "none"
                if setting.fp32_precision != precision:
                    setting.fp32_precision = precision


_full_precision = _FullPrecision()


@contextlib.contextmanager
def full_float32(device):
    """Products and convolutions of float32 in float32 inside a backend, which autocast and TF32 would otherwise reach."""
    with _full_precision, torch.autocast(device.type, enabled=False):
        yield
