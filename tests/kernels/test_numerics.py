"""What the backends share."""

import threading

import pytest
import torch

from cmim_kernels.numerics import full_float32


@pytest.fixture
def tf32():
    """Products in TF32 by the global setting, which the others inherit."""
    before = torch.backends.fp32_precision
    torch.backends.fp32_precision = "tf32"
    yield
    torch.backends.fp32_precision = before


def precisions():
    return [s.fp32_precision for s in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv)]


def test_threads_that_overlap_leave_the_settings_as_they_were(tf32):
    before, inside = precisions(), []
    entered, leave = [threading.Event() for _ in range(4)], [threading.Event() for _ in range(4)]

    def work(i):
        with full_float32(torch.device("cpu")):
            entered[i].set()
            leave[i].wait(30)
            inside.append(precisions())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for i, thread in enumerate(threads):
        thread.start()
        assert entered[i].wait(30)
    for i, thread in enumerate(threads):  # in the order in which they came
        leave[i].set()
        thread.join()
    assert inside == [["ieee"] * 3] * 4
    assert precisions() == before
    torch.backends.fp32_precision = "ieee"
    assert precisions() == ["ieee"] * 3  # they inherit again
    torch.backends.fp32_precision = "tf32"
    assert precisions() == before


def test_an_error_inside_leaves_the_settings_as_they_were(tf32):
    before = precisions()
    with pytest.raises(ZeroDivisionError), full_float32(torch.device("cpu")), full_float32(torch.device("cpu")):
        raise ZeroDivisionError
    assert precisions() == before
