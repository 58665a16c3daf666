"""How long a run is, and what changes with the step: learning rate and weight of the masked terms."""

from cmim.settings import TrainSettings


def total_steps(settings: TrainSettings, unlabelled: int) -> int:
    """Optimiser steps of a `TrainSettings`; an epoch is the whole steps that `unlabelled` images are enough for."""
    if settings.epochs is None:
        return settings.steps or 40_000
    return max(1, round(settings.epochs * (unlabelled // (settings.unlabelled_batch * settings.accumulate))))


def poly(step: int, steps: int, power: float) -> float:
    """Factor of the learning rate at step number `step` (from 0): (1 - step / steps) ** power."""
    return (1 - step / steps) ** power


def ramp(step: int, steps: int, start: float, length: float) -> float | None:
    """r(t): None before `start`, then linear from 0 to 1 over `length` (both fractions of `steps`), then 1."""
    progress = step / steps
    if progress < start:
        return None
    return 1.0 if progress >= start + length else (progress - start) / length
