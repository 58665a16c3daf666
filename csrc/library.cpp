// The namespace cmim_cuda of PyTorch ops, on the stable ABI of LibTorch 2.11: one binary for every Python and every
// PyTorch from there on. Each op fills tensors that its caller in cmim_kernels/cuda_kernels/ allocates, on the stream that
// the caller names: PyTorch's own CUDA library, which knows the current stream, cannot be reached from here. Loaded by
// Python it shows its symbols to nobody, and beside a PyTorch without CUDA it is not there.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "arguments.h"

namespace cmim {
namespace {

// The op of a launcher: the stream arrives as the number that `torch.cuda.Stream.cuda_stream` gives.
template <auto launcher>
struct Op;
template <typename... Arguments, void (*launcher)(Stream, Arguments...)>
struct Op<launcher> {
  static void call(int64_t stream, typename Argument<Arguments>::Arrives... arguments) {
    launcher(reinterpret_cast<Stream>(stream), Argument<Arguments>::pass(arguments)...);
  }
};

// What the launchers in Python need to know of the kernels, by name.
int64_t constant(std::string name) {
  for (const Constant& known : CONSTANTS)
    if (name == known.name) return known.value;
  throw std::runtime_error("cmim_cuda: no constant is called " + name);
}

}  // namespace
}  // namespace cmim

STABLE_TORCH_LIBRARY(cmim_cuda, m) {
  m.def("constant(str name) -> int");
  m.def("pack_classes(int stream, Tensor labels, Tensor masked, int num_classes, Tensor(a!)? counts, Tensor(b!) order, "
        "Tensor(c!) inverse, Tensor(d!) segment, Tensor(e!) offsets, Tensor(f!) cu_seqlens) -> ()");
  m.def("gather_forward(int stream, Tensor tokens, Tensor inverse, Tensor segment, Tensor? mask_token, Tensor? position, "
        "Tensor(a!) out) -> ()");
  m.def("gather_backward(int stream, Tensor grad, Tensor inverse, Tensor segment, Tensor(a!) grad_tokens, Tensor(b!)? "
        "groups, Tensor(c!)? grad_position, int blocks) -> ()");
  m.def("scatter_forward(int stream, Tensor packed, Tensor inverse, Tensor? mask_token, Tensor? position, Tensor(a!) out)"
        " -> ()");
  m.def("scatter_backward(int stream, Tensor grad, Tensor inverse, Tensor(a!) grad_packed, Tensor(b!)? groups, "
        "Tensor(c!)? grad_position, int blocks) -> ()");
  m.def("sum_rows(int stream, Tensor rows, Tensor(a!) out, Tensor? other_rows, Tensor(b!)? other_out) -> ()");
  m.def("patch_loss_forward(int stream, Tensor pred, Tensor image, Tensor masked, Tensor? labels, int num_classes, int "
        "patch_size, str distance, bool normalize, bool per_class, float[] mean, float[] std, Tensor(a!) sums, Tensor(b!)"
        " counts, Tensor(c!) finished, Tensor(d!) loss, Tensor(e!) class_sum, Tensor(f!) class_count) -> ()");
  m.def("patch_loss_backward(int stream, Tensor grad_loss, Tensor grad_class_sum, Tensor class_count, Tensor pred, Tensor"
        " image, Tensor masked, Tensor? labels, int num_classes, int patch_size, str distance, bool normalize, bool "
        "per_class, float[] mean, float[] std, Tensor(a!) grad) -> ()");
  m.def("centroids_forward(int stream, Tensor features, Tensor order, Tensor offsets, Tensor(a!) mean, Tensor(b!) count, "
        "Tensor(c!) rest) -> ()");
  m.def("centroids_backward(int stream, Tensor grad_mean, Tensor count, Tensor labels, Tensor masked, Tensor(a!) grad) ->"
        " ()");
  m.def("same_class_conv2d(int stream, Tensor x, Tensor labels, Tensor weight, bool flipped, Tensor? bias, int "
        "num_classes, Tensor(a!) out) -> ()");
  m.def("same_class_conv2d_weight(int stream, Tensor x, Tensor grad, Tensor labels, int num_classes, Tensor(a!) "
        "of_weight, Tensor(b!)? of_bias) -> ()");
}

#define CMIM_IMPLEMENT(op) m.impl(#op, TORCH_BOX(&cmim::Op<cmim::op>::call))

STABLE_TORCH_LIBRARY_IMPL(cmim_cuda, CMIM_DISPATCH_KEY, m) {
  CMIM_IMPLEMENT(pack_classes);
  CMIM_IMPLEMENT(gather_forward);
  CMIM_IMPLEMENT(gather_backward);
  CMIM_IMPLEMENT(scatter_forward);
  CMIM_IMPLEMENT(scatter_backward);
  CMIM_IMPLEMENT(sum_rows);
  CMIM_IMPLEMENT(patch_loss_forward);
  CMIM_IMPLEMENT(patch_loss_backward);
  CMIM_IMPLEMENT(centroids_forward);
  CMIM_IMPLEMENT(centroids_backward);
  CMIM_IMPLEMENT(same_class_conv2d);
  CMIM_IMPLEMENT(same_class_conv2d_weight);
}

STABLE_TORCH_LIBRARY_IMPL(cmim_cuda, CompositeExplicitAutograd, m) {
  m.impl("constant", TORCH_BOX(&cmim::constant));
}
