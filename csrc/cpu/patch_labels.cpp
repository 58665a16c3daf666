// The class of each patch by majority vote; of equals, the smallest id.
#include "labels.h"


namespace cmim::cpu::CMIM_ISA {
namespace {

constexpr int64_t COUNTED = 1 << 16;  // classes that may have a counter each

// The votes of a patch. With very many classes the votes are looked up among those that were cast.
struct Votes {
  const bool counted;
  const Scratch<int32_t> counts, cast;  // by class, or by the order in which they appear
  int64_t number = 0;

  Votes(int64_t classes, int64_t area) : counted(classes <= COUNTED), counts(counted ? classes : area), cast(area) {
    for (int64_t i = 0; i < (counted ? classes : area); ++i) counts[i] = 0;
  }

  ALWAYS_INLINE int32_t add(int32_t id) {
    if (counted) {
      if (counts[id] == 0) cast[number++] = id;
      return ++counts[id];
    }
    int64_t i = 0;
    while (i < number && cast[i] != id) ++i;
    if (i == number) cast[number++] = id;
    return ++counts[i];
  }

  ALWAYS_INLINE void clear() {
    for (int64_t i = 0; i < number; ++i) counts[counted ? cast[i] : i] = 0;
    number = 0;
  }
};

}  // namespace

void patch_labels(ForEach run, View labels, int64_t patch_size, int64_t num_classes, double min_share, View out) {
  const int64_t rows = out.sizes[1], columns = out.sizes[2], width = columns * patch_size, area = patch_size * patch_size;
  for_each(run, out.sizes[0] * rows, grain_of(4 * width * patch_size), [&](int64_t item) {
    const int64_t b = item / rows, row = item % rows;
    const Scratch<int32_t> ids(patch_size * width);
    Votes votes(num_classes, area);
    for (int64_t y = 0; y < patch_size; ++y)
      by_label_dtype(labels, [&](auto* first) {
        const int64_t start = b * labels.strides[0] + (row * patch_size + y) * labels.strides[1];
        read_classes(first + start, labels.strides[2], width, num_classes, -1, ids + y * width);
      });
    for (int64_t column = 0; column < columns; ++column) {
      const int32_t* const patch = ids + column * patch_size;
      int32_t winner = patch[0], differ = 0;
      int64_t most_votes = winner < 0 ? 0 : area;
      for (int64_t y = 0; y < patch_size; ++y)
        for (int64_t x = 0; x < patch_size; ++x) differ |= patch[y * width + x] ^ winner;
      if (differ) {
        winner = -1;
        most_votes = 0;
        for (int64_t y = 0; y < patch_size; ++y)
          for (int64_t x = 0; x < patch_size; ++x) {
            const int32_t id = patch[y * width + x];
            if (id < 0) continue;
            const int32_t count = votes.add(id);
            if (count > most_votes || (count == most_votes && id < winner)) most_votes = count, winner = id;
          }
        votes.clear();
      }
      const bool elected = most_votes > 0 && static_cast<double>(most_votes) / static_cast<double>(area) >= min_share;
      out.as<int32_t>()[item * columns + column] = elected ? winner : -1;
    }
  });
}

}  // namespace cmim::cpu::CMIM_ISA
