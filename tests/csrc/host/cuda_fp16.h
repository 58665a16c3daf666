// See cuda_runtime.h.
#pragma once

#include "cuda_runtime.h"

using __half = _Float16;

inline __half __ushort_as_half(unsigned short bits) { return emulated::value_of<__half>(bits); }
inline unsigned short __half_as_ushort(__half x) { return static_cast<unsigned short>(emulated::bits_of(x)); }
inline float __half2float(__half x) { return x; }
inline __half __float2half_rn(float x) { return static_cast<__half>(x); }
