// csrc/arithmetic.h against brute force; prints what fails.
#include "arithmetic.h"

#include <cmath>
#include <cstdio>
#include <random>

using namespace cmim;

int failures = 0;

template <typename A, typename B>
void expect(A got, B want, const char* what) {
  if (got == static_cast<A>(want) || ++failures > 20) return;
  std::printf("%s: got %.9g, expected %.9g\n", what, static_cast<double>(got), static_cast<double>(want));
}

void divisions() {
  std::mt19937 random(0);
  std::uniform_int_distribution<uint32_t> any(1, INT32_MAX);
  for (int i = 0; i < 20000; ++i) {
    const uint32_t d = i < 5000 ? i + 1 : i < 5031 ? uint32_t{1} << (i - 5000) : i == 5031 ? INT32_MAX : any(random);
    const Divisor divisor(d);
    for (int64_t n : {int64_t{0}, int64_t{d} - 1, int64_t{d}, int64_t{d} + 1, int64_t{INT32_MAX} / d * d - 1,
                      int64_t{INT32_MAX} / d * d, int64_t{INT32_MAX}, int64_t{any(random)}, int64_t{any(random) % 5000}}) {
      if (n < 0 || n > INT32_MAX) continue;
      const auto q = divisor.divide(static_cast<uint32_t>(n));
      expect(q, n / d, "quotient");
      expect(divisor.remainder(static_cast<uint32_t>(n), q), n % d, "remainder");
    }
  }
}

void segments() {
  for (int classes : {1, 3, 300})
    for (int64_t label : {int64_t{-1}, int64_t{0}, int64_t{2}, int64_t{3}, int64_t{255}, int64_t{1} << 32, INT64_MIN})
      for (bool masked : {false, true})
        expect(segment_of(label, masked, classes), label < 0 || label >= classes ? 2 * classes : 2 * label + masked,
               "segment");
}

// Every entry of every patch, in images and tokens so large that most offsets are beyond 32 bits.
void patches() {
  for (int64_t size : {1, 2, 7, 16})
    for (int64_t channels : {1, 3, 4})
      for (bool channel_first : {false, true}) {
        const int64_t columns = 300, rows = 200, height = rows * size, width = columns * size;
        const int64_t contiguous[] = {channels * height * width * 1000, height * width, width, 1};
        const int64_t channels_last[] = {channels * height * width * 1000, 1, width * channels, channels};
        const int64_t tokens[] = {rows * columns * size * size * channels * 1000, size * size * channels, 1, 0};
        const Layout layouts[] = {Layout(contiguous, true, columns, size, channels),
                                  Layout(channels_last, true, columns, size, channels),
                                  Layout(tokens, false, columns, size, channels)};
        const Patch patch(size, channels, channel_first);
        for (int64_t b : {0, 5})
          for (int64_t n : {int64_t{0}, int64_t{299}, int64_t{300}, rows * columns - 1})
            for (int64_t r = 0; r < size; ++r)
              for (int64_t c = 0; c < size; ++c)
                for (int64_t k = 0; k < channels; ++k) {
                  const auto e = patch.entry(static_cast<uint32_t>(
                      channel_first ? (k * size + r) * size + c : (r * size + c) * channels + k));
                  const int64_t y = n / columns * size + r, x = n % columns * size + c;
                  expect(layouts[0].patch(b, n, columns) + layouts[0].entry(e),
                         b * contiguous[0] + k * contiguous[1] + y * contiguous[2] + x, "contiguous image");
                  expect(layouts[1].patch(b, n, columns) + layouts[1].entry(e),
                         b * channels_last[0] + k + y * channels_last[2] + x * channels_last[3], "channels-last image");
                  expect(layouts[2].patch(b, n, columns) + layouts[2].entry(e),
                         b * tokens[0] + n * tokens[1] + (r * size + c) * channels + k, "tokens");
                }
      }
}

void token_grids() {
  const int64_t strides[] = {int64_t{1} << 33, 1, (int64_t{1} << 31) + 7, 11}, sizes[] = {3, 5, 40, 13};
  const int64_t token_strides[] = {int64_t{1} << 34, (int64_t{1} << 31) + 3, 1}, token_sizes[] = {3, 520, 5};
  const TokenGrid grid(strides, sizes, true), tokens(token_strides, token_sizes, false);
  for (int64_t b = 0; b < 3; ++b)
    for (int64_t n = 0; n < 520; ++n) {
      expect(grid.token(b, n), b * strides[0] + n / 13 * strides[2] + n % 13 * strides[3], "token of a grid");
      expect(tokens.token(b, n), b * token_strides[0] + n * token_strides[1], "token of a row");
    }
}

void distances() {
  for (float d = -3.0625f; d < 3; d += 0.125f) {  // never at a kink, and exact
    expect(distance(Distance::l1, d), std::fabs(d), "l1");
    expect(distance(Distance::mse, d), d * d, "mse");
    expect(distance(Distance::smooth_l1, d), std::fabs(d) < 1 ? d * d / 2 : std::fabs(d) - 0.5f, "smooth l1");
    for (Distance kind : {Distance::l1, Distance::mse, Distance::smooth_l1})
      expect(slope(kind, d), (distance(kind, d + 0.03125f) - distance(kind, d - 0.03125f)) / 0.0625f, "slope");
  }
  expect(slope(Distance::l1, 0), 0, "slope of l1 at 0");
  for (Distance kind : {Distance::l1, Distance::mse, Distance::smooth_l1})
    if (!std::isnan(distance(kind, NAN))) expect(0, 1, "distance of NaN");
}

int main() {
  divisions();
  segments();
  patches();
  token_grids();
  distances();
  return failures != 0;
}
