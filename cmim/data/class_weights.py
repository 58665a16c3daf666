"""Weights of the classes in the supervised cross-entropy, from how many pixels they have."""

from typing import Literal

import numpy as np

from cmim.data.survey import Counts


def class_weights(kind: Literal["inverse", "median"], counts: Counts) -> np.ndarray:
    """The weight of each class. With n_k pixels of class k:

        inverse   w_k = mean(n) / n_k
        median    w_k = median(f) / f_k, f_k = n_k / pixels with a class in the images in which class k occurs

    `median` is median-frequency balancing (Eigen and Fergus 2015, arXiv 1411.4734). Mean and median are those of the classes
    that have pixels. A class without pixels gets the weight 1, which no labelled pixel uses.

    Args:
        kind: the formula.
        counts: `Counts` of the labelled images.

    Returns:
        (K,) float64, above 0.
    """
    present = counts.classes > 0
    frequency = counts.classes[present] / (counts.around[present] if kind == "median" else 1)
    weights = np.ones(len(present))
    weights[present] = (np.median(frequency) if kind == "median" else frequency.mean()) / frequency
    return weights
