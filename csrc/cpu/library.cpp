// The namespace cmim_cpu of PyTorch ops, on the stable ABI of LibTorch 2.11: one binary for every Python and every PyTorch
// from there on. Each op fills tensors that its caller in cmim_kernels/cpu_kernels/ allocates.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../arguments.h"
#include "checks.h"
#include "kernels.h"

namespace cmim {
namespace {

template <>
struct Argument<cpu::Numbers> {
  using Arrives = std::vector<double>;
  static cpu::Numbers pass(const std::vector<double>& x) { return {x.data(), static_cast<int64_t>(x.size())}; }
};

}  // namespace
}  // namespace cmim

namespace cmim::cpu {
namespace {

const Kernels* const ALL[] = {  // the fastest first
#ifdef __x86_64__
    &avx512::kernels, &avx2::kernels,
#endif
    &baseline::kernels};

bool can_run(const Kernels* kernels) {
#ifdef __x86_64__
  __builtin_cpu_init();
  if (kernels == &avx512::kernels)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && can_run(&avx2::kernels);
  if (kernels == &avx2::kernels)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
           __builtin_cpu_supports("bmi2");
#endif
  return true;
}

const Kernels* fastest() {
  for (const Kernels* kernels : ALL)
    if (can_run(kernels)) return kernels;
  return &baseline::kernels;
}

const Kernels* chosen = fastest();

// Chooses an instruction set by name, for tests; "" leaves the choice. Returns the one in use.
std::string instruction_set(std::string name) {
  if (!name.empty()) {
    const Kernels* found = nullptr;
    for (const Kernels* kernels : ALL)
      if (name == kernels->name && can_run(kernels)) found = kernels;
    if (!found) throw std::runtime_error("cmim_cpu: this machine or library has no " + name);
    chosen = found;
  }
  return chosen->name;
}

void for_each(int64_t n, int64_t grain, Body body, void* context) {
  torch::stable::parallel_for(0, n, grain, [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

template <auto member, auto check>
struct Op;
template <typename... Arguments, void (*Kernels::*member)(ForEach, Arguments...), void (*check)(Arguments...)>
struct Op<member, check> {
  static void call(typename Argument<Arguments>::Arrives... arguments) {
    check(Argument<Arguments>::pass(arguments)...);
    (chosen->*member)(for_each, Argument<Arguments>::pass(arguments)...);
  }
};

}  // namespace
}  // namespace cmim::cpu

STABLE_TORCH_LIBRARY(cmim_cpu, m) {
  m.def("instruction_set(str name) -> str");
  m.def("pack_classes(Tensor labels, Tensor masked, int num_classes, Tensor(a!) order, Tensor(b!) inverse, Tensor(c!) "
        "segment, Tensor(d!) offsets, Tensor(e!) cu_seqlens) -> ()");
  m.def("centroids_forward(Tensor features, Tensor labels, Tensor masked, Tensor(a!) mean, Tensor(b!) count) -> ()");
  m.def("same_class_conv2d_forward(Tensor x, Tensor labels, Tensor weight, Tensor? bias, int num_classes, Tensor(a!) out) -> ()");
  m.def("same_class_conv2d_backward(Tensor grad, Tensor x, Tensor labels, Tensor weight, int num_classes, Tensor(a!) grad_x, "
        "Tensor(b!) grad_weight, Tensor(c!)? grad_bias) -> ()");
  m.def("upsample_cross_entropy_forward(Tensor logits, Tensor target, bool align_corners, Tensor(a!) loss, Tensor(b!) "
        "logsumexp) -> ()");
  m.def("upsample_cross_entropy_backward(Tensor grad, Tensor logits, Tensor target, Tensor logsumexp, bool align_corners, "
        "Tensor(a!) grad_logits) -> ()");
  m.def("upsample_pseudo_labels(Tensor logits, bool align_corners, Tensor(a!) label, Tensor(b!) confidence) -> ()");
  m.def("centroids_backward(Tensor grad_mean, Tensor count, Tensor labels, Tensor masked, Tensor(a!) grad) -> ()");
  m.def("gather_forward(Tensor tokens, Tensor inverse, Tensor segment, Tensor? mask_token, Tensor? position, Tensor(a!) out)"
        " -> ()");
  m.def("gather_backward(Tensor grad, Tensor inverse, Tensor segment, Tensor(a!) grad_tokens, Tensor(b!)? grad_mask_token, "
        "Tensor(c!)? grad_position) -> ()");
  m.def("scatter_forward(Tensor packed, Tensor inverse, Tensor? mask_token, Tensor? position, Tensor(a!) out) -> ()");
  m.def("scatter_backward(Tensor grad, Tensor inverse, Tensor(a!) grad_packed, Tensor(b!)? grad_mask_token, Tensor(c!)? "
        "grad_position) -> ()");
  m.def("patch_labels(Tensor labels, int patch_size, int num_classes, float min_share, Tensor(a!) out) -> ()");
  m.def("patch_loss_forward(Tensor pred, Tensor image, Tensor masked, Tensor? labels, int num_classes, int patch_size, int "
        "distance, bool normalize, bool per_class, float[] mean, float[] std, Tensor(a!) loss, Tensor(b!) class_sum, "
        "Tensor(c!) class_count) -> ()");
  m.def("patch_loss_backward(Tensor grad_loss, Tensor grad_class_sum, Tensor class_count, Tensor pred, Tensor image, Tensor "
        "masked, Tensor? labels, int num_classes, int patch_size, int distance, bool normalize, bool per_class, float[] mean, "
        "float[] std, Tensor(a!) grad) -> ()");
}

#define CMIM_IMPLEMENT(op) \
  m.impl(#op, TORCH_BOX((&cmim::cpu::Op<&cmim::cpu::Kernels::op, &cmim::cpu::Checks::op>::call)))

STABLE_TORCH_LIBRARY_IMPL(cmim_cpu, CPU, m) {
  CMIM_IMPLEMENT(pack_classes);
  CMIM_IMPLEMENT(centroids_forward);
  CMIM_IMPLEMENT(same_class_conv2d_forward);
  CMIM_IMPLEMENT(same_class_conv2d_backward);
  CMIM_IMPLEMENT(upsample_cross_entropy_forward);
  CMIM_IMPLEMENT(upsample_cross_entropy_backward);
  CMIM_IMPLEMENT(upsample_pseudo_labels);
  CMIM_IMPLEMENT(centroids_backward);
  CMIM_IMPLEMENT(gather_forward);
  CMIM_IMPLEMENT(gather_backward);
  CMIM_IMPLEMENT(scatter_forward);
  CMIM_IMPLEMENT(scatter_backward);
  CMIM_IMPLEMENT(patch_labels);
  CMIM_IMPLEMENT(patch_loss_forward);
  CMIM_IMPLEMENT(patch_loss_backward);
}

STABLE_TORCH_LIBRARY_IMPL(cmim_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&cmim::cpu::instruction_set));
}
