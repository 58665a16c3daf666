// The kernels for the CPU, and how they meet PyTorch: library.cpp knows PyTorch and chooses the instruction set, <op>.cpp
// knows neither and is compiled once for each of them.
//
// Work is cut by the shapes of the tensors, never by the number of threads, so that results have the same bits on any.
#pragma once

#include "../view.h"

namespace cmim::cpu {

// for_each(n, grain, body, context): body(context, begin, end) for parts of [0, n) of at least `grain`, on PyTorch's threads.
using Body = void (*)(void* context, int64_t begin, int64_t end);
using ForEach = void (*)(int64_t n, int64_t grain, Body body, void* context);

// A list of numbers.
struct Numbers {
  const double* data;
  int64_t size;
};

// What one instruction set offers. Outputs are allocated by the caller; tensors may have any strides unless it says "dense".
struct Kernels {
  const char* name;

  // labels, masked (B, N); order, inverse, segment (B, N), offsets (B, 2K + 2), cu_seqlens: int32, dense.
  void (*pack_classes)(ForEach, View labels, View masked, int64_t num_classes, View order, View inverse, View segment,
                       View offsets, View cu_seqlens);

  // features (B, C, h, w) or (B, N, C); labels, masked (B, N); mean (B, K, 2, C) float32, count (B, K, 2) int32: dense.
  void (*centroids_forward)(ForEach, View features, View labels, View masked, View mean, View count);

  // x, out (B, C, h, w), labels (B, h, w), weight (C, k, k), bias (C); grad_weight, grad_bias: dense.
  void (*same_class_conv2d_forward)(ForEach, View x, View labels, View weight, MaybeView bias, int64_t num_classes, View out);
  void (*same_class_conv2d_backward)(ForEach, View grad, View x, View labels, View weight, int64_t num_classes, View grad_x,
                                     View grad_weight, MaybeView grad_bias);

  // logits, grad_logits (B, K, h, w), target, grad (B, H, W); loss, logsumexp, confidence float32, label int32: dense.
  void (*upsample_cross_entropy_forward)(ForEach, View logits, View target, bool align_corners, View loss, View logsumexp);
  void (*upsample_cross_entropy_backward)(ForEach, View grad, View logits, View target, View logsumexp, bool align_corners,
                                          View grad_logits);
  void (*upsample_pseudo_labels)(ForEach, View logits, bool align_corners, View label, View confidence);

  // grad_mean (B, K, 2, C) float32, count dense, labels, masked (B, N), grad like features.
  void (*centroids_backward)(ForEach, View grad_mean, View count, View labels, View masked, View grad);

  // tokens, grad_tokens (B, N, C), packed, grad_packed (B, L, C), inverse, segment (B, N), mask_token (C), position (N, C).
  // Dense: outputs, inverse, segment.
  void (*gather_forward)(ForEach, View tokens, View inverse, View segment, MaybeView mask_token, MaybeView position, View out);
  void (*gather_backward)(ForEach, View grad, View inverse, View segment, View grad_tokens, MaybeView grad_mask_token,
                          MaybeView grad_position);
  void (*scatter_forward)(ForEach, View packed, View inverse, MaybeView mask_token, MaybeView position, View out);
  void (*scatter_backward)(ForEach, View grad, View inverse, View grad_packed, MaybeView grad_mask_token,
                           MaybeView grad_position);

  // labels (B, H, W), out (B, H / p, W / p) int32, dense.
  void (*patch_labels)(ForEach, View labels, int64_t patch_size, int64_t num_classes, double min_share, View out);

  // pred, grad (B, N, p p c) or (B, c, H, W), image (B, c, H, W), masked, labels (B, N). Dense: loss (), class_sum (K) float32,
  // class_count (K) int32. `distance` is one of Distance; mean and std are empty, or have c numbers for an image of bytes.
  void (*patch_loss_forward)(ForEach, View pred, View image, View masked, MaybeView labels, int64_t num_classes,
                             int64_t patch_size, int64_t distance, bool normalize, bool per_class, Numbers mean, Numbers std,
                             View loss, View class_sum, View class_count);
  void (*patch_loss_backward)(ForEach, View grad_loss, View grad_class_sum, View class_count, View pred, View image,
                              View masked, MaybeView labels, int64_t num_classes, int64_t patch_size, int64_t distance,
                              bool normalize, bool per_class, Numbers mean, Numbers std, View grad);

  // q, k, v, grad (B, heads, N, d), offsets (B, 2K + 2) int32; out and gradients like them, logsumexp (B, heads, N) float32: dense.
  void (*attention_forward)(ForEach, View q, View k, View v, View offsets, View out, View logsumexp);
  void (*attention_backward)(ForEach, View grad, View q, View k, View v, View out, View logsumexp, View offsets, View grad_q,
                             View grad_k, View grad_v);
};

namespace baseline { extern const Kernels kernels; }
#ifdef __x86_64__
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
#endif

}  // namespace cmim::cpu
