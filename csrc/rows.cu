// Rows of tokens from the original to the packed order (gather) and back (scatter), with mask token and positions.
//
// A row is handled by a few lanes, 16 bytes each, or one element each where rows are not aligned. Work is laid out place by
// place, image after image, so that the images' common position comes from the cache. The packed row of a place is found
// through the inverse permutation, in either direction.
//
// Memory traffic (minimum), forward: the rows that are needed, the output, `inverse`, `segment` (gathering with a mask
// token), and the positions once (again for each image from the cache). Backward: the gradients of rows and position once
// each, `inverse`, `segment`, and a row of partial sums of the mask token's gradient for each group of blocks. Both are
// bound by bandwidth, as Triton's are: expect a tie, and `auto` stays with Triton.
#include "device.cuh"

namespace cmim {
namespace {

constexpr int THREADS = 256, UNROLL = 4;

// How the threads of a block divide rows and channels.
struct Shape {
  int64_t batch, places, length, channels;
  int lanes;  // of a row, a power of two

  __device__ int lane() const { return threadIdx.x & (lanes - 1); }
  __device__ int row() const { return threadIdx.x / lanes; }
  __device__ int rows() const { return THREADS / lanes; }
};

// GATHER: in (B, N, C) to out (B, L, C), contiguous. Else in (B, L, C) to out (B, N, C).
template <typename T, int V, bool GATHER>
__global__ void __launch_bounds__(THREADS, 2)
    forward_kernel(View in, const int* inverse, const int* segment, View mask_token, View position, T* out, Shape shape,
                   Divisor batch) {
  const int64_t items = shape.batch * shape.places, of_block = shape.rows() * UNROLL;
  for (int64_t block = blockIdx.x; block * of_block < items; block += gridDim.x) {
    int64_t source[UNROLL], place[UNROLL], target[UNROLL];
    bool read[UNROLL], write[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const int64_t item = block * of_block + shape.row() * UNROLL + u;
      const bool valid = item < items;
      const uint32_t n = batch.divide(valid ? static_cast<uint32_t>(item) : 0);
      const int64_t b = batch.remainder(valid ? static_cast<uint32_t>(item) : 0, n);
      const int64_t packed = valid ? inverse[b * shape.places + n] : shape.length;
      const bool kept = packed < shape.length;
      place[u] = n;
      if (GATHER) {
        write[u] = kept;
        read[u] = kept && !(mask_token.data && segment[b * shape.places + packed] % 2 == 1);
        source[u] = b * in.strides[0] + n * in.strides[1];
        target[u] = (b * shape.length + packed) * shape.channels;
      } else {
        write[u] = valid;
        read[u] = kept;
        source[u] = b * in.strides[0] + packed * in.strides[1];
        target[u] = (b * shape.places + n) * shape.channels;
      }
    }
    for (int64_t c = shape.lane() * V; c < shape.channels; c += shape.lanes * V) {
      Floats<V> x[UNROLL];
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        x[u] = zeros<V>();
        if (read[u])
          x[u] = load<V>(in.as<const T>() + source[u] + c * in.strides[2]);
        else if (mask_token.data)
          x[u] = load<V>(mask_token, c * mask_token.strides[0]);
      }
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        if (!write[u]) continue;
        if (position.data) {
          const Floats<V> p = load<V>(position, place[u] * position.strides[0] + c * position.strides[1]);
#pragma unroll
          for (int i = 0; i < V; ++i) x[u][i] += p[i];
        }
        store(out + target[u] + c, x[u]);
      }
    }
  }
}

// GATHER: grad (B, L, C) to out (B, N, C). Else grad (B, N, C) to out (B, L, C). A thread keeps its channels and adds up
// places and images in their order. groups (gridDim.x, C) float32: each block's share of the mask token's gradient.
template <typename T, int V, bool GATHER>
__global__ void __launch_bounds__(THREADS, 2)
    backward_kernel(View grad, const int* inverse, const int* segment, T* out, float* groups, View grad_position,
                    Shape shape) {
  __shared__ float sums[THREADS * V];
  const bool every_row = groups || grad_position.data;  // else scattering reads packed rows only
  for (int64_t base = 0; base < shape.channels; base += shape.lanes * V) {
    const int64_t c = base + shape.lane() * V;
    const bool inside = c < shape.channels;
    Floats<V> token_sum = zeros<V>();
    const int64_t step = static_cast<int64_t>(gridDim.x) * shape.rows();
    for (int64_t n = blockIdx.x * static_cast<int64_t>(shape.rows()) + shape.row(); inside && n < shape.places; n += step) {
      Floats<V> position_sum = zeros<V>();
      for (int64_t first = 0; first < shape.batch; first += UNROLL) {
        Floats<V> x[UNROLL];
        int64_t packed[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u)
          packed[u] = first + u < shape.batch ? inverse[(first + u) * shape.places + n] : shape.length;
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
          const bool kept = packed[u] < shape.length, valid = first + u < shape.batch;
          const int64_t row = GATHER ? packed[u] : n;
          x[u] = zeros<V>();
          if (GATHER ? kept : valid && (kept || every_row))
            x[u] = load<V>(grad.as<const T>() + (first + u) * grad.strides[0] + row * grad.strides[1] + c * grad.strides[2]);
        }
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
          if (first + u >= shape.batch) break;
          const int64_t b = first + u;
          const bool kept = packed[u] < shape.length;
          const bool filled = groups && (GATHER ? kept && segment[b * shape.places + packed[u]] % 2 == 1 : !kept);
#pragma unroll
          for (int i = 0; i < V; ++i) {
            position_sum[i] += x[u][i];
            if (filled) token_sum[i] += x[u][i];
            if (GATHER && filled) x[u][i] = 0;
          }
          if (GATHER) store(out + (b * shape.places + n) * shape.channels + c, x[u]);
          else if (kept) store(out + (b * shape.length + packed[u]) * shape.channels + c, x[u]);
        }
      }
      if (grad_position.data)
#pragma unroll
        for (int i = 0; i < V; ++i) store(grad_position, n * shape.channels + c + i, position_sum[i]);
    }
    if (groups) {
#pragma unroll
      for (int i = 0; i < V; ++i) sums[threadIdx.x * V + i] = token_sum[i];
      __syncthreads();
      if (shape.row() == 0 && inside) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          float sum = 0;
          for (int r = 0; r < shape.rows(); ++r) sum += sums[(r * shape.lanes + threadIdx.x) * V + i];
          groups[blockIdx.x * shape.channels + c + i] = sum;
        }
      }
      __syncthreads();
    }
  }
}

// rows (R, C) float32, contiguous, to out (C): a block of 8 x 32 threads takes 32 columns.
struct Rows {
  const float* rows;  // (num_rows, columns)
  View out;           // (columns)
  int64_t columns, blocks;
};

__global__ void __launch_bounds__(THREADS) sum_rows_kernel(Rows one, Rows other, int64_t num_rows) {
  __shared__ float sums[THREADS];
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32;
  for (int64_t block = blockIdx.x; block < one.blocks + other.blocks; block += gridDim.x) {
    const bool first = block < one.blocks;
    const float* rows = first ? one.rows : other.rows;
    const int64_t columns = first ? one.columns : other.columns;
    const int64_t c = (first ? block : block - one.blocks) * 32 + lane;
    float sum = 0;
    if (c < columns)
#pragma unroll 8
      for (int64_t r = row; r < num_rows; r += THREADS / 32) sum += rows[r * columns + c];
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (row == 0 && c < columns) {
      for (int r = 1; r < THREADS / 32; ++r) sum += sums[r * 32 + lane];
      first ? store(one.out, c * one.out.strides[0], sum) : store(other.out, c * other.out.strides[0], sum);
    }
    __syncthreads();
  }
}

// inverse, and segment where it is given: (B, N) int32, with positions that the kernels count in 32 bits.
void require_places(int64_t batch, int64_t places, const View& inverse, const View& segment) {
  require(batch * places <= INT32_MAX, "rows: positions of tokens do not fit in 32 bits");
  require_dense(inverse, Dtype::int32, {batch, places}, "rows: inverse of the wrong kind");
  if (segment.data) require_dense(segment, Dtype::int32, {batch, places}, "rows: segment of the wrong kind");
}

template <bool GATHER>
void forward(Stream stream, View in, View inverse, View segment, View mask_token, View position, View out) {
  const int64_t places = inverse.sizes[1], length = GATHER ? out.sizes[1] : in.sizes[1];
  require_places(in.sizes[0], places, inverse, segment);
  require_dense(out, in.dtype, {in.sizes[0], GATHER ? length : places, in.sizes[2]}, "rows: an output of the wrong kind");
  require(in.sizes[1] == (GATHER ? places : length), "rows: not as many tokens as places");
  by_dtype(in.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int V = 16 / sizeof(T);
    const int64_t channels = in.sizes[2];
    const bool wide = packs(in, 3, 2, channels, V) && packs(out, 3, 2, channels, V) &&
                      packs(mask_token, 1, 0, channels, V) && packs(position, 2, 1, channels, V);
    const Shape shape{in.sizes[0], places, length, channels, lanes_for(channels, wide ? V : 1)};
    const int64_t blocks = ceil_div(shape.batch * places, THREADS / shape.lanes * UNROLL);
    launch(wide ? forward_kernel<T, V, GATHER> : forward_kernel<T, 1, GATHER>, stream, blocks, THREADS, in,
           inverse.as<const int>(), segment.as<const int>(), mask_token, position, out.as<T>(), shape, Divisor(shape.batch));
  });
}

template <bool GATHER>
void backward(Stream stream, View grad, View inverse, View segment, View out, View groups, View grad_position,
              int64_t blocks) {
  const int64_t places = inverse.sizes[1], length = GATHER ? grad.sizes[1] : out.sizes[1];
  const int64_t batch = grad.sizes[0], channels = grad.sizes[2];
  require_places(batch, places, inverse, segment);
  require(blocks >= 1 && (GATHER || grad.sizes[1] == places), "rows: not as many gradients as places");
  require_dense(out, grad.dtype, {batch, GATHER ? places : length, channels}, "rows: a gradient of the wrong kind");
  if (groups.data) require_dense(groups, Dtype::float32, {blocks, channels}, "rows: groups of the wrong kind");
  if (grad_position.data)
    require_dense(grad_position, grad_position.dtype, {places, channels}, "rows: a gradient of the wrong kind");
  by_dtype(grad.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int V = 16 / sizeof(T);
    const bool wide = packs(grad, 3, 2, channels, V) && packs(out, 3, 2, channels, V);
    const Shape shape{batch, places, length, channels, lanes_for(channels, wide ? V : 1)};
    launch(wide ? backward_kernel<T, V, GATHER> : backward_kernel<T, 1, GATHER>, stream, blocks, THREADS, grad,
           inverse.as<const int>(), segment.as<const int>(), out.as<T>(), groups.as<float>(), grad_position, shape);
  });
}

}  // namespace

// tokens (B, N, C), out (B, L, C) contiguous; inverse, segment (B, N) int32 contiguous. Nothing is empty, B N < 2^31.
void gather_forward(Stream stream, View tokens, View inverse, View segment, MaybeView mask_token, MaybeView position,
                    View out) {
  forward<true>(stream, tokens, inverse, segment, mask_token, position, out);
}

void scatter_forward(Stream stream, View packed, View inverse, MaybeView mask_token, MaybeView position, View out) {
  forward<false>(stream, packed, inverse, View{}, mask_token, position, out);
}

// `blocks` share the places. groups (blocks, C) float32, for `sum_rows`; None without a mask token. Outputs contiguous.
void gather_backward(Stream stream, View grad, View inverse, View segment, View grad_tokens, MaybeView groups,
                     MaybeView grad_position, int64_t blocks) {
  backward<true>(stream, grad, inverse, segment, grad_tokens, groups, grad_position, blocks);
}

void scatter_backward(Stream stream, View grad, View inverse, View grad_packed, MaybeView groups, MaybeView grad_position,
                      int64_t blocks) {
  backward<false>(stream, grad, inverse, View{}, grad_packed, groups, grad_position, blocks);
}

Rows rows_of(View rows, View out, int64_t num_rows) {
  if (!rows.data) return {};
  require_dense(rows, Dtype::float32, {num_rows, out.sizes[0]}, "sum_rows: rows of the wrong kind");
  return {rows.as<const float>(), out, out.sizes[0], ceil_div(out.sizes[0], 32)};
}

// rows (R, C) float32, contiguous; out (C): the sum of the rows, always in the same order. Others (R, D) and (D), or None, in
// the same launch.
void sum_rows(Stream stream, View rows, View out, MaybeView other_rows, MaybeView other_out) {
  const int64_t num_rows = rows.sizes[0];
  const Rows one = rows_of(rows, out, num_rows), other = rows_of(other_rows, other_out, num_rows);
  launch(sum_rows_kernel, stream, one.blocks + other.blocks, THREADS, one, other, num_rows);
}

}  // namespace cmim
