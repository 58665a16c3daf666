// Index arithmetic and the math of single elements: plain functions that need no CUDA, so that tests/csrc/ can hold them
// against brute force on any machine.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define CMIM_INLINE __host__ __device__ __forceinline__
#else
#define CMIM_INLINE inline __attribute__((always_inline))  // kernels of several instruction sets must share no symbol
#endif

namespace cmim {

CMIM_INLINE int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

// Quotient and remainder of 0 <= n < 2^31 by a divisor that stays the same in a launch, without a division
// (Granlund and Montgomery, 1994).
struct Divisor {
  uint32_t divisor, multiplier, shift;

  CMIM_INLINE explicit Divisor(int64_t d) : divisor(static_cast<uint32_t>(d)), shift(0) {
    while ((uint64_t{1} << shift) < divisor) ++shift;
    multiplier = static_cast<uint32_t>((((uint64_t{1} << shift) - divisor) << 32) / divisor + 1);
  }

  CMIM_INLINE uint32_t divide(uint32_t n) const {
    return (static_cast<uint32_t>((uint64_t{n} * multiplier) >> 32) + n) >> shift;
  }
  CMIM_INLINE uint32_t remainder(uint32_t n, uint32_t quotient) const { return n - quotient * divisor; }
};

// 2k visible, 2k + 1 masked, 2K ignored.
CMIM_INLINE int segment_of(int64_t label, bool masked, int num_classes) {
  return label >= 0 && label < num_classes ? 2 * static_cast<int>(label) + masked : 2 * num_classes;
}

// Where the entries of a p x p patch of an image with c channels lie, counted from the patch's first pixel.
struct Patch {
  Divisor outer, inner;  // entry = (first digit) outer + (second digit) inner + third digit
  bool channel_first;    // digits are (channel, row, column), else (row, column, channel)

  CMIM_INLINE Patch(int64_t size, int64_t channels, bool channel_first)
      : outer(channel_first ? size * size : size * channels), inner(channel_first ? size : channels),
        channel_first(channel_first) {}

  struct Entry {
    uint32_t channel, row, column;
  };

  CMIM_INLINE Entry entry(uint32_t index) const {
    const uint32_t first = outer.divide(index), rest = outer.remainder(index, first);
    const uint32_t second = inner.divide(rest), third = inner.remainder(rest, second);
    return channel_first ? Entry{first, second, third} : Entry{third, first, second};
  }
};

// Where the tokens of features (B, C, h, w) or (B, N, C) of any strides lie.
struct TokenGrid {
  int64_t image, channel, row, column;
  Divisor width;

  CMIM_INLINE TokenGrid(const int64_t* strides, const int64_t* sizes, bool is_grid)
      : image(strides[0]), channel(strides[is_grid ? 1 : 2]), row(is_grid ? strides[2] : 0),
        column(strides[is_grid ? 3 : 1]), width(sizes[is_grid ? 3 : 1]) {}

  CMIM_INLINE int64_t token(int64_t b, uint32_t n) const {
    const uint32_t y = width.divide(n);
    return b * image + y * row + width.remainder(n, y) * column;
  }
};

// Where patches and their entries lie in an image (B, c, H, W), or in tokens (B, N, p p c), of the given strides.
struct Layout {
  int64_t image, patch_row, patch_column, channel, row, column;

  CMIM_INLINE Layout(const int64_t* strides, bool is_image, int64_t columns, int64_t size, int64_t channels)
      : image(strides[0]), patch_row(is_image ? size * strides[2] : columns * strides[1]),
        patch_column(is_image ? size * strides[3] : strides[1]), channel(is_image ? strides[1] : strides[2]),
        row(is_image ? strides[2] : size * channels * strides[2]), column(is_image ? strides[3] : channels * strides[2]) {}

  CMIM_INLINE int64_t patch(int64_t b, int64_t n, int64_t columns) const {
    return b * image + n / columns * patch_row + n % columns * patch_column;
  }
  CMIM_INLINE int64_t entry(const Patch::Entry& e) const { return e.channel * channel + e.row * row + e.column * column; }
};

// Distance between a prediction and its target, given their difference; and its derivative.
enum class Distance : int { l1, mse, smooth_l1 };

CMIM_INLINE float distance(Distance kind, float difference) {
  const float size = difference < 0 ? -difference : difference;
  if (kind == Distance::l1) return size;
  if (kind == Distance::mse) return difference * difference;
  return size < 1 ? 0.5f * difference * difference : size - 0.5f;
}

CMIM_INLINE float slope(Distance kind, float difference) {
  if (kind == Distance::l1) return static_cast<float>(difference > 0) - static_cast<float>(difference < 0);
  if (kind == Distance::mse) return 2 * difference;
  return difference > 1 ? 1.0f : difference < -1 ? -1.0f : difference;
}

}  // namespace cmim
