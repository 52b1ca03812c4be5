"""The learning rate against its closed form."""

import math

import pytest

from utils.scheduler import Schedule, learning_rate


@pytest.mark.parametrize(
    "step, decay_type, expected",
    [
        (0, "cosine", 0.0),
        (25, "cosine", 0.03 / 4),
        (100, "cosine", 0.03),
        (325, "cosine", 0.03 * (1 + math.cos(math.pi / 4)) / 2),
        (550, "cosine", 0.015),
        (1000, "cosine", 0.0),
        (50, "linear", 0.015),
        (100, "linear", 0.03),
        (325, "linear", 0.0225),
        (1000, "linear", 0.0),
    ],
)
def test_closed_form(step, decay_type, expected):
    assert learning_rate(step, 0.03, Schedule(1000, 100, decay_type)) == pytest.approx(expected, abs=1e-15)


def test_without_warm_up_it_starts_at_the_base():
    assert learning_rate(0, 0.03, Schedule(10, 0, "cosine")) == 0.03


def test_a_warm_up_longer_than_the_run_is_cut_off():
    assert [learning_rate(step, 1.0, Schedule(4, 10, "cosine")) for step in range(4)] == pytest.approx(
        [0, 0.1, 0.2, 0.3]
    )
