"""The moving average of the weights: its closed form, and that it is evaluated and saved as the best weights."""

import pytest
import torch
from safetensors.torch import load_file

from helpers import assert_same_bits, initial_weights, make_shallow, train_run
from models import build_model
from utils.parallel.averaging import WeightAverage


def test_the_average_is_a_weighted_sum_of_the_weights():
    """Against the closed form, with the smaller decay of the first steps."""
    model = build_model("ViT-Mini_4", 8, num_layers=1)
    named = dict(model.named_parameters())
    average = WeightAverage(named, decay=0.3)
    expected = {name: weight.detach().clone() for name, weight in named.items()}
    for step in range(1, 6):
        decay = min(0.3, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, weight in named.items():
                weight.add_(torch.randn_like(weight))
                expected[name] = decay * expected[name] + (1 - decay) * weight
        average.update(named, step)
    assert [min(0.3, (1 + step) / (10 + step)) for step in (1, 2, 5)] == [2 / 11, 0.25, 0.3]
    for name, weight in average.weights.items():
        torch.testing.assert_close(weight, expected[name])


def test_the_model_has_the_average_only_inside_in_place():
    model = build_model("ViT-Mini_4", 8, num_layers=1)
    average = WeightAverage(dict(model.named_parameters()), decay=0.3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with average.in_place(model):
        assert_same_bits(dict(model.named_parameters()), average.weights)
        assert not torch.equal(model.head.bias, before["head.bias"])
    assert_same_bits(model.state_dict(), before)


def test_the_average_is_evaluated_and_saved_as_the_best_weights(tiny_flags, monkeypatch, tmp_path):
    make_shallow(monkeypatch)
    folder = tmp_path / "output" / "run"
    last, _ = train_run(tiny_flags("--ema_decay", 0.5, "--num_steps", 6), monkeypatch)
    assert not torch.equal(load_file(folder / "best.safetensors")["head.weight"], last["head.weight"])
    monkeypatch.setattr(WeightAverage, "update", lambda self, weights, step: None)
    again, [row] = train_run(tiny_flags("--ema_decay", 0.5, "--num_steps", 6, "--overwrite"), monkeypatch)
    assert_same_bits(load_file(folder / "best.safetensors"), initial_weights())
    assert_same_bits(again, last)
    model = build_model("ViT-Mini_4", img_size=8)
    assert row["test_loss"] == pytest.approx(torch.tensor(10.0).log().item())  # a head of zeros
    assert not model.head.weight.any()
