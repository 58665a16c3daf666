// Depthwise convolution in which a neighbour counts only if it has the label of the centre; k = 3, 5 or 7.
//
// A block takes a tile of ROWS rows and a block of channels, a thread WIDTH neighbouring columns of one channel. Which
// neighbours count is the same for all channels: a block finds it once, one bit for each tap, and an ordinary
// multiply-add becomes one predicated by its bit; what does not count is never added. A thread walks down the input
// rows: each is loaded once and serves the k output rows that it is part of, whose sums stay in registers, as do the
// weights. The gradient of x is the same with flipped weights; that of the weights swaps the roles of weights and sums.
//
// Memory traffic (minimum): x, the labels and the output. x is read (1 + (k - 1) / ROWS) (1 + (k - 1) / columns) times,
// from the cache as far as it reaches, and labels once for each block of channels. Arithmetic bounds it: k^2
// multiply-adds for each output, besides loads, moves, index arithmetic and a bit test for every row of taps. Without a
// window of registers every tap costs a load, a comparison and a selection more: this should win against Triton.
#include "device.cuh"

namespace cmim {
namespace {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000  // pairs registers for its multiply-adds, and needs more of them
constexpr int BLOCKS = 2;
#else
constexpr int BLOCKS = 3;
#endif
constexpr int THREADS = 128, WIDTH = 4, ROWS = 16, MAX_GROUPS = 16, MAX_COLUMNS = MAX_GROUPS * WIDTH;
constexpr int MIN_GROUPS = 4, MAX_CHANNELS = THREADS / MIN_GROUPS;

struct Grid {
  View labels;
  int64_t batch, channels, height, width;
  int num_classes, groups;  // of WIDTH columns in a block
  bool channels_last;       // neighbouring threads take neighbouring channels, else neighbouring columns

  __host__ __device__ int columns() const { return groups * WIDTH; }
  __host__ __device__ int64_t channel_blocks() const { return ceil_div(channels, THREADS / groups); }
  __host__ __device__ int64_t tiles() const { return batch * ceil_div(height, ROWS) * ceil_div(width, columns()); }
  __device__ int group() const { return channels_last ? threadIdx.x / (THREADS / groups) : threadIdx.x % groups; }
  __device__ int channel() const { return channels_last ? threadIdx.x % (THREADS / groups) : threadIdx.x / groups; }
};

// Which neighbours of each output of a tile count: one byte for each row of taps, whose bit 7 says that the centre is valid.
template <int K>
struct Gates {
  int labels[ROWS + K - 1][MAX_COLUMNS + K - 1];
  alignas(4) uint8_t same[ROWS][K][MAX_COLUMNS];

  __device__ void fill(const Grid& grid, int64_t b, int64_t y0, int64_t x0) {
    const int columns = grid.columns(), width = columns + K - 1;
    __syncthreads();
    for (int i = threadIdx.x; i < (ROWS + K - 1) * width; i += THREADS) {
      const int64_t y = y0 + i / width - K / 2, x = x0 + i % width - K / 2;
      int64_t label = -1;
      if (y >= 0 && y < grid.height && x >= 0 && x < grid.width) {
        const int64_t* s = grid.labels.strides;
        label = load_label(grid.labels, b * s[0] + y * s[1] + x * s[2]);
      }
      labels[i / width][i % width] = label < grid.num_classes ? static_cast<int>(max(label, int64_t{-1})) : -1;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < ROWS * columns; i += THREADS) {
      const int y = i / columns, x = i % columns, centre = labels[y + K / 2][x + K / 2];
      for (int dy = 0; dy < K; ++dy) {
        unsigned bits = centre >= 0 ? 128 : 0;
#pragma unroll
        for (int dx = 0; dx < K; ++dx) bits |= static_cast<unsigned>(centre >= 0 && labels[y + dy][x + dx] == centre) << dx;
        same[y][dy][x] = static_cast<uint8_t>(bits);
      }
    }
    __syncthreads();
  }

  // The bytes of a thread's WIDTH columns.
  __device__ unsigned of(int y, int dy, int group) const {
    return *reinterpret_cast<const unsigned*>(&same[y][dy][group * WIDTH]);
  }
};

// Where a block works.
struct Place {
  int64_t b, y0, x0;

  __device__ Place(const Grid& grid, int64_t tile) {
    const int64_t across = ceil_div(grid.width, grid.columns()), down = ceil_div(grid.height, ROWS);
    x0 = tile % across * grid.columns();
    y0 = tile / across % down * ROWS;
    b = tile / across / down;
  }
};

// COUNT neighbours of row y from column x on, zero outside the image.
template <int COUNT, typename T>
__device__ __forceinline__ void load_row(const View& image, const T* channel, const Grid& grid, int64_t y, int64_t x,
                                         float (&row)[COUNT]) {
  const bool inside = y >= 0 && y < grid.height;
#pragma unroll
  for (int i = 0; i < COUNT; ++i)
    row[i] = inside && x + i >= 0 && x + i < grid.width
                 ? widen(channel[y * image.strides[2] + (x + i) * image.strides[3]]) : 0;
}

template <typename T, int K>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    convolve_kernel(View x, Grid grid, View weight, bool flipped, View bias, View out) {
  __shared__ Gates<K> gates;
  __shared__ float taps[MAX_CHANNELS * K * K];
  const int channels = THREADS / grid.groups;
  const int64_t first_channel = blockIdx.x % grid.channel_blocks() * channels, c = first_channel + grid.channel();
  const bool active = c < grid.channels;
  for (int i = threadIdx.x; i < channels * K * K; i += THREADS) {
    const int64_t own = first_channel + i / (K * K), row = i / K % K, column = i % K;
    taps[flipped ? i / (K * K) * (K * K) + K * K - 1 - i % (K * K) : i] =
        own < grid.channels
            ? load<1>(weight, own * weight.strides[0] + row * weight.strides[1] + column * weight.strides[2])[0] : 0;
  }
  __syncthreads();
  float w[K][K];
#pragma unroll
  for (int i = 0; i < K * K; ++i) w[i / K][i % K] = taps[grid.channel() * K * K + i];
  const float shift = active && bias.data ? load<1>(bias, c * bias.strides[0])[0] : 0;

  for (int64_t tile = blockIdx.x / grid.channel_blocks(); tile < grid.tiles(); tile += gridDim.x / grid.channel_blocks()) {
    const Place place(grid, tile);
    gates.fill(grid, place.b, place.y0, place.x0);
    if (!active) continue;
    const int group = grid.group();
    const int64_t first = place.x0 + group * WIDTH;
    const T* const in = x.as<const T>() + place.b * x.strides[0] + c * x.strides[1];
    T* const result = out.as<T>() + place.b * out.strides[0] + c * out.strides[1];
    float sums[K][WIDTH] = {};  // sums[i]: of the output row whose taps of row i meet the input row at hand
#pragma unroll 1
    for (int r = 0; r < ROWS + K - 1; ++r) {
      float row[WIDTH + K - 1];
      load_row(x, in, grid, place.y0 + r - K / 2, first - K / 2, row);
#pragma unroll
      for (int i = 0; i < K; ++i) {
        if (r - i < 0 || r - i >= ROWS) continue;
        const unsigned bits = gates.of(r - i, i, group);
#pragma unroll
        for (int t = 0; t < WIDTH; ++t)
#pragma unroll
          for (int j = 0; j < K; ++j)
            if (bits & (1u << (8 * t + j))) sums[i][t] = fmaf(w[i][j], row[t + j], sums[i][t]);
      }
      const int done = r - (K - 1);
      const int64_t y = place.y0 + done;
      if (done >= 0 && y < grid.height) {
        const unsigned bits = gates.of(done, 0, group);
#pragma unroll
        for (int t = 0; t < WIDTH; ++t)
          if (first + t < grid.width)
            result[y * out.strides[2] + (first + t) * out.strides[3]] =
                narrow<T>(bits & (128u << 8 * t) ? sums[K - 1][t] + shift : 0);
      }
#pragma unroll
      for (int i = K - 1; i > 0; --i)
#pragma unroll
        for (int t = 0; t < WIDTH; ++t) sums[i][t] = sums[i - 1][t];
#pragma unroll
      for (int t = 0; t < WIDTH; ++t) sums[0][t] = 0;
    }
  }
}

// of_weight (blocks, C, K, K) and of_bias (blocks, C) float32, the latter or null: what the blocks of tiles find.
template <typename T, int K>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    weight_kernel(View x, View grad, Grid grid, float* of_weight, float* of_bias) {
  __shared__ Gates<K> gates;
  __shared__ float parts[THREADS];
  const int64_t c = blockIdx.x % grid.channel_blocks() * (THREADS / grid.groups) + grid.channel();
  const int64_t block = blockIdx.x / grid.channel_blocks(), blocks = gridDim.x / grid.channel_blocks();
  const bool active = c < grid.channels;
  const int group = grid.group();
  float sums[K][K] = {}, bias_sum = 0;
  for (int64_t tile = block; tile < grid.tiles(); tile += blocks) {
    const Place place(grid, tile);
    gates.fill(grid, place.b, place.y0, place.x0);
    if (!active) continue;
    const int64_t first = place.x0 + group * WIDTH;
    const T* const in = x.as<const T>() + place.b * x.strides[0] + c * x.strides[1];
    const T* const out = grad.as<const T>() + place.b * grad.strides[0] + c * grad.strides[1];
    float g[K][WIDTH] = {};  // g[i]: of the output row whose taps of row i meet the input row at hand
#pragma unroll 1
    for (int r = 0; r < ROWS + K - 1; ++r) {
#pragma unroll
      for (int i = K - 1; i > 0; --i)
#pragma unroll
        for (int t = 0; t < WIDTH; ++t) g[i][t] = g[i - 1][t];
      float row[WIDTH + K - 1];
      load_row(x, in, grid, place.y0 + r - K / 2, first - K / 2, row);
      if (r < ROWS) {
        load_row(grad, out, grid, place.y0 + r, first, g[0]);
        const unsigned bits = gates.of(r, 0, group);
#pragma unroll
        for (int t = 0; t < WIDTH; ++t)
          if (bits & (128u << 8 * t)) bias_sum += g[0][t];
      }
#pragma unroll
      for (int i = 0; i < K; ++i) {
        if (r - i < 0 || r - i >= ROWS) continue;
        const unsigned bits = gates.of(r - i, i, group);
#pragma unroll
        for (int t = 0; t < WIDTH; ++t)
#pragma unroll
          for (int j = 0; j < K; ++j)
            if (bits & (1u << (8 * t + j))) sums[i][j] = fmaf(g[i][t], row[t + j], sums[i][j]);
      }
    }
  }
  // The groups of a channel in their order.
  const int channels = THREADS / grid.groups, channel = grid.channel();
  const auto total = [&](float value) {
    __syncthreads();
    parts[channel * grid.groups + group] = value;
    __syncthreads();
    float sum = 0;
    if (static_cast<int>(threadIdx.x) < channels)
#pragma unroll 1
      for (int other = 0; other < grid.groups; ++other) sum += parts[threadIdx.x * grid.groups + other];
    return sum;
  };
  const int64_t written = blockIdx.x % grid.channel_blocks() * channels + threadIdx.x;
  const bool writes = static_cast<int>(threadIdx.x) < channels && written < grid.channels;
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

Grid grid_of(const View& x, const View& labels, int64_t num_classes) {
  require(labels.dimensions == 3 && labels.sizes[0] == x.sizes[0] && labels.sizes[1] == x.sizes[2] &&
              labels.sizes[2] == x.sizes[3],
          "same_class_conv2d: labels of the wrong kind");
  const bool channels_last = x.strides[1] < x.strides[3];
  int groups = MIN_GROUPS;
  while (!channels_last && groups < MAX_GROUPS && groups * WIDTH < x.sizes[3]) groups *= 2;
  return {labels, x.sizes[0], x.sizes[1], x.sizes[2], x.sizes[3], static_cast<int>(num_classes), groups, channels_last};
}

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
  const Grid grid = grid_of(x, labels, num_classes);
  require_alike(out, x, "same_class_conv2d: an output of the wrong kind");
  require(weight.sizes[0] == grid.channels && weight.sizes[1] == weight.sizes[2],
          "same_class_conv2d: a weight of the wrong kind");
  by_dtype(x.dtype, [&](auto element) {
    by_size(weight.sizes[1], [&](auto size) {
      launch(convolve_kernel<decltype(element), size()>, stream, grid.tiles() * grid.channel_blocks(), THREADS, x, grid,
             weight, flipped, bias, out);
    });
  });
}

// of_weight (blocks, C, k, k), of_bias (blocks, C) or None, float32, contiguous: for `sum_rows`. `blocks` share the tiles.
void same_class_conv2d_weight(Stream stream, View x, View grad, View labels, int64_t num_classes, View of_weight,
                              MaybeView of_bias) {
  const Grid grid = grid_of(x, labels, num_classes);
  const int64_t blocks = of_weight.sizes[0], k = of_weight.sizes[2];
  require_alike(grad, x, "same_class_conv2d: a gradient of the wrong kind");
  require_dense(of_weight, Dtype::float32, {blocks, grid.channels, k, k}, "same_class_conv2d: of_weight of the wrong kind");
  if (of_bias.data)
    require_dense(of_bias, Dtype::float32, {blocks, grid.channels}, "same_class_conv2d: of_bias of the wrong kind");
  by_dtype(x.dtype, [&](auto element) {
    by_size(k, [&](auto size) {
      launch(weight_kernel<decltype(element), size()>, stream, blocks * grid.channel_blocks(), THREADS, x, grad,
             grid, of_weight.as<float>(), of_bias.as<float>());
    });
  });
}

}  // namespace cmim
