"""Triton's own path of a kernel, from specialisation to the launch, on a machine without a GPU.

`driver.c` stands in for libcuda.so.1, `device.py` makes it Triton's device, `on_the_stub.py` holds the tests that run on it:
`test_stub_driver.py` calls them in a process of their own.
"""
