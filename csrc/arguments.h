// How the arguments of an op arrive from PyTorch, and how kernels, which do not know it, get them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "launchers.h"

namespace cmim {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Dtype dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Bool:
    case ScalarType::Byte: return Dtype::uint8;
    case ScalarType::Int: return Dtype::int32;
    case ScalarType::Long: return Dtype::int64;
    default: throw std::runtime_error("cmim: a tensor has a dtype that no kernel takes");
  }
}

View view(const Tensor& x) {
  View result;
  result.data = x.mutable_data_ptr();
  result.dtype = dtype_of(x.scalar_type());
  result.dimensions = static_cast<int>(x.dim());
  STD_TORCH_CHECK(x.dim() <= 4, "cmim: a tensor has more than 4 dimensions");
  for (int64_t i = 0; i < x.dim(); ++i) {
    result.sizes[i] = x.size(i);
    result.strides[i] = x.stride(i);
  }
  return result;
}

// How an argument of a launcher arrives, and how the launcher gets it.
template <typename T>
struct Argument {
  using Arrives = T;
  static T pass(const T& value) { return value; }
};
template <>
struct Argument<View> {
  using Arrives = Tensor;
  static View pass(const Tensor& x) { return view(x); }
};
template <>
struct Argument<MaybeView> {
  using Arrives = std::optional<Tensor>;
  static MaybeView pass(const std::optional<Tensor>& x) { return x ? MaybeView{view(*x)} : MaybeView{}; }
};

}  // namespace
}  // namespace cmim
