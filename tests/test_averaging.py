"""The moving average of the weights: its closed form, and that it is evaluated and saved as the best weights."""

import json

import pytest
import torch
from safetensors.torch import load_file

import evaluate
import train
from helpers import assert_same_bits, initial_weights, make_shallow, run_dir, stop_after, train_run
from models import build_model
from utils.parallel.averaging import WeightAverage
from utils.records.result import read_result
from utils.records.weights import saved_step


def test_the_average_is_a_weighted_sum_of_the_weights():
    """Against the closed form, with the smaller decay of the first steps; running statistics included."""
    model = build_model("ViT-Mini_4", 8, num_layers=1, norm_type="BN")
    named = model.state_dict()
    assert "blocks.0.norm1.running_var" in named
    average = WeightAverage(model, dict(model.named_parameters()), decay=0.3)
    expected = {name: weight.detach().clone() for name, weight in named.items()}
    for step in range(1, 6):
        decay = min(0.3, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, weight in named.items():
                weight.add_(torch.randn_like(weight))
                expected[name] = decay * expected[name] + (1 - decay) * weight
        average.update(step)
    assert [min(0.3, (1 + step) / (10 + step)) for step in (1, 2, 5)] == [2 / 11, 0.25, 0.3]
    assert average.weights.keys() == expected.keys()
    for name, weight in average.weights.items():
        torch.testing.assert_close(weight, expected[name])


def test_the_model_has_the_average_only_inside_in_place():
    model = build_model("ViT-Mini_4", 8, num_layers=1, norm_type="BN")
    average = WeightAverage(model, dict(model.named_parameters()), decay=0.3)
    with torch.no_grad():
        for weight in model.state_dict().values():
            weight.normal_()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with average.in_place(model):
        assert_same_bits(model.state_dict(), average.weights)
        assert not torch.equal(model.head.bias, before["head.bias"])
    assert_same_bits(model.state_dict(), before)


def test_the_average_is_evaluated_and_saved_as_the_best_weights(tiny_flags, monkeypatch, tmp_path):
    make_shallow(monkeypatch)
    folder = tmp_path / "output" / "run"
    last, _ = train_run(tiny_flags("--ema_decay", 0.5, "--num_steps", 6), monkeypatch)
    assert not torch.equal(load_file(folder / "best.safetensors")["head.weight"], last["head.weight"])
    monkeypatch.setattr(WeightAverage, "update", lambda self, step: None)
    again, [row] = train_run(tiny_flags("--ema_decay", 0.5, "--num_steps", 6, "--overwrite"), monkeypatch)
    assert_same_bits(load_file(folder / "best.safetensors"), initial_weights())
    assert_same_bits(again, last)
    model = build_model("ViT-Mini_4", img_size=8)
    assert row["test_loss"] == pytest.approx(torch.tensor(10.0).log().item())  # a head of zeros
    assert not model.head.weight.any()


def test_averaged_running_statistics_are_saved_and_resumed(tiny_flags, monkeypatch, tmp_path):
    """With BN the best weights have the average of the statistics, and a resumed run continues it to the same bits."""
    make_shallow(monkeypatch)
    flags = ["--ema_decay", 0.9, "--norm_type", "BN", "--learning_rate", 0.1]
    whole, _ = train_run(tiny_flags(*flags, "--eval_every", 12), monkeypatch)
    best = load_file(tmp_path / "output" / "run" / "best.safetensors")
    statistics = [name for name in whole if "running" in name]
    assert statistics
    assert all(not torch.equal(best[name], whole[name]) for name in statistics)
    stop_after(5, monkeypatch)
    with pytest.raises(SystemExit):
        train_run(tiny_flags(*flags, "--eval_every", 12, "--name", "stopped"), monkeypatch)
    resumed = tiny_flags(*flags, "--eval_every", 12, "--name", "stopped", "--resume")
    train_run(resumed, monkeypatch, "stopped")
    assert_same_bits(load_file(tmp_path / "output" / "stopped" / "best.safetensors"), best)


def test_what_is_reported_of_the_last_step_is_the_average_in_a_file_of_its_own(tiny_flags, run_main, monkeypatch):
    """Also with --test_at_end, which keeps no best weights; the summary names the file."""
    make_shallow(monkeypatch)
    flags = tiny_flags("--ema_decay", 0.5, "--num_steps", 6, "--test_at_end")
    printed = run_main(train, *flags)
    path = run_dir(flags) / "averaged.safetensors"
    assert f"weights      {path}\n" in printed
    assert not torch.equal(load_file(path)["head.weight"], load_file(path.with_name("last.safetensors"))["head.weight"])
    reported = read_result(run_dir(flags))["last"]["test"]["loss"]
    measured = json.loads(run_main(evaluate, "--checkpoint", path, "--json"))["loss"]
    assert measured == pytest.approx(reported, rel=1e-5)
    run_main(train, *flags, "--resume", "--num_steps", 7, "--ema_decay", 0.9)
    assert read_result(run_dir(flags))["last"]["step"] == saved_step(path) == 7
