// Softmax attention of each token over the tokens of its own (image, class), visible and masked.
//
// The tokens of a class are neighbours in packed order, so each (image, class, head) is ordinary attention. Blocks of queries
// meet blocks of keys (Dao et al. 2022, arXiv 2205.14135): no score leaves the cache.
#include "product.h"

namespace cmim::cpu::CMIM_ISA {
namespace {

constexpr int64_t QUERIES = 48, KEYS = 128;  // of a block
constexpr int64_t CHUNK = 480;               // queries of one item of the forward pass, which all read the keys as they were copied

// One (image, class, head), or some of its queries.
struct Segment {
  int64_t b, head, begin, count;  // tokens
  int64_t first, end;             // queries, counted from `begin`
};

// f(segment) for parts of `chunk` queries of every class and head, on all threads.
template <typename F>
void over_segments(ForEach run, const View& q, const View& offsets, int64_t chunk, const F& f) {
  const int64_t batch = q.sizes[0], heads = q.sizes[1], starts = offsets.sizes[1], classes = starts / 2 - 1;
  const Scratch<int64_t> part_of(batch * classes + 1);  // the first part of each (image, class)
  part_of[0] = 0;
  const auto begin_of = [&](int64_t i) { return offsets.as<const int32_t>() + i / classes * starts + i % classes * 2; };
  for (int64_t i = 0; i < batch * classes; ++i) part_of[i + 1] = part_of[i] + ceil_div(begin_of(i)[2] - begin_of(i)[0], chunk);
  for_each(run, part_of[batch * classes] * heads, 1, [&](int64_t item) {
    const int64_t part = item / heads;
    int64_t low = 0, high = batch * classes;  // the (image, class) that has the part
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (part_of[middle] <= part) low = middle;
      else high = middle;
    }
    const int64_t begin = begin_of(low)[0], count = begin_of(low)[2] - begin, first = (part - part_of[low]) * chunk;
    f(Segment{low / classes, item % heads, begin, count, first, least(first + chunk, count)});
  });
}

// Rows [first, first + count) of x (B, heads, N, d) times `scale`, as float32 [row][width], zero beyond d.
void read_rows(const View& x, const Segment& s, int64_t first, int64_t count, float scale, int64_t width, float* out) {
  const int64_t d = x.sizes[3];
  by_dtype(x.dtype, [&](auto element) {
    using T = decltype(element);
    for (int64_t i = 0; i < count; ++i) {
      const T* const in =
          x.as<const T>() + s.b * x.strides[0] + s.head * x.strides[1] + (s.begin + first + i) * x.strides[2];
      float* const row = out + i * width;
      int64_t c = 0;
      if (x.strides[3] == 1)
        for (; c + W <= d; c += W) store(row + c, load(in + c) * scale);
      for (; c < d; ++c) row[c] = widen(in[c * x.strides[3]]) * scale;
      for (; c < width; ++c) row[c] = 0;
    }
  });
}

// The same rows turned over, in panels: [row / PANEL][channel][row % PANEL], zero beyond the last row.
void read_panels(const View& x, const Segment& s, float* out) {
  const int64_t d = x.sizes[3];
  by_dtype(x.dtype, [&](auto element) {
    using T = decltype(element);
    const T* const in = x.as<const T>() + s.b * x.strides[0] + s.head * x.strides[1] + s.begin * x.strides[2];
    for (int64_t first = 0; first < s.count; first += PANEL, out += d * PANEL)
      for (int64_t i = 0; i < PANEL; ++i) {
        const bool there = first + i < s.count;
        for (int64_t c = 0; c < d; ++c)
          out[c * PANEL + i] = there ? widen(in[(first + i) * x.strides[2] + c * x.strides[3]]) : 0;
      }
  });
}

void write_rows(const float* rows, int64_t width, const View& out, const Segment& s, int64_t first, int64_t count) {
  const int64_t d = out.sizes[3];
  by_dtype(out.dtype, [&](auto element) {
    using T = decltype(element);
    T* const to = out.as<T>() + ((s.b * out.sizes[1] + s.head) * out.sizes[2] + s.begin + first) * d;
    for (int64_t i = 0; i < count; ++i) {
      int64_t c = 0;
      for (; c + W <= d; c += W) store(to + i * d + c, load(rows + i * width + c));
      for (; c < d; ++c) narrow(rows[i * width + c], to[i * d + c]);
    }
  });
}

// What becomes of ignored tokens, which are the last of each image: zeros.
void clear_ignored(ForEach run, const View& offsets, const View& out) {
  const int64_t heads = out.sizes[1], tokens = out.sizes[2], d = out.sizes[3], starts = offsets.sizes[1];
  by_dtype(out.dtype, [&](auto element) {
    using T = decltype(element);
    for_each(run, out.sizes[0] * heads, 1, [&](int64_t item) {
      const int64_t first = offsets.as<const int32_t>()[item / heads * starts + starts - 2];
      T* const rows = out.as<T>() + (item * tokens + first) * d;
      std::memset(static_cast<void*>(rows), 0, static_cast<size_t>((tokens - first) * d) * sizeof(T));
    });
  });
}

// Scores of a block: queries (rows of `width`) with the keys from `first` on, which lie in panels of `d` rows.
void multiply_panels(const float* rows, int64_t width, int64_t count, const float* panels, int64_t first, int64_t keys,
                     int64_t d, float* out) {
  for (int64_t j = 0; j < keys; j += PANEL)
    product({rows, width, 1}, panels + (first + j) * d, PANEL, count, PANEL, d, out + j, KEYS, false);
}

ALWAYS_INLINE float largest_of(Floats x) {
  float lanes[W];
  store(lanes, x);
  float most = lanes[0];
  for (int i = 1; i < W; ++i) most = lanes[i] > most ? lanes[i] : most;
  return most;
}
ALWAYS_INLINE float sum_of(Floats x) {
  float lanes[W];
  store(lanes, x);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

int64_t padded(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

}  // namespace

void attention_forward(ForEach run, View q, View k, View v, View offsets, View out, View logsumexp) {
  const int64_t d = q.sizes[3], width = padded(d, W), all = q.sizes[0] * q.sizes[1] * q.sizes[2];
  const float scale = static_cast<float>(1 / __builtin_sqrt(static_cast<double>(d)));
  for (int64_t i = 0; i < all; ++i) logsumexp.as<float>()[i] = -__builtin_inff();
  clear_ignored(run, offsets, out);
  over_segments(run, q, offsets, CHUNK, [&](const Segment& s) {
    const Scratch<float> panels(padded(s.count, PANEL) * d), values(s.count * width), queries(QUERIES * width);
    const Scratch<float> scores(QUERIES * KEYS), sums(QUERIES * width);
    read_panels(k, s, panels);
    read_rows(v, s, 0, s.count, 1, width, values);
    for (int64_t first = s.first; first < s.end; first += QUERIES) {
      const int64_t count = least(QUERIES, s.end - first);
      float largest[QUERIES], total[QUERIES];
      for (int64_t i = 0; i < count; ++i) largest[i] = -__builtin_inff(), total[i] = 0;
      read_rows(q, s, first, count, scale, width, queries);
      for (int64_t key = 0; key < s.count; key += KEYS) {
        const int64_t keys = least(KEYS, s.count - key);
        multiply_panels(queries, width, count, panels, key, keys, d, scores);
        for (int64_t i = 0; i < count; ++i) {
          float* const row = scores + i * KEYS;
          for (int64_t j = keys; j < padded(keys, W); ++j) row[j] = -__builtin_inff();
          Floats most = splat(largest[i]);
          for (int64_t j = 0; j < keys; j += W) most = maximum(most, load(row + j));
          const float now = largest_of(most);
          const float base = now == -__builtin_inff() ? 0 : now;  // all scores so far are -inf: their exponentials are zero
          Floats sum{};
          for (int64_t j = 0; j < keys; j += W) {
            const Floats share = exp(load(row + j) - base);
            sum += share;
            store(row + j, share);
          }
          if (key > 0 && !(now == largest[i])) {
            const float shrink = exp(splat(largest[i] - base))[0];
            total[i] *= shrink;
            for (int64_t c = 0; c < width; c += W) store(sums + i * width + c, load(sums + i * width + c) * shrink);
          }
          largest[i] = now;
          total[i] += sum_of(sum);
        }
        product({scores, KEYS, 1}, values + key * width, width, count, width, keys, sums, width, key > 0);
      }
      for (int64_t i = 0; i < count; ++i) {
        const float share = 1 / total[i];
        for (int64_t c = 0; c < width; c += W) store(sums + i * width + c, load(sums + i * width + c) * share);
        logsumexp.as<float>()[(s.b * q.sizes[1] + s.head) * q.sizes[2] + s.begin + first + i] =
            largest[i] + log(splat(total[i]))[0];
      }
      write_rows(sums, width, out, s, first, count);
    }
  });
}

// With g the gradient of the output: dv = p^T g, ds = p (g v^T - rowsum(g out)), dq = ds k / sqrt(d), dk = ds^T q / sqrt(d).
void attention_backward(ForEach run, View grad, View q, View k, View v, View out, View logsumexp, View offsets, View grad_q,
                        View grad_k, View grad_v) {
  const int64_t d = q.sizes[3], width = padded(d, W);
  const float scale = static_cast<float>(1 / __builtin_sqrt(static_cast<double>(d)));
  clear_ignored(run, offsets, grad_q);
  clear_ignored(run, offsets, grad_k);
  clear_ignored(run, offsets, grad_v);
  over_segments(run, q, offsets, int64_t{1} << 40, [&](const Segment& s) {
    const Scratch<float> key_panels(padded(s.count, PANEL) * d), value_panels(padded(s.count, PANEL) * d);
    const Scratch<float> key_rows(s.count * width), of_keys(s.count * width), of_values(s.count * width);
    const Scratch<float> queries(QUERIES * width), grads(QUERIES * width), outs(QUERIES * width), of_queries(QUERIES * width);
    const Scratch<float> shares(QUERIES * KEYS), slopes(QUERIES * KEYS);
    read_panels(k, s, key_panels);
    read_panels(v, s, value_panels);
    read_rows(k, s, 0, s.count, 1, width, key_rows);
    const float* const total = logsumexp.as<const float>() + (s.b * q.sizes[1] + s.head) * q.sizes[2] + s.begin;
    for (int64_t first = 0; first < s.count; first += QUERIES) {
      const int64_t count = least(QUERIES, s.count - first);
      read_rows(q, s, first, count, scale, width, queries);
      read_rows(grad, s, first, count, 1, width, grads);
      read_rows(out, s, first, count, 1, width, outs);
      float delta[QUERIES];
      for (int64_t i = 0; i < count; ++i) {
        Floats sum{};
        for (int64_t c = 0; c < width; c += W) sum += load(grads + i * width + c) * load(outs + i * width + c);
        delta[i] = sum_of(sum);
      }
      for (int64_t key = 0; key < s.count; key += KEYS) {
        const int64_t keys = least(KEYS, s.count - key);
        multiply_panels(queries, width, count, key_panels, key, keys, d, shares);
        multiply_panels(grads, width, count, value_panels, key, keys, d, slopes);
        for (int64_t i = 0; i < count; ++i)
          for (int64_t j = i * KEYS; j < i * KEYS + keys; j += W) {
            const Floats share = exp(load(shares + j) - total[first + i]);
            store(shares + j, share);
            store(slopes + j, share * (load(slopes + j) - delta[i]));
          }
        product({shares, 1, KEYS}, grads, width, keys, width, count, of_values + key * width, width, first > 0);
        product({slopes, 1, KEYS}, queries, width, keys, width, count, of_keys + key * width, width, first > 0);
        product({slopes, KEYS, 1}, key_rows + key * width, width, count, width, keys, of_queries, width, key > 0);
      }
      for (int64_t i = 0; i < count * width; i += W) store(of_queries + i, load(of_queries + i) * scale);
      write_rows(of_queries, width, grad_q, s, first, count);
    }
    write_rows(of_keys, width, grad_k, s, 0, s.count);
    write_rows(of_values, width, grad_v, s, 0, s.count);
  });
}

}  // namespace cmim::cpu::CMIM_ISA
