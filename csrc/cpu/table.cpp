// The kernels of one instruction set, by name.
#include "vector.h"

namespace cmim::cpu::CMIM_ISA {

void pack_classes(ForEach, View, View, int64_t, View, View, View, View, View);
void centroids_forward(ForEach, View, View, View, View, View);
void same_class_conv2d_forward(ForEach, View, View, View, MaybeView, int64_t, View);
void same_class_conv2d_backward(ForEach, View, View, View, View, int64_t, View, View, MaybeView);
void upsample_cross_entropy_forward(ForEach, View, View, bool, View, View);
void upsample_cross_entropy_backward(ForEach, View, View, View, View, bool, View);
void upsample_pseudo_labels(ForEach, View, bool, View, View);
void centroids_backward(ForEach, View, View, View, View, View);
void gather_forward(ForEach, View, View, View, MaybeView, MaybeView, View);
void gather_backward(ForEach, View, View, View, View, MaybeView, MaybeView);
void scatter_forward(ForEach, View, View, MaybeView, MaybeView, View);
void scatter_backward(ForEach, View, View, View, MaybeView, MaybeView);
void patch_labels(ForEach, View, int64_t, int64_t, double, View);
void patch_loss_forward(ForEach, View, View, View, MaybeView, int64_t, int64_t, int64_t, bool, bool, Numbers, Numbers, View,
                        View, View);
void patch_loss_backward(ForEach, View, View, View, View, View, View, MaybeView, int64_t, int64_t, int64_t, bool, bool, Numbers,
                         Numbers, View);
void attention_forward(ForEach, View, View, View, View, View, View);
void attention_backward(ForEach, View, View, View, View, View, View, View, View, View, View);

#define CMIM_NAME_OF(isa) #isa
#define CMIM_NAME(isa) CMIM_NAME_OF(isa)

extern const Kernels kernels{
    CMIM_NAME(CMIM_ISA), pack_classes, centroids_forward, same_class_conv2d_forward, same_class_conv2d_backward,
    upsample_cross_entropy_forward, upsample_cross_entropy_backward, upsample_pseudo_labels, centroids_backward, gather_forward, gather_backward, scatter_forward, scatter_backward, patch_labels, patch_loss_forward, patch_loss_backward, attention_forward, attention_backward,
};

}  // namespace cmim::cpu::CMIM_ISA
