"""The length of a run, and the schedules of the learning rate and of the weight of the masked terms."""

from cmim.settings import TrainSettings


def total_steps(settings: TrainSettings, unlabelled: int) -> int:
    """Number of optimiser steps; an epoch has as many whole steps as `unlabelled` images allow."""
    if settings.epochs is None:
        return settings.steps or 40_000
    return max(1, round(settings.epochs * (unlabelled // (settings.unlabelled_batch * settings.accumulate))))


def lr_factor(step: int, steps: int, power: float, warmup: float = 0.0) -> float:
    """Factor of the learning rate at step `step` (counted from 0). For the first w = `warmup` x `steps` steps it grows
    linearly, (step + 1) / w; then it is (1 - (step - w) / (steps - w)) ** `power`."""
    first = round(warmup * steps)
    if step < first:
        return (step + 1) / first
    return (1 - (step - first) / (steps - first)) ** power


def ramp(step: int, steps: int, start: float, length: float) -> float | None:
    """r(t): None before `start`, then linear from 0 to 1 over `length` (both fractions of `steps`), then 1."""
    progress = step / steps
    if progress < start:
        return None
    return 1.0 if progress >= start + length else (progress - start) / length
