"""Triton kernels of the ops: `<op>.py` holds the kernels of an op and their launchers.

A launcher has the signature of the reference's function of the same name. Kernels are plain: one pointer per element,
64-bit addresses, loads widened to float32 at once, no autotuning (a `*_launch` function of the shapes gives the launch
configuration), no float atomics, every sum in a fixed order. `maxnreg` in a configuration keeps ptxas from spilling a
few bytes for the sake of occupancy. Sizes that align no address are not specialised (`do_not_specialize`), so that another
batch or another image compiles nothing anew.
"""
