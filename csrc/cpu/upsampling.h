// Bilinear upsampling without the upsampled tensor: what cross-entropy and pseudo-labels have in common.
//
// Pixels between the same two rows of logits, and between any two columns, are handled together. A vector holds pixels of
// one row whose columns of logits are neighbours: with a factor of 4, every fourth pixel. So logits are read as they lie,
// and interpolating costs two loads and a multiply-add for a pixel and class.
#pragma once

#include "vector.h"

namespace cmim::cpu::CMIM_ISA {
namespace {

constexpr int64_t BAND = 8;  // gaps between rows of logits that one item of work goes through

// Rounds x: the compiler must not make one multiply-add of a product and a sum.
ALWAYS_INLINE Floats rounded(Floats x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

// The position of a pixel along one axis of logits: between `low` and low + 1, which are -1 and `source` beyond the ends.
struct Tap {
  int64_t low;
  float weight;  // of low + 1, rounded once

  ALWAYS_INLINE Tap(int64_t pixel, int64_t source, int64_t size, bool align_corners) {
    const int64_t numerator = align_corners ? pixel * (source - 1) : (2 * pixel + 1) * source - size;
    const int64_t denominator = align_corners ? most(1, size - 1) : 2 * size;
    low = numerator < 0 ? -1 : numerator / denominator;
    const int64_t rest = numerator < 0 ? numerator + denominator : numerator - low * denominator;
    weight = static_cast<float>(static_cast<double>(rest) / static_cast<double>(denominator));
  }
};

struct Upsampling {
  const int64_t batch, classes, height, width, rows, columns;  // logits, then pixels
  const bool align_corners;
  const int64_t line;   // floats of a padded row of logits of one class: column x at x + 1
  const int64_t slots;  // pixels from one of a vector to the next
  const int64_t bands;
  const Scratch<int64_t> first_row;           // of the pixels between rows i and i + 1 of logits, at i + 1
  const Scratch<int32_t> base, pixel;         // of each vector: its first column of logits; W pixels, -1 for none
  const Scratch<float> weight;
  int64_t vectors = 0;

  Upsampling(const View& logits, int64_t rows, int64_t columns, bool align_corners)
      : batch(logits.sizes[0]), classes(logits.sizes[1]), height(logits.sizes[2]), width(logits.sizes[3]), rows(rows),
        columns(columns), align_corners(align_corners), line(width + 2 + W),
        slots(most(1, !align_corners ? ceil_div(columns, width) : width > 1 ? ceil_div(columns - 1, width - 1) : columns)),
        bands(ceil_div(height + 1, BAND)), first_row(height + 2), base(most_vectors()), pixel(most_vectors() * W),
        weight(most_vectors() * W) {
    int64_t gap = -1;
    for (int64_t y = 0; y < rows; ++y)
      for (const int64_t low = Tap(y, height, rows, align_corners).low; gap <= low; ++gap) first_row[gap + 1] = y;
    for (; gap <= height; ++gap) first_row[gap + 1] = rows;
    for (int64_t slot = 0; slot < least(slots, columns); ++slot) {
      int64_t end = INT64_MIN;  // the vector's last column
      for (int64_t x = slot; x < columns; x += slots) {
        const Tap tap(x, width, columns, align_corners);
        if (tap.low > end) {
          base[vectors] = static_cast<int32_t>(tap.low);
          for (int i = 0; i < W; ++i) pixel[vectors * W + i] = -1, weight[vectors * W + i] = 0;
          end = tap.low + W - 1;
          ++vectors;
        }
        const int64_t at = (vectors - 1) * W + tap.low - base[vectors - 1];
        pixel[at] = static_cast<int32_t>(x);
        weight[at] = tap.weight;
      }
    }
  }

  int64_t most_vectors() const { return least(columns, slots * (ceil_div(width + 1, W) + 1)); }
  Tap row(int64_t y) const { return Tap(y, height, rows, align_corners); }

  // Row y of logits, padded by its ends: [class][line].
  void read_row(const View& logits, int64_t b, int64_t y, float* out) const {
    y = most(0, least(y, height - 1));
    by_dtype(logits.dtype, [&](auto element) {
      const auto* const in = logits.as<const decltype(element)>() + b * logits.strides[0] + y * logits.strides[2];
      const int64_t step = logits.strides[1], next = logits.strides[3];
      if (step == 1) {
        for (int64_t x = 0; x < width; ++x)
          for (int64_t k = 0; k < classes; ++k) out[k * line + 1 + x] = widen(in[x * next + k]);
      } else {
        for (int64_t k = 0; k < classes; ++k)
          for (int64_t x = 0; x < width; ++x) out[k * line + 1 + x] = widen(in[x * next + k * step]);
      }
    });
    for (int64_t k = 0; k < classes; ++k) {
      float* const of_class = out + k * line;
      of_class[0] = of_class[1];
      for (int64_t x = width + 1; x < line; ++x) of_class[x] = of_class[width];
    }
  }

  // A vector's logits [class][2][W]: those in the upper row, and what the lower row has more.
  ALWAYS_INLINE void read_vector(const float* upper, const float* lower, int64_t v, float* out) const {
    const Floats w = load(weight + v * W);
    const int64_t at = base[v] + 1;
    for (int64_t k = 0; k < classes; ++k) {
      const float *const a = upper + k * line + at, *const b = lower + k * line + at;
      const Floats a0 = load(a), b0 = load(b);
      const Floats above = a0 + rounded(w * (load(a + 1) - a0)), below = b0 + rounded(w * (load(b + 1) - b0));
      store(out + k * 2 * W, above);
      store(out + k * 2 * W + W, below - above);
    }
  }

  // f(gap, upper, lower) for the gaps of a band that have pixels: pixels between rows `gap` and gap + 1 of logits.
  template <typename F>
  ALWAYS_INLINE void over_gaps(const View& logits, int64_t b, int64_t band, const F& f) const {
    const Scratch<float> memory(2 * classes * line);
    float *upper = memory, *lower = memory + classes * line;
    int64_t lower_row = -2;
    const int64_t begin = band * BAND - 1;
    for (int64_t gap = begin; gap < least(begin + BAND, height); ++gap) {
      if (first_row[gap + 1] == first_row[gap + 2]) continue;
      float* const spare = upper;
      if (lower_row == gap) upper = lower, lower = spare;
      else read_row(logits, b, gap, upper);
      read_row(logits, b, gap + 1, lower);
      lower_row = gap + 1;
      f(gap, static_cast<const float*>(upper), static_cast<const float*>(lower));
    }
  }
};

// Between the rows of a vector's logits.
ALWAYS_INLINE Floats between(const float* logits, int64_t k, float weight) {
  return load(logits + k * 2 * W) + weight * load(logits + k * 2 * W + W);
}

}  // namespace
}  // namespace cmim::cpu::CMIM_ISA
