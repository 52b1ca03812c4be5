"""The Vision Transformer: its attention weights, image sizes and initial weights."""

import math

import pytest
import torch

from models import build_model
from synthetic import make_images, randomised

TINY = {"hidden_size": 32, "mlp_dim": 64, "num_heads": 2, "num_layers": 2}


def tiny(model_type="ViT-Mini_4", img_size=32, **overrides):
    return build_model(model_type, img_size, **{**TINY, **overrides})


@pytest.mark.parametrize("model_type", ["ViT-Mini_4", "R26-ViT-S_32"])
def test_attention_rows_sum_to_one_and_the_logits_are_those_of_forward(model_type):
    model = randomised(tiny(model_type, img_size=64))
    images = torch.from_numpy(make_images(64))
    with torch.no_grad():
        logits, attention = model.forward_with_attention(images)
        torch.testing.assert_close(logits, model(images), rtol=1e-5, atol=1e-5)
    tokens = model.pos_embed.shape[1]
    assert [weights.shape for weights in attention] == [(2, 2, tokens, tokens)] * 2
    torch.testing.assert_close(torch.stack(attention).sum(-1), torch.ones(2, 2, 2, tokens))


def test_a_model_for_images_that_are_not_square_accepts_no_other_shape():
    model = randomised(tiny(img_size=(16, 32)))
    assert model(torch.zeros(1, 3, 16, 32)).shape == (1, 10)
    with pytest.raises(ValueError, match="the model was built for"):
        model(torch.zeros(1, 3, 32, 16))


def test_initial_weights_have_the_published_distributions():
    torch.manual_seed(0)
    model = build_model("ViT-Ti_16", num_layers=1).requires_grad_(False)
    block = model.blocks[0]
    assert model.cls_token.abs().max() == model.head.weight.abs().max() == model.head.bias.abs().max() == 0
    assert model.pos_embed.std() == pytest.approx(0.02, rel=0.02)
    for weight, fan_in, fan_out in (
        (block.mlp.fc1.weight, 192, 768),
        (block.mlp.fc2.weight, 768, 192),
        (block.attn.qkv.weight, 192, 192),  # each of the three projections has its own fans
        (block.attn.proj.weight, 192, 192),
    ):
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert weight.abs().max() <= bound
        assert weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert block.mlp.fc1.bias.std() == pytest.approx(1e-6, rel=0.1)
    assert model.patch_embed.proj.weight.std() == pytest.approx(1 / math.sqrt(3 * 16 * 16), rel=0.02)
    assert block.norm1.eps == 1e-6


def test_stacked_weights_are_those_of_query_key_and_value():
    """Each parameter that a module lists stacks that many matrices; each of them was initialised alone."""
    model = tiny()
    stacked = {
        f"{prefix}.{name}": count
        for prefix, module in model.named_modules()
        for name, count in getattr(module, "stacked_weights", {}).items()
    }
    assert stacked == {f"blocks.{index}.attn.qkv.weight": 3 for index in range(2)}
    assert all(len(model.get_parameter(name)) == count * 32 for name, count in stacked.items())
