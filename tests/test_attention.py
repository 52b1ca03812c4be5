"""Numbers computed from attention weights, embeddings, filters and gradients, compared with closed forms."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from helpers import random_model
from models import attention as attention_kernels
from models import build_model
from models.configs import VITS
from models.token_reduction import Clusters
from synthetic import make_checkpoint, make_images
from utils.attention import (
    attention_distance,
    class_maps,
    class_relevance,
    class_token_mask,
    cluster_grid,
    expand_attention,
    first_convolution,
    grad_cam,
    position_similarity,
    principal_filters,
    rollout,
    token_grad_cam,
)
from utils.figures import upsample

SMALL = {"hidden_size": 32, "mlp_dim": 32, "num_heads": 2, "num_layers": 4}


def random_attention(blocks, tokens, images=2, heads=3):
    torch.manual_seed(0)
    return [torch.randn(images, heads, tokens, tokens).softmax(dim=-1) for _ in range(blocks)]


def attention_to(patch, blocks, tokens):
    """Attention of every token to one patch only."""
    weights = torch.zeros(1, 2, tokens, tokens)
    weights[..., 1 + patch] = 1
    return [weights] * blocks


def test_rollout_is_the_product_of_averaged_matrices():
    attention = random_attention(3, 5)
    expected = np.eye(5)
    for weights in attention:
        expected = (0.5 * weights[1].mean(dim=0).numpy() + 0.5 * np.eye(5)) @ expected
    torch.testing.assert_close(rollout(attention)[1].double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-6)


def test_the_rows_of_a_rollout_sum_to_one():
    torch.testing.assert_close(rollout(random_attention(12, 17)).sum(dim=-1), torch.ones(2, 17))


def test_rollout_of_uniform_attention_is_uniform():
    uniform = [torch.full((1, 4, 13, 13), 1 / 13)] * 6
    torch.testing.assert_close(class_token_mask(rollout(uniform), (3, 4)), torch.ones(1, 3, 4))


@pytest.mark.parametrize("patch, row, column", [(0, 0, 0), (4, 0, 4), (7, 1, 2), (14, 2, 4)])
def test_attention_to_one_patch_is_largest_at_that_patch(patch, row, column):
    """On a grid of 3 x 5 patches, and at the same place of an image of 30 x 100 pixels."""
    mask = class_token_mask(rollout(attention_to(patch, 4, 16)), (3, 5))[0]
    assert mask.shape == (3, 5)
    assert mask[row, column] == pytest.approx(15)
    assert mask.sum() == pytest.approx(15)
    heat = upsample(mask, (30, 100))
    assert heat.shape == (30, 100)
    brightest = heat[10 * row : 10 * row + 10, 20 * column : 20 * column + 20]
    assert brightest.mean() > 0.5 * 15
    assert heat.argmax() in torch.arange(3000).view(30, 100)[10 * row : 10 * row + 10, 20 * column : 20 * column + 20]


def test_the_mask_shows_the_patch_that_a_model_attends_to():
    """Queries and keys are set so that every token attends to the brightest patch."""
    model = build_model("ViT-Mini_4", (12, 20), **SMALL).eval().requires_grad_(False)
    block = model.blocks[0]
    block.norm1.weight.fill_(1)
    for tensor in (block.attn.qkv.weight, block.attn.qkv.bias, model.pos_embed, model.cls_token):
        tensor.zero_()
    query, key, _ = block.attn.qkv.weight.chunk(3)
    block.attn.qkv.bias[:32] = 10  # every query is the same
    key[:, 0] = 10  # keys are the first feature
    model.patch_embed.proj.weight.zero_()
    model.patch_embed.proj.weight[0] = 1  # which is the brightness
    images = torch.full((1, 3, 12, 20), -1.0)
    images[:, :, 4:8, 12:16] = 1  # row 1, column 3
    model.pos_embed[..., 1] = 1e-3  # otherwise the norm divides 0 by 0
    _, attention = model.forward_with_attention(images)
    mask = class_token_mask(attention[0].mean(dim=1), model.patch_embed.grid_size)[0]
    assert mask.shape == (3, 5)
    assert mask[1, 3] > 0.99 * 15
    mixed = class_token_mask(rollout(attention[:1]), (3, 5))[0]
    assert mixed[1, 3] > 0.99 * 15


@pytest.mark.parametrize("model_type", VITS)
def test_every_vit_and_hybrid_has_attention_on_images_that_are_not_square(model_type):
    """With the patches, heads and stem of each type, but narrow blocks, whose width changes no shape here."""
    img_size = (84, 126) if model_type == "ViT-H_14" else (64, 128)
    narrow = {"hidden_size": 4 * VITS[model_type].num_heads, "mlp_dim": 8, "num_layers": 2}
    model = build_model(model_type, img_size, **narrow).eval()
    with torch.no_grad():
        _, attention = model.forward_with_attention(torch.zeros(1, 3, *img_size))
    grid_size = model.patch_embed.grid_size
    assert grid_size[0] < grid_size[1]
    assert class_token_mask(rollout(attention), grid_size).shape == (1, *grid_size)
    assert attention_distance(attention, grid_size, img_size).shape == (2, model.config.num_heads)
    filters = first_convolution(model).weight
    assert len(principal_filters(filters, 8)) == min(8, len(filters) - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type, img_size", [("ViT-Mini_4", (12, 20)), ("R26-ViT-Mini_4", (16, 32))])
def test_only_forward_with_attention_stores_attention_weights(model_type, img_size, dtype, monkeypatch):
    """Both methods give the same logits; `forward` keeps no tensor with a value for each pair of tokens, in bfloat16
    if there are more tokens than MAX_SAVED_TOKENS."""
    monkeypatch.setattr(attention_kernels, "MAX_SAVED_TOKENS", 1)
    model = build_model(model_type, img_size, num_layers=2).eval()
    model.load_from(make_checkpoint({key: array.shape for key, array in model.export_npz().items()}), head="keep")
    images = torch.from_numpy(make_images(32)[:, :, : img_size[0], : img_size[1]].copy()).to(dtype)
    model.to(dtype)
    tokens = model.pos_embed.shape[1]
    shapes = []

    def keep(tensor):
        shapes.append(tuple(tensor.shape[-2:]))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(images)
        assert (tokens, tokens) not in shapes
        with_attention, attention = model.forward_with_attention(images)
        assert (tokens, tokens) in shapes
    exact = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(with_attention, logits, rtol=exact, atol=exact)
    for weights in attention:
        sums = weights.float().sum(dim=-1)
        torch.testing.assert_close(sums, torch.ones(2, model.config.num_heads, tokens), rtol=0, atol=exact)


def test_attention_distance_against_closed_forms():
    """0 pixels to itself, one patch to a neighbour; for uniform attention the mean distance between two patches."""
    grid_size, img_size = (2, 3), (8, 24)  # patches of 4 x 8 pixels
    itself = torch.eye(7).expand(1, 2, 7, 7)
    right = torch.zeros(1, 2, 7, 7)
    for patch in range(6):
        right[..., 1 + patch, 1 + patch + (1 if patch % 3 < 2 else -1)] = 0.5
    right[..., 0] = 0.5  # the half that goes to the class token does not count
    uniform = torch.full((1, 2, 7, 7), 1 / 7)
    places = [(4 * row, 8 * column) for row in range(2) for column in range(3)]
    mean = float(np.mean([math.dist(a, b) for a in places for b in places]))
    found = attention_distance([itself, right, uniform], grid_size, img_size)
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0], [8.0, 8.0], [mean, mean]]))


def test_position_similarity_is_the_cosine_on_the_grid():
    random = torch.randn(1, 7, 5)
    random[0, 1] = 3 * random[0, 6]
    similarity = position_similarity(random, (2, 3))
    assert similarity.shape == (2, 3, 2, 3)
    assert similarity[0, 0, 1, 2] == pytest.approx(1)
    torch.testing.assert_close(similarity[1, 1, 1, 1], torch.tensor(1.0))
    expected = torch.cosine_similarity(random[0, 2], random[0, 4], dim=0)
    torch.testing.assert_close(similarity[0, 1, 1, 0], expected)


def test_the_first_principal_filter_is_the_common_pattern_of_the_kernels():
    pattern = torch.randn(3, 4, 4)
    kernels = torch.randn(50, 1, 1, 1) * pattern + 0.01 * torch.randn(50, 3, 4, 4)
    first = principal_filters(kernels, 5)
    assert first.shape == (5, 4, 4, 3)
    assert first.min() >= 0
    assert first.max() <= 1
    found = (first[0] - 0.5).flatten()
    cosine = torch.cosine_similarity(found, pattern.permute(1, 2, 0).flatten(), dim=0)
    assert cosine.abs() > 0.99


def test_grad_cam_is_largest_where_the_class_depends_on_the_image():
    model = nn.Sequential(
        nn.Conv2d(3, 2, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2, bias=False)
    )
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]).view(2, 3, 1, 1))  # red and green
        model[3].weight.copy_(torch.eye(2))
    images = torch.zeros(1, 3, 4, 6)
    images[0, 0, 1, 2] = images[0, 1, 3, 5] = 1
    for label, place in ((0, (1, 2)), (1, (3, 5))):
        mask = grad_cam(model, model[0], images, torch.tensor([label]))[0]
        assert mask.shape == (4, 6)
        assert mask[place] == pytest.approx(24)


def forward_by_hand(model, images, block, attention=None):
    """Logits (B, classes) in float64, and what the parts of one block compute; `attention` replaces its weights."""
    x = model.embed(images)
    parts = {}
    for number, layer in enumerate(model.blocks):
        inputs = layer.norm1(x)
        q, k, v = (
            part.unflatten(-1, (layer.attn.num_heads, -1)).transpose(1, 2)
            for part in nn.functional.linear(inputs, layer.attn.qkv.weight, layer.attn.qkv.bias).chunk(3, dim=-1)
        )
        weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)
        if number == block:
            parts = {"inputs": inputs, "weights": weights}
            weights = weights if attention is None else attention
        x = x + layer.attn.proj((weights @ v).transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.norm2(x))
    return model.head(model.norm(x)[:, 0]), parts


def small_vit(**keywords):
    model = random_model("ViT-Mini_4", (8, 12), 3, hidden_size=8, mlp_dim=8, num_heads=2, **keywords)
    torch.manual_seed(3)
    return model.double().requires_grad_(False), torch.randn(1, 3, 8, 12, dtype=torch.float64)


def test_relevance_against_differences_of_the_logit():
    """Equations 5 and 6, with the gradient of each attention weight by central differences of the logit."""
    model, images = small_vit(num_layers=2)
    found = class_relevance(model, images.expand(2, -1, -1, -1), torch.tensor([2, 0]))
    assert not found[0].allclose(found[1])
    for row, label in enumerate((2, 0)):
        expected = torch.eye(7, dtype=torch.float64)
        for block in (0, 1):
            weights = forward_by_hand(model, images, block)[1]["weights"]
            gradient = torch.zeros_like(weights)
            for index in np.ndindex(*weights.shape):
                logits = []
                for step in (1e-5, -1e-5):
                    changed = weights.clone()
                    changed[index] += step
                    logits.append(forward_by_hand(model, images, block, changed)[0][0, label])
                gradient[index] = (logits[0] - logits[1]) / 2e-5
            expected = expected + (gradient * weights).clamp(min=0)[0].mean(dim=0) @ expected
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-4, atol=1e-6)


def test_relevance_after_a_token_reduction_that_merges_equal_tokens_is_that_of_the_whole_model():
    """The right half of the image is one colour, and so are its position embeddings: four equal patches become one."""
    whole, images = small_vit(num_layers=3)
    images[..., 4:] = images[..., :1, :1, 4:5]
    whole.pos_embed[:, [2, 3, 5, 6]] = whole.pos_embed[:, 2:3].clone()
    keywords = {"token_reduction": "facility", "keep_tokens": 3, "reduction_layer": 1}
    reduced = small_vit(num_layers=3, **keywords)[0]
    reduced.load_state_dict(whole.state_dict())
    labels = torch.tensor([1])
    expected, found = (class_relevance(model, images, labels)[0] for model in (whole, reduced))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-6)


def test_grad_cam_of_a_vit_against_its_definition():
    """The gradient of the class's logit with respect to the input of the last attention, by autograd on plain code."""
    model, images = small_vit(num_layers=2)
    images = images.requires_grad_()
    for label in (0, 1, 2):
        logits, parts = forward_by_hand(model, images, 1)
        [gradient] = torch.autograd.grad(logits[0, label], parts["inputs"])
        importance = gradient[0, 1:].mean(dim=0)  # of each channel
        expected = (parts["inputs"][0, 1:] @ importance).clamp(min=0)
        expected = (expected / expected.mean().clamp(min=1e-12)).unflatten(0, (2, 3)).detach()
        found = token_grad_cam(model, images, torch.tensor([label]))[0]
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("norm_type", ["LN", "BN", "GN", "Rescale"])
def test_maps_of_classes_leave_the_model_as_it_was(norm_type):
    """No hook, no gradient; the maps of a class do not depend on the other classes; frozen weights change nothing."""
    model = random_model("ViT-Mini_4", 16, 5, norm_type, num_layers=2)
    image = torch.from_numpy(make_images(16))[:1]
    maps = class_maps(model, image, torch.tensor([4, 1]))
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    alone = class_maps(model.requires_grad_(False), image, torch.tensor([1]))
    for name, masks in maps.items():
        assert masks.shape == (2, 4, 4)
        assert not masks.requires_grad
        torch.testing.assert_close(masks[1:], alone[name], rtol=1e-4, atol=1e-5)
        assert masks.mean().item() == pytest.approx(1, abs=1e-4)


def test_patches_have_the_grad_cam_of_their_cluster():
    model = random_model("ViT-Mini_4", 16, 5, token_reduction="tome", keep_tokens=4, reduction_layer=1, num_layers=2)
    image = torch.from_numpy(make_images(16))[:1]
    clusters = model.forward_with_clusters(image)[2]
    maps = class_maps(model, image, torch.tensor([0, 3]), clusters)["Grad-CAM"].flatten(1)
    numbers = clusters[0].assignment[0, 1:]
    for cluster in range(1, 5):
        members = maps[:, numbers == cluster]
        assert (members == members[:, :1]).all()


def test_tokens_share_the_attention_of_their_cluster():
    """Two blocks: among 4 tokens, and among 3 clusters, of which the second has the tokens 1 and 3."""
    full = torch.rand(1, 2, 4, 4).softmax(dim=-1)
    merged = torch.rand(1, 2, 3, 3).softmax(dim=-1)
    clusters = Clusters(torch.tensor([[0, 1, 2]]), torch.tensor([[0, 1, 2, 1]]))
    first, second = expand_attention([full, merged], [clusters])
    assert first is full
    clusters, members = [0, 1, 2, 1], [1, 2, 1, 2]
    expected = merged[:, :, clusters][..., clusters] / torch.tensor(members)
    torch.testing.assert_close(second, expected)
    torch.testing.assert_close(second.sum(dim=-1), torch.ones(1, 2, 4))


def test_clusters_are_laid_out_on_the_grid_without_the_class_token():
    """2 x 3 patches are the tokens 1 to 6; token 2 and token 6 were kept."""
    clusters = Clusters(kept=torch.tensor([[0, 2, 6]]), assignment=torch.tensor([[0, 1, 1, 2, 1, 2, 2]]))
    numbers, kept = cluster_grid(clusters, (2, 3))
    assert numbers.tolist() == [[0, 0, 1], [0, 1, 1]]
    assert kept == [(0, 1), (1, 2)]
