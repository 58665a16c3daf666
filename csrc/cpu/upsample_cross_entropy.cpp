// Cross-entropy of bilinearly upsampled logits at every pixel.
#include "upsampling.h"

namespace cmim::cpu::CMIM_ISA {
namespace {

constexpr int ROWS = 4;  // of pixels whose exponentials are computed together

// The classes of a vector's pixels in row y, -1 where there is no pixel or its target is ignored.
ALWAYS_INLINE void read_targets(const Upsampling& up, const View& target, int64_t b, int64_t y, int64_t v, int32_t* out) {
  for (int i = 0; i < W; ++i) {
    const int32_t x = up.pixel[v * W + i];
    out[i] = -1;
    if (x < 0) continue;
    const int64_t label = load_label(target, b * target.strides[0] + y * target.strides[1] + x * target.strides[2]);
    if (label >= 0 && label < up.classes) out[i] = static_cast<int32_t>(label);
  }
}

// Gradients of the rows of logits that a band touches: [row][class][line].
struct Rows {
  const Upsampling& up;
  const int64_t band, begin, end;  // rows, of which the first and the last may be half done
  const Scratch<float> sum;

  Rows(const Upsampling& up, int64_t band)
      : up(up), band(band), begin(band * BAND - 1), end(least(begin + BAND, up.height) + 1),
        sum((end - begin) * up.classes * up.line) {
    for (int64_t i = 0; i < (end - begin) * up.classes * up.line; ++i) sum[i] = 0;
  }

  float* row(int64_t y) const { return sum + (y - begin) * up.classes * up.line; }

  // What lies beyond the ends of a row, and of a column, belongs to them.
  void fold() const {
    for (int64_t y = begin; y < end; ++y)
      for (int64_t k = 0; k < up.classes; ++k) {
        float* const of_class = row(y) + k * up.line;
        of_class[1] += of_class[0];
        of_class[up.width] += of_class[up.width + 1];
      }
    if (begin == -1) add(row(-1), row(0));
    if (end == up.height + 1) add(row(up.height), row(up.height - 1));
  }

  void add(const float* from, float* to) const {
    for (int64_t i = 0; i < up.classes * up.line; ++i) to[i] += from[i];
  }
};

// A row of logits' gradients, the sum of one or two parts [class][line].
void write_row(const Upsampling& up, const View& grad, int64_t b, int64_t y, const float* part, const float* other) {
  by_dtype(grad.dtype, [&](auto element) {
    auto* const out = grad.as<decltype(element)>() + b * grad.strides[0] + y * grad.strides[2];
    const auto write = [&](int64_t k, int64_t x) {
      const int64_t at = k * up.line + 1 + x;
      narrow(other ? part[at] + other[at] : part[at], out[k * grad.strides[1] + x * grad.strides[3]]);
    };
    if (grad.strides[1] == 1) {
      for (int64_t x = 0; x < up.width; ++x)
        for (int64_t k = 0; k < up.classes; ++k) write(k, x);
    } else {
      for (int64_t k = 0; k < up.classes; ++k)
        for (int64_t x = 0; x < up.width; ++x) write(k, x);
    }
  });
}

}  // namespace

void upsample_cross_entropy_forward(ForEach run, View logits, View target, bool align_corners, View loss, View logsumexp) {
  const Upsampling up(logits, target.sizes[1], target.sizes[2], align_corners);
  for_each(run, up.batch * up.bands, 1, [&](int64_t item) {
    const int64_t b = item / up.bands;
    const Scratch<float> z(up.classes * 2 * W);
    up.over_gaps(logits, b, item % up.bands, [&](int64_t gap, const float* upper, const float* lower) {
      for (int64_t v = 0; v < up.vectors; ++v) {
        up.read_vector(upper, lower, v, z);
        for (int64_t y = up.first_row[gap + 1]; y < up.first_row[gap + 2]; ++y) {
          const float w = up.row(y).weight;
          Floats largest = between(z, 0, w), other = largest;
          int64_t k = 1;
          for (; k + 1 < up.classes; k += 2) {
            largest = maximum(largest, between(z, k, w));
            other = maximum(other, between(z, k + 1, w));
          }
          if (k < up.classes) largest = maximum(largest, between(z, k, w));
          largest = maximum(largest, other);
          Floats sum{};
          for (k = 0; k < up.classes; ++k) sum += exp(between(z, k, w) - largest);
          const Floats rest = log(sum), total = largest + rest;
          int32_t classes[W];
          read_targets(up, target, b, y, v, classes);
          const int64_t row = (b * up.rows + y) * up.columns;
          for (int i = 0; i < W; ++i) {
            const int32_t x = up.pixel[v * W + i];
            if (x < 0) continue;
            logsumexp.as<float>()[row + x] = total[i];
            float value = 0;
            if (classes[i] >= 0) {
              const float* const own = z + classes[i] * 2 * W + i;
              value = largest[i] - (own[0] + w * own[W]) + rest[i];
            }
            loss.as<float>()[row + x] = value;
          }
        }
      }
    });
  });
}

// A pixel's gradient is softmax - onehot, times that of its loss. Pixels between two rows of logits are added up before
// columns are told apart; rows that two bands share are added up in the end.
void upsample_cross_entropy_backward(ForEach run, View grad, View logits, View target, View logsumexp, bool align_corners,
                                     View grad_logits) {
  const Upsampling up(logits, target.sizes[1], target.sizes[2], align_corners);
  const int64_t of_row = up.classes * up.line;
  const Scratch<float> shared(up.batch * up.bands * 2 * of_row);  // the first row of a band, and the one after its last
  for_each(run, up.batch * up.bands, 1, [&](int64_t item) {
    const int64_t b = item / up.bands, band = item % up.bands;
    const Scratch<float> z(up.classes * 2 * W), sums(up.classes * 2 * W);
    const Rows rows(up, band);
    up.over_gaps(logits, b, band, [&](int64_t gap, const float* upper, const float* lower) {
      for (int64_t v = 0; v < up.vectors; ++v) {
        up.read_vector(upper, lower, v, z);
        for (int64_t i = 0; i < up.classes * 2 * W; ++i) sums[i] = 0;
        for (int64_t first = up.first_row[gap + 1]; first < up.first_row[gap + 2]; first += ROWS) {
          int32_t classes[ROWS][W];
          float total[ROWS][W], scale[ROWS][W], weight[ROWS];
          bool any = false;
          for (int r = 0; r < ROWS; ++r) {
            const int64_t y = first + r;
            weight[r] = 0;
            for (int i = 0; i < W; ++i) classes[r][i] = -1, total[r][i] = scale[r][i] = 0;
            if (y >= up.first_row[gap + 2]) continue;
            weight[r] = up.row(y).weight;
            read_targets(up, target, b, y, v, classes[r]);
            for (int i = 0; i < W; ++i)
              if (classes[r][i] >= 0) {
                const int64_t x = up.pixel[v * W + i];
                total[r][i] = logsumexp.as<const float>()[(b * up.rows + y) * up.columns + x];
                scale[r][i] = grad.as<const float>()[b * grad.strides[0] + y * grad.strides[1] + x * grad.strides[2]];
                any = true;
              }
          }
          if (!any) continue;
          for (int64_t k = 0; k < up.classes; ++k) {
            Floats above = load(sums + k * 2 * W), below = load(sums + k * 2 * W + W);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) {
              const Floats share = exp(between(z, k, weight[r]) - load(total[r])) * load(scale[r]);
              const Floats value = load_ints(classes[r]) >= 0 ? share : Floats{};
              above += (1 - weight[r]) * value;
              below += weight[r] * value;
            }
            store(sums + k * 2 * W, above);
            store(sums + k * 2 * W + W, below);
          }
          for (int r = 0; r < ROWS; ++r)
            for (int i = 0; i < W; ++i)
              if (classes[r][i] >= 0) {
                float* const own = sums + classes[r][i] * 2 * W + i;
                own[0] -= (1 - weight[r]) * scale[r][i];
                own[W] -= weight[r] * scale[r][i];
              }
        }
        const Floats right = load(up.weight + v * W), left = 1 - right;
        for (int64_t k = 0; k < up.classes; ++k)
          for (int r = 0; r < 2; ++r) {
            float* const out = rows.row(gap + r) + k * up.line + up.base[v] + 1;
            const Floats sum = load(sums + k * 2 * W + r * W);
            store(out, load(out) + left * sum);
            store(out + 1, load(out + 1) + right * sum);
          }
      }
    });
    rows.fold();
    for (int64_t y = most(rows.begin, 0); y < least(rows.end, up.height); ++y) {
      float* const first = shared + item * 2 * of_row;
      if (y == rows.begin) std::memcpy(first, rows.row(y), static_cast<size_t>(of_row) * sizeof(float));
      else if (y == rows.end - 1) std::memcpy(first + of_row, rows.row(y), static_cast<size_t>(of_row) * sizeof(float));
      else write_row(up, grad_logits, b, y, rows.row(y), nullptr);
    }
  });
  for_each(run, up.batch * up.bands, 1, [&](int64_t item) {
    const int64_t y = item % up.bands * BAND - 1;
    if (y < 0) return;
    write_row(up, grad_logits, item / up.bands, y, shared + item * 2 * of_row, shared + item * 2 * of_row - of_row);
  });
}

}  // namespace cmim::cpu::CMIM_ISA
