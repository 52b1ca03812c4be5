"""The Vision Transformer: its attention weights, image sizes and initial weights."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import NORM_TYPES, build_model
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


@pytest.mark.parametrize(
    ("model_type", "keywords"),
    [
        *(("ViT-Mini_4", {"norm_type": norm_type}) for norm_type in NORM_TYPES),
        ("ViT-Mini_4", {"dropout_rate": 0.3, "drop_path_rate": 0.5}),
        ("ViT-Mini_4", {"token_reduction": "facility", "keep_tokens": 0.25, "reduction_layer": 1}),
        ("R26-ViT-S_32", {}),
        ("Conformer-Mini_4", {}),
    ],
)
def test_training_computes_the_logits_and_gradients_of_all_tokens(model_type, keywords):
    """forward_with_attention computes all tokens in every block."""
    # Standardised kernels have gradients of few digits in float32, and other ones on each CPU.
    dtype = torch.float64 if model_type.startswith("R26") else torch.float32
    model = randomised(tiny(model_type, img_size=64, **keywords)).train().to(dtype)
    images = torch.from_numpy(make_images(64)).to(dtype)
    logits, gradients = logits_and_gradients(model, lambda: model(images))
    expected, expected_gradients = logits_and_gradients(model, lambda: model.forward_with_attention(images)[0])
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    largest = max(gradient.abs().max().item() for gradient in expected_gradients.values())
    for name, expected in expected_gradients.items():
        torch.testing.assert_close(gradients[name], expected, rtol=1e-4, atol=1e-6 * largest)


def logits_and_gradients(model, forward):
    """The logits, and {name: gradient of a nonlinear function of them}; the same samples are dropped in each call."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if hasattr(module, "seed_samples"):
            module.seed_samples(torch.randint(-(2**31), 2**31, (2, 2), dtype=torch.int64, generator=generator).int())
    model.zero_grad()
    logits = forward()
    logits.square().sum().backward()
    return logits.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()}


def test_the_last_block_skips_patches_in_training_only_and_only_if_no_norm_needs_them():
    flops = {}
    for norm_type in NORM_TYPES:
        with torch.device("meta"):
            model, image = tiny(norm_type=norm_type, num_layers=1), torch.zeros(1, 3, 32, 32)
        for training in (True, False):
            with FlopCounterMode(display=False) as counter:
                model.train(training)(image)
            flops[norm_type, training] = counter.get_total_flops()
    assert len({flops[norm_type, False] for norm_type in NORM_TYPES}) == 1
    assert flops["BN", True] == flops["GN", True] == flops["BN", False]
    skipped = 64 * 2 * (2 * 32 * 32 + 2 * 32 * 64 + 2 * 65 * 32)  # query, projection, MLP, scores, weighted sum
    assert flops["LN", True] == flops["Rescale", True] == flops["LN", False] - skipped


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
