// Every kernel for the CPU without PyTorch, for AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer: each runs on
// random inputs of several sizes and types with 1 thread and with 3, and must give the same bytes. Tensors are allocated one
// by one and exactly as large as they are, so that the sanitizers see each access beyond. `driver FILE` also writes all outputs
// there, which another instruction set or processor should give too: inputs are the same everywhere.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "cpu/kernels.h"

using namespace cmim;
using namespace cmim::cpu;

namespace {

int number_of_threads = 1;

void for_each(int64_t n, int64_t grain, Body body, void* context) {
  if (number_of_threads == 1 || n <= grain) {
    if (n > 0) body(context, 0, n);
    return;
  }
  std::vector<std::thread> threads;
  for (int64_t t = 0; t < number_of_threads; ++t)
    threads.emplace_back([=] {
      const int64_t begin = n * t / number_of_threads, end = n * (t + 1) / number_of_threads;
      if (begin < end) body(context, begin, end);
    });
  for (std::thread& thread : threads) thread.join();
}

std::mt19937 random_bits(0);

// A tensor with its own memory; `order` lists the dimensions from the outermost in memory to the innermost.
struct Tensor {
  View view;
  size_t bytes;
  std::unique_ptr<uint8_t, void (*)(void*)> memory{nullptr, std::free};

  Tensor(Dtype dtype, std::vector<int64_t> sizes, std::vector<int> order = {}) {
    view.dtype = dtype;
    view.dimensions = static_cast<int>(sizes.size());
    if (order.empty())
      for (int i = 0; i < view.dimensions; ++i) order.push_back(i);
    int64_t step = 1;
    for (int i = view.dimensions - 1; i >= 0; --i) {
      view.sizes[order[i]] = sizes[order[i]];
      view.strides[order[i]] = step;
      step *= sizes[order[i]];
    }
    const size_t size = dtype == Dtype::float32 || dtype == Dtype::int32 ? 4 : dtype == Dtype::int64 ? 8 : dtype == Dtype::uint8 ? 1 : 2;
    bytes = static_cast<size_t>(step) * size;
    memory.reset(static_cast<uint8_t*>(std::malloc(bytes ? bytes : 1)));
    view.data = memory.get();
    std::memset(view.data, 0xa5, bytes);
  }

  int64_t count() const {
    int64_t n = 1;
    for (int i = 0; i < view.dimensions; ++i) n *= view.sizes[i];
    return n;
  }

  // Numbers around zero, of any float type.
  Tensor&& randomly() && {
    for (int64_t i = 0; i < count(); ++i) {
      const float x = static_cast<float>(random_bits() % 2001) / 500 - 2;
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      if (view.dtype == Dtype::float32) view.as<float>()[i] = x;
      if (view.dtype == Dtype::bfloat16) view.as<uint16_t>()[i] = static_cast<uint16_t>(bits >> 16);
      if (view.dtype == Dtype::float16) view.as<uint16_t>()[i] = static_cast<uint16_t>(0x3000 + random_bits() % 0x1000);
      if (view.dtype == Dtype::uint8) view.as<uint8_t>()[i] = static_cast<uint8_t>(random_bits());
    }
    return std::move(*this);
  }

  // Integers from `low` to `high`.
  Tensor&& between(int64_t low, int64_t high) && {
    for (int64_t i = 0; i < count(); ++i) {
      const int64_t x = low + static_cast<int64_t>(random_bits() % static_cast<uint64_t>(high - low + 1));
      if (view.dtype == Dtype::uint8) view.as<uint8_t>()[i] = static_cast<uint8_t>(x);
      if (view.dtype == Dtype::int32) view.as<int32_t>()[i] = static_cast<int32_t>(x);
      if (view.dtype == Dtype::int64) view.as<int64_t>()[i] = x;
    }
    return std::move(*this);
  }
};

std::FILE* written = nullptr;

void write(const char* name, const Tensor& x) {
  const char* const types[] = {"float32", "float16", "bfloat16", "uint8", "int32", "int64"};
  const Dtype dtypes[] = {Dtype::float32, Dtype::float16, Dtype::bfloat16, Dtype::uint8, Dtype::int32, Dtype::int64};
  for (int i = 0; i < 6; ++i)
    if (x.view.dtype == dtypes[i]) std::fprintf(written, "%s %s %zu\n", name, types[i], x.bytes);
  std::fwrite(x.view.data, 1, x.bytes, written);
}

MaybeView maybe(const Tensor& x) { return MaybeView{x.view}; }

// Runs a kernel with 1 thread and with 3; what it writes must have the same bytes.
void check(const char* name, std::initializer_list<const Tensor*> outputs, const std::function<void()>& call) {
  std::vector<std::vector<uint8_t>> first;
  for (int threads : {1, 3}) {
    for (const Tensor* out : outputs) std::memset(out->view.data, 0xa5, out->bytes);
    number_of_threads = threads;
    call();
    size_t i = 0;
    for (const Tensor* out : outputs) {
      const uint8_t* const bytes = static_cast<const uint8_t*>(out->view.data);
      if (threads == 1) {
        first.emplace_back(bytes, bytes + out->bytes);
        if (written) write(name, *out);
      } else if (std::memcmp(first[i++].data(), bytes, out->bytes)) {
        std::printf("%s: 1 thread and %d differ\n", name, threads);
        std::exit(1);
      }
    }
  }
}

void run_all(const Kernels& kernels, int64_t side, int64_t channels, int64_t classes, int64_t patch, Dtype T, Dtype L) {
  const int64_t B = 2, N = side * side, K = classes, C = channels;
  const auto f32 = Dtype::float32, i32 = Dtype::int32;
  const Tensor labels = Tensor(L, {B, side, side}).between(L == Dtype::uint8 ? 0 : -1, K);
  const Tensor masked = Tensor(Dtype::uint8, {B, N}).between(0, 1);
  View rows = labels.view;
  rows.dimensions = 2, rows.sizes[1] = N, rows.strides[1] = 1;

  Tensor order(i32, {B, N}), inverse(i32, {B, N}), segment(i32, {B, N}), offsets(i32, {B, 2 * K + 2}), starts(i32, {B * (K + 1) + 1});
  check("pack_classes", {&order, &inverse, &segment, &offsets, &starts}, [&] {
    kernels.pack_classes(for_each, rows, masked.view, K, order.view, inverse.view, segment.view, offsets.view, starts.view);
  });

  const std::vector<std::pair<Tensor, bool>> features = [&] {
    std::vector<std::pair<Tensor, bool>> all;
    all.emplace_back(Tensor(T, {B, N, C}).randomly(), false);
    all.emplace_back(Tensor(T, {B, C, side, side}).randomly(), true);
    all.emplace_back(Tensor(T, {B, C, side, side}, {0, 2, 3, 1}).randomly(), true);
    return all;
  }();
  Tensor mean(f32, {B, K, 2, C}), count(i32, {B, K, 2});
  const Tensor grad_mean = Tensor(f32, {B, K, 2, C}).randomly();
  for (const auto& feature : features) {
    const Tensor& x = feature.first;
    const bool is_grid = feature.second;
    check("centroids_forward", {&mean, &count}, [&] { kernels.centroids_forward(for_each, x.view, rows, masked.view, mean.view, count.view); });
    Tensor grad(T, is_grid ? std::vector<int64_t>{B, C, side, side} : std::vector<int64_t>{B, N, C});
    check("centroids_backward", {&grad}, [&] { kernels.centroids_backward(for_each, grad_mean.view, count.view, rows, masked.view, grad.view); });
    if (!is_grid) continue;
    for (int64_t size : {1, 3, 5, 7, 9}) {
      const Tensor weight = Tensor(f32, {C, size, size}).randomly(), bias = Tensor(T, {C}).randomly();
      Tensor out(T, {B, C, side, side}), grad_x(T, {B, C, side, side}, {0, 2, 3, 1}), grad_w(f32, {C, size, size}), grad_b(T, {C});
      check("same_class_conv2d_forward", {&out}, [&] {
        kernels.same_class_conv2d_forward(for_each, x.view, labels.view, weight.view, maybe(bias), K, out.view);
      });
      check("same_class_conv2d_backward", {&grad_x, &grad_w, &grad_b}, [&] {
        kernels.same_class_conv2d_backward(for_each, out.view, x.view, labels.view, weight.view, K, grad_x.view, grad_w.view, maybe(grad_b));
      });
    }
  }

  const Tensor& tokens = features[0].first;
  const int64_t length = N / 2 + 1;
  const Tensor mask_token = Tensor(T, {C}).randomly(), position = Tensor(f32, {N, C}).randomly();
  Tensor packed(T, {B, length, C}), back(T, {B, N, C}), grad_mask(T, {C}), grad_position(f32, {N, C});
  check("gather_forward", {&packed}, [&] {
    kernels.gather_forward(for_each, tokens.view, inverse.view, segment.view, maybe(mask_token), maybe(position), packed.view);
  });
  check("gather_backward", {&back, &grad_mask, &grad_position}, [&] {
    kernels.gather_backward(for_each, packed.view, inverse.view, segment.view, back.view, maybe(grad_mask), maybe(grad_position));
  });
  check("scatter_forward", {&back}, [&] {
    kernels.scatter_forward(for_each, packed.view, inverse.view, maybe(mask_token), MaybeView{}, back.view);
  });
  check("scatter_backward", {&packed, &grad_mask, &grad_position}, [&] {
    kernels.scatter_backward(for_each, tokens.view, inverse.view, packed.view, maybe(grad_mask), maybe(grad_position));
  });

  const int64_t heads = 2, d = C;
  const Tensor q = Tensor(T, {B, heads, N, d}).randomly(), k = Tensor(T, {B, heads, N, d}, {0, 2, 1, 3}).randomly();
  const Tensor v = Tensor(f32, {B, heads, N, d}, {0, 1, 3, 2}).randomly();
  Tensor out(T, {B, heads, N, d}), total(f32, {B, heads, N}), gq(T, {B, heads, N, d}), gk(T, {B, heads, N, d}), gv(f32, {B, heads, N, d});
  check("attention_forward", {&out, &total}, [&] { kernels.attention_forward(for_each, q.view, k.view, v.view, offsets.view, out.view, total.view); });
  check("attention_backward", {&gq, &gk, &gv}, [&] {
    kernels.attention_backward(for_each, q.view, q.view, k.view, v.view, out.view, total.view, offsets.view, gq.view, gk.view, gv.view);
  });

  const int64_t H = side * patch;
  const Tensor pixels = Tensor(L, {B, H, H}).between(L == Dtype::uint8 ? 0 : -1, K);
  Tensor winners(i32, {B, side, side});
  check("patch_labels", {&winners}, [&] { kernels.patch_labels(for_each, pixels.view, patch, K, 0.3, winners.view); });

  const double numbers[] = {0.5, 0.4, 0.3};
  const Tensor grad_loss = Tensor(f32, {}).randomly(), grad_sum = Tensor(f32, {K}).randomly();
  Tensor loss(f32, {}), class_sum(f32, {K}), class_count(i32, {K});
  for (bool bytes : {false, true}) {
    const Tensor image = Tensor(bytes ? Dtype::uint8 : T, {B, 3, H, H}).randomly();
    const Numbers list{numbers, bytes ? 3 : 0};
    for (int64_t distance : {0, 1, 2})
      for (bool as_image : {false, true}) {
        const std::vector<int64_t> sizes = as_image ? std::vector<int64_t>{B, 3, H, H} : std::vector<int64_t>{B, N, 3 * patch * patch};
        const Tensor pred = as_image ? Tensor(T, sizes, {0, 2, 3, 1}).randomly() : Tensor(T, sizes).randomly();
        Tensor grad(T, sizes);
        check("patch_loss_forward", {&loss, &class_sum, &class_count}, [&] {
          kernels.patch_loss_forward(for_each, pred.view, image.view, masked.view, MaybeView{rows}, K, patch, distance, true, true,
                                     list, list, loss.view, class_sum.view, class_count.view);
        });
        check("patch_loss_backward", {&grad}, [&] {
          kernels.patch_loss_backward(for_each, grad_loss.view, grad_sum.view, class_count.view, pred.view, image.view, masked.view,
                                      MaybeView{rows}, K, patch, distance, true, false, list, list, grad.view);
        });
      }
  }

  for (bool align : {false, true})
    for (bool channels_last : {false, true}) {
      const Tensor logits = Tensor(T, {B, K, side, side}, channels_last ? std::vector<int>{0, 2, 3, 1} : std::vector<int>{}).randomly();
      const Tensor grad = Tensor(f32, {B, H, H}).randomly();
      Tensor pixel_loss(f32, {B, H, H}), logsumexp(f32, {B, H, H}), grad_logits(T, {B, K, side, side});
      Tensor label(i32, {B, H, H}), confidence(f32, {B, H, H});
      check("upsample_cross_entropy_forward", {&pixel_loss, &logsumexp}, [&] {
        kernels.upsample_cross_entropy_forward(for_each, logits.view, pixels.view, align, pixel_loss.view, logsumexp.view);
      });
      check("upsample_cross_entropy_backward", {&grad_logits}, [&] {
        kernels.upsample_cross_entropy_backward(for_each, grad.view, logits.view, pixels.view, logsumexp.view, align, grad_logits.view);
      });
      check("upsample_pseudo_labels", {&label, &confidence}, [&] {
        kernels.upsample_pseudo_labels(for_each, logits.view, align, label.view, confidence.view);
      });
    }
}

}  // namespace

int main(int argc, char** argv) {
  const Kernels& kernels = CMIM_ISA::kernels;
  if (argc > 1 && !(written = std::fopen(argv[1], "wb"))) return 2;
  run_all(kernels, 11, 37, 4, 3, Dtype::float32, Dtype::int64);
  run_all(kernels, 5, 1, 1, 2, Dtype::bfloat16, Dtype::int32);
  run_all(kernels, 7, 64, 300, 1, Dtype::float16, Dtype::uint8);
  run_all(kernels, 1, 3, 2, 5, Dtype::float32, Dtype::uint8);
  run_all(kernels, 23, 160, 2, 4, Dtype::float32, Dtype::int32);
  if (written && std::fclose(written)) return 2;
  std::printf("%s: every kernel, the same bytes with 1 thread and 3\n", kernels.name);
}
