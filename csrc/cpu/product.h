// Products of small float32 matrices, for attention.
#pragma once

#include "vector.h"

namespace cmim::cpu::CMIM_ISA {
namespace {

constexpr int PRODUCT_ROWS = 6, PRODUCT_VECTORS = W == 16 ? 4 : 2;  // of the tile of results that stays in registers
constexpr int PANEL = PRODUCT_VECTORS * W;

struct Matrix {
  const float* data;
  int64_t row, column;  // steps
};

template <int M, int V>
void product_tile(Matrix a, const float* b, int64_t b_row, int64_t depth, float* c, int64_t c_row, bool add) {
  Floats sum[M][V];
  for (int i = 0; i < M; ++i)
    for (int v = 0; v < V; ++v) sum[i][v] = add ? load(c + i * c_row + v * W) : Floats{};
  for (int64_t k = 0; k < depth; ++k) {
    Floats right[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) right[v] = load(b + k * b_row + v * W);
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i) {
      const Floats left = splat(a.data[i * a.row + k * a.column]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[i][v] += left * right[v];
    }
  }
  for (int i = 0; i < M; ++i)
    for (int v = 0; v < V; ++v) store(c + i * c_row + v * W, sum[i][v]);
}

template <int V>
ALWAYS_INLINE void product_columns(Matrix a, const float* b, int64_t b_row, int64_t rows, int64_t depth, float* c, int64_t c_row,
                                   bool add) {
  int64_t i = 0;
  for (; i + PRODUCT_ROWS <= rows; i += PRODUCT_ROWS)
    product_tile<PRODUCT_ROWS, V>({a.data + i * a.row, a.row, a.column}, b, b_row, depth, c + i * c_row, c_row, add);
  for (; i < rows; ++i) product_tile<1, V>({a.data + i * a.row, a.row, a.column}, b, b_row, depth, c + i * c_row, c_row, add);
}

// c (rows, columns) = a (rows, depth) b (depth, columns), added to what c holds if `add`; columns are a multiple of W.
inline __attribute__((noinline)) void product(Matrix a, const float* b, int64_t b_row, int64_t rows, int64_t columns,
                                              int64_t depth, float* c, int64_t c_row, bool add) {
  int64_t j = 0;
  for (; j + PANEL <= columns; j += PANEL)
    product_columns<PRODUCT_VECTORS>(a, b + j, b_row, rows, depth, c + j, c_row, add);
  for (; j < columns; j += W) product_columns<1>(a, b + j, b_row, rows, depth, c + j, c_row, add);
}

}  // namespace
}  // namespace cmim::cpu::CMIM_ISA
