// Depthwise convolution in which a neighbour counts only if it has the label of the centre.
//
// A row is cut into runs of neighbours of one class. For the outputs of a run, which stay in registers, a row of the window
// is a row of weights, which do too, and of inputs, each of which is loaded once and meets all outputs that it reaches, or
// none where its label is another. Channels are handled a block at a time: in place where they are neighbours in memory and
// float32, else in a copy of the block.
#include "vector.h"

namespace cmim::cpu::CMIM_ISA {
namespace {

constexpr int V = W == 16 ? 2 : 1;  // vectors of a block of channels
constexpr int BLOCK = V * W;
constexpr int LONGEST = 5;          // outputs of a run
constexpr int64_t COPY = 1 << 16;   // floats that a copy should not exceed by much

// Labels of all images with `reach` of no class around each: -1 everywhere outside [0, num_classes).
struct Classes {
  const int64_t height, width, reach, row, image;
  const Scratch<int32_t> ids;

  Classes(ForEach run, const View& labels, int64_t num_classes, int64_t reach)
      : height(labels.sizes[1]), width(labels.sizes[2]), reach(reach), row(width + 2 * reach + W),
        image((height + 2 * reach) * row), ids(labels.sizes[0] * image + W) {
    for_each(run, labels.sizes[0] * (height + 2 * reach), grain_of(row), [&](int64_t item) {
      const int64_t b = item / (height + 2 * reach), y = item % (height + 2 * reach) - reach;
      int32_t* const out = ids + item * row;
      for (int64_t x = 0; x < row; ++x) out[x] = -1;
      if (y < 0 || y >= height) return;
      for (int64_t x = 0; x < width; ++x) {
        const int64_t label = load_label(labels, b * labels.strides[0] + y * labels.strides[1] + x * labels.strides[2]);
        if (label >= 0 && label < num_classes) out[reach + x] = static_cast<int32_t>(label);
      }
    });
  }

  // Those of the window's first row and column around output (y, x).
  const int32_t* window(int64_t b, int64_t y, int64_t x) const { return ids + b * image + y * row + x; }
};

// Weights or their gradients as [block of channels][tap][channel], zero where there is no channel.
void blocks_of_weights(const View& weight, bool flipped, float* out) {
  const int64_t channels = weight.sizes[0], size = weight.sizes[1], taps = size * size;
  by_dtype(weight.dtype, [&](auto element) {
    using T = decltype(element);
    for (int64_t c = 0; c < ceil_div(channels, BLOCK) * BLOCK; ++c)
      for (int64_t t = 0; t < taps; ++t) {
        const int64_t from = flipped ? taps - 1 - t : t;
        const int64_t at = c * weight.strides[0] + from / size * weight.strides[1] + from % size * weight.strides[2];
        out[(c / BLOCK * taps + t) * BLOCK + c % BLOCK] = c < channels ? widen(weight.as<const T>()[at]) : 0;
      }
  });
}

// A block of channels of some rows of an image: pixel (y, x) at data + y row + x pixel, `BLOCK` floats that are neighbours.
struct Pixels {
  const float* data;
  int64_t row, pixel;
};

bool in_place(const View& x, int64_t block) {
  return x.dtype == Dtype::float32 && x.strides[1] == 1 && (block + 1) * BLOCK <= x.sizes[1];
}

// Rows [from, to) of a block, in place or in `copy`. They are addressed as if all rows were there.
Pixels pixels_of(const View& x, int64_t b, int64_t block, int64_t from, int64_t to, float* copy) {
  const int64_t width = x.sizes[3], first = block * BLOCK, channels = least(BLOCK, x.sizes[1] - first);
  if (in_place(x, block)) return {x.as<const float>() + b * x.strides[0] + first, x.strides[2], x.strides[3]};
  by_dtype(x.dtype, [&](auto element) {
    using T = decltype(element);
    for (int64_t y = from; y < to; ++y) {
      const T* const in = x.as<const T>() + b * x.strides[0] + first * x.strides[1] + y * x.strides[2];
      float* const out = copy + (y - from) * width * BLOCK;
      if (x.strides[1] == 1 && channels == BLOCK) {
        for (int64_t i = 0; i < width; ++i)
          for (int v = 0; v < V; ++v) store(out + i * BLOCK + v * W, load(in + i * x.strides[3] + v * W));
        continue;
      }
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t i = 0; i < width; ++i) out[i * BLOCK + c] = widen(in[c * x.strides[1] + i * x.strides[3]]);
      for (int64_t c = channels; c < BLOCK; ++c)
        for (int64_t i = 0; i < width; ++i) out[i * BLOCK + c] = 0;
    }
  });
  return {copy - from * width * BLOCK, width * BLOCK, BLOCK};
}

// One row of a block to where it belongs in out.
void write_row(const View& out, int64_t b, int64_t block, int64_t y, const float* from) {
  const int64_t width = out.sizes[3], first = block * BLOCK, channels = least(BLOCK, out.sizes[1] - first);
  by_dtype(out.dtype, [&](auto element) {
    using T = decltype(element);
    T* const to = out.as<T>() + b * out.strides[0] + first * out.strides[1] + y * out.strides[2];
    if (out.strides[1] == 1 && channels == BLOCK) {
      for (int64_t i = 0; i < width; ++i)
        for (int v = 0; v < V; ++v) store(to + i * out.strides[3] + v * W, load(from + i * BLOCK + v * W));
      return;
    }
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < width; ++i) narrow(from[i * BLOCK + c], to[c * out.strides[1] + i * out.strides[3]]);
  });
}

// Bit j: whether the j-th of n neighbours from `near` on has the class `id`.
template <int N>
ALWAYS_INLINE uint32_t same(const int32_t* near, int32_t id) {
  uint32_t bits = 0;
#pragma GCC unroll 8
  for (int j = 0; j < N; j += W) bits |= bits_of(load_ints(near + j) == id) << j;
  return bits;
}

// The outputs of a run of P pixels; x and near lie at the window's first row and column of the first of them.
template <int K, int P>
void convolve_run(Pixels x, const int32_t* near, int64_t ids_row, int32_t id, const float* weight, const float* bias, float* out,
                  int64_t out_pixel) {
  Floats sum[P][V];
  for (int i = 0; i < P; ++i)
    for (int v = 0; v < V; ++v) sum[i][v] = load(bias + v * W);
  for (int dy = 0; dy < K; ++dy, near += ids_row, weight += K * BLOCK, x.data += x.row) {
    const uint32_t bits = same<K + P - 1>(near, id);
    Floats w[K][V];
#pragma GCC unroll 8
    for (int dx = 0; dx < K; ++dx)
      for (int v = 0; v < V; ++v) w[dx][v] = load(weight + dx * BLOCK + v * W);
#pragma GCC unroll 16
    for (int j = 0; j < K + P - 1; ++j) {
      if (!(bits >> j & 1)) continue;
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        const Floats value = load(x.data + j * x.pixel + v * W);
#pragma GCC unroll 8
        for (int i = 0; i < P; ++i)
          if (j - i >= 0 && j - i < K) sum[i][v] += value * w[j - i][v];
      }
    }
  }
  for (int i = 0; i < P; ++i)
    for (int v = 0; v < V; ++v) store(out + i * out_pixel + v * W, sum[i][v]);
}

// One output of a window of any size.
void convolve_pixel(int64_t size, Pixels x, const int32_t* near, int64_t ids_row, int32_t id, const float* weight,
                    const float* bias, float* out) {
  Floats sum[V];
  for (int v = 0; v < V; ++v) sum[v] = load(bias + v * W);
  for (int64_t dy = 0; dy < size; ++dy, near += ids_row, weight += size * BLOCK, x.data += x.row)
    for (int64_t dx = 0; dx < size; ++dx)
      if (near[dx] == id)
        for (int v = 0; v < V; ++v) sum[v] += load(x.data + dx * x.pixel + v * W) * load(weight + dx * BLOCK + v * W);
  for (int v = 0; v < V; ++v) store(out + v * W, sum[v]);
}

// Adds to the weights' gradients [tap][channel] what a run of P pixels gives.
template <int K, int P>
void weight_run(Pixels x, const int32_t* near, int64_t ids_row, int32_t id, const float* grad, int64_t grad_pixel, float* sum) {
  Floats g[P][V];
  for (int i = 0; i < P; ++i)
    for (int v = 0; v < V; ++v) g[i][v] = load(grad + i * grad_pixel + v * W);
  for (int dy = 0; dy < K; ++dy, near += ids_row, sum += K * BLOCK, x.data += x.row) {
    const uint32_t bits = same<K + P - 1>(near, id);
    Floats w[K][V];
#pragma GCC unroll 8
    for (int dx = 0; dx < K; ++dx)
      for (int v = 0; v < V; ++v) w[dx][v] = load(sum + dx * BLOCK + v * W);
#pragma GCC unroll 16
    for (int j = 0; j < K + P - 1; ++j) {
      if (!(bits >> j & 1)) continue;
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        const Floats value = load(x.data + j * x.pixel + v * W);
#pragma GCC unroll 8
        for (int i = 0; i < P; ++i)
          if (j - i >= 0 && j - i < K) w[j - i][v] += value * g[i][v];
      }
    }
#pragma GCC unroll 8
    for (int dx = 0; dx < K; ++dx)
      for (int v = 0; v < V; ++v) store(sum + dx * BLOCK + v * W, w[dx][v]);
  }
}

void weight_pixel(int64_t size, Pixels x, const int32_t* near, int64_t ids_row, int32_t id, const float* grad, float* sum) {
  for (int64_t dy = 0; dy < size; ++dy, near += ids_row, sum += size * BLOCK, x.data += x.row)
    for (int64_t dx = 0; dx < size; ++dx)
      if (near[dx] == id)
        for (int v = 0; v < V; ++v) {
          float* const w = sum + dx * BLOCK + v * W;
          store(w, load(w) + load(x.data + dx * x.pixel + v * W) * load(grad + v * W));
        }
}

template <int K, typename F>
ALWAYS_INLINE void with_run(int64_t length, const F& f) {
  switch (length) {
    case 1: return f(constant<K>{}, constant<1>{});
    case 2: return f(constant<K>{}, constant<2>{});
    case 3: return f(constant<K>{}, constant<3>{});
    case 4: return f(constant<K>{}, constant<4>{});
    default: return f(constant<K>{}, constant<LONGEST>{});
  }
}

// f(size, length) with the window's size, 0 for one that is not compiled, and the length of a run as constants.
template <typename F>
ALWAYS_INLINE void with_sizes(int64_t size, int64_t length, const F& f) {
  if (size == 3) return with_run<3>(length, f);
  if (size == 5) return with_run<5>(length, f);
  if (size == 7) return with_run<7>(length, f);
  f(constant<0>{}, constant<1>{});
}

// f(x, length, id) for the runs of row y; runs of ignored pixels have the id -1.
template <typename F>
ALWAYS_INLINE void over_runs(const Classes& classes, int64_t size, int64_t b, int64_t y, const F& f) {
  const int32_t* const ids = classes.window(b, y + classes.reach, classes.reach);
  const bool compiled = size == 3 || size == 5 || size == 7;
  for (int64_t x = 0; x < classes.width;) {
    int64_t end = x + 1;
    while (end < classes.width && ids[end] == ids[x]) ++end;
    const int64_t pieces = compiled ? ceil_div(end - x, LONGEST) : end - x;
    for (int64_t left = pieces; left > 0; --left) {  // as equal as possible
      const int64_t length = ceil_div(end - x, left);
      f(x, length, ids[x]);
      x += length;
    }
  }
}

int64_t rows_of_band(int64_t height, int64_t width, int64_t size) {
  return most(1, least(height, most(size, COPY / (width * BLOCK) - size + 1)));
}

void convolve(ForEach run, const View& x, const Classes& classes, const View& weight, bool flipped, const MaybeView& bias,
              const View& out) {
  const int64_t channels = x.sizes[1], height = x.sizes[2], width = x.sizes[3], size = weight.sizes[1], reach = size / 2;
  const int64_t blocks = ceil_div(channels, BLOCK), rows = rows_of_band(height, width, size), bands = ceil_div(height, rows);
  const Scratch<float> weights(blocks * BLOCK * size * size), shift(blocks * BLOCK);
  blocks_of_weights(weight, flipped, weights);
  for (int64_t c = 0; c < blocks * BLOCK; ++c) shift[c] = 0;
  if (bias.data)
    by_dtype(bias.dtype, [&](auto element) {
      for (int64_t c = 0; c < channels; ++c) shift[c] = widen(bias.as<const decltype(element)>()[c * bias.strides[0]]);
    });
  for_each(run, x.sizes[0] * bands * blocks, grain_of(rows * width * BLOCK * size * size), [&](int64_t item) {
    const int64_t block = item % blocks, band = item / blocks % bands, b = item / blocks / bands;
    const int64_t begin = band * rows, end = least(begin + rows, height);
    const int64_t from = most(0, begin - reach), to = least(end + reach, height);
    const bool direct = in_place(out, block);
    const Scratch<float> copy(in_place(x, block) ? 0 : (to - from) * width * BLOCK), line(direct ? 0 : width * BLOCK);
    const Pixels in = pixels_of(x, b, block, from, to, copy);
    const float* const w = weights + block * BLOCK * size * size;
    const float* const add = shift + block * BLOCK;
    for (int64_t y = begin; y < end; ++y) {
      float* const result = direct ? out.as<float>() + b * out.strides[0] + block * BLOCK + y * out.strides[2] : line.data;
      const int64_t step = direct ? out.strides[3] : BLOCK;
      over_runs(classes, size, b, y, [&](int64_t first, int64_t length, int32_t id) {
        float* const to_run = result + first * step;
        if (id < 0) {
          for (int64_t i = 0; i < length; ++i)
            for (int v = 0; v < V; ++v) store(to_run + i * step + v * W, Floats{});
          return;
        }
        const Pixels window{in.data + (y - reach) * in.row + (first - reach) * in.pixel, in.row, in.pixel};
        const int32_t* const near = classes.window(b, y, first);
        with_sizes(size, length, [&](auto k, auto p) {
          if constexpr (k.value == 0) convolve_pixel(size, window, near, classes.row, id, w, add, to_run);
          else convolve_run<k.value, p.value>(window, near, classes.row, id, w, add, to_run, step);
        });
      });
      if (!direct) write_row(out, b, block, y, line);
    }
  });
}

}  // namespace

void same_class_conv2d_forward(ForEach run, View x, View labels, View weight, MaybeView bias, int64_t num_classes, View out) {
  convolve(run, x, Classes(run, labels, num_classes, weight.sizes[1] / 2), weight, false, bias, out);
}

// "p + o has the label of p" is symmetric: the gradient of x is the same convolution with flipped weights.
void same_class_conv2d_backward(ForEach run, View grad, View x, View labels, View weight, int64_t num_classes, View grad_x,
                                View grad_weight, MaybeView grad_bias) {
  const int64_t channels = x.sizes[1], height = x.sizes[2], width = x.sizes[3], size = weight.sizes[1], reach = size / 2;
  const Classes classes(run, labels, num_classes, reach);
  convolve(run, grad, classes, weight, true, MaybeView{}, grad_x);
  const int64_t blocks = ceil_div(channels, BLOCK), rows = rows_of_band(height, width, size), bands = ceil_div(height, rows);
  const int64_t taps = size * size, parts = x.sizes[0] * bands, of_part = blocks * BLOCK * (taps + 1);
  const Scratch<float> sums(parts * of_part);  // [part][block][tap, then bias][channel]
  for_each(run, parts * blocks, grain_of(rows * width * BLOCK * taps), [&](int64_t item) {
    const int64_t block = item % blocks, part = item / blocks, band = part % bands, b = part / bands;
    const int64_t begin = band * rows, end = least(begin + rows, height);
    const int64_t from = most(0, begin - reach), to = least(end + reach, height);
    const Scratch<float> copy(in_place(x, block) ? 0 : (to - from) * width * BLOCK);
    const Scratch<float> grad_copy(in_place(grad, block) ? 0 : (end - begin) * width * BLOCK), of_row((taps + 1) * BLOCK);
    const Pixels in = pixels_of(x, b, block, from, to, copy), g = pixels_of(grad, b, block, begin, end, grad_copy);
    float* const sum = sums + part * of_part + block * BLOCK * (taps + 1);
    for (int64_t i = 0; i < (taps + 1) * BLOCK; ++i) sum[i] = 0;
    for (int64_t y = begin; y < end; ++y) {
      for (int64_t i = 0; i < (taps + 1) * BLOCK; ++i) of_row[i] = 0;
      over_runs(classes, size, b, y, [&](int64_t first, int64_t length, int32_t id) {
        if (id < 0) return;
        const Pixels window{in.data + (y - reach) * in.row + (first - reach) * in.pixel, in.row, in.pixel};
        const int32_t* const near = classes.window(b, y, first);
        const float* const own = g.data + y * g.row + first * g.pixel;
        with_sizes(size, length, [&](auto k, auto p) {
          if constexpr (k.value == 0) weight_pixel(size, window, near, classes.row, id, own, of_row);
          else weight_run<k.value, p.value>(window, near, classes.row, id, own, g.pixel, of_row);
        });
        for (int v = 0; v < V; ++v) {
          Floats total = load(of_row + taps * BLOCK + v * W);
          for (int64_t i = 0; i < length; ++i) total += load(own + i * g.pixel + v * W);
          store(of_row + taps * BLOCK + v * W, total);
        }
      });
      for (int64_t i = 0; i < (taps + 1) * BLOCK; ++i) sum[i] += of_row[i];
    }
  });
  by_dtype(grad_weight.dtype, [&](auto element) {
    using T = decltype(element);
    for_each(run, blocks, grain_of(parts * BLOCK * taps), [&](int64_t block) {
      const Scratch<float> total((taps + 1) * BLOCK);
      for (int64_t i = 0; i < (taps + 1) * BLOCK; ++i) {
        float value = 0;
        for (int64_t part = 0; part < parts; ++part) value += sums[part * of_part + block * BLOCK * (taps + 1) + i];
        total[i] = value;
      }
      for (int64_t c = block * BLOCK; c < least((block + 1) * BLOCK, channels); ++c) {
        for (int64_t t = 0; t < taps; ++t) narrow(total[t * BLOCK + c % BLOCK], grad_weight.as<T>()[c * taps + t]);
        if (grad_bias.data)
          by_dtype(grad_bias.dtype, [&](auto of_bias) {
            narrow(total[taps * BLOCK + c % BLOCK], grad_bias.as<decltype(of_bias)>()[c]);
          });
      }
    });
  });
}

}  // namespace cmim::cpu::CMIM_ISA
