// Mean feature of the visible and of the masked tokens of each class in each image.
//
// Tokens are added up in packed order, RUN of them by one group of lanes, so that sums stay in registers, no class costs
// anything but its tokens, and the order of summation is fixed. A segment that begins in a run leaves its sum in `mean`;
// what continues from an earlier run goes to `rest`, and a second kernel adds the pieces of segments that have several.
//
// Memory traffic (minimum): the features and the means. Besides: `order`, and `rest`, a row of float32 for each 64 tokens.
// Features whose channels are neighbours are read 16 bytes at a time, whole rows in any order; others one element at a time
// along the tokens, whose order within a class is that of memory. Triton reads tokens where they lie, through the tensor
// cores, and needs no order: with a layout at hand expect a tie, without one Triton wins by the launches of the packing.
// Backward (minimum): the gradient of the features, 16 bytes at a time; a row of grad_mean for each token comes from the
// cache.
#include "device.cuh"

namespace cmim {
namespace {

constexpr int THREADS = 128, RUN = CENTROIDS_RUN, UNROLL = 8, CHANNELS = 8;

struct Features : TokenGrid {
  View x;
  int64_t channels;

  explicit Features(const View& x)
      : TokenGrid(x.strides, x.sizes, x.sizes[3] > 0), x(x), channels(x.sizes[3] > 0 ? x.sizes[1] : x.sizes[2]) {}

  bool aligned(int V) const {
    return reinterpret_cast<uintptr_t>(x.data) % std::min<int64_t>(16, itemsize(x.dtype) * V) == 0 && image % V == 0;
  }
  bool channels_pack(int V) const {
    return aligned(V) && channel == 1 && channels % V == 0 && row % V == 0 && column % V == 0;
  }
  bool tokens_pack(int64_t tokens, int V) const {
    return aligned(V) && column == 1 && (row == width.divisor || row == 0) && channel % V == 0 && tokens % V == 0;
  }
};

struct Sums {
  const int *order, *offsets;  // (B, N), (B, 2K + 2)
  float *mean, *rest;          // (B, 2K, C), (B, runs, C)
  int64_t batch, tokens, runs, channels;
  int segments;  // 2K

  // The segment that the packed position i belongs to.
  __device__ int segment_at(int64_t b, int64_t i) const {
    const int* starts = offsets + b * (segments + 2);
    int low = 0, high = segments + 1;  // starts[low] <= i < starts[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (starts[middle] <= i) low = middle;
      else high = middle;
    }
    return low;
  }

  // add(first, last) returns the sum of packed rows; write(where, sum) keeps it. Goes through the segments of a run.
  template <typename Add, typename Write>
  __device__ void walk(int64_t b, int64_t run, Add add, Write write) const {
    const int* starts = offsets + b * (segments + 2);
    const int64_t begin = run * RUN, end = min(begin + RUN, tokens);
    int64_t i = begin;
    for (int s = segment_at(b, begin); s < segments && i < end; ++s) {
      const int64_t stop = min(end, static_cast<int64_t>(starts[s + 1]));
      if (stop <= i) continue;
      const auto sum = add(i, stop);
      const bool begins_here = starts[s] >= begin, ends_here = starts[s + 1] <= end;
      const float share = begins_here && ends_here ? static_cast<float>(starts[s + 1] - starts[s]) : 1.0f;
      write(begins_here ? mean + (b * segments + s) * channels : rest + (b * runs + run) * channels, sum, share);
      i = stop;
    }
  }
};

// A few lanes take a run, and a vector of channels each.
template <typename T, int V>
__global__ void __launch_bounds__(THREADS, 4) row_kernel(Features features, Sums sums, int lanes) {
  const int lane = threadIdx.x & (lanes - 1), at_once = THREADS / lanes;
  const int64_t slices = ceil_div(sums.channels, lanes * V), items = sums.batch * sums.runs * slices;
  for (int64_t item = blockIdx.x * static_cast<int64_t>(at_once) + threadIdx.x / lanes; item < items;
       item += gridDim.x * static_cast<int64_t>(at_once)) {
    const int64_t c = (item % slices * lanes + lane) * V, run = item / slices % sums.runs, b = item / slices / sums.runs;
    if (c >= sums.channels) continue;
    const int* order = sums.order + b * sums.tokens;
    const T* x = features.x.as<const T>() + c;
    sums.walk(
        b, run,
        [&](int64_t first, int64_t last) {
          Floats<V> sum = zeros<V>();
          for (int64_t i = first; i < last; i += UNROLL) {
            Floats<V> rows[UNROLL];
#pragma unroll
            for (int u = 0; u < UNROLL; ++u)
              rows[u] = i + u < last ? load<V>(x + features.token(b, order[i + u])) : zeros<V>();
#pragma unroll
            for (int u = 0; u < UNROLL; ++u)
#pragma unroll
              for (int j = 0; j < V; ++j) sum[j] += rows[u][j];
          }
          return sum;
        },
        [&](float* row, Floats<V> sum, float share) {
#pragma unroll
          for (int j = 0; j < V; ++j) sum[j] /= share;
          store(row + c, sum);
        });
  }
}

// A warp takes a run and CHANNELS channels; its lanes are tokens.
template <typename T>
__global__ void __launch_bounds__(THREADS, 4) column_kernel(Features features, Sums sums) {
  const int lane = threadIdx.x % 32, warps = THREADS / 32;
  const int64_t slices = ceil_div(sums.channels, CHANNELS), items = sums.batch * sums.runs * slices;
  for (int64_t item = blockIdx.x * int64_t{warps} + threadIdx.x / 32; item < items; item += gridDim.x * int64_t{warps}) {
    const int64_t run = item % sums.runs, b = item / sums.runs / slices;
    const int64_t first_channel = item / sums.runs % slices * CHANNELS;
    const int count = static_cast<int>(min(int64_t{CHANNELS}, sums.channels - first_channel));
    const int* order = sums.order + b * sums.tokens;
    sums.walk(
        b, run,
        [&](int64_t first, int64_t last) {
          Floats<CHANNELS> sum = zeros<CHANNELS>();
          for (int64_t i = first + lane; i < last; i += 32) {
            const T* x = features.x.as<const T>() + features.token(b, order[i]) + first_channel * features.channel;
#pragma unroll
            for (int j = 0; j < CHANNELS; ++j)
              if (j < count) sum[j] += widen(x[j * features.channel]);
          }
#pragma unroll
          for (int j = 0; j < CHANNELS; ++j) {
#pragma unroll
            for (int distance = 16; distance > 0; distance /= 2) sum[j] += __shfl_xor_sync(ALL_LANES, sum[j], distance);
          }
          return sum;
        },
        [&](float* row, Floats<CHANNELS> sum, float share) {
#pragma unroll
          for (int j = 0; j < CHANNELS; ++j)
            if (lane == 0 && j < count) row[first_channel + j] = sum[j] / share;
        });
  }
}

// Writes the counts, the means of empty segments, and completes those of segments with several runs.
__global__ void __launch_bounds__(THREADS) mean_kernel(Sums sums, int* count) {
  for (int64_t item = blockIdx.x; item < sums.batch * sums.segments; item += gridDim.x) {
    const int64_t b = item / sums.segments;
    const int* start = sums.offsets + b * (sums.segments + 2) + item % sums.segments;
    const int begin = start[0], end = start[1];
    if (threadIdx.x == 0) count[item] = end - begin;
    const int64_t first = begin / RUN + 1, last = (end - 1) / RUN;
    if (begin < end && first > last) continue;
    for (int64_t c = threadIdx.x; c < sums.channels; c += THREADS) {
      float* mean = sums.mean + item * sums.channels + c;
      float sum = begin < end ? *mean : 0;
#pragma unroll 8
      for (int64_t run = first; run <= last && begin < end; ++run)
        sum += sums.rest[(b * sums.runs + run) * sums.channels + c];
      *mean = sum / static_cast<float>(max(end - begin, 1));
    }
  }
}

struct Shares {
  View grad_mean, labels, masked;  // (B, K, 2, C), (B, N), (B, N)
  const int* count;                // (B, K, 2)
  int64_t batch, tokens;
  int num_classes;

  // Where the gradient of a token's centroid lies, and its count; 0 for a token without.
  __device__ float of(int64_t b, int64_t n, int64_t& offset) const {
    const int segment = load_segment(labels, masked, b, n, num_classes);
    if (segment == 2 * num_classes) return 0;
    const int64_t* s = grad_mean.strides;
    offset = b * s[0] + segment / 2 * s[1] + segment % 2 * s[2];
    return static_cast<float>(count[b * 2 * num_classes + segment]);
  }
};

// A few lanes take a token, and vectors of channels.
template <typename T, int V>
__global__ void __launch_bounds__(THREADS, 4) spread_row_kernel(Shares shares, Features grad, int lanes, bool packs) {
  const int lane = threadIdx.x & (lanes - 1), at_once = THREADS / lanes;
  for (int64_t item = blockIdx.x * static_cast<int64_t>(at_once) + threadIdx.x / lanes; item < shares.batch * shares.tokens;
       item += gridDim.x * static_cast<int64_t>(at_once)) {
    const int64_t b = item / shares.tokens, n = item % shares.tokens;
    int64_t offset = 0;
    const float count = shares.of(b, n, offset);
    T* out = grad.x.as<T>() + grad.token(b, static_cast<uint32_t>(n));
    const float* source = shares.grad_mean.as<const float>() + offset;
#pragma unroll 2
    for (int64_t c = lane * V; c < grad.channels; c += lanes * V) {
      Floats<V> x = zeros<V>();
      if (count > 0) {
        if (packs) {
          x = load<V>(source + c);
        } else {
#pragma unroll
          for (int j = 0; j < V; ++j) x[j] = source[(c + j) * shares.grad_mean.strides[3]];
        }
#pragma unroll
        for (int j = 0; j < V; ++j) x[j] /= count;
      }
      store(out + c, x);
    }
  }
}

// A thread takes V tokens and CHANNELS channels.
template <typename T, int V>
__global__ void __launch_bounds__(THREADS, 4) spread_column_kernel(Shares shares, Features grad) {
  const int64_t slices = ceil_div(grad.channels, CHANNELS), vectors = ceil_div(shares.tokens, V);
  for (int64_t item = blockIdx.x * int64_t{THREADS} + threadIdx.x; item < shares.batch * slices * vectors;
       item += gridDim.x * int64_t{THREADS}) {
    const int64_t n = item % vectors * V, first = item / vectors % slices * CHANNELS, b = item / vectors / slices;
    int64_t offset[V];
    float count[V];
#pragma unroll
    for (int i = 0; i < V; ++i) count[i] = shares.of(b, n + i, offset[i]);
    T* out = grad.x.as<T>() + grad.token(b, static_cast<uint32_t>(n));
    for (int64_t c = first; c < min(first + CHANNELS, grad.channels); ++c) {
      Floats<V> x;
#pragma unroll
      for (int i = 0; i < V; ++i)
        x[i] = count[i] > 0 ? shares.grad_mean.as<const float>()[offset[i] + c * shares.grad_mean.strides[3]] / count[i] : 0;
      store(out + c * grad.channel, x);
    }
  }
}

}  // namespace

// features (B, C, h, w) or (B, N, C); order (B, N) and offsets (B, 2K + 2) int32, mean (B, K, 2, C) float32, count (B, K, 2)
// int32, rest (B, ceil(N / CENTROIDS_RUN), C) float32: contiguous. Nothing is empty.
void centroids_forward(Stream stream, View features, View order, View offsets, View mean, View count, View rest) {
  const Features x(features);
  const Sums sums{order.as<const int>(), offsets.as<const int>(), mean.as<float>(), rest.as<float>(), order.sizes[0],
                  order.sizes[1], rest.sizes[1], x.channels, static_cast<int>(2 * mean.sizes[1])};
  const int64_t classes = mean.sizes[1];
  require_dense(order, Dtype::int32, {features.sizes[0], sums.tokens}, "class_centroids: order of the wrong kind");
  require_dense(offsets, Dtype::int32, {sums.batch, 2 * classes + 2}, "class_centroids: offsets of the wrong kind");
  require_dense(mean, Dtype::float32, {sums.batch, classes, 2, x.channels}, "class_centroids: mean of the wrong kind");
  require_dense(count, Dtype::int32, {sums.batch, classes, 2}, "class_centroids: count of the wrong kind");
  require_dense(rest, Dtype::float32, {sums.batch, ceil_div(sums.tokens, RUN), x.channels},
                "class_centroids: rest of the wrong kind");
  by_dtype(features.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int V = 16 / sizeof(T);
    if (x.channels_pack(V)) {
      const int lanes = lanes_for(x.channels, V);
      const int64_t items = sums.batch * sums.runs * ceil_div(x.channels, lanes * V);
      launch(row_kernel<T, V>, stream, ceil_div(items * lanes, THREADS), THREADS, x, sums, lanes);
    } else {
      const int64_t items = sums.batch * sums.runs * ceil_div(x.channels, CHANNELS);
      launch(column_kernel<T>, stream, ceil_div(items, THREADS / 32), THREADS, x, sums);
    }
  });
  launch(mean_kernel, stream, sums.batch * sums.segments, THREADS, sums, count.as<int>());
}

// grad_mean (B, K, 2, C) float32; count (B, K, 2) int32 contiguous; grad like the features. Nothing is empty.
void centroids_backward(Stream stream, View grad_mean, View count, View labels, View masked, View grad) {
  const Features x(grad);
  const Shares shares{grad_mean, labels, masked, count.as<const int>(), labels.sizes[0], labels.sizes[1],
                      static_cast<int>(grad_mean.sizes[1])};
  require_dense(count, Dtype::int32, {shares.batch, shares.num_classes, 2}, "class_centroids: count of the wrong kind");
  require(grad_mean.dtype == Dtype::float32 && grad_mean.sizes[3] == x.channels && masked.dtype == Dtype::uint8,
          "class_centroids: a tensor of the wrong kind");
  const int64_t tokens = grad.dimensions == 4 ? grad.sizes[2] * grad.sizes[3] : grad.sizes[1];
  require(grad.sizes[0] == shares.batch && tokens == shares.tokens,
          "class_centroids: a gradient of the wrong kind");
  by_dtype(grad.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int V = 16 / sizeof(T);
    if (x.channels_pack(V)) {
      const int lanes = lanes_for(x.channels, V);
      launch(spread_row_kernel<T, V>, stream, ceil_div(shares.batch * shares.tokens * lanes, THREADS), THREADS, shares, x,
             lanes, packs(grad_mean, 4, 3, x.channels, V));
      return;
    }
    const bool wide = x.tokens_pack(shares.tokens, V);
    const int64_t items = shares.batch * ceil_div(x.channels, CHANNELS) * ceil_div(shares.tokens, wide ? V : 1);
    launch(wide ? spread_column_kernel<T, V> : spread_column_kernel<T, 1>, stream, ceil_div(items, THREADS), THREADS, shares,
           x);
  });
}

}  // namespace cmim
