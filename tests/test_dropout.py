"""Dropout masks: their statistics, and what they depend on."""

import numpy as np
import pytest
import torch

from helpers import CPU
from models import build_model
from models.dropout import Dropout, StochasticDepth, dropout_mask
from synthetic import randomised
from utils.data.stream import dropout_keys


def keys_at(*positions, seed=0, layer=0):
    return dropout_keys(seed, np.array(positions), layer + 1, CPU)[layer]


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_masks_have_their_rate_and_are_independent_between_samples_and_elements(rate):
    mask = dropout_mask(keys_at(*range(256)), 4096, rate).double()
    assert mask.mean() == pytest.approx(rate, abs=0.005)
    centred = (mask - rate) / (rate * (1 - rate)) ** 0.5
    between_samples = (centred @ centred.T / 4096).fill_diagonal_(0)
    between_elements = (centred.T @ centred / 256).fill_diagonal_(0)
    assert between_samples.abs().max() < 6 / 4096**0.5
    assert between_elements.std() == pytest.approx(1 / 256**0.5, rel=0.05)


def test_the_mask_depends_on_the_sample_not_on_its_position_in_the_batch():
    layer = Dropout(0.5).train()
    x = torch.ones(4, 8, 16)
    layer.seed_samples(keys_at(3, 9, 27, 81, layer=5))
    whole = layer(x)
    layer.seed_samples(keys_at(81, 27, layer=5))
    assert torch.equal(layer(x[:2]), whole[[3, 2]])
    assert set(whole.unique().tolist()) == {0.0, 2.0}


def test_other_layers_seeds_and_positions_have_other_masks():
    masks = []
    for position, seed, number in ((1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1)):
        layer = Dropout(0.5).train()
        layer.seed_samples(keys_at(position, seed=seed, layer=number))
        masks.append(layer(torch.ones(1, 1024)) == 0)
    for i, mask in enumerate(masks):
        for other in masks[:i]:
            assert 0.4 < (mask == other).double().mean() < 0.6


def test_the_gradient_has_the_mask_of_the_output():
    layer = Dropout(0.25).train()
    layer.seed_samples(keys_at(7))
    x = torch.ones(1, 100, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    torch.testing.assert_close(x.grad, out.detach())


def test_dropout_does_nothing_in_evaluation():
    x = torch.randn(2, 10)
    assert torch.equal(Dropout(0.5).eval()(x), x)


@pytest.mark.parametrize("seeded", [True, False])
def test_stochastic_depth_drops_whole_samples(seeded):
    layer = StochasticDepth(0.25).train()
    x = torch.randn(4000, 3, 2)
    if seeded:
        layer.seed_samples(keys_at(*range(4000)))
    out = layer(x)
    dropped = (out == 0).all(dim=(1, 2))
    torch.testing.assert_close(out[~dropped], x[~dropped] / 0.75)
    assert dropped.double().mean() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(layer.eval()(x), x)


def test_the_rate_of_stochastic_depth_grows_with_the_block():
    blocks = build_model("ViT-Mini_4", 8, drop_path_rate=0.5).blocks
    for drop_path in ("drop_path1", "drop_path2"):
        rates = [getattr(block, drop_path).rate for block in blocks]
        assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


@pytest.mark.parametrize("model_type", ["ViT-Mini_4", "R26-ViT-Mini_4", "Conformer-Mini_4", "ResNet-Mini_Flops"])
def test_every_random_layer_of_a_model_draws_from_its_keys(model_type):
    """With keys, the logits in training do not depend on the global generator; other keys give other logits."""
    rates = {} if model_type.startswith("ResNet") else {"dropout_rate": 0.2, "drop_path_rate": 0.3}
    model = randomised(build_model(model_type, 16, **rates)).train()
    layers = [module for module in model.modules() if hasattr(module, "seed_samples")]
    assert bool(layers) == bool(rates)
    images = torch.randn(4, 3, 16, 16)

    def logits(seed, generator_seed):
        for layer, keys in zip(layers, dropout_keys(seed, np.arange(4), len(layers), CPU), strict=True):
            layer.seed_samples(keys)
        torch.manual_seed(generator_seed)
        return model(images)

    assert torch.equal(logits(0, 1), logits(0, 2))
    assert torch.equal(logits(0, 1), logits(3, 1)) == (not rates)
