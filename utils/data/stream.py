"""What each step sees: random bits, the order of the samples and dropout keys as pure functions of seed and position.

Nothing depends on what was drawn before, on the number of processes or on how a batch is divided.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch

from utils.parallel.devices import to_device

# The purposes, each with a stream of its own. New ones are added at the end, so that the others keep their bits.
ORDER, AUGMENTATION, DROPOUT, MIXING, POLICY, COLOR_JITTER, ERASING = range(7)


class MicroBatch(NamedTuple):
    """The part of a step's batch that one process computes at once."""

    positions: np.ndarray  # (B,) in the stream of samples
    images: torch.Tensor  # float32 (B, 3, H, W), normalised
    labels: torch.Tensor  # int64 (B,)


def random_bits(seed, purpose, counters, count):
    """uint64 (len(counters), count) that depend on the seed, the purpose and each counter alone."""
    counters = np.asarray(counters, dtype=np.uint64)
    stream = hash_bits(hash_bits(np.uint64([seed])) + np.uint64([purpose]))
    rows = hash_bits(hash_bits(counters) + stream)
    return hash_bits(rows[:, None] + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def random_uniform(seed, purpose, counters, count):
    """float64 (len(counters), count), uniform in [0, 1)."""
    return (random_bits(seed, purpose, counters, count) >> np.uint64(11)) * 2.0**-53


def hash_bits(x):
    """The finaliser of SplitMix64 (Steele et al., 2014): a bijection of 64-bit integers; products wrap around."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@functools.lru_cache(maxsize=2)  # a batch may reach from one epoch into the next
def epoch_order(seed, epoch, num_samples):
    """The permutation of the samples in one epoch."""
    first = epoch * num_samples
    return np.argsort(random_bits(seed, ORDER, np.arange(first, first + num_samples), 1)[:, 0])


def samples_at(seed, positions, num_samples, repeats=1):
    """Positions in the endless stream of shuffled epochs -> (epochs, sample indices).

    With `repeats` an epoch of `num_samples` positions has that many repetitions of the first samples of its order.
    They count as epochs, so that each has its own augmentation. The repetitions of two samples alternate (a, b, a, b),
    because mixup needs neighbours that differ.
    """
    epochs, slots = np.divmod(np.asarray(positions), num_samples)
    pairs, slots = np.divmod(slots, 2 * repeats)
    places = 2 * pairs + slots % 2  # in the order of the epoch
    indices = np.empty_like(places)
    for epoch in np.unique(epochs):
        of_epoch = epochs == epoch
        indices[of_epoch] = epoch_order(seed, int(epoch), num_samples)[places[of_epoch]]
    return epochs * repeats + slots // 2, indices


def stream_positions(batch_size, accumulation_steps, processes, first_step, num_steps):
    """Yield this process's stream positions for each micro-batch of the steps from `first_step` on.

    All processes together take the positions [step * batch_size, (step + 1) * batch_size), micro-batch by micro-batch.
    For any number of processes a micro-batch holds the same samples, over which BN takes its statistics.
    """
    count = batch_size // accumulation_steps // processes.size
    for micro_batch in range(first_step * accumulation_steps, num_steps * accumulation_steps):
        start = (micro_batch * processes.size + processes.rank) * count
        yield np.arange(start, start + count)


def dropout_keys(seed, positions, num_layers, device):
    """Random bits for the samples at these positions, int32 (layers, B, 2), from which dropout masks derive."""
    bits = np.ascontiguousarray(random_bits(seed, DROPOUT, positions, num_layers).T)
    keys = torch.from_numpy(bits.view(np.int32))  # (layers, 2 B): one uint64 is two int32
    return to_device(keys.unflatten(1, (-1, 2)), device)
