// Most likely class, and its softmax probability, at every pixel of bilinearly upsampled logits.
//
// Columns first, then rows, and each difference, product and sum is rounded by itself: classes with equal logits stay equal,
// and the first one wins, as in the reference.
#include "upsampling.h"

namespace cmim::cpu::CMIM_ISA {

void upsample_pseudo_labels(ForEach run, View logits, bool align_corners, View label, View confidence) {
  const Upsampling up(logits, label.sizes[1], label.sizes[2], align_corners);
  for_each(run, up.batch * up.bands, 1, [&](int64_t item) {
    const int64_t b = item / up.bands;
    const Scratch<float> z(up.classes * 2 * W);
    up.over_gaps(logits, b, item % up.bands, [&](int64_t gap, const float* upper, const float* lower) {
      for (int64_t v = 0; v < up.vectors; ++v) {
        up.read_vector(upper, lower, v, z);
        for (int64_t y = up.first_row[gap + 1]; y < up.first_row[gap + 2]; ++y) {
          const float w = up.row(y).weight;
          const auto at = [&](int64_t k) { return load(z + k * 2 * W) + rounded(w * load(z + k * 2 * W + W)); };
          Floats largest = at(0);
          Ints winner{};
          for (int64_t k = 1; k < up.classes; ++k) {
            const Floats x = at(k);
            const Ints larger = x > largest;
            largest = larger ? x : largest;
            winner = larger ? Ints{} + static_cast<int32_t>(k) : winner;
          }
          Floats sum{};
          for (int64_t k = 0; k < up.classes; ++k) sum += exp(at(k) - largest);
          const Floats share = 1.0f / sum;
          const int64_t row = (b * up.rows + y) * up.columns;
          for (int i = 0; i < W; ++i) {
            const int32_t x = up.pixel[v * W + i];
            if (x < 0) continue;
            label.as<int32_t>()[row + x] = winner[i];
            confidence.as<float>()[row + x] = share[i];
          }
        }
      }
    });
  });
}

}  // namespace cmim::cpu::CMIM_ISA
