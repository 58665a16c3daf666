// Stable counting sort of the tokens of each image by (class, visible before masked).
#include "labels.h"

namespace cmim::cpu::CMIM_ISA {

void pack_classes(ForEach run, View labels, View masked, int64_t num_classes, View order, View inverse, View segment,
                  View offsets, View cu_seqlens) {
  const int64_t batch = labels.sizes[0], tokens = labels.sizes[1], segments = 2 * num_classes + 2;
  int32_t* const classes_start = static_cast<int32_t*>(cu_seqlens.data);
  for_each(run, batch, 1, [&](int64_t b) {
    int32_t* const start = static_cast<int32_t*>(offsets.data) + b * segments;
    int32_t* const packed = static_cast<int32_t*>(inverse.data) + b * tokens;
    int32_t* const token_at = static_cast<int32_t*>(order.data) + b * tokens;
    int32_t* const segment_at = static_cast<int32_t*>(segment.data) + b * tokens;
    for (int64_t s = 0; s < segments; ++s) start[s] = 0;
    read_segments(labels, masked, b, num_classes, static_cast<int32_t>(2 * num_classes), packed);
    for (int64_t n = 0; n < tokens; ++n) ++start[packed[n]];
    int32_t sum = 0;
    for (int64_t s = 0; s < segments; ++s) {
      const int32_t count = start[s];
      start[s] = sum;
      if (s % 2 == 0) classes_start[b * (num_classes + 1) + s / 2] = static_cast<int32_t>(b * tokens) + sum;
      sum += count;
    }
    for (int64_t n = 0; n < tokens; ++n) {
      const int32_t s = packed[n], place = start[s]++;
      token_at[place] = static_cast<int32_t>(n);
      segment_at[place] = s;
      packed[n] = place;
    }
    for (int64_t s = segments - 1; s > 0; --s) start[s] = start[s - 1];  // each had moved to where the next begins
    start[0] = 0;
  });
  classes_start[batch * (num_classes + 1)] = static_cast<int32_t>(batch * tokens);
}

}  // namespace cmim::cpu::CMIM_ISA
