// What the kernels share: element types, vectors of elements, launching.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "arithmetic.h"
#include "launchers.h"

namespace cmim {

constexpr unsigned ALL_LANES = 0xffffffffu;

// The 16-bit types as they lie in memory.
struct float16 { uint16_t bits; };
struct bfloat16 { uint16_t bits; };

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(float16 x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ __forceinline__ float widen(bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
__device__ __forceinline__ float widen(uint8_t x) { return x; }

template <typename T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) { return x; }
template <>
__device__ __forceinline__ float16 narrow<float16>(float x) { return {__half_as_ushort(__float2half_rn(x))}; }
template <>
__device__ __forceinline__ bfloat16 narrow<bfloat16>(float x) { return {__bfloat16_as_ushort(__float2bfloat16_rn(x))}; }

// V neighbours in memory, moved by the widest accesses that their alignment to min(16, their size) bytes allows.
template <typename T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
  T element[V];
};

template <int V>
struct Floats {
  float element[V];
  __device__ __forceinline__ float& operator[](int i) { return element[i]; }
  __device__ __forceinline__ float operator[](int i) const { return element[i]; }
};

template <int V>
__device__ __forceinline__ Floats<V> zeros() {
  Floats<V> x;
#pragma unroll
  for (int i = 0; i < V; ++i) x[i] = 0;
  return x;
}

template <int V, typename T>
__device__ __forceinline__ Floats<V> load(const T* address) {
  const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(address);
  Floats<V> x;
#pragma unroll
  for (int i = 0; i < V; ++i) x[i] = widen(pack.element[i]);
  return x;
}

template <int V, typename T>
__device__ __forceinline__ void store(T* address, const Floats<V>& x) {
  Pack<T, V> pack;
#pragma unroll
  for (int i = 0; i < V; ++i) pack.element[i] = narrow<T>(x[i]);
  *reinterpret_cast<Pack<T, V>*>(address) = pack;
}

// V neighbours of a tensor whose type is known at run time only, from `offset` elements on.
template <int V>
__device__ __forceinline__ Floats<V> load(const View& x, int64_t offset) {
  switch (x.dtype) {
    case Dtype::float16: return load<V>(x.as<const float16>() + offset);
    case Dtype::bfloat16: return load<V>(x.as<const bfloat16>() + offset);
    case Dtype::uint8: return load<V>(x.as<const uint8_t>() + offset);
    default: return load<V>(x.as<const float>() + offset);
  }
}

__device__ __forceinline__ void store(const View& x, int64_t offset, float value) {
  switch (x.dtype) {
    case Dtype::float16: x.as<float16>()[offset] = narrow<float16>(value); break;
    case Dtype::bfloat16: x.as<bfloat16>()[offset] = narrow<bfloat16>(value); break;
    default: x.as<float>()[offset] = value;
  }
}

__device__ __forceinline__ int64_t load_label(const View& labels, int64_t offset) {
  switch (labels.dtype) {
    case Dtype::uint8: return labels.as<const uint8_t>()[offset];
    case Dtype::int32: return labels.as<const int32_t>()[offset];
    default: return labels.as<const int64_t>()[offset];
  }
}

// The segment of a token from labels (B, N), or None for one class, and masked (B, N).
__device__ __forceinline__ int load_segment(const View& labels, const View& masked, int64_t image, int64_t token,
                                            int num_classes) {
  const int64_t label = labels.data ? load_label(labels, image * labels.strides[0] + token * labels.strides[1]) : 0;
  return segment_of(label, masked.as<const uint8_t>()[image * masked.strides[0] + token * masked.strides[1]], num_classes);
}

inline int64_t itemsize(Dtype dtype) {
  return dtype == Dtype::int64 ? 8 : dtype == Dtype::float32 || dtype == Dtype::int32 ? 4 : dtype == Dtype::uint8 ? 1 : 2;
}

// Whether every V neighbours along dimension `along`, of which there are `count`, can be moved as a Pack.
inline bool packs(const View& x, int dimensions, int along, int64_t count, int V) {
  if (!x.data) return true;
  const auto bytes = std::min<int64_t>(16, itemsize(x.dtype) * V);
  bool fits = reinterpret_cast<uintptr_t>(x.data) % bytes == 0 && count % V == 0 && x.strides[along] == 1;
  for (int i = 0; i < dimensions; ++i) fits = fits && (i == along || x.strides[i] % V == 0);
  return fits;
}

// How many lanes, a power of two, share a row of elements in vectors of V.
inline int lanes_for(int64_t elements, int V) {
  int lanes = 1;
  while (lanes < 32 && lanes * V < elements) lanes *= 2;
  return lanes;
}

// f(T{}) for the element type T of features.
template <typename F>
void by_dtype(Dtype dtype, F f) {
  if (dtype == Dtype::float32) return f(float{});
  if (dtype == Dtype::float16) return f(float16{});
  if (dtype == Dtype::bfloat16) return f(bfloat16{});
  throw std::runtime_error("cmim_cuda: features must be float32, float16 or bfloat16");
}

// Requires that x has this dtype and these sizes, and, unless it is empty, lies in memory without gaps.
inline void require_dense(const View& x, Dtype dtype, std::initializer_list<int64_t> sizes, const char* what) {
  require(x.dtype == dtype && x.dimensions == static_cast<int>(sizes.size()) &&
              std::equal(sizes.begin(), sizes.end(), x.sizes), what);
  bool dense = x.data;
  int64_t count = 1;
  for (int i = x.dimensions - 1; i >= 0; --i) {
    dense = dense && (x.strides[i] == count || x.sizes[i] == 1);
    count *= x.sizes[i];
  }
  require(dense || count == 0, what);
}

// Requires that a and b have the same dtype and sizes.
inline void require_alike(const View& a, const View& b, const char* what) {
  require(a.dtype == b.dtype && a.dimensions == b.dimensions && std::equal(a.sizes, a.sizes + 4, b.sizes), what);
}

// How many blocks of `threads` threads run at the same time on this device.
template <typename... Parameters>
int64_t resident(void (*kernel)(Parameters...), int threads) {
  int device = 0, processors = 1, blocks = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0);
  return std::max<int64_t>(1, int64_t{processors} * blocks);
}

// Kernels stride over their work, so that any grid will do.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), Stream stream, int64_t blocks, unsigned threads, Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(blocks, INT32_MAX)));
  config.blockDim = dim3(threads);
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != cudaSuccess) throw std::runtime_error(std::string("cmim_cuda: ") + cudaGetErrorString(error));
}

}  // namespace cmim
