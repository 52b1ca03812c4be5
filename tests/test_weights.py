"""Weights as .safetensors files."""

import pytest
import torch

from helpers import assert_same_bits, flip_bit
from utils.errors import UserError
from utils.records.weights import load_into, load_weights, save_weights, saved_step


def test_weights_are_read_as_they_were_written(tmp_path):
    weights = {"a": torch.randn(3, 4).T, "b": torch.randn(2).bfloat16()}  # not contiguous; 16 bits
    save_weights(tmp_path / "w.safetensors", weights, step=7)
    loaded, step = load_weights(tmp_path / "w.safetensors")
    assert (step, saved_step(tmp_path / "w.safetensors")) == (7, 7)
    assert_same_bits(loaded, weights)
    flip_bit(tmp_path / "w.safetensors", 0.99)
    with pytest.raises(UserError, match="w.safetensors is damaged: its checksum does not match"):
        load_weights(tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="nothing.safetensors does not exist"):
        saved_step(tmp_path / "nothing.safetensors")
    with pytest.raises(UserError, match="is a folder; give its best.safetensors"):
        saved_step(tmp_path)


def test_weights_that_do_not_fit_are_named():
    model = torch.nn.Linear(3, 2)
    state = {name: torch.randn_like(weight) for name, weight in model.state_dict().items()}
    load_into(model, state, "w")
    assert_same_bits(model.state_dict(), state)
    for wrong, message in (
        ({**state, "weight": torch.zeros(4, 3)}, r"w does not fit the model: weight has \(4, 3\), expected \(2, 3\)"),
        ({"weight": state["weight"]}, r"bias has nothing, expected \(2,\)"),
        ({**state, "scale": torch.zeros(1)}, r"scale has \(1,\), expected nothing"),
    ):
        with pytest.raises(UserError, match=message):
            load_into(model, wrong, "w")
