"""Numbers that depend on (seed, purpose, counter) alone."""

import numpy as np

from utils.data.stream import AUGMENTATION, DROPOUT, epoch_order, random_bits, random_uniform, samples_at


def test_a_row_depends_on_its_own_counter_only():
    whole = random_bits(1, AUGMENTATION, [5, 6, 7], 4)
    assert np.array_equal(random_bits(1, AUGMENTATION, [7, 5], 4), whole[[2, 0]])
    assert np.array_equal(random_bits(1, AUGMENTATION, [5, 6, 7], 2), whole[:, :2])


def test_seeds_purposes_and_counters_give_different_words():
    words = [random_bits(s, p, np.arange(50), 8) for s in range(3) for p in (AUGMENTATION, DROPOUT)]
    assert len(np.unique(words)) == 6 * 50 * 8


def test_uniform_numbers_are_uniform():
    draws = random_uniform(3, AUGMENTATION, np.arange(20000), 5)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    expected = draws.size / 20
    assert ((counts - expected) ** 2 / expected).sum() < 43.8  # chi-square, 19 degrees of freedom, 0.1 %
    assert abs(np.corrcoef(draws.T) - np.eye(5)).max() < 0.03


def test_every_epoch_is_a_permutation_of_its_own():
    orders = [epoch_order(42, epoch, 100) for epoch in range(3)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], epoch_order(43, 0, 100))


def test_the_stream_runs_on_over_the_end_of_an_epoch():
    epochs, indices = samples_at(42, np.arange(95, 105), 100)
    assert epochs.tolist() == [0] * 5 + [1] * 5
    assert indices.tolist() == [*epoch_order(42, 0, 100)[95:], *epoch_order(42, 1, 100)[:5]]
