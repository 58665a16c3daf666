// Depthwise convolution in which a neighbour counts only if it has the label of the centre; k = 3, 5 or 7.
//
// A block takes a tile of some rows, COLUMNS columns and CHANNELS channels, a thread WIDTH neighbouring columns of one
// channel. Which neighbours count is the same for all channels: a block finds it once, one bit for each tap, and an ordinary
// multiply-add becomes one predicated by its bit; what does not count is never added. A block walks down the input rows,
// CHUNK at a time, which it copies to shared memory: there, addresses need no arithmetic. A thread loads each row once; it
// serves the k output rows that it is part of, whose sums stay in registers, as do the weights. The gradient of x is the same
// with flipped weights; that of the weights swaps the roles of weights and sums.
//
// Memory traffic (minimum): x, the labels and the output. x is read (1 + (k - 1) / rows) (1 + (k - 1) / COLUMNS) times, from
// the cache as far as it reaches, and labels once for each block of channels. Arithmetic bounds it: k^2 multiply-adds for
// each output, which are 3 of 5 instructions of the loop over rows; the others set predicates (k for each output and row of
// taps), load and move.
#include "same_class_conv2d.cuh"

namespace cmim {
namespace {

template <int K>
__device__ __forceinline__ void shift_down(float (&of_rows)[K][WIDTH]) {
#pragma unroll
  for (int i = K - 1; i > 0; --i)
#pragma unroll
    for (int t = 0; t < WIDTH; ++t) of_rows[i][t] = of_rows[i - 1][t];
}

template <typename T, int K>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    convolve_kernel(View x, Grid grid, View weight, bool flipped, View bias, View out, bool vectors, bool channels_last) {
  __shared__ Gates<K> gates;
  __shared__ Chunk<K> chunk;
  __shared__ float taps[CHANNELS * K * K];
  const int64_t first_channel = grid.first_channel(), c = first_channel + own_channel();
  const bool active = c < grid.channels;
  for (int i = threadIdx.x; i < CHANNELS * K * K; i += THREADS) {
    const int64_t own = first_channel + i / (K * K), row = i / K % K, column = i % K;
    taps[flipped ? i / (K * K) * (K * K) + K * K - 1 - i % (K * K) : i] =
        own < grid.channels
            ? load<1>(weight, own * weight.strides[0] + row * weight.strides[1] + column * weight.strides[2])[0] : 0;
  }
  __syncthreads();
  float w[K][K];
#pragma unroll
  for (int i = 0; i < K * K; ++i) w[i / K][i % K] = taps[own_channel() * K * K + i];
  const float shift = active && bias.data ? load<1>(bias, c * bias.strides[0])[0] : 0;
  const int group = own_group();

  for (int64_t tile = blockIdx.x / grid.channel_blocks(); tile < grid.tiles(); tile += gridDim.x / grid.channel_blocks()) {
    const Place place(grid, tile);
    gates.fill(grid, place);
    const int64_t first = place.x0 + group * WIDTH;
    const int inside = active ? static_cast<int>(min(grid.width - first, int64_t{WIDTH})) : 0;
    const int right = static_cast<int>(out.strides[3]);
    T* result = out.as<T>() + place.b * out.strides[0] + c * out.strides[1] + place.y0 * out.strides[2] + first * right;
    float sums[K][WIDTH] = {};  // sums[i]: of the output row whose taps of row i meet the input row at hand
    const auto fill = [&](int r) { chunk.template fill<T>(x, grid, place, r, vectors, channels_last); };
    walk<K>(place.rows, fill, [&](int r, auto near_edge) {
      constexpr bool edge = decltype(near_edge)::value;
      float row[WIDTH + K - 1];
      chunk.row(static_cast<unsigned>(r) % CHUNK, group, own_channel(), row);
#pragma unroll
      for (int i = 0; i < K; ++i) {
        if (edge && (r - i < 0 || r - i >= place.rows)) continue;
        const unsigned bits = gates.of(r - i, i, group);
#pragma unroll
        for (int t = 0; t < WIDTH; ++t)
#pragma unroll
          for (int j = 0; j < K; ++j) add_if(bits, 1u << (8 * t + j), sums[i][t], w[i][j], row[t + j]);
      }
      if (!edge || r >= K - 1) {
        const unsigned bits = gates.of(r - (K - 1), 0, group);
#pragma unroll
        for (int t = 0; t < WIDTH; ++t) {
          const float sum = sums[K - 1][t] + (bits & (128u << 8 * t) ? shift : 0);
          if (t < inside) result[t * right] = narrow<T>(sum);
        }
        result += out.strides[2];
      }
      shift_down(sums);
#pragma unroll
      for (int t = 0; t < WIDTH; ++t) sums[0][t] = 0;
    });
  }
}

// of_weight (blocks, C, K, K) and of_bias (blocks, C) float32, the latter or null: what the blocks of tiles find.
template <typename T, int K>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    weight_kernel(View x, View grad, Grid grid, float* of_weight, float* of_bias, bool vectors, bool channels_last) {
  __shared__ Gates<K> gates;
  __shared__ Chunk<K> chunk;
  __shared__ float parts[THREADS];
  const int64_t first_channel = grid.first_channel(), c = min(first_channel + own_channel(), grid.channels - 1);
  const int64_t block = blockIdx.x / grid.channel_blocks(), blocks = gridDim.x / grid.channel_blocks();
  const int group = own_group();
  float sums[K][K] = {}, bias_sum = 0;
  for (int64_t tile = block; tile < grid.tiles(); tile += blocks) {
    const Place place(grid, tile);
    gates.fill(grid, place);
    const int64_t first = place.x0 + group * WIDTH;
    const T* out = grad.as<const T>() + place.b * grad.strides[0] + c * grad.strides[1] + place.y0 * grad.strides[2];
    int columns[WIDTH];
#pragma unroll
    for (int t = 0; t < WIDTH; ++t) columns[t] = static_cast<int>(min(first + t, grid.width - 1) * grad.strides[3]);
    float g[K][WIDTH] = {};  // g[i]: of the output row whose taps of row i meet the input row at hand
    const auto fill = [&](int r) { chunk.template fill<T>(x, grid, place, r, vectors, channels_last); };
    walk<K>(place.rows, fill, [&](int r, auto near_edge) {
      constexpr bool edge = decltype(near_edge)::value;
      float row[WIDTH + K - 1];
      chunk.row(static_cast<unsigned>(r) % CHUNK, group, own_channel(), row);
      shift_down(g);
      if (!edge || r < place.rows) {
        const unsigned bits = gates.of(r, 0, group);
#pragma unroll
        for (int t = 0; t < WIDTH; ++t) {
          g[0][t] = widen(out[columns[t]]);
          if (bits & (128u << 8 * t)) bias_sum += g[0][t];
        }
        out += grad.strides[2];
      }
#pragma unroll
      for (int i = 0; i < K; ++i) {
        if (edge && (r - i < 0 || r - i >= place.rows)) continue;
        const unsigned bits = gates.of(r - i, i, group);
#pragma unroll
        for (int t = 0; t < WIDTH; ++t)
#pragma unroll
          for (int j = 0; j < K; ++j) add_if(bits, 1u << (8 * t + j), sums[i][j], g[i][t], row[t + j]);
      }
    });
  }
  // The groups of a channel in their order.
  const auto total = [&](float value) {
    __syncthreads();
    parts[own_channel() * GROUPS + group] = value;
    __syncthreads();
    float sum = 0;
    if (group == 0)
#pragma unroll
      for (int other = 0; other < GROUPS; ++other) sum += parts[own_channel() * GROUPS + other];
    return sum;
  };
  const int64_t written = first_channel + own_channel();
  const bool writes = group == 0 && written < grid.channels;
#pragma unroll
  for (int i = 0; i < K; ++i)
#pragma unroll
    for (int j = 0; j < K; ++j) {
      const float sum = total(sums[i][j]);
      if (writes) of_weight[((block * grid.channels + written) * K + i) * K + j] = sum;
    }
  if (of_bias) {
    const float sum = total(bias_sum);
    if (writes) of_bias[block * grid.channels + written] = sum;
  }
}

// The grid whose tiles have the height with which `programs` blocks are done first: in the fewest rounds of the fewest rows.
Grid grid_of(const View& x, const View& labels, int64_t num_classes, int64_t k, int64_t programs) {
  require(labels.dimensions == 3 && labels.sizes[0] == x.sizes[0] && labels.sizes[1] == x.sizes[2] &&
              labels.sizes[2] == x.sizes[3],
          "same_class_conv2d: labels of the wrong kind");
  Grid grid{labels, x.sizes[0], x.sizes[1], x.sizes[2], x.sizes[3], static_cast<int>(num_classes), 0};
  int64_t least = INT64_MAX;
  for (int64_t down = ceil_div(grid.height, ROWS); down <= ceil_div(grid.height, CHUNK); ++down) {
    Grid other = grid;
    other.rows = static_cast<int>(ceil_div(grid.height, down));
    const int64_t rounds = ceil_div(other.tiles() * other.channel_blocks(), programs), rows = rounds * (other.rows + k - 1);
    if (rows < least) grid = other, least = rows;
  }
  return grid;
}

// Whether the columns of a row are less than 2^31 elements apart, as the kernels' offsets require.
bool columns_are_near(const View& x) { return x.sizes[3] * x.strides[3] <= INT32_MAX; }

template <typename F>
void by_size(int64_t k, F f) {
  if (k == 3) return f(std::integral_constant<int, 3>{});
  if (k == 5) return f(std::integral_constant<int, 5>{});
  if (k == 7) return f(std::integral_constant<int, 7>{});
  throw std::runtime_error("cmim_cuda: the kernel's size must be 3, 5 or 7");
}

}  // namespace

// x, out (B, C, h, w); labels (B, h, w); weight (C, k, k), which `flipped` turns by 180 degrees. Nothing is empty.
void same_class_conv2d(Stream stream, View x, View labels, View weight, bool flipped, MaybeView bias, int64_t num_classes,
                       View out) {
  require_alike(out, x, "same_class_conv2d: an output of the wrong kind");
  require(columns_are_near(out), "same_class_conv2d: an output whose columns are too far apart");
  require(weight.sizes[0] == x.sizes[1] && weight.sizes[1] == weight.sizes[2],
          "same_class_conv2d: a weight of the wrong kind");
  by_dtype(x.dtype, [&](auto element) {
    by_size(weight.sizes[1], [&](auto size) {
      const auto kernel = convolve_kernel<decltype(element), size()>;
      const int64_t programs = resident(kernel, THREADS);
      const Grid grid = grid_of(x, labels, num_classes, size(), programs);
      // All blocks of tiles have all blocks of channels.
      const int64_t blocks = std::max<int64_t>(1, std::min(grid.tiles(), programs / grid.channel_blocks()));
      launch(kernel, stream, blocks * grid.channel_blocks(), THREADS, x, grid, weight, flipped, bias, out,
             packs(x, 4, 1, grid.channels, VECTOR), x.strides[1] < x.strides[3]);
    });
  });
}

// of_weight (blocks, C, k, k), of_bias (blocks, C) or None, float32, contiguous: for `sum_rows`. `blocks` share the tiles.
void same_class_conv2d_weight(Stream stream, View x, View grad, View labels, int64_t num_classes, View of_weight,
                              MaybeView of_bias) {
  const int64_t blocks = of_weight.sizes[0], k = of_weight.sizes[2];
  require_alike(grad, x, "same_class_conv2d: a gradient of the wrong kind");
  require(columns_are_near(grad), "same_class_conv2d: a gradient whose columns are too far apart");
  require_dense(of_weight, Dtype::float32, {blocks, x.sizes[1], k, k}, "same_class_conv2d: of_weight of the wrong kind");
  if (of_bias.data)
    require_dense(of_bias, Dtype::float32, {blocks, x.sizes[1]}, "same_class_conv2d: of_bias of the wrong kind");
  by_dtype(x.dtype, [&](auto element) {
    by_size(k, [&](auto size) {
      const Grid grid = grid_of(x, labels, num_classes, size(), blocks * ceil_div(x.sizes[1], CHANNELS));
      launch(weight_kernel<decltype(element), size()>, stream, blocks * grid.channel_blocks(), THREADS, x, grad, grid,
             of_weight.as<float>(), of_bias.as<float>(), packs(x, 4, 1, grid.channels, VECTOR),
             x.strides[1] < x.strides[3]);
    });
  });
}

}  // namespace cmim
