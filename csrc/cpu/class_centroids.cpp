// Mean feature of the visible and of the masked tokens of each class in each image.
//
// Features are read once, as they lie in memory. Where the channels of a token are neighbours, a chunk of tokens is added,
// row by row, to its own sums of the segments that it meets, and the chunks' sums are added up. Where tokens are neighbours,
// a tile of RUN tokens and W channels is transposed first.
#include "labels.h"

namespace cmim::cpu::CMIM_ISA {
namespace {

constexpr int64_t RUN = 64;

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

// Adds n neighbours to a sum, or begins it with them.
template <typename T>
ALWAYS_INLINE void add_row(const T* in, int64_t n, bool begins, float* sum) {
  int64_t c = 0;
  if (begins) {
    for (; c + W <= n; c += W) store(sum + c, load(in + c));
    for (; c < n; ++c) sum[c] = widen(in[c]);
    return;
  }
  for (; c + W <= n; c += W) store(sum + c, load(sum + c) + load(in + c));
  for (; c < n; ++c) sum[c] += widen(in[c]);
}

// Tokens in a chunk: many for each segment, so that the sums are few beside the features.
int64_t chunk_of(int64_t segments) { return most(1024, 8 * segments); }

}  // namespace

void centroids_forward(ForEach run, View features, View labels, View masked, View mean, View count) {
  const Features f(features);
  const int64_t batch = mean.sizes[0], classes = mean.sizes[1], segments = 2 * classes, channels = f.channels();
  const int64_t tokens = f.tokens();
  const Scratch<int32_t> segment_of(batch * tokens);
  int32_t* const counts = count.as<int32_t>();
  for_each(run, batch, grain_of(tokens), [&](int64_t b) {
    int32_t* const own = segment_of + b * tokens;
    read_segments(labels, masked, b, classes, static_cast<int32_t>(segments), own);
    for (int64_t s = 0; s < segments; ++s) counts[b * segments + s] = 0;
    for (int64_t n = 0; n < tokens; ++n)
      if (own[n] < segments) ++counts[b * segments + own[n]];
  });
  by_dtype(features.dtype, [&](auto element) {
    using T = decltype(element);
    const T* const x = features.as<const T>();
    if (f.channel != 1) {
      const int64_t blocks = ceil_div(channels, W);
      for_each(run, batch * blocks, grain_of(tokens * W), [&](int64_t item) {
        const int64_t b = item / blocks, first = item % blocks * W, width = least(W, channels - first);
        const Scratch<float> sum((segments + 1) * W);
        add_planes(x, f, b, first, width, segment_of + b * tokens, segments, sum);
        for (int64_t s = 0; s < segments; ++s)
          for (int64_t c = 0; c < width; ++c)
            mean.as<float>()[(b * segments + s) * channels + first + c] = sum[s * W + c] / divisor(counts[b * segments + s]);
      });
      return;
    }
    const int64_t chunk = chunk_of(segments), chunks = ceil_div(tokens, chunk);
    const Scratch<float> sums(batch * chunks * segments * channels);  // of segments that the chunk meets
    const Scratch<uint8_t> met(batch * chunks * segments);
    for_each(run, batch * chunks, 1, [&](int64_t item) {
      const int64_t b = item / chunks, begin = item % chunks * chunk;
      uint8_t* const own = met + item * segments;
      std::memset(own, 0, static_cast<size_t>(segments));
      for (int64_t n = begin; n < least(begin + chunk, tokens); ++n) {
        const int32_t s = segment_of[b * tokens + n];
        if (s == segments) continue;
        add_row(x + f.offset(b, n), channels, !own[s], sums + (item * segments + s) * channels);
        own[s] = 1;
      }
    });
    for_each(run, batch * segments, grain_of(channels), [&](int64_t item) {
      const int64_t b = item / segments, s = item % segments;
      float* const out = mean.as<float>() + item * channels;
      bool begins = true;
      for (int64_t part = b * chunks; part < (b + 1) * chunks; ++part)
        if (met[part * segments + s]) {
          add_row(sums.data + (part * segments + s) * channels, channels, begins, out);
          begins = false;
        }
      if (begins) std::memset(out, 0, static_cast<size_t>(channels) * sizeof(float));
      else
        for (int64_t c = 0; c < channels; ++c) out[c] /= divisor(counts[item]);
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
