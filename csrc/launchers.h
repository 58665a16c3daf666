// What library.cpp, which knows PyTorch, and the .cu files, which know CUDA, have in common.
//
// Outputs are allocated by the caller. Tensors may have any strides unless it says "contiguous".
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "view.h"

struct CUstream_st;

namespace cmim {

using Stream = CUstream_st*;
using Numbers = std::vector<double>;

// Throws what a launcher relies on and its caller did not keep.
inline void require(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(std::string("cmim_cuda: ") + what);
}

// What the launchers in Python need to know, which the op `constant` tells them.
constexpr int64_t PACK_TILE = 1024;          // tokens that one block of pack_classes sorts
constexpr int64_t PACK_MAX_CLASSES = 1151;   // with more, the counters of a block leave its shared memory
constexpr int64_t CENTROIDS_RUN = 64;        // packed tokens that one group of threads adds up
constexpr int64_t LOSS_MAX_CHANNELS = 16;    // of images of bytes, whose mean and std travel with the launch
constexpr int64_t CONVOLUTION_PROGRAMS = 3;  // blocks of the weights' gradient that a multiprocessor runs at a time
constexpr int64_t CONVOLUTION_CHANNELS = 32;  // of a block
struct Constant {
  const char* name;
  int64_t value;
};
constexpr Constant CONSTANTS[] = {
    {"PACK_TILE", PACK_TILE},
    {"PACK_MAX_CLASSES", PACK_MAX_CLASSES},
    {"CENTROIDS_RUN", CENTROIDS_RUN},
    {"LOSS_MAX_CHANNELS", LOSS_MAX_CHANNELS},
    {"CONVOLUTION_PROGRAMS", CONVOLUTION_PROGRAMS},
    {"CONVOLUTION_CHANNELS", CONVOLUTION_CHANNELS},
};

void pack_classes(Stream, View labels, View masked, int64_t num_classes, MaybeView counts, View order, View inverse,
                  View segment, View offsets, View cu_seqlens);
void gather_forward(Stream, View tokens, View inverse, View segment, MaybeView mask_token, MaybeView position, View out);
void gather_backward(Stream, View grad, View inverse, View segment, View grad_tokens, MaybeView groups,
                     MaybeView grad_position, int64_t blocks);
void scatter_forward(Stream, View packed, View inverse, MaybeView mask_token, MaybeView position, View out);
void scatter_backward(Stream, View grad, View inverse, View grad_packed, MaybeView groups, MaybeView grad_position,
                      int64_t blocks);
void sum_rows(Stream, View rows, View out, MaybeView other_rows, MaybeView other_out);
void patch_loss_forward(Stream, View pred, View image, View masked, MaybeView labels, int64_t num_classes,
                        int64_t patch_size, std::string distance, bool normalize, bool per_class, Numbers mean, Numbers std,
                        View sums, View counts, View finished, View loss, View class_sum, View class_count);
void patch_loss_backward(Stream, View grad_loss, View grad_class_sum, View class_count, View pred, View image, View masked,
                         MaybeView labels, int64_t num_classes, int64_t patch_size, std::string distance, bool normalize,
                         bool per_class, Numbers mean, Numbers std, View grad);
void centroids_forward(Stream, View features, View order, View offsets, View mean, View count, View rest);
void centroids_backward(Stream, View grad_mean, View count, View labels, View masked, View grad);
void same_class_conv2d(Stream, View x, View labels, View weight, bool flipped, MaybeView bias, int64_t num_classes,
                       View out);
void same_class_conv2d_weight(Stream, View x, View grad, View labels, int64_t num_classes, View of_weight,
                              MaybeView of_bias);

}  // namespace cmim
