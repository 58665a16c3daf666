// What library.cpp, which knows PyTorch, and the .cu files, which know CUDA, have in common.
//
// Outputs are allocated by the caller. Tensors may have any strides unless it says "contiguous".
#pragma once

#include <cstdint>
#include <vector>

#include "arithmetic.h"

struct CUstream_st;

namespace cmim {

using Stream = CUstream_st*;
enum class Dtype : int { float32, float16, bfloat16, uint8, int32, int64 };

// A tensor of up to 4 dimensions; strides in elements. No data: None.
struct View {
  void* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t sizes[4] = {}, strides[4] = {};

  template <typename T>
  CMIM_INLINE T* as() const { return static_cast<T*>(data); }
};
struct MaybeView : View {};

using Numbers = std::vector<double>;

void pack_classes(Stream, View labels, View masked, int64_t num_classes, MaybeView counts, View order, View inverse,
                  View segment, View offsets, View cu_seqlens);

}  // namespace cmim
