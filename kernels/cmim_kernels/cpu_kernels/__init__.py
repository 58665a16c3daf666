"""Launchers of the kernels for the CPU: `<op>.py` allocates and calls `cmim_cpu::*`, which csrc/cpu/ implements in C++.

A launcher has the signature of the function of the same name in the reference. The few inputs that a kernel does not support
are passed to the reference; the launcher says which ones.
"""
