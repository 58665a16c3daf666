// Reconstruction loss over masked patches, by class.
//
// The patch of a token that counts is read from prediction and image into rows of float32, in the order in which the
// prediction has its entries as neighbours. Errors of tokens are added up by class in the end, one after the other.
#include "labels.h"

namespace cmim::cpu::CMIM_ISA {
namespace {

// Copies n neighbours, few or many.
template <typename T>
ALWAYS_INLINE void read_run(const T* in, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, load(in + i));
  for (; i + 4 <= n; i += 4)
    for (int j = 0; j < 4; ++j) out[i + j] = widen(in[i + j]);
  for (; i < n; ++i) out[i] = widen(in[i]);
}
ALWAYS_INLINE void read_run(const uint8_t* in, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = widen(in[i]);
}
template <typename T>
ALWAYS_INLINE void write_run(const float* in, int64_t n, T* out) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, load(in + i));
  for (; i + 4 <= n; i += 4)
    for (int j = 0; j < 4; ++j) narrow(in[i + j], out[i + j]);
  for (; i < n; ++i) narrow(in[i], out[i]);
}

// How patches lie in a tensor, and where their entries go in a row.
struct Patches {
  const View& x;
  const Layout at;
  const int64_t size, channels;
  const bool channel_first;            // as the entries of a row are ordered
  const int64_t channel, row, column;  // steps in the row
  int64_t run;                         // entries that are neighbours in the same order in both: of a patch, of a row of it, ...

  Patches(const View& x, int64_t size, int64_t channels, int64_t columns, bool channel_first)
      : x(x), at(x.strides, x.dimensions == 4, columns, size, channels), size(size), channels(channels),
        channel_first(channel_first), channel(channel_first ? size * size : 1), row(channel_first ? size : size * channels),
        column(channel_first ? 1 : channels), run(0) {
    if (at.column == column && (channel_first || at.channel == channel)) {
      run = row;
      if (at.row == row && (!channel_first || at.channel == channel)) run = size * size * channels;
    }
  }

  // Where the patch of token (y, x) of image b begins.
  int64_t start(int64_t b, int64_t y, int64_t x) const { return b * at.image + y * at.patch_row + x * at.patch_column; }

  // f(place in the tensor, place in the row) of the first entry of every run, from `start` on.
  template <typename F>
  ALWAYS_INLINE void over_runs(int64_t start, const F& f) const {
    if (run == size * size * channels) return f(start, int64_t{0});
    const int64_t across = run ? 1 : size, planes = run && !channel_first ? 1 : channels;
    for (int64_t y = 0; y < size; ++y)
      for (int64_t c = 0; c < planes; ++c)
        for (int64_t x = 0; x < across; ++x)
          f(start + y * at.row + c * at.channel + x * at.column, y * row + c * channel + x * column);
  }

  template <typename T>
  void read(int64_t start, float* out) const {
    const T* const in = x.as<const T>();
    if (run) over_runs(start, [&](int64_t from, int64_t to) { read_run(in + from, run, out + to); });
    else over_runs(start, [&](int64_t from, int64_t to) { out[to] = widen(in[from]); });
  }

  template <typename T>
  void write(int64_t start, const float* values) const {
    T* const out = x.as<T>();
    if (run) over_runs(start, [&](int64_t to, int64_t from) { write_run(values + from, run, out + to); });
    else over_runs(start, [&](int64_t to, int64_t from) { narrow(values[from], out[to]); });
  }
};

// Sums of f over n entries, f(vector of x, vector of y); `one` is f of two numbers.
template <typename F, typename G>
ALWAYS_INLINE float sum_of(const float* x, const float* y, int64_t n, const F& f, const G& one) {
  Floats total[2] = {};
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    total[0] += f(load(x + i), load(y + i));
    total[1] += f(load(x + i + W), load(y + i + W));
  }
  if (i + W <= n) total[0] += f(load(x + i), load(y + i)), i += W;
  total[0] += total[1];
  float lanes[W], sum = 0;
  for (; i < n; ++i) sum += one(x[i], y[i]);
  store(lanes, total[0]);
  for (int half = W / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return sum + lanes[0];
}

// MAE's targets: minus their mean, over their unbiased standard deviation.
void standardise(float* x, int64_t n) {
  const auto same = [](auto a, auto) { return a; };
  const float mean = sum_of(x, x, n, same, same) / static_cast<float>(n);
  for (int64_t i = 0; i < n; ++i) x[i] -= mean;
  const auto square = [](auto a, auto) { return a * a; };
  const float scale = 1 / __builtin_sqrtf(sum_of(x, x, n, square, square) / static_cast<float>(n - 1) + 1e-6f);
  for (int64_t i = 0; i < n; ++i) x[i] *= scale;
}

float error_of(Distance kind, const float* pred, const float* target, int64_t n) {
  const auto one = [&](float a, float b) { return distance(kind, a - b); };
  const auto size = [](Floats a, Floats b) { return maximum(a - b, b - a); };
  float sum = 0;
  if (kind == Distance::l1) sum = sum_of(pred, target, n, [&](Floats a, Floats b) { return size(a, b); }, one);
  if (kind == Distance::mse) sum = sum_of(pred, target, n, [](Floats a, Floats b) { return (a - b) * (a - b); }, one);
  if (kind == Distance::smooth_l1)
    sum = sum_of(pred, target, n, [&](Floats a, Floats b) {
      const Floats d = size(a, b);
      return d < 1.0f ? 0.5f * d * d : d - 0.5f;
    }, one);
  return sum / static_cast<float>(n);
}

struct Loss {
  const View &masked, &labels;
  const int64_t classes, channels, rows, columns, tokens, entries;
  const bool channel_first, normalize;
  const Distance kind;
  const Patches pred, image;
  const Scratch<float> scale, shift;  // of bytes, by entry

  Loss(const View& pred, const View& image, const View& masked, const View& labels, int64_t classes, int64_t size,
       int64_t distance, bool normalize, Numbers mean, Numbers std)
      : masked(masked), labels(labels), classes(classes), channels(image.sizes[1]), rows(image.sizes[2] / size),
        columns(image.sizes[3] / size), tokens(masked.sizes[1]), entries(size * size * channels),
        channel_first(pred.dimensions == 4 && pred.strides[1] != 1), normalize(normalize),
        kind(static_cast<Distance>(distance)), pred(pred, size, channels, columns, channel_first),
        image(image, size, channels, columns, channel_first), scale(mean.size ? entries : 0), shift(mean.size ? entries : 0) {
    for (int64_t i = 0; i < (mean.size ? entries : 0); ++i) {
      const int64_t c = channel_first ? i / (size * size) : i % channels;
      scale[i] = static_cast<float>(1 / (255 * std.data[c]));
      shift[i] = static_cast<float>(mean.data[c] / std.data[c]);
    }
  }

  // The class of a token that counts, else -1.
  int32_t class_of(int64_t b, int64_t n) const {
    if (!masked.as<const uint8_t>()[b * masked.strides[0] + n * masked.strides[1]]) return -1;
    if (!labels.data) return 0;
    const int64_t label = load_label(labels, b * labels.strides[0] + n * labels.strides[1]);
    return label >= 0 && label < classes ? static_cast<int32_t>(label) : -1;
  }

  void read_target(int64_t start, float* out) const {
    if (image.x.dtype == Dtype::uint8) {
      image.read<uint8_t>(start, out);
      for (int64_t i = 0; i < entries; ++i) out[i] = out[i] * scale[i] - shift[i];
    } else {
      by_dtype(image.x.dtype, [&](auto element) { image.read<decltype(element)>(start, out); });
    }
    if (normalize) standardise(out, entries);
  }

  // The prediction's row, in place or in `copy`.
  template <typename T>
  const float* read_pred(int64_t start, float* copy) const {
    if (pred.run == entries && pred.x.dtype == Dtype::float32) return pred.x.as<const float>() + start;
    pred.read<T>(start, copy);
    return copy;
  }
};

// d loss / d class_sum of class k is weight / count, or weight where classes do not count alike.
struct Balance {
  bool per_class;
  float weight;

  Balance(const int32_t* count, int64_t classes, bool per_class) : per_class(per_class) {
    int64_t total = 0, present = 0;
    for (int64_t k = 0; k < classes; ++k) total += count[k], present += count[k] > 0;
    weight = 1 / static_cast<float>(most(1, per_class ? present : total));
  }
  float of(int32_t count) const { return per_class ? weight / static_cast<float>(most(1, count)) : weight; }
};

}  // namespace

void patch_loss_forward(ForEach run, View pred, View image, View masked, MaybeView labels, int64_t num_classes,
                        int64_t patch_size, int64_t distance, bool normalize, bool per_class, Numbers mean, Numbers std,
                        View loss, View class_sum, View class_count) {
  const Loss own(pred, image, masked, labels, num_classes, patch_size, distance, normalize, mean, std);
  const int64_t batch = masked.sizes[0], all = batch * own.tokens;
  const Scratch<float> errors(all);
  const Scratch<int32_t> classes(all);
  by_dtype(pred.dtype, [&](auto element) {
    using T = decltype(element);
    for_each(run, batch * own.rows, grain_of(own.columns * own.entries), [&](int64_t item) {
      const Scratch<float> copy(own.entries), target(own.entries);
      const int64_t b = item / own.rows, y = item % own.rows;
      for (int64_t x = 0; x < own.columns; ++x) {
        const int64_t i = item * own.columns + x;
        classes[i] = own.class_of(b, y * own.columns + x);
        if (classes[i] < 0) continue;
        own.read_target(own.image.start(b, y, x), target);
        errors[i] = error_of(own.kind, own.template read_pred<T>(own.pred.start(b, y, x), copy), target, own.entries);
      }
    });
  });
  const Scratch<double> sums(num_classes);
  int32_t* const count = class_count.as<int32_t>();
  for (int64_t k = 0; k < num_classes; ++k) sums[k] = 0, count[k] = 0;
  for (int64_t i = 0; i < all; ++i)
    if (classes[i] >= 0) sums[classes[i]] += static_cast<double>(errors[i]), ++count[classes[i]];
  const Balance balance(count, num_classes, per_class);
  double total = 0;
  for (int64_t k = 0; k < num_classes; ++k) {
    class_sum.as<float>()[k] = static_cast<float>(sums[k]);
    if (count[k] > 0) total += sums[k] * static_cast<double>(balance.of(count[k]));
  }
  *loss.as<float>() = static_cast<float>(total);
}

void patch_loss_backward(ForEach run, View grad_loss, View grad_class_sum, View class_count, View pred, View image, View masked,
                         MaybeView labels, int64_t num_classes, int64_t patch_size, int64_t distance, bool normalize,
                         bool per_class, Numbers mean, Numbers std, View grad) {
  const Loss own(pred, image, masked, labels, num_classes, patch_size, distance, normalize, mean, std);
  const Patches out(grad, patch_size, own.channels, own.columns, own.channel_first);
  const int64_t entries = own.entries;
  const Scratch<float> weights(num_classes);
  const int32_t* const count = class_count.as<const int32_t>();
  const Balance balance(count, num_classes, per_class);
  for (int64_t k = 0; k < num_classes; ++k) {
    const float of_sum = grad_class_sum.as<const float>()[k * grad_class_sum.strides[0]];
    weights[k] = (of_sum + *grad_loss.as<const float>() * balance.of(count[k])) / static_cast<float>(entries);
  }
  by_dtype(pred.dtype, [&](auto element) {
    using T = decltype(element);
    for_each(run, masked.sizes[0] * own.rows, grain_of(own.columns * entries), [&](int64_t item) {
      const Scratch<float> copy(entries), target(entries);
      const int64_t b = item / own.rows, y = item % own.rows;
      for (int64_t x = 0; x < own.columns; ++x) {
        const int32_t k = own.class_of(b, y * own.columns + x);
        if (k < 0) {
          for (int64_t e = 0; e < entries; ++e) target[e] = 0;
        } else {
          own.read_target(own.image.start(b, y, x), target);
          const float* const from = own.template read_pred<T>(own.pred.start(b, y, x), copy);
          const float weight = weights[k];
          if (own.kind == Distance::l1)
            for (int64_t e = 0; e < entries; ++e) target[e] = slope(Distance::l1, from[e] - target[e]) * weight;
          else if (own.kind == Distance::mse)
            for (int64_t e = 0; e < entries; ++e) target[e] = slope(Distance::mse, from[e] - target[e]) * weight;
          else
            for (int64_t e = 0; e < entries; ++e) target[e] = slope(Distance::smooth_l1, from[e] - target[e]) * weight;
        }
        out.template write<T>(out.start(b, y, x), target);
      }
    });
  });
}

}  // namespace cmim::cpu::CMIM_ISA
