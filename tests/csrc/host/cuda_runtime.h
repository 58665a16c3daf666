// Runs CUDA kernels on the CPU, so that csrc/ can be tested where there is no GPU: the sources as they are, with this
// folder in place of CUDA's headers.
//
// Blocks run one after the other. The threads of a block are fibres that run one at a time, from one barrier or warp
// operation to the next: in order in blocks of even number, in reverse in the others, so that a missing barrier shows. A
// kernel that leaves a lane out of a warp operation, or waits for a barrier that not all threads reach, aborts. A block finds
// its shared memory full of NaN and -1, so that what it reads and never wrote shows.
//
// It shows that arithmetic, indices and barriers are right. It cannot show what depends on a device's memory: accesses
// that run at the same time without order, fences, limits of shared memory.
#pragma once

#include <link.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <vector>

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __shared__ static __thread
#define __launch_bounds__(...)
#define __grid_constant__

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1) : x(x), y(1), z(1) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

enum State { ready, at_block_barrier, at_warp_barrier, finished };

struct Fibre {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  State state;
};

inline std::vector<Fibre> fibres(1024);
inline ucontext_t scheduler;
inline unsigned current, threads;
inline void (*body)(void*);
inline void* argument;
inline int64_t of_lane[1024];

[[noreturn]] inline void fail(const char* reason) {
  std::fprintf(stderr, "CUDA emulation: %s\n", reason);
  std::abort();
}

inline void wait(State state) {
  fibres[current].state = state;
  swapcontext(&fibres[current].context, &scheduler);
}

inline void start() {
  body(argument);
  wait(finished);
}

// Lets go on who waits at a barrier that all live threads from `begin` to `end` have reached.
inline bool release(State barrier, unsigned begin, unsigned end) {
  bool any = false;
  for (unsigned t = begin; t < end; ++t) {
    if (fibres[t].state != barrier && fibres[t].state != finished) return false;
    any = any || fibres[t].state == barrier;
  }
  for (unsigned t = begin; t < end; ++t)
    if (fibres[t].state == barrier) fibres[t].state = ready;
  return any;
}

// Shared memory is all that belongs to a thread in this library: fills what the loader keeps of it for this thread.
inline void spoil_shared_memory() {
  static __thread char one_of_them;  // of a thread that asks for an address, the loader has made them all
  const auto spoil = [](dl_phdr_info* library, size_t, void* one) {
    char* const begin = static_cast<char*>(library->dlpi_tls_data);
    for (int i = 0; begin && i < library->dlpi_phnum; ++i) {
      const size_t size = library->dlpi_phdr[i].p_memsz;
      if (library->dlpi_phdr[i].p_type != PT_TLS || one < begin || one >= begin + size) continue;
      std::memset(begin, 0xff, size);
      return 1;
    }
    return 0;
  };
  if (!dl_iterate_phdr(spoil, &one_of_them)) fail("shared memory is not found");
}

inline void run_block(bool reversed) {
  spoil_shared_memory();
  for (unsigned t = 0; t < threads; ++t) {
    Fibre& fibre = fibres[t];
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.data();
    fibre.context.uc_stack.ss_size = fibre.stack.size();
    makecontext(&fibre.context, start, 0);
    fibre.state = ready;
  }
  for (;;) {
    for (unsigned i = 0; i < threads; ++i) {
      current = reversed ? threads - 1 - i : i;
      if (fibres[current].state != ready) continue;
      threadIdx.x = current;
      swapcontext(&scheduler, &fibres[current].context);
    }
    bool moved = release(at_block_barrier, 0, threads);
    for (unsigned t = 0; t < threads; t += 32) moved = release(at_warp_barrier, t, std::min(threads, t + 32)) || moved;
    if (moved) continue;
    for (unsigned t = 0; t < threads; ++t)
      if (fibres[t].state != finished) fail("threads wait for a barrier that others never reach");
    return;
  }
}

// Every lane shows its value; then f reads them.
template <typename F>
auto exchange(unsigned mask, int64_t value, F f) {
  const unsigned warp = current / 32 * 32;
  if (mask != 0xffffffffu || warp + 32 > threads) fail("a warp operation of less than a whole warp");
  of_lane[current] = value;
  wait(at_warp_barrier);
  for (unsigned t = warp; t < warp + 32; ++t)
    if (fibres[t].state == finished) fail("a warp operation that a lane never reaches");
  auto result = f(of_lane + warp, static_cast<int>(current % 32));
  wait(at_warp_barrier);
  return result;
}

template <typename T>
int64_t bits_of(T value) {
  int64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
T value_of(int64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulated

inline void __syncthreads() { emulated::wait(emulated::at_block_barrier); }
inline void __syncwarp() { emulated::wait(emulated::at_warp_barrier); }
inline void __threadfence() {}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
  return emulated::exchange(mask, emulated::bits_of(value), [=](const int64_t* lanes, int lane) {
    return emulated::value_of<T>(lanes[lane < distance ? lane : lane - distance]);
  });
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return emulated::exchange(mask, emulated::bits_of(value), [=](const int64_t* lanes, int lane) {
    return emulated::value_of<T>(lanes[lane ^ distance]);
  });
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int from) {
  return emulated::exchange(mask, emulated::bits_of(value), [=](const int64_t* lanes, int) {
    return emulated::value_of<T>(lanes[from % 32]);
  });
}

inline unsigned __match_any_sync(unsigned mask, int value) {
  return emulated::exchange(mask, value, [](const int64_t* lanes, int lane) {
    unsigned same = 0;
    for (int other = 0; other < 32; ++other) same |= static_cast<unsigned>(lanes[other] == lanes[lane]) << other;
    return same;
  });
}

inline unsigned __ballot_sync(unsigned mask, bool value) {
  return emulated::exchange(mask, value, [](const int64_t* lanes, int) {
    unsigned set = 0;
    for (int lane = 0; lane < 32; ++lane) set |= static_cast<unsigned>(lanes[lane] != 0) << lane;
    return set;
  });
}

inline int atomicAdd(int* address, int value) {
  const int before = *address;
  *address += value;
  return before;
}

template <typename T>
T __ldcg(const T* address) { return *address; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline float __uint_as_float(unsigned bits) { return emulated::value_of<float>(bits); }

enum cudaError_t { cudaSuccess };
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

// A device that runs 6 blocks at a time.
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 3, cudaSuccess; }
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  return *blocks = 2, cudaSuccess;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  void* stream;
};

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  auto call = [&] { kernel(arguments...); };
  emulated::body = [](void* f) { (*static_cast<decltype(call)*>(f))(); };
  emulated::argument = &call;
  emulated::threads = blockDim.x = config->blockDim.x;
  gridDim.x = config->gridDim.x;
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) emulated::run_block(blockIdx.x % 2);
  return cudaSuccess;
}
