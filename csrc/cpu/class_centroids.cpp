// Mean feature of the visible and of the masked tokens of each class in each image.
//
// Where the channels of a token are neighbours in memory, tokens are added up in packed order: the rows of a segment one
// after the other, RUN of them into one sum that stays in registers, and the sums of the runs into the segment's. So no
// class costs anything but its tokens, and errors stay small. Where tokens are neighbours, a tile of RUN tokens and W
// channels is transposed, and its rows are added to the sums of their segments.
#include "labels.h"

namespace cmim::cpu::CMIM_ISA {
namespace {

constexpr int64_t RUN = 64;
constexpr int BLOCK = 8 * W;      // channels at a time
constexpr int64_t AHEAD = 6;      // rows from one that is added to the one that is fetched into the cache

struct Features {
  const View& x;
  const bool is_grid;
  const int64_t width, row, column, channel;

  explicit Features(const View& x)
      : x(x), is_grid(x.dimensions == 4), width(is_grid ? x.sizes[3] : x.sizes[1]), row(is_grid ? x.strides[2] : 0),
        column(is_grid ? x.strides[3] : x.strides[1]), channel(is_grid ? x.strides[1] : x.strides[2]) {}

  int64_t channels() const { return is_grid ? x.sizes[1] : x.sizes[2]; }
  int64_t tokens() const { return is_grid ? x.sizes[2] * x.sizes[3] : x.sizes[1]; }
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
          const T* const row = x + f.offset(b, order[i]) + first;
          const T* const ahead = x + f.offset(b, order[least(i + AHEAD, count - 1)]) + first;
          for (int64_t c = 0; c < BLOCK; c += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(ahead + c);
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

// The sums of channels [first, first + channels), at most W, of every segment: [segment][W]. segment_of (N): that of each
// token, `segments` where it is ignored.
template <typename T>
void add_planes(const T* x, const Features& f, int64_t b, int64_t first, int64_t channels, const int32_t* segment_of,
                int64_t segments, float* sum) {
  const int64_t tokens = f.tokens();
  const Scratch<float> of_tile((segments + 1) * W);
  const Scratch<int64_t> last_tile(segments + 1);  // that met the segment
  for (int64_t s = 0; s <= segments; ++s) last_tile[s] = -1;
  for (int64_t i = 0; i < (segments + 1) * W; ++i) sum[i] = 0;
  for (int64_t begin = 0; begin < tokens; begin += RUN) {
    float tile[RUN][W];
    int32_t met[RUN];
    const int64_t count = least(RUN, tokens - begin);
    int64_t number = 0;
    for (int64_t c = 0; c < W; ++c)
      for (int64_t i = 0; i < count; ++i)
        tile[i][c] = c < channels ? widen(x[f.offset(b, begin + i) + (first + c) * f.channel]) : 0;
    for (int64_t i = 0; i < count; ++i) {
      const int32_t s = segment_of[begin + i];
      float* const own = of_tile + s * W;
      if (last_tile[s] == begin) {
        store(own, load(own) + load(tile[i]));
      } else {
        last_tile[s] = begin;
        met[number++] = s;
        store(own, load(tile[i]));
      }
    }
    for (int64_t i = 0; i < number; ++i) store(sum + met[i] * W, load(sum + met[i] * W) + load(of_tile + met[i] * W));
  }
}

// What a centroid's sum is divided by.
float divisor(int64_t count) { return static_cast<float>(most(count, 1)); }

}  // namespace

void centroids_forward(ForEach run, View features, View order, View offsets, View mean, View count) {
  const Features f(features);
  const int64_t batch = order.sizes[0], tokens = order.sizes[1], segments = 2 * mean.sizes[1], channels = f.channels();
  const auto start_of = [&](int64_t b) { return offsets.as<const int32_t>() + b * (segments + 2); };
  for_each(run, batch * segments, grain_of(8), [&](int64_t item) {
    const int32_t* const start = start_of(item / segments) + item % segments;
    count.as<int32_t>()[item] = start[1] - start[0];
  });
  by_dtype(features.dtype, [&](auto element) {
    using T = decltype(element);
    const T* const x = features.as<const T>();
    if (f.channel == 1) {
      for_each(run, batch * segments, 1, [&](int64_t item) {
        const int64_t b = item / segments, number = count.as<const int32_t>()[item];
        const int32_t* const own = order.as<const int32_t>() + b * tokens + start_of(b)[item % segments];
        float* const out = mean.as<float>() + item * channels;
        for (int64_t c = 0; c < channels; ++c) out[c] = 0;
        if (number == 0) return;
        add_rows(x, f, b, own, number, channels, out);
        for (int64_t c = 0; c < channels; ++c) out[c] /= divisor(number);
      });
      return;
    }
    const int64_t blocks = ceil_div(channels, W);
    for_each(run, batch * blocks, grain_of(tokens * W), [&](int64_t item) {
      const int64_t b = item / blocks, first = item % blocks * W, width = least(W, channels - first);
      const Scratch<int32_t> segment_of(tokens);
      const int32_t *const start = start_of(b), *const own = order.as<const int32_t>() + b * tokens;
      for (int64_t s = 0; s <= segments; ++s)
        for (int64_t i = start[s]; i < start[s + 1]; ++i) segment_of[own[i]] = static_cast<int32_t>(s);
      const Scratch<float> sum((segments + 1) * W);
      add_planes(x, f, b, first, width, segment_of, segments, sum);
      for (int64_t s = 0; s < segments; ++s)
        for (int64_t c = 0; c < width; ++c)
          mean.as<float>()[(b * segments + s) * channels + first + c] = sum[s * W + c] / divisor(start[s + 1] - start[s]);
    });
  });
}

// Each token receives the gradient of its own centroid over its count.
void centroids_backward(ForEach run, View grad_mean, View count, View labels, View masked, View grad) {
  const Features f(grad);
  const int64_t batch = grad_mean.sizes[0], classes = grad_mean.sizes[1], segments = 2 * classes, tokens = f.tokens();
  const int64_t channels = f.channels();
  const Scratch<float> shares(batch * segments * channels);  // of segments that have tokens
  for_each(run, batch * segments, grain_of(channels), [&](int64_t item) {
    const int64_t b = item / segments, s = item % segments;
    const int32_t number = count.as<const int32_t>()[item];
    const int64_t* const stride = grad_mean.strides;
    const float* const in = grad_mean.as<const float>() + b * stride[0] + s / 2 * stride[1] + s % 2 * stride[2];
    if (number > 0)
      for (int64_t c = 0; c < channels; ++c) shares[item * channels + c] = in[c * stride[3]] / divisor(number);
  });
  const Scratch<int32_t> segment_of(batch * tokens);
  for_each(run, batch, grain_of(tokens), [&](int64_t b) {
    read_segments(labels, masked, b, classes, -1, segment_of + b * tokens);
  });
  by_dtype(grad.dtype, [&](auto element) {
    using T = decltype(element);
    T* const out = grad.as<T>();
    if (f.channel == 1) {
      const int64_t parts = ceil_div(tokens, RUN);
      for_each(run, batch * parts, grain_of(RUN * channels), [&](int64_t item) {
        const int64_t b = item / parts, begin = item % parts * RUN;
        for (int64_t n = begin; n < least(begin + RUN, tokens); ++n) {
          const int32_t s = segment_of[b * tokens + n];
          T* const to = out + f.offset(b, n);
          if (s < 0) {
            std::memset(static_cast<void*>(to), 0, static_cast<size_t>(channels) * sizeof(T));
            continue;
          }
          const float* const from = shares + (b * segments + s) * channels;
          int64_t c = 0;
          for (; c + W <= channels; c += W) store(to + c, load(from + c));
          for (; c < channels; ++c) narrow(from[c], to[c]);
        }
      });
      return;
    }
    for_each(run, batch * channels, grain_of(tokens), [&](int64_t item) {
      const int64_t b = item / channels, c = item % channels;
      const float* const from = shares + b * segments * channels + c;
      for (int64_t n = 0; n < tokens; ++n) {
        const int32_t s = segment_of[b * tokens + n];
        narrow(s < 0 ? 0 : from[s * channels], out[f.offset(b, n) + c * f.channel]);
      }
    });
  });
}

}  // namespace cmim::cpu::CMIM_ISA
