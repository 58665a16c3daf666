// Tensors as kernels see them: no PyTorch, no CUDA.
#pragma once

#include <cstdint>

#include "arithmetic.h"

namespace cmim {

enum class Dtype : int { float32, float16, bfloat16, uint8, int32, int64 };

// A tensor of up to 4 dimensions; strides in elements. No data: None.
struct View {
  void* data = nullptr;
  Dtype dtype = Dtype::float32;
  int dimensions = 0;
  int64_t sizes[4] = {}, strides[4] = {};

  template <typename T>
  CMIM_INLINE T* as() const { return static_cast<T*>(data); }
};
struct MaybeView : View {};

}  // namespace cmim
