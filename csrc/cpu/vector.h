// Vectors of floats as wide as a register of the instruction set, and the 16-bit types.
//
// Everything lies in the namespace of the instruction set: a function that the linker finds in two of them could be the one
// that this machine cannot run.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#ifdef __SSE2__
#include <immintrin.h>
#endif

#include "kernels.h"

#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace cmim::cpu::CMIM_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * W)));
typedef int32_t Ints __attribute__((vector_size(4 * W)));
typedef uint32_t Bits __attribute__((vector_size(4 * W)));
typedef uint16_t Halves __attribute__((vector_size(2 * W)));

struct float16 { uint16_t bits; };
struct bfloat16 { uint16_t bits; };

template <typename To, typename From>
ALWAYS_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

ALWAYS_INLINE Floats splat(float x) { return x - Floats{}; }

// Of one number or a vector of them: I are the integers, F the floats.
template <typename F, typename I>
ALWAYS_INLINE F widen_bfloat16(I bits) { return bit_cast<F>(bits << 16); }

template <typename F, typename I>
ALWAYS_INLINE F widen_float16(I bits) {
  const I magnitude = (bits & 0x7fff) << 13;  // exponents of float16 in the place of float32's, 112 too small
  const F scaled = bit_cast<F>(magnitude) * 0x1p112f;
  const I special = magnitude >= (0x7c00u << 13) ? bit_cast<I>(scaled) | 0x7f800000u : bit_cast<I>(scaled);
  return bit_cast<F>(special | (bits & 0x8000) << 16);
}

// To the nearest, ties to even; every NaN becomes the quiet one.
template <typename I, typename F>
ALWAYS_INLINE I narrow_bfloat16(F x) {
  const I bits = bit_cast<I>(x), rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return ((bits & 0x7fffffff) > 0x7f800000 ? (bits | 0x00400000) : rounded) >> 16;
}

template <typename I, typename F>
ALWAYS_INLINE I narrow_float16(F x) {
  const I bits = bit_cast<I>(x), sign = bits & 0x80000000u, magnitude = bits ^ sign;
  const I special = magnitude > 0x7f800000u ? I{} + 0x7e00u : I{} + 0x7c00u;
  const F shifted = bit_cast<F>(magnitude) + 0.5f;  // the sum rounds a small number to float16's finest step
  const I small = bit_cast<I>(shifted) - 0x3f000000u;
  const I usual = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1)) >> 13;
  const I result = magnitude >= 0x47800000u ? special : magnitude < 0x38800000u ? small : usual;
  return result | sign >> 16;
}

ALWAYS_INLINE float widen(float x) { return x; }
ALWAYS_INLINE float widen(bfloat16 x) { return widen_bfloat16<float>(uint32_t{x.bits}); }
ALWAYS_INLINE float widen(float16 x) { return widen_float16<float>(uint32_t{x.bits}); }
ALWAYS_INLINE float widen(uint8_t x) { return x; }

ALWAYS_INLINE void narrow(float x, float& out) { out = x; }
ALWAYS_INLINE void narrow(float x, bfloat16& out) { out.bits = static_cast<uint16_t>(narrow_bfloat16<uint32_t>(x)); }
ALWAYS_INLINE void narrow(float x, float16& out) { out.bits = static_cast<uint16_t>(narrow_float16<uint32_t>(x)); }

// W neighbours in memory, from any address.
ALWAYS_INLINE Floats load(const float* address) {
  Floats x;
  std::memcpy(&x, address, sizeof(x));
  return x;
}
ALWAYS_INLINE Bits load_bits(const void* address) {
  Halves x;
  std::memcpy(&x, address, sizeof(x));
  return __builtin_convertvector(x, Bits);
}
ALWAYS_INLINE Floats load(const bfloat16* address) { return widen_bfloat16<Floats>(load_bits(address)); }
ALWAYS_INLINE Floats load(const float16* address) { return widen_float16<Floats>(load_bits(address)); }

ALWAYS_INLINE void store(float* address, Floats x) { std::memcpy(address, &x, sizeof(x)); }
ALWAYS_INLINE void store_bits(void* address, Bits bits) {
  const Halves x = __builtin_convertvector(bits, Halves);
  std::memcpy(address, &x, sizeof(x));
}
ALWAYS_INLINE void store(bfloat16* address, Floats x) { store_bits(address, narrow_bfloat16<Bits>(x)); }
ALWAYS_INLINE void store(float16* address, Floats x) { store_bits(address, narrow_float16<Bits>(x)); }

constexpr float LOG2_E = 1.4426950408889634f;

// e^x for x <= 88, to about one unit in the last place where there are multiply-adds; 0 below -87.33, and NaN of NaN.
ALWAYS_INLINE Floats exp(Floats x) {
  const Floats least = splat(-104.0f), clamped = least > x ? least : x;
  const Floats shifted = clamped * LOG2_E + 0x1.8p23f;  // its low bits are the nearest integer
  const Floats fraction = clamped * LOG2_E - (shifted - 0x1.8p23f);
  Floats p = splat(1.535336188319500e-4f);
  p = p * fraction + 1.339887440266574e-3f;
  p = p * fraction + 9.618437357674640e-3f;
  p = p * fraction + 5.550332471162809e-2f;
  p = p * fraction + 2.402264791363012e-1f;
  p = p * fraction + 6.931472028550421e-1f;
  p = p * fraction + 1.0f;
  const Ints exponent = bit_cast<Ints>(shifted) << 23;
  const Floats scaled = bit_cast<Floats>(bit_cast<Ints>(p) + exponent);
  return x < -87.33f ? Floats{} : scaled;
}

ALWAYS_INLINE Ints load_ints(const int32_t* address) {
  Ints x;
  std::memcpy(&x, address, sizeof(x));
  return x;
}

// A number that is part of its type.
template <int N>
struct constant {
  static constexpr int value = N;
};

ALWAYS_INLINE Floats maximum(Floats a, Floats b) { return a > b ? a : b; }

// Natural logarithm of normal x > 0 to about one unit in the last place (S. Moshier's polynomial); NaN of NaN.
ALWAYS_INLINE Floats log(Floats x) {
  const Ints bits = bit_cast<Ints>(x) - 0x3f3504f3;  // sqrt(1/2): the mantissa lies between it and sqrt(2)
  const Floats exponent = __builtin_convertvector(bits >> 23, Floats);
  const Floats m = bit_cast<Floats>((bits & 0x007fffff) + 0x3f3504f3) - 1.0f, square = m * m;
  Floats p = splat(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const Floats rest = p * m * square - 2.12194440e-4f * exponent - 0.5f * square;
  const Floats result = m + rest + 0.693359375f * exponent;
  return x == x ? result : x;
}

// Bit i: whether lane i of a comparison holds.
ALWAYS_INLINE uint32_t bits_of(Ints holds) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(bit_cast<__m512i>(holds));
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(bit_cast<__m256>(holds)));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps(bit_cast<__m128>(holds)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < W; ++i) bits |= static_cast<uint32_t>(holds[i] & 1) << i;
  return bits;
#endif
}

// Minimum and maximum of int64 without <algorithm>, whose templates the linker shares.
ALWAYS_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
ALWAYS_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Uninitialised memory that begins with a cache line.
template <typename T>
struct Scratch {
  T* const data;

  ALWAYS_INLINE explicit Scratch(int64_t n)
      : data(static_cast<T*>(aligned_alloc(64, (static_cast<size_t>(most(n, 1)) * sizeof(T) + 63) / 64 * 64))) {
    if (!data) abort();
  }
  ALWAYS_INLINE ~Scratch() { free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  ALWAYS_INLINE operator T*() const { return data; }
};

template <typename F>
void for_each(ForEach run, int64_t n, int64_t grain, const F& f) {
  run(n, grain, [](void* context, int64_t begin, int64_t end) {
    const F& body = *static_cast<const F*>(context);
    for (int64_t i = begin; i < end; ++i) body(i);
  }, const_cast<F*>(&f));
}

// How many items of that many elementary operations are worth a thread.
ALWAYS_INLINE int64_t grain_of(int64_t work) { return most(1, 32768 / most(1, work)); }

// f(T{}) for the element type T of features.
template <typename F>
ALWAYS_INLINE void by_dtype(Dtype dtype, const F& f) {
  if (dtype == Dtype::bfloat16) return f(bfloat16{});
  if (dtype == Dtype::float16) return f(float16{});
  return f(float{});
}

ALWAYS_INLINE int64_t load_label(const View& labels, int64_t offset) {
  switch (labels.dtype) {
    case Dtype::uint8: return static_cast<const uint8_t*>(labels.data)[offset];
    case Dtype::int32: return static_cast<const int32_t*>(labels.data)[offset];
    default: return static_cast<const int64_t*>(labels.data)[offset];
  }
}

}  // namespace cmim::cpu::CMIM_ISA
