// Rows of tokens from the original to the packed order (gather) and back (scatter), with mask token and positions.
//
// Work goes from place to place, and at each through the images, which have its position in common. The packed row of a
// place is found through the inverse permutation, in either direction.
#include "vector.h"

namespace cmim::cpu::CMIM_ISA {
namespace {

constexpr int64_t PLACES = 32;  // that one item of work goes through

// Row x[b, n] of (B, N, C), or x[n] of (N, C): `step` from one channel to the next.
template <typename T>
struct Row {
  T* data;
  int64_t step;
};
template <typename T>
ALWAYS_INLINE Row<T> row_of(const View& x, int64_t b, int64_t n) {
  return {x.as<T>() + b * x.strides[0] + n * x.strides[1], x.strides[2]};
}

// A row as float32 neighbours, in place or in `copy`; null of no row.
const float* floats_of(const View& x, int64_t offset, int64_t step, int64_t channels, float* copy) {
  if (!x.data) return nullptr;
  if (x.dtype == Dtype::float32 && step == 1) return x.as<const float>() + offset;
  by_dtype(x.dtype, [&](auto element) {
    const auto* const in = x.as<const decltype(element)>() + offset;
    for (int64_t c = 0; c < channels; ++c) copy[c] = widen(in[c * step]);
  });
  return copy;
}

// out = row, or `other` where there is no row (zero without one), plus `added` if there is such.
template <typename T>
void write_row(Row<const T> row, const float* other, const float* added, int64_t channels, T* out) {
  int64_t c = 0;
  if (row.data && row.step == 1) {
    if (added)
      for (; c + W <= channels; c += W) store(out + c, load(row.data + c) + load(added + c));
    else
      for (; c + W <= channels; c += W) std::memcpy(static_cast<void*>(out + c), row.data + c, W * sizeof(T));
  } else if (!row.data) {
    for (; c + W <= channels; c += W) {
      const Floats x = other ? load(other + c) : Floats{};
      store(out + c, added ? x + load(added + c) : x);
    }
  }
  for (; c < channels; ++c) {
    const float x = row.data ? widen(row.data[c * row.step]) : other ? other[c] : 0;
    narrow(added ? x + added[c] : x, out[c]);
  }
}

template <typename T>
void add_row(Row<const T> row, int64_t channels, float* sum) {
  int64_t c = 0;
  if (row.step == 1)
    for (; c + W <= channels; c += W) store(sum + c, load(sum + c) + load(row.data + c));
  for (; c < channels; ++c) sum[c] += widen(row.data[c * row.step]);
}

void clear(float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = 0;
}

void write_floats(const float* x, int64_t n, const View& out, int64_t offset) {
  by_dtype(out.dtype, [&](auto element) {
    auto* const to = out.as<decltype(element)>() + offset;
    for (int64_t i = 0; i < n; ++i) narrow(x[i], to[i]);
  });
}

// each(position's row or null, sum of position's gradient or null, sum of the mask token's or null, n) for all places; then
// the two gradients are written.
template <typename F>
void over_places(ForEach run, int64_t batch, int64_t places, int64_t channels, const View& position, const View& grad_mask_token,
                 const View& grad_position, const F& each) {
  const int64_t parts = ceil_div(places, PLACES);
  const Scratch<float> of_mask(grad_mask_token.data ? parts * channels : 0);
  for_each(run, parts, grain_of(PLACES * batch * channels), [&](int64_t part) {
    const Scratch<float> copy(channels), of_position(channels);
    float* const of_part = grad_mask_token.data ? of_mask + part * channels : nullptr;
    if (of_part) clear(of_part, channels);
    for (int64_t n = part * PLACES; n < least((part + 1) * PLACES, places); ++n) {
      const float* const added = floats_of(position, n * position.strides[0], position.strides[1], channels, copy);
      if (grad_position.data) clear(of_position, channels);
      each(added, grad_position.data ? of_position.data : nullptr, of_part, n);
      if (grad_position.data) write_floats(of_position, channels, grad_position, n * channels);
    }
  });
  if (!grad_mask_token.data) return;
  const Scratch<float> total(channels);
  clear(total, channels);
  for (int64_t part = 0; part < parts; ++part) add_row(Row<const float>{of_mask + part * channels, 1}, channels, total);
  write_floats(total, channels, grad_mask_token, 0);
}

const int32_t* ints(const View& x) { return x.as<const int32_t>(); }

}  // namespace

void gather_forward(ForEach run, View tokens, View inverse, View segment, MaybeView mask_token, MaybeView position, View out) {
  const int64_t batch = tokens.sizes[0], places = tokens.sizes[1], length = out.sizes[1], channels = out.sizes[2];
  const Scratch<float> copy(channels);
  const float* const other = floats_of(mask_token, 0, mask_token.strides[0], channels, copy);
  by_dtype(tokens.dtype, [&](auto element) {
    using T = decltype(element);
    over_places(run, batch, places, channels, position, View{}, View{}, [&](const float* added, float*, float*, int64_t n) {
      for (int64_t b = 0; b < batch; ++b) {
        const int64_t packed = ints(inverse)[b * places + n];
        if (packed >= length) continue;
        const bool replaced = other && ints(segment)[b * places + packed] % 2 == 1;
        const Row<const T> row = replaced ? Row<const T>{nullptr, 1} : row_of<const T>(tokens, b, n);
        write_row(row, other, added, channels, out.as<T>() + (b * length + packed) * channels);
      }
    });
  });
}

void gather_backward(ForEach run, View grad, View inverse, View segment, View grad_tokens, MaybeView grad_mask_token,
                     MaybeView grad_position) {
  const int64_t batch = grad.sizes[0], length = grad.sizes[1], channels = grad.sizes[2], places = inverse.sizes[1];
  by_dtype(grad.dtype, [&](auto element) {
    using T = decltype(element);
    over_places(run, batch, places, channels, View{}, grad_mask_token, grad_position,
                [&](const float*, float* of_position, float* of_mask, int64_t n) {
      for (int64_t b = 0; b < batch; ++b) {
        const int64_t packed = ints(inverse)[b * places + n];
        const bool kept = packed < length, replaced = of_mask && ints(segment)[b * places + packed] % 2 == 1;
        const Row<const T> row = row_of<const T>(grad, b, kept ? packed : 0);
        write_row(kept && !replaced ? row : Row<const T>{nullptr, 1}, nullptr, nullptr, channels,
                  grad_tokens.as<T>() + (b * places + n) * channels);
        if (kept && of_position) add_row(row, channels, of_position);
        if (kept && replaced) add_row(row, channels, of_mask);
      }
    });
  });
}

void scatter_forward(ForEach run, View packed, View inverse, MaybeView mask_token, MaybeView position, View out) {
  const int64_t batch = packed.sizes[0], length = packed.sizes[1], places = out.sizes[1], channels = out.sizes[2];
  const Scratch<float> copy(channels);
  const float* const other = floats_of(mask_token, 0, mask_token.strides[0], channels, copy);
  by_dtype(packed.dtype, [&](auto element) {
    using T = decltype(element);
    over_places(run, batch, places, channels, position, View{}, View{}, [&](const float* added, float*, float*, int64_t n) {
      for (int64_t b = 0; b < batch; ++b) {
        const int64_t from = ints(inverse)[b * places + n];
        const Row<const T> row = from < length ? row_of<const T>(packed, b, from) : Row<const T>{nullptr, 1};
        write_row(row, other, added, channels, out.as<T>() + (b * places + n) * channels);
      }
    });
  });
}

void scatter_backward(ForEach run, View grad, View inverse, View grad_packed, MaybeView grad_mask_token, MaybeView grad_position) {
  const int64_t batch = grad.sizes[0], places = grad.sizes[1], channels = grad.sizes[2], length = grad_packed.sizes[1];
  by_dtype(grad.dtype, [&](auto element) {
    using T = decltype(element);
    over_places(run, batch, places, channels, View{}, grad_mask_token, grad_position,
                [&](const float*, float* of_position, float* of_mask, int64_t n) {
      for (int64_t b = 0; b < batch; ++b) {
        const int64_t to = ints(inverse)[b * places + n];
        const Row<const T> row = row_of<const T>(grad, b, n);
        if (to < length) write_row(row, nullptr, nullptr, channels, grad_packed.as<T>() + (b * length + to) * channels);
        else if (of_mask) add_row(row, channels, of_mask);
        if (of_position) add_row(row, channels, of_position);
      }
    });
  });
}

}  // namespace cmim::cpu::CMIM_ISA
