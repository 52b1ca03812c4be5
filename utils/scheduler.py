"""The learning rate as a closed form of the step: linear warm-up, then one of DECAY_TYPES."""

import math
from typing import NamedTuple

STEP_FRACTIONS = (0.3, 0.6, 0.9)  # of all steps, where "step" divides the learning rate by 10 by default


class Schedule(NamedTuple):
    """How the learning rate changes over the steps of a run."""

    num_steps: int
    warmup_steps: int = 0
    decay_type: str = "cosine"
    decay_steps: tuple | None = None  # for "step"; None: at STEP_FRACTIONS

    def progress(self, step):
        """The fraction of the steps after the warm-up that are done, 0 to 1."""
        return min(1.0, (step - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps))


def learning_rate(step, base, schedule):
    """The rate of update number `step`, counted from 0: linear warm-up from 0 to `base`, then the decay.

    Raises ValueError for an unknown decay type.
    """
    if schedule.decay_type not in DECAY_TYPES:
        raise ValueError(f"unknown decay type {schedule.decay_type!r}; choose from {', '.join(DECAY_TYPES)}")
    if step < schedule.warmup_steps:
        return base * step / schedule.warmup_steps
    return base * DECAY_TYPES[schedule.decay_type](step, schedule)


def cosine(step, schedule):
    """Half a cosine wave from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * schedule.progress(step)))


def linear(step, schedule):
    """A straight line from 1 to 0."""
    return 1 - schedule.progress(step)


def constant(step, schedule):
    """Always 1."""
    return 1.0


def step_decay(step, schedule):
    """1, divided by 10 at each of the `decay_steps`."""
    milestones = schedule.decay_steps or [round(fraction * schedule.num_steps) for fraction in STEP_FRACTIONS]
    return 10.0 ** -sum(step >= milestone for milestone in milestones)


DECAY_TYPES = {"cosine": cosine, "linear": linear, "constant": constant, "step": step_decay}  # factors of the rate
