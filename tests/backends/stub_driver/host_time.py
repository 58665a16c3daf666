"""`python -m tests.backends.stub_driver.host_time`: microseconds of the host for calls of the Triton kernels, without a GPU.

For each call of `tests.backends.calls`, forward on tiny tensors without gradients: the whole call, and Triton's part of each
of its launches. They are process time relative to a loop that is timed in turn, in units of the fastest such loop, so that a
processor that changes its clock changes little. The stub's way to a tensor's address takes one of them for each tensor.
"""

import os
import sys
import time

if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    sys.exit("error: unset TRITON_INTERPRET: interpreted kernels are not launched")

import torch
from triton.backends.nvidia.driver import CudaLauncher
from triton.runtime.jit import JITFunction

from cmim_kernels.backends import use_backend
from tests.backends import declared
from tests.backends.calls import CALLS, call
from tests.backends.stub_driver import device

ROUNDS, CALLS_OF_ROUND = 40, 40
launch = JITFunction.run


def seconds_of(function, times=1):
    start = time.process_time()
    for _ in range(times):
        function()
    return (time.process_time() - start) / times


def loop():
    found = {}
    for i in range(1500):
        found[i % 7] = (i, str(i))


def microseconds(function, unit):
    seconds_of(function, CALLS_OF_ROUND)
    ratios = sorted(seconds_of(function, CALLS_OF_ROUND) / seconds_of(loop) for _ in range(ROUNDS))
    return 1e6 * unit * ratios[ROUNDS // 4]


def main():
    # The stub compares every launch with what arrived; that is not what is timed here.
    device._Launcher.__call__ = CudaLauncher.__call__
    for module, name in declared.triton_launchers():
        setattr(module, name, getattr(module, name).__wrapped__)
    unit = min(seconds_of(loop) for _ in range(300))
    with use_backend("triton"), torch.no_grad():
        for name in CALLS:
            function, inputs = call(name, torch.bfloat16, "cpu")
            launches = []
            JITFunction.run = lambda *args, **options: launches.append((args, options)) or launch(*args, **options)  # noqa: B023
            function(*inputs)
            JITFunction.run = launch
            whole = microseconds(lambda: function(*inputs), unit)  # noqa: B023
            of_each = [microseconds(lambda: launch(*args, **options), unit) for args, options in launches]  # noqa: B023
            print(f"{name:26} {whole:5.0f}   launches {', '.join(f'{t:.0f}' for t in of_each)}", flush=True)


if __name__ == "__main__":
    main()
