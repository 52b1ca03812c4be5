"""Random numbers as a pure function of (seed, purpose, counter): nothing depends on what was drawn before."""

import functools

import numpy as np

ORDER, AUGMENTATION, DROPOUT, MIXING, RAND_AUGMENT = range(5)  # the purposes, each a stream of its own


def random_words(seed, purpose, counters, count):
    """uint64 (len(counters), count): words that depend on the seed, the purpose and each counter alone."""
    counters = np.asarray(counters, dtype=np.uint64)
    stream = mix(mix(np.uint64([seed])) + np.uint64([purpose]))
    rows = mix(mix(counters) + stream)
    return mix(rows[:, None] + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def random_uniform(seed, purpose, counters, count):
    """float64 (len(counters), count), uniform in [0, 1)"""
    return (random_words(seed, purpose, counters, count) >> np.uint64(11)) * 2.0**-53


def mix(x):
    """The finaliser of SplitMix64 (Steele et al., 2014): a bijection of 64-bit words; products wrap around."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@functools.lru_cache(maxsize=2)  # a batch may reach from one epoch into the next
def epoch_order(seed, epoch, num_samples):
    """The permutation of the samples in one epoch."""
    first = epoch * num_samples
    return np.argsort(random_words(seed, ORDER, np.arange(first, first + num_samples), 1)[:, 0])


def samples_at(seed, positions, num_samples):
    """Positions in the endless stream of shuffled epochs -> (epochs, sample indices)."""
    epochs, slots = np.divmod(np.asarray(positions), num_samples)
    indices = np.empty_like(slots)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = epoch_order(seed, int(epoch), num_samples)[slots[here]]
    return epochs, indices
