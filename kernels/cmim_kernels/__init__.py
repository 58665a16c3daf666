"""Ops of class-wise masked image modelling for PyTorch.

    from cmim_kernels import pack_classes, masked_patch_loss, class_centroids

`reference/<op>.py` defines each op in plain PyTorch; `ops/<op>.py` has its schema, fake implementation, autograd and public
function. Labels are uint8, int32 or int64, and any value outside [0, num_classes) means "ignored".
"""

from cmim_kernels.backends import use_backend
from cmim_kernels.ops.centroid_distance import CentroidDistance, centroid_distance
from cmim_kernels.ops.class_attention import class_attention
from cmim_kernels.ops.class_centroids import ClassCentroids, class_centroids
from cmim_kernels.ops.gather_class_tokens import gather_class_tokens
from cmim_kernels.ops.masked_patch_loss import PatchLoss, masked_patch_loss
from cmim_kernels.ops.pack_classes import ClassLayout, pack_classes
from cmim_kernels.ops.patch_labels import patch_labels
from cmim_kernels.ops.random_mask import random_mask
from cmim_kernels.ops.same_class_conv2d import same_class_conv2d
from cmim_kernels.ops.scatter_class_tokens import scatter_class_tokens
from cmim_kernels.ops.upsample_cross_entropy import upsample_cross_entropy
from cmim_kernels.ops.upsample_pseudo_labels import PseudoLabels, upsample_pseudo_labels

__all__ = [
    "CentroidDistance",
    "ClassCentroids",
    "ClassLayout",
    "PatchLoss",
    "PseudoLabels",
    "centroid_distance",
    "class_attention",
    "class_centroids",
    "gather_class_tokens",
    "masked_patch_loss",
    "pack_classes",
    "patch_labels",
    "random_mask",
    "same_class_conv2d",
    "scatter_class_tokens",
    "upsample_cross_entropy",
    "upsample_pseudo_labels",
    "use_backend",
]
__version__ = "0.1.0"
