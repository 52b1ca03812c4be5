"""The learning rate against its closed form."""

import math

import pytest

import train
from helpers import call_main, evaluate_and_export, fails, make_shallow
from utils.records.run_folder import read_metrics
from utils.scheduler import DECAY_TYPES, Schedule, learning_rate


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
        (50, "constant", 0.015),
        (100, "constant", 0.03),
        (1000, "constant", 0.03),
        (50, "step", 0.015),
        (299, "step", 0.03),
        (300, "step", 0.003),
        (600, "step", 0.0003),
        (899, "step", 0.0003),
        (900, "step", 0.00003),
    ],
)
def test_the_learning_rate_has_its_closed_form(step, decay_type, expected):
    assert learning_rate(step, 0.03, Schedule(1000, 100, decay_type)) == pytest.approx(expected, abs=1e-15)


def test_without_warm_up_the_first_step_has_the_base_rate():
    assert learning_rate(0, 0.03, Schedule(10, 0, "cosine")) == 0.03


def test_a_run_shorter_than_its_warm_up_ends_within_it():
    assert [learning_rate(step, 1.0, Schedule(4, 10, "cosine")) for step in range(4)] == pytest.approx(
        [0, 0.1, 0.2, 0.3]
    )


def test_step_decay_at_given_steps():
    schedule = Schedule(100, 0, "step", decay_steps=(10, 20))
    rates = [learning_rate(step, 1.0, schedule) for step in (0, 9, 10, 19, 20, 99)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01], rel=1e-12)


def test_an_unknown_decay_type_is_an_error():
    with pytest.raises(ValueError, match="unknown decay type 'cosin'; choose from cosine, linear, constant, step"):
        learning_rate(5, 1.0, Schedule(10, 0, "cosin"))


def test_a_new_decay_type_needs_one_line_to_be_trained_and_resumed(tiny_flags, monkeypatch, tmp_path, capsys):
    make_shallow(monkeypatch, 1)
    monkeypatch.setitem(DECAY_TYPES, "hyperbola", lambda step, schedule: 1 / (1 + step - schedule.warmup_steps))
    flags = ["--decay_type", "hyperbola", "--learning_rate", 0.2]
    call_main(train, tiny_flags(*flags, "--num_steps", 6), monkeypatch)
    call_main(train, tiny_flags(*flags, "--resume"), monkeypatch)
    assert read_metrics(tmp_path / "output" / "run")["lr"] == pytest.approx([0.2 / 4, 0.2 / 10])
    evaluate_and_export(tiny_flags(*flags), monkeypatch, capsys)
    message = fails(train, tiny_flags("--decay_type", "hyperbole"), monkeypatch, capsys)
    assert "unknown decay type 'hyperbole'; did you mean hyperbola" in message
    message = fails(train, tiny_flags("--decay_steps", 5), monkeypatch, capsys)
    assert "--decay_steps is for --decay_type step, not cosine" in message
