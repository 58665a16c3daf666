// Mean feature of the visible and of the masked tokens of each class in each image.
//
// Tokens are added up in packed order: the rows of a segment one after the other, RUN of them into one sum that stays in
// registers, and the sums of the runs into the segment's. So no class costs anything but its tokens, and errors stay small.
#include "vector.h"

namespace cmim::cpu::CMIM_ISA {
namespace {

constexpr int64_t RUN = 64;
constexpr int BLOCK = 8 * W;  // channels at a time

struct Features {
  const View& x;
  const bool is_grid;
  const int64_t width, row, column, channel;

  explicit Features(const View& x)
      : x(x), is_grid(x.dimensions == 4), width(is_grid ? x.sizes[3] : x.sizes[1]), row(is_grid ? x.strides[2] : 0),
        column(is_grid ? x.strides[3] : x.strides[1]), channel(is_grid ? x.strides[1] : x.strides[2]) {}

  int64_t channels() const { return is_grid ? x.sizes[1] : x.sizes[2]; }
  int64_t offset(int64_t b, int64_t n) const {
    return b * x.strides[0] + (row == width * column ? n * column : n / width * row + n % width * column);
  }
};

// Adds rows[order[0..count)] of `channels` neighbours each to sum.
template <typename T>
void add_rows(const T* x, const Features& f, int64_t b, const int32_t* order, int64_t count, int64_t channels, float* sum) {
  for (int64_t first = 0; first < channels; first += BLOCK) {
    const int64_t width = least(BLOCK, channels - first);
    for (int64_t begin = 0; begin < count; begin += RUN) {
      const int64_t end = least(begin + RUN, count);
      if (width == BLOCK) {
        Floats total[8] = {};
        for (int64_t i = begin; i < end; ++i) {
          const T* row = x + f.offset(b, order[i]) + first;
          for (int j = 0; j < 8; ++j) total[j] += load(row + j * W);
        }
        for (int j = 0; j < 8; ++j) store(sum + first + j * W, load(sum + first + j * W) + total[j]);
        continue;
      }
      for (int64_t c = first; c + W <= first + width; c += W) {
        Floats total = {};
        for (int64_t i = begin; i < end; ++i) total += load(x + f.offset(b, order[i]) + c);
        store(sum + c, load(sum + c) + total);
      }
      for (int64_t c = first + width / W * W; c < first + width; ++c) {
        float total = 0;
        for (int64_t i = begin; i < end; ++i) total += widen(x[f.offset(b, order[i]) + c]);
        sum[c] += total;
      }
    }
  }
}

}  // namespace

void centroids_forward(ForEach run, View features, View order, View offsets, View mean, View count) {
  const Features f(features);
  const int64_t batch = order.sizes[0], tokens = order.sizes[1], segments = 2 * mean.sizes[1], channels = f.channels();
  by_dtype(features.dtype, [&](auto element) {
    using T = decltype(element);
    for_each(run, batch * segments, 1, [&](int64_t item) {
      const int64_t b = item / segments, s = item % segments;
      const int32_t* const start = static_cast<const int32_t*>(offsets.data) + b * (segments + 2) + s;
      const int32_t* const own = static_cast<const int32_t*>(order.data) + b * tokens + start[0];
      const int64_t number = start[1] - start[0];
      float* const out = static_cast<float*>(mean.data) + item * channels;
      static_cast<int32_t*>(count.data)[item] = static_cast<int32_t>(number);
      for (int64_t c = 0; c < channels; ++c) out[c] = 0;
      const T* const x = static_cast<const T*>(features.data);
      if (f.channel == 1) {
        add_rows(x, f, b, own, number, channels, out);
      } else {
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t begin = 0; begin < number; begin += RUN) {
            float total = 0;
            for (int64_t i = begin; i < least(begin + RUN, number); ++i) total += widen(x[f.offset(b, own[i]) + c * f.channel]);
            out[c] += total;
          }
      }
      for (int64_t c = 0; c < channels; ++c) out[c] /= static_cast<float>(number > 0 ? number : 1);
    });
  });
}

}  // namespace cmim::cpu::CMIM_ISA
