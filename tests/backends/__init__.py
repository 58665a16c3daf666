"""The Triton kernels against the reference.

Where there is a GPU these tests run on it; elsewhere, or with TRITON_INTERPRET=1, Triton's interpreter runs the kernels
on the CPU. Compiling for GPUs that are not there is the matter of `cross_compile.py`.
"""
