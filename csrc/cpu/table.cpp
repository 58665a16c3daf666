// The kernels of one instruction set, by name.
#include "vector.h"

namespace cmim::cpu::CMIM_ISA {

void pack_classes(ForEach, View, View, int64_t, View, View, View, View, View);
void centroids_forward(ForEach, View, View, View, View, View);

#define CMIM_NAME_OF(isa) #isa
#define CMIM_NAME(isa) CMIM_NAME_OF(isa)

extern const Kernels kernels{CMIM_NAME(CMIM_ISA), pack_classes, centroids_forward};

}  // namespace cmim::cpu::CMIM_ISA
