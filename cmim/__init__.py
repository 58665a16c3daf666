"""Semi-supervised semantic segmentation with class-wise masked image modelling."""

__version__ = "0.1.0"
