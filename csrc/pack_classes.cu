// Stable counting sort of the tokens of each image by (class, visible before masked).
//
// An image of up to TILE tokens takes one launch. A longer one is cut into tiles: count the tokens of each segment in a
// tile, turn the counts into the packed position where the tile's tokens of the segment begin, place. Within a tile each
// warp ranks its own stretch of tokens, 32 at a time, by asking which lanes hold the same segment.
//
// Memory traffic (minimum): labels, masks and three int32 a token. Images of several tiles read labels and masks twice, and
// write a row of counts for each tile. Triton compares every two of the 128 tokens of a tile; here a token costs one
// comparison with its warp, and short images one launch instead of three.
#include "device.cuh"

namespace cmim {
namespace {

constexpr int WARPS = 4, THREADS = 32 * WARPS, TILE = PACK_TILE, ROUNDS = TILE / THREADS;
constexpr int MAX_SEGMENTS = 2 * PACK_MAX_CLASSES + 2;

struct Tokens {
  View labels, masked;
  int64_t batch, length, tiles;
  int num_classes;

  // 2K + 1 past the last token: one more segment, at the end of all.
  __device__ int segment(int64_t image, int64_t token) const {
    return token < length ? load_segment(labels, masked, image, token, num_classes) : 2 * num_classes + 1;
  }
  __device__ int segments() const { return 2 * num_classes + 2; }
};

// Replaces values[0..n) of the block by the sums of those before each. Begins and ends with all threads together.
__device__ void exclusive_scan(int* values, int n) {
  __shared__ int of_warp[WARPS];
  const int share = (n + THREADS - 1) / THREADS, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int begin = min(n, static_cast<int>(threadIdx.x) * share), end = min(n, begin + share);
  __syncthreads();
  int own = 0;
  for (int i = begin; i < end; ++i) own += values[i];
  int sum = own;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(ALL_LANES, sum, distance);
    if (lane >= distance) sum += other;
  }
  if (lane == 31) of_warp[warp] = sum;
  __syncthreads();
  int before = sum - own;
  for (int w = 0; w < warp; ++w) before += of_warp[w];
  for (int i = begin; i < end; ++i) {
    const int value = values[i];
    values[i] = before;
    before += value;
  }
  __syncthreads();
}

__device__ void write_bounds(const int* starts, int64_t image, const Tokens& tokens, int* offsets, int* cu_seqlens) {
  const int classes = tokens.num_classes;
  for (int s = threadIdx.x; s < tokens.segments(); s += THREADS) {
    offsets[image * tokens.segments() + s] = starts[s];
    if (s % 2 == 0) cu_seqlens[image * (classes + 1) + s / 2] = static_cast<int>(image * tokens.length) + starts[s];
  }
  if (image == tokens.batch - 1 && threadIdx.x == 0)
    cu_seqlens[tokens.batch * (classes + 1)] = static_cast<int>(tokens.batch * tokens.length);
}

// counts (B, tiles, segments): how many tokens of each segment a tile has.
template <int SEGMENTS>
__global__ void __launch_bounds__(THREADS) count_kernel(Tokens tokens, int* counts) {
  __shared__ int found[SEGMENTS];
  for (int64_t item = blockIdx.x; item < tokens.batch * tokens.tiles; item += gridDim.x) {
    const int64_t image = item / tokens.tiles, first = item % tokens.tiles * TILE;
    for (int s = threadIdx.x; s < tokens.segments(); s += THREADS) found[s] = 0;
    int segment[ROUNDS];
#pragma unroll
    for (int r = 0; r < ROUNDS; ++r) segment[r] = tokens.segment(image, first + r * THREADS + threadIdx.x);
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ROUNDS; ++r) atomicAdd(&found[segment[r]], 1);
    __syncthreads();
    for (int s = threadIdx.x; s < tokens.segments(); s += THREADS) counts[item * tokens.segments() + s] = found[s];
    __syncthreads();
  }
}

// counts (B, tiles, segments); out: the packed position where the tile's tokens of the segment begin.
template <int SEGMENTS>
__global__ void __launch_bounds__(THREADS) scan_kernel(Tokens tokens, int* counts, int* offsets, int* cu_seqlens) {
  __shared__ int starts[SEGMENTS];
  const int segments = tokens.segments();
  for (int64_t image = blockIdx.x; image < tokens.batch; image += gridDim.x) {
    int* own = counts + image * tokens.tiles * segments;
    for (int s = threadIdx.x; s < segments; s += THREADS) {
      int total = 0;
#pragma unroll 8
      for (int64_t tile = 0; tile < tokens.tiles; ++tile) total += own[tile * segments + s];
      starts[s] = total;
    }
    exclusive_scan(starts, segments);
    write_bounds(starts, image, tokens, offsets, cu_seqlens);
    for (int s = threadIdx.x; s < segments; s += THREADS) {
      int position = starts[s];
#pragma unroll 8
      for (int64_t tile = 0; tile < tokens.tiles; ++tile) {
        const int count = own[tile * segments + s];
        own[tile * segments + s] = position;
        position += count;
      }
    }
    __syncthreads();
  }
}

// begins (B, tiles, segments): where the tile's tokens of each segment begin; null where an image is one tile.
template <int SEGMENTS>
__global__ void __launch_bounds__(THREADS) place_kernel(Tokens tokens, const int* begins, int* order, int* inverse,
                                                        int* segment_out, int* offsets, int* cu_seqlens) {
  __shared__ int found[WARPS][SEGMENTS], starts[SEGMENTS];
  const int segments = tokens.segments(), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int64_t item = blockIdx.x; item < tokens.batch * tokens.tiles; item += gridDim.x) {
    const int64_t image = item / tokens.tiles, first = item % tokens.tiles * TILE + warp * ROUNDS * 32 + lane;
    for (int s = threadIdx.x; s < segments; s += THREADS)
      for (int w = 0; w < WARPS; ++w) found[w][s] = 0;
    int segment[ROUNDS], rank[ROUNDS];
#pragma unroll
    for (int r = 0; r < ROUNDS; ++r) segment[r] = tokens.segment(image, first + r * 32);
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ROUNDS; ++r) {
      const unsigned peers = __match_any_sync(ALL_LANES, segment[r]);
      rank[r] = found[warp][segment[r]] + __popc(peers & ((1u << lane) - 1));
      __syncwarp();
      if (lane == __ffs(peers) - 1) found[warp][segment[r]] += __popc(peers);
      __syncwarp();
    }
    __syncthreads();
    for (int s = threadIdx.x; s < segments; s += THREADS) {  // of each warp: how many before it in the tile
      int sum = 0;
      for (int w = 0; w < WARPS; ++w) {
        const int count = found[w][s];
        found[w][s] = sum;
        sum += count;
      }
      starts[s] = begins ? begins[item * segments + s] : sum;
    }
    if (begins) {
      __syncthreads();
    } else {
      exclusive_scan(starts, segments);
      write_bounds(starts, image, tokens, offsets, cu_seqlens);
    }
    const int64_t row = image * tokens.length;
#pragma unroll
    for (int r = 0; r < ROUNDS; ++r) {
      const int64_t token = first + r * 32;
      if (token < tokens.length) {
        const int packed = starts[segment[r]] + found[warp][segment[r]] + rank[r];
        order[row + packed] = static_cast<int>(token);
        segment_out[row + packed] = segment[r];
        inverse[row + token] = packed;
      }
    }
    __syncthreads();
  }
}

template <int SEGMENTS>
void run(Stream stream, const Tokens& tokens, int* counts, int* order, int* inverse, int* segment, int* offsets,
         int* cu_seqlens) {
  const int64_t items = tokens.batch * tokens.tiles;
  if (tokens.tiles > 1) {
    launch(count_kernel<SEGMENTS>, stream, items, THREADS, tokens, counts);
    launch(scan_kernel<SEGMENTS>, stream, tokens.batch, THREADS, tokens, counts, offsets, cu_seqlens);
  }
  launch(place_kernel<SEGMENTS>, stream, items, THREADS, tokens, tokens.tiles > 1 ? counts : nullptr, order, inverse,
         segment, offsets, cu_seqlens);
}

}  // namespace

// counts (B, tiles, 2K + 2) where an image has several tiles of PACK_TILE tokens, else None. Outputs int32, contiguous.
void pack_classes(Stream stream, View labels, View masked, int64_t num_classes, MaybeView counts, View order, View inverse,
                  View segment, View offsets, View cu_seqlens) {
  const Tokens tokens{labels,          masked, labels.sizes[0], labels.sizes[1], ceil_div(labels.sizes[1], TILE),
                      static_cast<int>(num_classes)};
  require(num_classes >= 1 && num_classes <= PACK_MAX_CLASSES, "pack_classes: too many classes");
  require(tokens.batch * tokens.length <= INT32_MAX, "pack_classes: positions of tokens do not fit in 32 bits");
  require(masked.dtype == Dtype::uint8, "pack_classes: masked must be of bool");
  const int64_t segments = 2 * num_classes + 2;
  for (const View& out : {order, inverse, segment})
    require_dense(out, Dtype::int32, {tokens.batch, tokens.length}, "pack_classes: an output of the wrong kind");
  require_dense(offsets, Dtype::int32, {tokens.batch, segments}, "pack_classes: offsets of the wrong kind");
  require_dense(cu_seqlens, Dtype::int32, {tokens.batch * (num_classes + 1) + 1},
                "pack_classes: cu_seqlens of the wrong kind");
  if (tokens.tiles > 1)
    require_dense(counts, Dtype::int32, {tokens.batch, tokens.tiles, segments}, "pack_classes: counts of the wrong kind");
  // Few sizes: of counters that lie in shared memory.
  const auto chosen = num_classes <= 31 ? run<64> : num_classes <= 255 ? run<512> : run<MAX_SEGMENTS>;
  chosen(stream, tokens, counts.as<int>(), order.as<int>(), inverse.as<int>(), segment.as<int>(), offsets.as<int>(),
         cu_seqlens.as<int>());
}

}  // namespace cmim
