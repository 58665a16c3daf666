"""Launchers of the kernels for the CPU: `<op>.py` allocates and calls `cmim_cpu::*`, which csrc/cpu/ implements in C++.

A launcher has the signature of the reference's function of the same name. The few inputs that the kernels do not cover it
hands to the reference, and says which.
"""
