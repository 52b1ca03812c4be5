"""The learning rate as a closed form of the step."""

import math

DECAY_TYPES = ("cosine", "linear")


def learning_rate(step, base, warmup_steps, num_steps, decay_type):
    """The rate of update number `step`, counted from 0: linear warm-up from 0, then decay to 0 at `num_steps`."""
    if step < warmup_steps:
        return base * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    if decay_type == "linear":
        return base * (1 - progress)
    return base * 0.5 * (1 + math.cos(math.pi * progress))
