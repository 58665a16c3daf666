// Labels of pixels and tokens.
#pragma once

#include "vector.h"

namespace cmim::cpu::CMIM_ISA {
namespace {

// f(label pointer) with the type that labels have.
template <typename F>
ALWAYS_INLINE void by_label_dtype(const View& labels, const F& f) {
  switch (labels.dtype) {
    case Dtype::uint8: return f(labels.as<const uint8_t>());
    case Dtype::int32: return f(labels.as<const int32_t>());
    default: return f(labels.as<const int64_t>());
  }
}

// The classes of n labels `step` apart, `ignored` for those outside [0, classes).
template <typename L>
ALWAYS_INLINE void read_classes(const L* labels, int64_t step, int64_t n, int64_t classes, int32_t ignored, int32_t* out) {
  const auto read = [&](int64_t step) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t label = static_cast<int64_t>(labels[i * step]);
      out[i] = label >= 0 && label < classes ? static_cast<int32_t>(label) : ignored;
    }
  };
  if (step == 1) read(1);
  else read(step);
}

// The segments of the tokens of image b: 2k visible, 2k + 1 masked, `ignored` for labels outside [0, classes).
inline __attribute__((noinline)) void read_segments(const View& labels, const View& masked, int64_t b, int64_t classes,
                                                    int32_t ignored, int32_t* out) {
  const int64_t tokens = masked.sizes[1], step = masked.strides[1];
  const uint8_t* const hidden = masked.as<const uint8_t>() + b * masked.strides[0];
  by_label_dtype(labels, [&](auto* first) {
    read_classes(first + b * labels.strides[0], labels.strides[1], tokens, classes, -1, out);
  });
  const auto combine = [&](int64_t step) {
    for (int64_t n = 0; n < tokens; ++n) out[n] = out[n] < 0 ? ignored : 2 * out[n] + (hidden[n * step] != 0);
  };
  if (step == 1) combine(1);
  else combine(step);
}

}  // namespace
}  // namespace cmim::cpu::CMIM_ISA
