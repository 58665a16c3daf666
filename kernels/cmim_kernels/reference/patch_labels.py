"""The class of each patch by majority vote.

The labels of a patch are sorted, so that the votes for a label are the length of its run. Time and memory do not depend on
the number of classes.
"""

import torch

from cmim_kernels.numerics import class_ids


def patch_labels_forward(labels, patch_size, num_classes, min_share):
    """(B, H, W) labels to (B, H / patch_size, W / patch_size) int32. See `cmim_kernels.patch_labels`."""
    batch, height, width = labels.shape
    rows, columns, area = height // patch_size, width // patch_size, patch_size**2
    patches = class_ids(labels, num_classes).to(torch.int32).reshape(batch, rows, patch_size, columns, patch_size)
    votes = patches.transpose(2, 3).reshape(batch, rows, columns, area).contiguous().sort(dim=-1).values
    count = torch.searchsorted(votes, votes, right=True) - torch.searchsorted(votes, votes)
    count = torch.where(votes < num_classes, count, 0)
    # argmax returns the first of equal maxima, which after sorting is that of the smallest id.
    winner = count.argmax(dim=-1, keepdim=True)
    count = count.gather(-1, winner)
    elected = (count > 0) & (count.to(torch.float64) / area >= min_share)
    return torch.where(elected, votes.gather(-1, winner), -1).squeeze(-1)
