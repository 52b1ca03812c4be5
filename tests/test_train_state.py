"""The state of a training run: compilation, and the attention that is drawn during training."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from helpers import assert_same_bits, differences, fails, make_shallow, train_run


@pytest.mark.slow
def test_a_compiled_run_has_the_weights_of_an_ordinary_one(tiny_flags, monkeypatch):
    """In float32, which a CPU would not compile by itself, because rounding to 16 bits hides errors."""
    monkeypatch.setattr("utils.train_state.is_compiled", lambda args, *others: args.compile)
    make_shallow(monkeypatch, num_layers=1)
    eager, _ = train_run(tiny_flags("--num_steps", 3), monkeypatch)
    compiled, _ = train_run(tiny_flags("--num_steps", 3, "--compile", "--overwrite"), monkeypatch)
    assert max(differences(eager, compiled).values()) < 1e-5


def test_attention_is_logged_at_its_steps_and_leaves_the_weights_unchanged(tiny_flags, tmp_path, monkeypatch):
    make_shallow(monkeypatch)
    without, _ = train_run(tiny_flags("--name", "without"), monkeypatch, "without")
    logged, _ = train_run(tiny_flags("--name", "logged", "--log_attention_every", 4), monkeypatch, "logged")
    events = EventAccumulator(str(tmp_path / "output" / "logged"), size_guidance={"images": 0}).Reload()
    assert [image.step for image in events.Images("attention rollout")] == [4, 8, 12]
    assert_same_bits(without, logged)


def test_a_model_without_attention_can_not_log_it(tiny_flags, monkeypatch, capsys):
    flags = tiny_flags("--model_type", "ResNet-Mini_Flops", "--log_attention_every", 4)
    message = fails(train, flags, monkeypatch, capsys)
    assert "--log_attention_every: ResNet-Mini_Flops has no attention" in message
