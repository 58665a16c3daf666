"""csrc/ on a machine without a GPU: what nvcc says about it, and its kernels emulated on the CPU."""
