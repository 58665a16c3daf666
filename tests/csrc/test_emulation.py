"""The stand-in for a CUDA device: what a kernel may not rely on."""

import ctypes
import shutil
import subprocess
import threading

import pytest

from .emulation import FLAGS, HOST

SOURCE = """
#include "cuda_runtime.h"

template <typename T>
void read_then_write(T* seen) {
  __shared__ T of_block[3];
  if (threadIdx.x == 0) seen[blockIdx.x] = of_block[2];
  __syncthreads();
  of_block[2] = 7;
}

template <typename T>
int run(T* seen) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(2);
  config.blockDim = dim3(32);
  return cudaLaunchKernelEx(&config, read_then_write<T>, seen);
}

#define EXPORTED extern "C" __attribute__((visibility("default")))
EXPORTED int floats(float* seen) { return run(seen); }
EXPORTED int integers(int* seen) { return run(seen); }
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_no_block_finds_zeros_or_what_another_wrote_in_shared_memory(tmp_path):
    source, library = tmp_path / "kernel.cpp", tmp_path / "kernel.so"
    source.write_text(SOURCE)
    hidden = "-fvisibility=hidden"  # the loader would share the emulator with a library that other tests have loaded
    subprocess.run(["g++", *FLAGS, hidden, "-shared", "-I", HOST, source, "-o", library], check=True)
    kernels = ctypes.CDLL(str(library))
    floats, integers, codes = (ctypes.c_float * 2)(), (ctypes.c_int * 2)(), []
    call = lambda: codes.extend([kernels.floats(floats), kernels.integers(integers)])  # noqa: E731
    call()
    assert [x != x for x in floats] == [True, True] and list(integers) == [-1, -1]
    floats[:], integers[:] = [0, 0], [0, 0]
    thread = threading.Thread(target=call)  # backward passes run in other threads, which have memory of their own
    thread.start()
    thread.join()
    assert [x != x for x in floats] == [True, True] and list(integers) == [-1, -1] and codes == [0] * 4
