// See cuda_runtime.h.
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  unsigned short bits;
};

inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }

// To the nearest, to even between two.
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const auto bits = static_cast<uint32_t>(emulated::bits_of(x));
  if (x != x) return {0x7fff};
  return {static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
