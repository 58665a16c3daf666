"""Triton kernels of the ops: `<op>.py` holds the kernels of an op and their launchers.

A launcher has the signature of the function of the same name in the reference. Kernels are kept simple: one pointer per
element, 64-bit addresses, loads converted to float32 immediately, no autotuning (a `*_launch` function computes the launch
configuration from the shapes), no float atomics, every sum in a fixed order. `maxnreg` in a configuration prevents ptxas
from spilling a few bytes to increase occupancy. Sizes that do not affect the alignment of addresses are not specialised
(`do_not_specialize`), so that another batch or image size does not compile again.
"""
