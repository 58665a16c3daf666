// csrc/cpu/vector.h by itself: conversions of the 16-bit types, exp and log, over arrays that a test in Python makes.
#include "cpu/vector.h"

using namespace cmim::cpu::CMIM_ISA;

template <typename T>
static void widen_all(const T* in, int64_t n, float* out, float* one_by_one) {
  for (int64_t i = 0; i + W <= n; i += W) store(out + i, load(in + i));
  for (int64_t i = 0; i < n; ++i) one_by_one[i] = widen(in[i]);
}

template <typename T>
static void narrow_all(const float* in, int64_t n, T* out, T* one_by_one) {
  for (int64_t i = 0; i + W <= n; i += W) store(out + i, load(in + i));
  for (int64_t i = 0; i < n; ++i) narrow(in[i], one_by_one[i]);
}

extern "C" {
__attribute__((visibility("default"))) void widen_float16s(const float16* in, int64_t n, float* out, float* other) {
  widen_all(in, n, out, other);
}
__attribute__((visibility("default"))) void widen_bfloat16s(const bfloat16* in, int64_t n, float* out, float* other) {
  widen_all(in, n, out, other);
}
__attribute__((visibility("default"))) void narrow_float16s(const float* in, int64_t n, float16* out, float16* other) {
  narrow_all(in, n, out, other);
}
__attribute__((visibility("default"))) void narrow_bfloat16s(const float* in, int64_t n, bfloat16* out, bfloat16* other) {
  narrow_all(in, n, out, other);
}
__attribute__((visibility("default"))) void exps(const float* in, int64_t n, float* out) {
  for (int64_t i = 0; i + W <= n; i += W) store(out + i, exp(load(in + i)));
}
__attribute__((visibility("default"))) void logs(const float* in, int64_t n, float* out) {
  for (int64_t i = 0; i + W <= n; i += W) store(out + i, log(load(in + i)));
}
}
