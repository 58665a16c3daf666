"""A term of the objective: sums and counts, whose ratio is taken over all processes."""

from typing import NamedTuple

import torch
from torch import Tensor


class Ratio(NamedTuple):
    """The vectors S and n of a term, whose value is the mean of S / n over the entries with n > 0; S is 0 where n is."""

    total: Tensor
    count: Tensor  # integers, or sums of weights

    def value(self, counts: Tensor) -> Tensor:
        """The value of the term, where `counts` is n summed over all processes."""
        some = counts > 0
        return (self.total / torch.where(some, counts, 1)).sum() / some.sum().clamp(min=1)


Terms = dict[str, tuple[float | Tensor, Ratio]]
"""{name: (weight, term)}."""
