// What the kernels of same_class_conv2d.cu share: tiles, which neighbours count, and rows in shared memory.
#pragma once

#include "device.cuh"

namespace cmim {
namespace {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000  // pairs registers for its multiply-adds, and needs more of them
constexpr int BLOCKS = 2;
#else
constexpr int BLOCKS = CONVOLUTION_PROGRAMS;
#endif
constexpr int CHANNELS = CONVOLUTION_CHANNELS, GROUPS = 4, THREADS = GROUPS * CHANNELS, WIDTH = 4, COLUMNS = GROUPS * WIDTH;
constexpr int ROWS = 40, CHUNK = 8, VECTOR = 4;

struct Grid {
  View labels;
  int64_t batch, channels, height, width;
  int num_classes, rows;  // of a tile, at most ROWS

  __host__ __device__ int64_t channel_blocks() const { return ceil_div(channels, CHANNELS); }
  __host__ __device__ int64_t tiles() const { return batch * ceil_div(height, rows) * ceil_div(width, COLUMNS); }
  __device__ int64_t first_channel() const { return blockIdx.x % channel_blocks() * CHANNELS; }
};

__device__ __forceinline__ int own_group() { return threadIdx.x / CHANNELS; }
__device__ __forceinline__ int own_channel() { return threadIdx.x % CHANNELS; }

// Where a block works.
struct Place {
  int64_t b;
  int y0, x0, rows;

  __device__ Place(const Grid& grid, int64_t tile) {
    const int64_t across = ceil_div(grid.width, COLUMNS), down = ceil_div(grid.height, grid.rows);
    x0 = static_cast<int>(tile % across) * COLUMNS;
    y0 = static_cast<int>(tile / across % down) * grid.rows;
    b = tile / across / down;
    rows = min(grid.rows, static_cast<int>(grid.height) - y0);
  }
};

// Which neighbours of each output of a tile count: one byte for each row of taps, whose bit 7 says that the centre is valid.
template <int K>
struct Gates {
  int labels[ROWS + K - 1][COLUMNS + K - 1];
  alignas(4) uint8_t same[ROWS][K][COLUMNS];

  __device__ void fill(const Grid& grid, const Place& place) {
    constexpr int WIDE = COLUMNS + K - 1;
    __syncthreads();
    for (int i = threadIdx.x; i < (place.rows + K - 1) * WIDE; i += THREADS) {
      const int y = place.y0 + i / WIDE - K / 2, x = place.x0 + i % WIDE - K / 2;
      int64_t label = -1;
      if (y >= 0 && y < grid.height && x >= 0 && x < grid.width) {
        const int64_t* s = grid.labels.strides;
        label = load_label(grid.labels, place.b * s[0] + y * s[1] + x * s[2]);
      }
      labels[i / WIDE][i % WIDE] = label < grid.num_classes ? static_cast<int>(max(label, int64_t{-1})) : -1;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < place.rows * COLUMNS; i += THREADS) {
      const int y = i / COLUMNS, x = i % COLUMNS, centre = labels[y + K / 2][x + K / 2];
      for (int dy = 0; dy < K; ++dy) {
        unsigned bits = centre >= 0 ? 128 : 0;
#pragma unroll
        for (int dx = 0; dx < K; ++dx) bits |= static_cast<unsigned>(centre >= 0 && labels[y + dy][x + dx] == centre) << dx;
        same[y][dy][x] = static_cast<uint8_t>(bits);
      }
    }
  }

  // The bytes of a thread's WIDTH columns.
  __device__ __forceinline__ unsigned of(int y, int dy, int group) const {
    return *reinterpret_cast<const unsigned*>(&same[y][dy][group * WIDTH]);
  }
};

// sum += a * b if `bits` has one of the bits `mask`. In C++ the test of bit 0 would cost two instructions more.
__device__ __forceinline__ void add_if(unsigned bits, unsigned mask, float& sum, float a, float b) {
#ifdef __CUDA_ARCH__
  asm("{.reg .pred p; .reg .b32 t; and.b32 t, %1, %2; setp.ne.u32 p, t, 0; @p fma.rn.f32 %0, %3, %4, %0;}"
      : "+f"(sum) : "r"(bits), "r"(mask), "f"(a), "f"(b));
#else
  if (bits & mask) sum = fmaf(a, b, sum);
#endif
}

// CHUNK rows of a tile with its neighbours. Rows and columns outside of the image hold what lies at its edge: they are never
// used, because no label outside equals a centre's.
template <int K>
struct Chunk {
  static constexpr int WIDE = COLUMNS + K - 1;
  alignas(16) float element[CHUNK][WIDE][CHANNELS];

  template <typename T, int V>
  __device__ void copy(const View& image, const Grid& grid, const Place& place, int r0, bool channels_last) {
    constexpr int LANES = CHANNELS / V, POSITIONS = CHUNK * WIDE;
    const T* const from = image.as<const T>() + place.b * image.strides[0];
#pragma unroll 2
    for (int i = threadIdx.x; i < POSITIONS * LANES; i += THREADS) {
      const int lane = channels_last ? i % LANES : i / POSITIONS, position = channels_last ? i / LANES : i % POSITIONS;
      const int row = position / WIDE, column = position % WIDE;
      const int64_t y = min(max(place.y0 + r0 + row - K / 2, 0), static_cast<int>(grid.height) - 1);
      const int64_t x = min(max(place.x0 + column - K / 2, 0), static_cast<int>(grid.width) - 1);
      const int64_t c = min(grid.first_channel() + lane * V, grid.channels - V);
      const T* const address = from + c * image.strides[1] + y * image.strides[2] + x * image.strides[3];
      store(&element[row][column][lane * V], load<V>(address));
    }
  }

  // Rows r0 - K / 2 and following of a tile.
  template <typename T>
  __device__ void fill(const View& image, const Grid& grid, const Place& place, int r0, bool vectors, bool channels_last) {
    __syncthreads();
    if (vectors) copy<T, VECTOR>(image, grid, place, r0, true);
    else copy<T, 1>(image, grid, place, r0, channels_last);
    __syncthreads();
  }

  __device__ __forceinline__ void row(unsigned row, int group, int channel, float (&values)[WIDTH + K - 1]) const {
#pragma unroll
    for (int i = 0; i < WIDTH + K - 1; ++i) values[i] = element[row][group * WIDTH + i][channel];
  }
};

// step(r, near_edge) for the input rows r of a tile, in their order; all K rows of taps of those that are not near the edge
// meet outputs of the tile. fill(r) before each CHUNK of them.
template <int K, typename Fill, typename Step>
__device__ __forceinline__ void walk(int rows, Fill fill, Step step) {
  int r = 0;
  const auto near_edge = [&](int end) {
#pragma unroll 1
    for (; r < end; ++r) step(r, std::true_type{});
  };
#pragma unroll 1
  while (r < rows + K - 1) {
    fill(r);
    const int end = min(r + CHUNK, rows + K - 1);
    near_edge(min(end, K - 1));
#pragma unroll 1
    for (; r + 1 < min(end, rows); r += 2) {
      step(r, std::false_type{});
      step(r + 1, std::false_type{});
    }
    near_edge(end);
  }
}

}  // namespace
}  // namespace cmim
