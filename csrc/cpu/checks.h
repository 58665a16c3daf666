// What the kernels rely on and the launchers in Python keep: checked before a kernel runs, under the name of its op.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace cmim::cpu {
namespace {

using Sizes = std::initializer_list<int64_t>;

void require(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(std::string("cmim_cpu: ") + what + " is of the wrong kind");
}

bool has_sizes(const View& x, Sizes sizes) {
  if (x.dimensions != static_cast<int>(sizes.size())) return false;
  int i = 0;
  for (const int64_t size : sizes)
    if (x.sizes[i++] != size) return false;
  return true;
}
bool is_float(const View& x) { return x.dtype <= Dtype::bfloat16; }
bool is_label(const View& x) { return x.dtype >= Dtype::uint8; }

bool floats(const View& x, Sizes sizes) { return is_float(x) && has_sizes(x, sizes); }
bool labels_of(const View& x, Sizes sizes) { return is_label(x) && has_sizes(x, sizes); }
bool mask(const View& x, Sizes sizes) { return x.dtype == Dtype::uint8 && has_sizes(x, sizes); }
bool is_dense(const View& x) {
  int64_t step = 1;
  for (int i = 0; i < x.dimensions; ++i)
    if (x.sizes[i] == 0) return true;
  for (int i = x.dimensions - 1; i >= 0; --i) {
    if (x.sizes[i] != 1 && x.strides[i] != step) return false;
    step *= x.sizes[i];
  }
  return true;
}
bool dense(const View& x, Dtype dtype, Sizes sizes) { return x.dtype == dtype && has_sizes(x, sizes) && is_dense(x); }
bool like(const View& x, const View& other) {
  bool same = x.dimensions == other.dimensions;
  for (int i = 0; same && i < x.dimensions; ++i) same = x.sizes[i] == other.sizes[i];
  return same;
}
bool none_or(const View& x, bool holds) { return !x.data || holds; }

// One function for each op, with its arguments.
struct Checks {
  static void pack_classes(View labels, View masked, int64_t classes, View order, View inverse, View segment, View offsets,
                           View cu_seqlens) {
    const int64_t b = labels.sizes[0], n = labels.sizes[1];
    require(labels_of(labels, {b, n}), "labels");
    require(mask(masked, {b, n}), "masked");
    require(classes > 0 && classes < (int64_t{1} << 30), "num_classes");
    require(dense(order, Dtype::int32, {b, n}) && dense(inverse, Dtype::int32, {b, n}), "order or inverse");
    require(dense(segment, Dtype::int32, {b, n}) && dense(offsets, Dtype::int32, {b, 2 * classes + 2}), "segment or offsets");
    require(dense(cu_seqlens, Dtype::int32, {b * (classes + 1) + 1}), "cu_seqlens");
  }

  // Tokens or a grid: images and tokens of each.
  static int64_t tokens_of(const View& x) { return x.dimensions == 4 ? x.sizes[2] * x.sizes[3] : x.sizes[1]; }
  static int64_t channels_of(const View& x) { return x.sizes[x.dimensions == 4 ? 1 : 2]; }

  static void centroids_forward(View features, View labels, View masked, View mean, View count) {
    const int64_t b = features.sizes[0], n = tokens_of(features), k = mean.sizes[1];
    require(is_float(features) && (features.dimensions == 3 || features.dimensions == 4), "features");
    require(labels_of(labels, {b, n}) && mask(masked, {b, n}), "labels or masked");
    require(dense(mean, Dtype::float32, {b, k, 2, channels_of(features)}), "mean");
    require(dense(count, Dtype::int32, {b, k, 2}), "count");
  }
  static void centroids_backward(View grad_mean, View count, View labels, View masked, View grad) {
    const int64_t b = grad.sizes[0], n = tokens_of(grad), k = grad_mean.sizes[1];
    require(is_float(grad) && (grad.dimensions == 3 || grad.dimensions == 4), "grad");
    require(grad_mean.dtype == Dtype::float32 && has_sizes(grad_mean, {b, k, 2, channels_of(grad)}), "grad_mean");
    require(dense(count, Dtype::int32, {b, k, 2}), "count");
    require(labels_of(labels, {b, n}) && mask(masked, {b, n}), "labels or masked");
  }

  static void weights(const View& x, const View& labels, const View& weight) {
    require(is_float(x) && x.dimensions == 4, "x");
    require(labels_of(labels, {x.sizes[0], x.sizes[2], x.sizes[3]}), "labels");
    require(floats(weight, {x.sizes[1], weight.sizes[1], weight.sizes[1]}) && weight.sizes[1] % 2 == 1, "weight");
  }
  static void same_class_conv2d_forward(View x, View labels, View weight, MaybeView bias, int64_t, View out) {
    weights(x, labels, weight);
    require(none_or(bias, floats(bias, {x.sizes[1]})), "bias");
    require(like(out, x) && is_float(out), "out");
  }
  static void same_class_conv2d_backward(View grad, View x, View labels, View weight, int64_t, View grad_x, View grad_weight,
                                         MaybeView grad_bias) {
    weights(x, labels, weight);
    require(like(grad, x) && is_float(grad), "grad");
    require(like(grad_x, x) && is_float(grad_x), "grad_x");
    require(dense(grad_weight, weight.dtype, {x.sizes[1], weight.sizes[1], weight.sizes[1]}), "grad_weight");
    require(none_or(grad_bias, floats(grad_bias, {x.sizes[1]}) && is_dense(grad_bias)), "grad_bias");
  }

  static void upsample_cross_entropy_forward(View logits, View target, bool, View loss, View logsumexp) {
    const Sizes pixels{logits.sizes[0], target.sizes[1], target.sizes[2]};
    require(is_float(logits) && logits.dimensions == 4, "logits");
    require(labels_of(target, pixels), "target");
    require(dense(loss, Dtype::float32, pixels) && dense(logsumexp, Dtype::float32, pixels), "loss or logsumexp");
  }
  static void upsample_cross_entropy_backward(View grad, View logits, View target, View logsumexp, bool, View grad_logits) {
    const Sizes pixels{logits.sizes[0], target.sizes[1], target.sizes[2]};
    require(is_float(logits) && logits.dimensions == 4, "logits");
    require(labels_of(target, pixels), "target");
    require(grad.dtype == Dtype::float32 && has_sizes(grad, pixels), "grad");
    require(dense(logsumexp, Dtype::float32, pixels), "logsumexp");
    require(like(grad_logits, logits) && is_float(grad_logits), "grad_logits");
  }
  static void upsample_pseudo_labels(View logits, bool, View label, View confidence) {
    const Sizes pixels{logits.sizes[0], label.sizes[1], label.sizes[2]};
    require(is_float(logits) && logits.dimensions == 4, "logits");
    require(dense(label, Dtype::int32, pixels) && dense(confidence, Dtype::float32, pixels), "label or confidence");
  }

  static void indices(const View& inverse, int64_t b, int64_t n) { require(dense(inverse, Dtype::int32, {b, n}), "inverse"); }
  static void parameters(const View& mask_token, const View& position, int64_t n, int64_t c) {
    require(none_or(mask_token, floats(mask_token, {c})), "mask_token");
    require(none_or(position, floats(position, {n, c})), "position");
  }
  static void gather_forward(View tokens, View inverse, View segment, MaybeView mask_token, MaybeView position, View out) {
    const int64_t b = tokens.sizes[0], n = tokens.sizes[1], c = tokens.sizes[2];
    require(floats(tokens, {b, n, c}), "tokens");
    indices(inverse, b, n), indices(segment, b, n), parameters(mask_token, position, n, c);
    require(dense(out, tokens.dtype, {b, out.sizes[1], c}), "out");
  }
  static void gather_backward(View grad, View inverse, View segment, View grad_tokens, MaybeView grad_mask_token,
                              MaybeView grad_position) {
    const int64_t b = grad.sizes[0], n = inverse.sizes[1], c = grad.sizes[2];
    require(floats(grad, {b, grad.sizes[1], c}), "grad");
    indices(inverse, b, n), indices(segment, b, n), parameters(grad_mask_token, grad_position, n, c);
    require(dense(grad_tokens, grad.dtype, {b, n, c}), "grad_tokens");
    require(is_dense(grad_mask_token) && is_dense(grad_position), "a parameter's gradient");
  }
  static void scatter_forward(View packed, View inverse, MaybeView mask_token, MaybeView position, View out) {
    const int64_t b = packed.sizes[0], n = inverse.sizes[1], c = packed.sizes[2];
    require(floats(packed, {b, packed.sizes[1], c}), "packed");
    indices(inverse, b, n), parameters(mask_token, position, n, c);
    require(dense(out, packed.dtype, {b, n, c}), "out");
  }
  static void scatter_backward(View grad, View inverse, View grad_packed, MaybeView grad_mask_token, MaybeView grad_position) {
    const int64_t b = grad.sizes[0], n = grad.sizes[1], c = grad.sizes[2];
    require(floats(grad, {b, n, c}), "grad");
    indices(inverse, b, n), parameters(grad_mask_token, grad_position, n, c);
    require(dense(grad_packed, grad.dtype, {b, grad_packed.sizes[1], c}), "grad_packed");
    require(is_dense(grad_mask_token) && is_dense(grad_position), "a parameter's gradient");
  }

  static void patch_labels(View labels, int64_t size, int64_t classes, double, View out) {
    require(is_label(labels) && labels.dimensions == 3, "labels");
    require(size > 0 && classes > 0, "patch_size or num_classes");
    require(dense(out, Dtype::int32, {labels.sizes[0], labels.sizes[1] / size, labels.sizes[2] / size}), "out");
  }

  static void patches(const View& pred, const View& image, const View& masked, const View& labels, int64_t size,
                      int64_t distance, const Numbers& mean, const Numbers& std) {
    require(image.dimensions == 4 && (is_float(image) || image.dtype == Dtype::uint8), "image");
    require(size > 0 && image.sizes[2] % size == 0 && image.sizes[3] % size == 0, "patch_size");
    const int64_t b = image.sizes[0], c = image.sizes[1], n = image.sizes[2] / size * (image.sizes[3] / size);
    require(is_float(pred) && (like(pred, image) || has_sizes(pred, {b, n, size * size * c})), "pred");
    require(mask(masked, {b, n}) && none_or(labels, labels_of(labels, {b, n})), "masked or labels");
    require(distance >= 0 && distance <= 2, "distance");
    const int64_t wanted = image.dtype == Dtype::uint8 ? c : 0;
    require(mean.size == wanted && std.size == wanted, "mean or std");
  }
  static void patch_loss_forward(View pred, View image, View masked, MaybeView labels, int64_t classes, int64_t size,
                                 int64_t distance, bool, bool, Numbers mean, Numbers std, View loss, View class_sum,
                                 View class_count) {
    patches(pred, image, masked, labels, size, distance, mean, std);
    require(loss.dtype == Dtype::float32 && loss.dimensions == 0, "loss");
    require(dense(class_sum, Dtype::float32, {classes}) && dense(class_count, Dtype::int32, {classes}), "class_sum or class_count");
  }
  static void patch_loss_backward(View grad_loss, View grad_class_sum, View class_count, View pred, View image, View masked,
                                  MaybeView labels, int64_t classes, int64_t size, int64_t distance, bool, bool, Numbers mean,
                                  Numbers std, View grad) {
    patches(pred, image, masked, labels, size, distance, mean, std);
    require(grad_loss.dtype == Dtype::float32 && grad_loss.dimensions == 0, "grad_loss");
    require(grad_class_sum.dtype == Dtype::float32 && has_sizes(grad_class_sum, {classes}), "grad_class_sum");
    require(dense(class_count, Dtype::int32, {classes}), "class_count");
    require(like(grad, pred) && grad.dtype == pred.dtype, "grad");
  }
};

}  // namespace
}  // namespace cmim::cpu
