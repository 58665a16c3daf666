// Reconstruction loss over masked patches, by class.
//
// A patch is handled by a power of two of lanes, 16 bytes of the prediction each. A block goes through 128 tokens at a time;
// then one warp adds their errors to the block's sums by class, always in the same order. A second kernel adds up what the
// blocks found. No error reaches memory, and the target is computed where it is needed, in both directions.
//
// Memory traffic (minimum), forward: prediction and image of the tokens that count, all masks and labels; besides, a row
// of K sums and counts for each block. Backward: the same, and the whole gradient. With `normalize` the image is read
// three times, the last two from the cache. Bound by bandwidth like Triton's kernels, which however write and read an
// error for each token, and look at all tokens once for each 64 classes: expect a tie for few classes.
#include "device.cuh"

namespace cmim {
namespace {

constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int SHARED_CLASSES = 1024;  // with more, a block keeps its sums in memory

// Whether every V entries in the order of (row, column, channel), or (channel, row, column), are V neighbours of a tensor,
// as aligned as their size asks.
bool packs(const View& x, const Layout& at, bool channel_first, int64_t size, int64_t channels, int V) {
  int64_t run = channel_first ? size : size * channels;
  bool fits = channel_first ? at.column == 1 : at.channel == 1 && at.column == channels;
  if (at.row == run) run = channel_first && at.channel == size * size ? size * size * channels : run * size;
  else fits = fits && at.row % V == 0;
  fits = fits && (!channel_first || at.channel % V == 0) && at.image % V == 0 && at.patch_row % V == 0 &&
         at.patch_column % V == 0;
  return fits && run % V == 0 && reinterpret_cast<uintptr_t>(x.data) % std::min<int64_t>(16, itemsize(x.dtype) * V) == 0;
}

struct Patches {
  View pred, image, masked, labels;
  Layout pred_layout, image_layout;
  Patch patch;
  int64_t tokens, of_image, columns;
  int num_classes, size, lanes;
  bool image_packs, normalize;
  Distance kind;
  bool scaled;  // bytes: x scale - shift, by channel
  float scale[LOSS_MAX_CHANNELS], shift[LOSS_MAX_CHANNELS];

  // The class of a token that counts, else -1.
  __device__ int class_of(int64_t token) const {
    if (token >= tokens) return -1;
    const int segment = load_segment(labels, masked, token / of_image, token % of_image, num_classes);
    return segment % 2 == 1 ? segment / 2 : -1;
  }

  template <int V>
  __device__ Floats<V> target(int64_t start, uint32_t entry) const {
    Floats<V> x;
    if (image_packs) {
      x = load<V>(image, start + image_layout.entry(patch.entry(entry)));
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) x[i] = load<1>(image, start + image_layout.entry(patch.entry(entry + i)))[0];
    }
    if (scaled) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const uint32_t channel = patch.entry(entry + i).channel;
        x[i] = x[i] * scale[channel] - shift[channel];
      }
    }
    return x;
  }
};

// Sum over the `lanes` lanes that share a patch; the whole warp must call it.
__device__ __forceinline__ float sum_lanes(float x, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
  return x;
}

// One patch as its lanes see it. `counts` says whether there is one: the warp stays together.
template <typename T, int V>
struct Lane {
  const Patches& p;
  const bool counts;
  int64_t pred = 0, image = 0;
  int first;
  float centre = 0, scale = 1;

  __device__ Lane(const Patches& p, int64_t token, bool counts) : p(p), counts(counts) {
    first = threadIdx.x % p.lanes * V;
    if (counts) {
      const int64_t b = token / p.of_image, n = token % p.of_image;
      pred = p.pred_layout.patch(b, n, p.columns);
      image = p.image_layout.patch(b, n, p.columns);
    }
    if (p.normalize) {
      centre = sum_lanes(over_target([](float t) { return t; }), p.lanes) / p.size;
      const float mean = centre;
      const float squares = sum_lanes(over_target([mean](float t) { return (t - mean) * (t - mean); }), p.lanes);
      scale = 1 / sqrtf(squares / (p.size - 1) + 1e-6f);
    }
  }

  template <typename F>
  __device__ float over_target(F f) const {
    float sum = 0;
    if (counts)
      for (int e = first; e < p.size; e += p.lanes * V) {
        const Floats<V> t = p.target<V>(image, e);
#pragma unroll
        for (int i = 0; i < V; ++i) sum += f(t[i]);
      }
    return sum;
  }

  // Prediction minus target from entry e on.
  __device__ Floats<V> difference(int e) const {
    Floats<V> x = load<V>(p.pred.as<const T>() + pred + p.pred_layout.entry(p.patch.entry(e)));
    const Floats<V> t = p.target<V>(image, e);
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] -= p.normalize ? (t[i] - centre) * scale : t[i];
    return x;
  }
};

// sums, counts (gridDim.x, K): what each block found.
template <typename T, int V>
__global__ void __launch_bounds__(THREADS, 4)
    error_kernel(const __grid_constant__ Patches p, float* sums, int* counts, int* finished) {
  __shared__ float shared_sums[SHARED_CLASSES], errors[THREADS];
  __shared__ int shared_counts[SHARED_CLASSES], classes[THREADS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, at_once = 32 / p.lanes;
  float* const own_sums = sums + static_cast<int64_t>(blockIdx.x) * p.num_classes;
  int* const own_counts = counts + static_cast<int64_t>(blockIdx.x) * p.num_classes;
  float* const block_sums = p.num_classes <= SHARED_CLASSES ? shared_sums : own_sums;
  int* const block_counts = p.num_classes <= SHARED_CLASSES ? shared_counts : own_counts;
  for (int k = threadIdx.x; k < p.num_classes; k += THREADS) block_sums[k] = 0, block_counts[k] = 0;
  if (blockIdx.x == 0 && threadIdx.x == 0) *finished = 0;  // for the next kernel

  for (int64_t start = blockIdx.x * int64_t{THREADS}; start < p.tokens; start += gridDim.x * int64_t{THREADS}) {
    const int64_t of_warp = start + warp * 32;
    const int own = p.class_of(of_warp + lane);
    for (int i = 0; i < 32; i += at_once) {
      const int token = i + lane / p.lanes;
      const bool counting = __shfl_sync(ALL_LANES, own, token) >= 0;
      if (!__ballot_sync(ALL_LANES, counting)) continue;
      const Lane<T, V> patch(p, of_warp + token, counting);
      float error = 0;
      if (counting) {
#pragma unroll 2
        for (int e = patch.first; e < p.size; e += p.lanes * V) {
          const Floats<V> d = patch.difference(e);
#pragma unroll
          for (int j = 0; j < V; ++j) error += distance(p.kind, d[j]);
        }
      }
      error = sum_lanes(error, p.lanes) / p.size;
      if (lane % p.lanes == 0) errors[warp * 32 + token] = error;
    }
    classes[threadIdx.x] = own;
    __syncthreads();
    if (warp == 0) {
      for (int w = 0; w < WARPS; ++w) {
        const int k = classes[w * 32 + lane];
        unsigned left = __ballot_sync(ALL_LANES, k >= 0);
        while (left) {
          const int chosen = __shfl_sync(ALL_LANES, k, __ffs(left) - 1);
          const unsigned same = __ballot_sync(ALL_LANES, k == chosen);
          const float sum = sum_lanes(k == chosen ? errors[w * 32 + lane] : 0, 32);
          if (lane == 0) block_sums[chosen] += sum, block_counts[chosen] += __popc(same);
          left &= ~same;
        }
      }
    }
    __syncthreads();
  }
  if (block_sums == own_sums) return;
  __syncthreads();
  for (int k = threadIdx.x; k < p.num_classes; k += THREADS) own_sums[k] = block_sums[k], own_counts[k] = block_counts[k];
}

struct Totals {
  float tokens, present;
};

// How many tokens count and how many classes have some. Begins and ends with all threads of the block together.
template <int SIZE>
__device__ Totals totals(const int* class_count, int num_classes) {
  __shared__ long long tokens[SIZE];
  __shared__ int present[SIZE];
  tokens[threadIdx.x] = present[threadIdx.x] = 0;
  for (int k = threadIdx.x; k < num_classes; k += SIZE) {
    const int count = __ldcg(class_count + k);
    tokens[threadIdx.x] += count;
    present[threadIdx.x] += count > 0;
  }
  __syncthreads();
  for (unsigned half = SIZE / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) {
      tokens[threadIdx.x] += tokens[threadIdx.x + half];
      present[threadIdx.x] += present[threadIdx.x + half];
    }
    __syncthreads();
  }
  const Totals result{static_cast<float>(tokens[0]), static_cast<float>(present[0])};
  __syncthreads();
  return result;
}

// A block of 8 x 32 threads adds up 32 classes of all blocks; the last one to end computes the loss. Which
// one that is varies; the result does not.
constexpr int SUM_THREADS = 256;

__global__ void __launch_bounds__(SUM_THREADS)
    class_sum_kernel(const float* sums, const int* counts, int blocks, int num_classes, bool per_class, float* class_sum,
                     int* class_count, float* loss, int* finished) {
  __shared__ float parts[SUM_THREADS];
  __shared__ int count_parts[SUM_THREADS], done;
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32, k = blockIdx.x * 32 + lane;
  float sum = 0;
  int count = 0;
  if (k < num_classes)
#pragma unroll 4
    for (int block = row; block < blocks; block += SUM_THREADS / 32) {
      sum += sums[static_cast<int64_t>(block) * num_classes + k];
      count += counts[static_cast<int64_t>(block) * num_classes + k];
    }
  parts[threadIdx.x] = sum;
  count_parts[threadIdx.x] = count;
  __syncthreads();
  if (row == 0 && k < num_classes) {
    for (int r = 1; r < SUM_THREADS / 32; ++r) sum += parts[r * 32 + lane], count += count_parts[r * 32 + lane];
    class_sum[k] = sum;
    class_count[k] = count;
    __threadfence();
  }
  __syncthreads();
  if (threadIdx.x == 0) done = atomicAdd(finished, 1);
  __syncthreads();
  if (done != static_cast<int>(gridDim.x) - 1) return;
  __threadfence();
  const Totals total = totals<SUM_THREADS>(class_count, num_classes);
  float own = 0;
  for (int c = threadIdx.x; c < num_classes; c += SUM_THREADS)
    own += __ldcg(class_sum + c) / (per_class ? max(__ldcg(class_count + c), 1) : 1);
  parts[threadIdx.x] = own;
  __syncthreads();
  for (unsigned half = SUM_THREADS / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) parts[threadIdx.x] += parts[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) *loss = parts[0] / max(per_class ? total.present : total.tokens, 1.0f);
}

template <typename T, int V>
__global__ void __launch_bounds__(THREADS, 4)
    gradient_kernel(const __grid_constant__ Patches p, const float* grad_loss, View grad_class_sum, const int* class_count,
                    bool per_class, T* grad, Layout grad_layout) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, at_once = 32 / p.lanes;
  const Totals total = totals<THREADS>(class_count, p.num_classes);
  for (int64_t start = blockIdx.x * int64_t{THREADS}; start < p.tokens; start += gridDim.x * int64_t{THREADS}) {
    const int64_t of_warp = start + warp * 32;
    const int own = p.class_of(of_warp + lane);
    float own_weight = 0;
    if (own >= 0) {
      const float denominator = per_class ? max(total.present, 1.0f) * class_count[own] : max(total.tokens, 1.0f);
      own_weight = grad_class_sum.as<const float>()[own * grad_class_sum.strides[0]] + *grad_loss / denominator;
    }
    for (int i = 0; i < 32; i += at_once) {
      const int64_t token = of_warp + i + lane / p.lanes;
      const bool counting = __shfl_sync(ALL_LANES, own, i + lane / p.lanes) >= 0;
      const float weight = __shfl_sync(ALL_LANES, own_weight, i + lane / p.lanes) / p.size;
      const Lane<T, V> patch(p, token, counting);
      if (token >= p.tokens) continue;
      T* const target = grad + grad_layout.patch(token / p.of_image, token % p.of_image, p.columns);
#pragma unroll 2
      for (int e = patch.first; e < p.size; e += p.lanes * V) {
        Floats<V> d = zeros<V>();
        if (counting) {
          d = patch.difference(e);
#pragma unroll
          for (int j = 0; j < V; ++j) d[j] = slope(p.kind, d[j]) * weight;
        }
        store(target + grad_layout.entry(p.patch.entry(e)), d);
      }
    }
  }
}

struct Prepared {
  Patches patches;
  Layout grad;
  bool wide;
};

Distance distance_called(const std::string& name) {
  require(name == "l1" || name == "mse" || name == "smooth_l1", "masked_patch_loss: unknown distance");
  return name == "l1" ? Distance::l1 : name == "mse" ? Distance::mse : Distance::smooth_l1;
}

// What both directions have in common; grad is pred where there is none.
Prepared prepare(View pred, View image, View masked, View labels, View grad, int64_t num_classes, int64_t patch_size,
                 const std::string& distance, bool normalize, const Numbers& mean, const Numbers& std) {
  require(num_classes >= 1 && patch_size >= 1, "masked_patch_loss: no class or no patch");
  require(mean.size() == std.size() && mean.size() <= LOSS_MAX_CHANNELS &&
              (mean.empty() || static_cast<int64_t>(mean.size()) == image.sizes[1]),
          "masked_patch_loss: mean and std do not fit the channels");
  require((image.dtype == Dtype::uint8) == !mean.empty(), "masked_patch_loss: mean and std go with images of bytes");
  require_alike(grad, pred, "masked_patch_loss: a gradient of the wrong kind");
  require(masked.dtype == Dtype::uint8, "masked_patch_loss: masked must be of bool");
  const int64_t channels = image.sizes[1], columns = image.sizes[3] / patch_size, size = patch_size * patch_size * channels;
  const bool is_image = pred.sizes[3] > 0, channel_first = is_image && pred.strides[3] == 1;
  const Layout pred_layout(pred.strides, is_image, columns, patch_size, channels);
  const Layout grad_layout(grad.strides, is_image, columns, patch_size, channels);
  const Layout image_layout(image.strides, true, columns, patch_size, channels);
  const int V = static_cast<int>(16 / itemsize(pred.dtype));
  const bool wide = packs(pred, pred_layout, channel_first, patch_size, channels, V) &&
                    packs(grad, grad_layout, channel_first, patch_size, channels, V);
  Patches p{pred, image, masked, labels, pred_layout, image_layout, Patch(patch_size, channels, channel_first),
            masked.sizes[0] * masked.sizes[1], masked.sizes[1], columns, static_cast<int>(num_classes),
            static_cast<int>(size), lanes_for(size, wide ? V : 1),
            packs(image, image_layout, channel_first, patch_size, channels, wide ? V : 1), normalize,
            distance_called(distance), !mean.empty(), {}, {}};
  for (size_t c = 0; c < mean.size(); ++c) {
    p.scale[c] = static_cast<float>(1 / (255 * std[c]));
    p.shift[c] = static_cast<float>(mean[c] / std[c]);
  }
  return {p, grad_layout, wide};
}

}  // namespace

// pred (B, N, p p c) or (B, c, H, W); image (B, c, H, W), at most LOSS_MAX_CHANNELS of bytes, whose mean and std are given;
// `distance` is "l1", "mse" or "smooth_l1". sums float32 and counts int32 (blocks, K); finished one int32. Nothing is empty.
void patch_loss_forward(Stream stream, View pred, View image, View masked, MaybeView labels, int64_t num_classes,
                        int64_t patch_size, std::string distance, bool normalize, bool per_class, Numbers mean, Numbers std,
                        View sums, View counts, View finished, View loss, View class_sum, View class_count) {
  const auto [p, _, wide] =
      prepare(pred, image, masked, labels, pred, num_classes, patch_size, distance, normalize, mean, std);
  const int64_t blocks = sums.sizes[0];
  require_dense(sums, Dtype::float32, {blocks, num_classes}, "masked_patch_loss: sums of the wrong kind");
  require_dense(counts, Dtype::int32, {blocks, num_classes}, "masked_patch_loss: counts of the wrong kind");
  require_dense(finished, Dtype::int32, {1}, "masked_patch_loss: finished of the wrong kind");
  require_dense(loss, Dtype::float32, {}, "masked_patch_loss: loss of the wrong kind");
  require_dense(class_sum, Dtype::float32, {num_classes}, "masked_patch_loss: class_sum of the wrong kind");
  require_dense(class_count, Dtype::int32, {num_classes}, "masked_patch_loss: class_count of the wrong kind");
  by_dtype(pred.dtype, [&, &p = p, wide = wide](auto element) {
    using T = decltype(element);
    launch(wide ? error_kernel<T, 16 / sizeof(T)> : error_kernel<T, 1>, stream, blocks, THREADS, p, sums.as<float>(),
           counts.as<int>(), finished.as<int>());
  });
  launch(class_sum_kernel, stream, ceil_div(num_classes, 32), SUM_THREADS, sums.as<const float>(), counts.as<const int>(),
         static_cast<int>(blocks), static_cast<int>(num_classes), per_class, class_sum.as<float>(), class_count.as<int>(),
         loss.as<float>(), finished.as<int>());
}

// grad_loss one float32, grad_class_sum (K) float32, class_count (K) int32 contiguous; grad like pred.
void patch_loss_backward(Stream stream, View grad_loss, View grad_class_sum, View class_count, View pred, View image,
                         View masked, MaybeView labels, int64_t num_classes, int64_t patch_size, std::string distance,
                         bool normalize, bool per_class, Numbers mean, Numbers std, View grad) {
  const auto [p, layout, wide] =
      prepare(pred, image, masked, labels, grad, num_classes, patch_size, distance, normalize, mean, std);
  require_dense(grad_loss, Dtype::float32, {}, "masked_patch_loss: grad_loss of the wrong kind");
  require(grad_class_sum.dtype == Dtype::float32 && grad_class_sum.sizes[0] == num_classes,
          "masked_patch_loss: grad_class_sum of the wrong kind");
  require_dense(class_count, Dtype::int32, {num_classes}, "masked_patch_loss: class_count of the wrong kind");
  by_dtype(pred.dtype, [&, &p = p, &layout = layout, wide = wide](auto element) {
    using T = decltype(element);
    launch(wide ? gradient_kernel<T, 16 / sizeof(T)> : gradient_kernel<T, 1>, stream, ceil_div(p.tokens, THREADS), THREADS,
           p, grad_loss.as<const float>(), grad_class_sum, class_count.as<const int>(), per_class, grad.as<T>(), layout);
  });
}

}  // namespace cmim
