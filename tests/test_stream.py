"""Random bits, the order of the samples, and dropout keys: functions of seed and position alone."""

import numpy as np
import pytest
import torch

from helpers import CPU
from utils.data.stream import (
    AUGMENTATION,
    DROPOUT,
    dropout_keys,
    epoch_order,
    random_bits,
    random_uniform,
    samples_at,
    stream_positions,
)
from utils.parallel.processes import Processes


def test_random_bits_depend_only_on_their_own_counter():
    whole = random_bits(1, AUGMENTATION, [5, 6, 7], 4)
    assert np.array_equal(random_bits(1, AUGMENTATION, [7, 5], 4), whole[[2, 0]])
    assert np.array_equal(random_bits(1, AUGMENTATION, [5, 6, 7], 2), whole[:, :2])


def test_seeds_purposes_and_counters_give_different_bits():
    bits = [random_bits(s, p, np.arange(50), 8) for s in range(3) for p in (AUGMENTATION, DROPOUT)]
    assert len(np.unique(bits)) == 6 * 50 * 8


def test_uniform_numbers_are_uniform():
    draws = random_uniform(3, AUGMENTATION, np.arange(20000), 5)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    expected = draws.size / 20
    assert ((counts - expected) ** 2 / expected).sum() < 43.8  # chi-square, 19 degrees of freedom, 0.1 %
    assert abs(np.corrcoef(draws.T) - np.eye(5)).max() < 0.03


def test_each_epoch_is_another_permutation():
    orders = [epoch_order(42, epoch, 100) for epoch in range(3)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], epoch_order(43, 0, 100))


def test_the_stream_continues_from_one_epoch_into_the_next():
    epochs, indices = samples_at(42, np.arange(95, 105), 100)
    assert epochs.tolist() == [0] * 5 + [1] * 5
    assert indices.tolist() == [*epoch_order(42, 0, 100)[95:], *epoch_order(42, 1, 100)[:5]]


@pytest.mark.parametrize("repeats", [1, 2, 3])
@pytest.mark.parametrize("num_samples", [1, 12, 25])
def test_repeats_of_a_sample_alternate_with_those_of_its_neighbour(num_samples, repeats):
    """An epoch has as many positions as without repeats, and takes the first samples of the same permutation."""
    epochs, indices = samples_at(42, np.arange(2 * num_samples), num_samples, repeats)
    for epoch in range(2):
        mine = indices[epoch * num_samples : (epoch + 1) * num_samples]
        order = epoch_order(42, epoch, num_samples)
        pairs = [np.tile(order[i : i + 2], repeats) for i in range(0, num_samples, 2)]
        assert mine.tolist() == np.concatenate(pairs)[:num_samples].tolist()
        repetitions = epochs[epoch * num_samples : (epoch + 1) * num_samples] - epoch * repeats
        assert ((repetitions >= 0) & (repetitions < repeats)).all()
    assert len(set(zip(epochs.tolist(), indices.tolist(), strict=True))) == 2 * num_samples  # no augmentation twice
    if num_samples > 1:
        assert (indices[1:num_samples] != indices[: num_samples - 1]).all()  # partners of mixup differ


def test_without_repeats_the_order_is_that_of_earlier_versions():
    _, indices = samples_at(42, np.arange(6), 6)
    assert indices.tolist() == [5, 0, 1, 2, 4, 3]


def test_micro_batches_of_all_processes_make_up_the_global_batch():
    whole = list(stream_positions(24, 1, Processes(0, 1, 0, CPU), 3, 5))
    for size, parts in ((2, 1), (2, 3), (4, 2)):
        shares = [list(stream_positions(24, parts, Processes(rank, size, 0, CPU), 3, 5)) for rank in range(size)]
        for step in range(2):
            taken = [share[step * parts + part] for part in range(parts) for share in shares]
            assert list(np.concatenate(taken)) == list(whole[step])


def test_the_stream_of_a_resumed_run_is_the_rest_of_the_whole_one():
    whole = list(stream_positions(12, 2, Processes(1, 3, 0, CPU), 0, 5))
    resumed = list(stream_positions(12, 2, Processes(1, 3, 0, CPU), 2, 5))
    assert np.array_equal(resumed, whole[4:])


def test_dropout_keys_depend_on_seed_position_and_layer_alone():
    whole = dropout_keys(1, np.array([3, 9, 27]), 4, CPU)
    assert (whole.shape, whole.dtype) == ((4, 3, 2), torch.int32)
    assert torch.equal(dropout_keys(1, np.array([27, 3]), 4, CPU), whole[:, [2, 0]])
    assert torch.equal(dropout_keys(1, np.array([3, 9, 27]), 2, CPU), whole[:2])
    assert len(whole.flatten().unique()) == 4 * 3 * 2
    assert not (dropout_keys(2, np.array([3, 9, 27]), 4, CPU) == whole).any()
