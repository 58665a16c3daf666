"""The length of a run, and the schedules of the learning rate and of the weight of the masked terms."""

from cmim.settings import TrainSettings


def total_steps(settings: TrainSettings, unlabelled: int) -> int:
    """Number of optimiser steps; an epoch has as many whole steps as `unlabelled` images allow."""
    if settings.epochs is None:
        return settings.steps or 40_000
    return max(1, round(settings.epochs * (unlabelled // (settings.unlabelled_batch * settings.accumulate))))


def poly(step: int, steps: int, power: float) -> float:
    """Factor of the learning rate at step `step` (counted from 0): (1 - step / steps) ** power."""
    return (1 - step / steps) ** power


def ramp(step: int, steps: int, start: float, length: float) -> float | None:
    """r(t): None before `start`, then linear from 0 to 1 over `length` (both fractions of `steps`), then 1."""
    progress = step / steps
    if progress < start:
        return None
    return 1.0 if progress >= start + length else (progress - start) / length
