"""ToMe as published, which merges tokens in every block, against loops that follow the paper."""

import math

import pytest
import torch
import torch.nn.functional as F

import evaluate
import train
from command_line import train_parser
from helpers import assert_same_bits, call_main, read_config, run_dir, stop_after, train_run, write_images
from inference import SavedModel
from models import NORM_TYPES, build_model
from models.token_reduction import EveryBlock, Reduction, match_tokens, merge_tokens, tome_clusters
from synthetic import make_images, randomised
from utils.attention import attention_of, class_maps, class_token_mask, rollout
from utils.flag_groups import token_reduction_of
from utils.parallel.memory import recompute_activations
from utils.profiling import count_flops

SMALL = {"hidden_size": 32, "mlp_dim": 48, "num_heads": 2, "num_layers": 4}
IMAGES = torch.from_numpy(make_images(32))
TOME = ("--token_reduction", "tome", "--tome_r")


def merging(r, **keywords):
    return randomised(build_model("ViT-Mini_4", 32, token_reduction="tome", tome_r=r, **{**SMALL, **keywords}))


def whole_of(model, **keywords):
    """The same model without token reduction."""
    whole = build_model("ViT-Mini_4", 32, **{**SMALL, **keywords})
    whole.load_state_dict(model.state_dict())
    return whole.eval()


def matches(keys, r):
    """Section 3 of the paper by loops: the edges (a, b) that are merged, and the tokens that then remain, in order."""
    first, second = range(0, len(keys), 2), range(1, len(keys), 2)
    edges = []
    for a in first:
        if a > 0:  # the class token is not merged
            cosines = {b: F.cosine_similarity(keys[a], keys[b], dim=0).item() for b in second}
            b = max(cosines, key=cosines.get)
            edges.append((cosines[b], a, b))
    edges = [(a, b) for _, a, b in sorted(edges, reverse=True)[:r]]
    merged = {a for a, _ in edges}
    return edges, [*(a for a in first if a not in merged), *second]


def attention_by_loops(block, tokens, sizes):
    """The attention's output (N, hidden) and the keys (N, head_dim), the mean over the heads."""
    attention = block.attn
    q, k, v = attention.qkv(block.norm1(tokens)).chunk(3, dim=-1)
    parts = [part.chunk(attention.num_heads, dim=-1) for part in (q, k, v)]
    outputs = []
    for query, key, value in zip(*parts, strict=True):
        scores = query @ key.T / math.sqrt(query.shape[-1])
        for token, size in enumerate(sizes):
            scores[:, token] += math.log(size)
        outputs.append(scores.softmax(dim=-1) @ value)
    return attention.proj(torch.cat(outputs, dim=-1)), sum(parts[1]) / attention.num_heads


def published(model, image, r):
    """The logits (classes,) of a model in float64 for one image."""
    tokens = model.embed(image[None])[0]
    sizes = [1] * len(tokens)
    for block in model.blocks:
        out, keys = attention_by_loops(block, tokens, sizes)
        tokens = tokens + out
        edges, order = matches(keys, min(r, (len(tokens) - 1) // 2))
        sums, counts = [size * token for size, token in zip(sizes, tokens, strict=True)], list(sizes)
        for a, b in edges:
            sums[b], counts[b] = sums[b] + sums[a], counts[b] + counts[a]
        tokens, sizes = torch.stack([sums[i] / counts[i] for i in order]), [counts[i] for i in order]
        tokens = tokens + block.mlp(block.norm2(tokens))
    assert sum(sizes) == len(model.pos_embed[0]) and sizes[0] == 1
    return model.head(model.norm(tokens[:1])[0])


@torch.no_grad()
@pytest.mark.parametrize("r", [1, 7, 16, 100])
def test_logits_are_those_of_the_paper_by_loops(r):
    model = merging(r).double()
    expected = torch.stack([published(model, image.double(), r) for image in IMAGES])
    torch.testing.assert_close(model(IMAGES.double()), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.forward_with_attention(IMAGES.double())[0], expected, rtol=1e-6, atol=1e-6)
    assert (whole_of(model.float())(IMAGES) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("count", [1, 5, 8])
def test_one_matching_is_that_of_the_reduction_at_one_layer(count):
    """There patches have no class token before them, so those of odd index are here those of even index, reversed."""
    keys = torch.randn(3, 32, 8, generator=torch.Generator().manual_seed(4))
    kept, assignment = tome_clusters(keys, 32 - count)
    expected = kept.gather(1, assignment)  # the patch that stands for each
    with_class = torch.cat([torch.ones(3, 1, 8), keys.flip(1)], dim=1)
    found = match_tokens(with_class[:, None], count)
    patches = 32 - found.kept.gather(1, found.assignment)[:, 1:].flip(1)
    assert torch.equal(patches, expected)


@torch.no_grad()
@pytest.mark.parametrize("r, tokens", [(3, [65, 62, 59, 56, 53]), (20, [65, 45, 25, 13, 7]), (100, [65, 33, 17, 9, 5])])
def test_each_block_merges_r_tokens_or_half_of_them(r, tokens):
    """The class token stays alone, and every token is in one cluster with the patch that stands for it."""
    model = merging(r)
    _, attention, clusters = model.forward_with_clusters(IMAGES)
    assert [weights.shape[-1] for weights in attention] == tokens[:-1]
    assert [each.kept.shape[1] for each in clusters] == tokens[1:]
    assert model.reduction.keep == tokens[-1] - 1
    for each in clusters:
        members = F.one_hot(each.assignment, each.kept.shape[1]).sum(dim=1)
        assert (members > 0).all() and (members[:, 0] == 1).all() and (members.sum(dim=1) == 65).all()
        numbers = torch.arange(each.kept.shape[1]).expand(2, -1)
        assert torch.equal(each.assignment.gather(1, each.kept), numbers)
        assert (each.assignment[:, 0] == 0).all()


def test_a_merge_leaves_the_class_token_as_it_is():
    keys, x = torch.ones(2, 3, 11, 4), torch.randn(2, 11, 5)
    merged, sizes = merge_tokens(x, match_tokens(keys, 5))
    assert torch.equal(merged[:, 0], x[:, 0])
    assert sizes.tolist() == 2 * [[1, 6, 1, 1, 1, 1]]


def test_of_equal_tokens_the_first_are_merged():
    clusters = match_tokens(torch.ones(2, 3, 11, 4), 3)
    assert clusters.kept.tolist() == 2 * [[0, 8, 10, 1, 3, 5, 7, 9]]
    assert clusters.assignment.tolist() == 2 * [[0, 3, 3, 4, 3, 5, 3, 6, 1, 7, 2]]


@torch.no_grad()
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_without_merges_nothing_changes(norm_type):
    """r = 0 builds the whole model, and blocks that merge no tokens compute the same bits."""
    model = merging(0, norm_type=norm_type)
    assert model.reduction is None
    expected = whole_of(model, norm_type=norm_type)(IMAGES)
    assert torch.equal(model(IMAGES), expected)
    model = merging(5, norm_type=norm_type)
    model.reduction = EveryBlock(0, (0, 0, 0, 0), 64)
    assert torch.equal(model(IMAGES), expected)


@torch.no_grad()
@pytest.mark.parametrize("norm_type", ["LN", "BN", "Rescale"])
def test_merging_exact_duplicates_does_not_change_the_output(norm_type):
    """Each patch equals its right neighbour. The first block merges all 32 pairs; what the last merges is not read."""
    keywords = {"num_layers": 2, "norm_type": norm_type}
    images = IMAGES.unflatten(3, (4, 2, 4))
    images = images[..., :1, :].expand(images.shape).flatten(3)
    model = merging(32, **keywords)
    model.pos_embed.zero_()
    expected = whole_of(model, **keywords)(images)
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "norm_type, dtype", [*((norm_type, torch.float32) for norm_type in NORM_TYPES), ("LN", torch.bfloat16)]
)
def test_training_reaches_every_weight_also_with_recomputed_activations(norm_type, dtype):
    gradients = []
    for recompute in (False, True):
        model = merging(9, norm_type=norm_type).train().to(dtype)
        if recompute:
            recompute_activations(model)
        model(IMAGES.to(dtype)).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.isfinite().all() and gradient.abs().sum() > 0, name
    assert_same_bits(*gradients)


@pytest.mark.slow  # compilation
@torch.no_grad()
@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_model_gives_the_same(whole):
    torch._dynamo.reset()
    model = merging(9)
    expected = model(IMAGES)
    if whole:
        found = torch.compile(model, backend="aot_eager", fullgraph=True)(IMAGES)
    else:
        model.compile(backend="aot_eager", fullgraph=True)
        found = model(IMAGES)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_flops_are_those_of_the_tokens_in_each_block():
    """Per block: four square projections, two products with (N, N) weights, the matching, the merge and the MLP."""
    hidden, mlp, head_dim, r = 32, 48, 16, 9
    flops = 2 * 64 * 48 * hidden + 2 * hidden * 10  # patch embedding and head
    for n in (65, 56, 47, 38):
        flops += 2 * 4 * n * hidden**2 + 2 * 2 * n**2 * hidden
        flops += 2 * ((n + 1) // 2) * (n // 2) * head_dim + 2 * (n - r) * n * hidden
        flops += 2 * 2 * (n - r) * hidden * mlp
    with torch.device("meta"):
        model = build_model("ViT-Mini_4", 32, token_reduction="tome", tome_r=r, **SMALL)
        assert count_flops(model, 32) == flops


@torch.no_grad()
def test_expanded_attention_gives_the_rollout_through_the_merges():
    """It equals the rollout of the small matrices with each merge as one more factor, weighted by sizes."""
    model = merging(20)
    _, attention, clusters = model.forward_with_clusters(IMAGES)
    _, expanded, _ = attention_of(model, IMAGES)
    assert [weights.shape for weights in expanded] == 4 * [(2, 2, 65, 65)]
    torch.testing.assert_close(torch.stack(expanded).sum(dim=-1), torch.ones(4, 2, 2, 65))
    for block, number in ((2, 1), (3, 2)):  # up to this block's attention
        shares = F.one_hot(clusters[number].assignment).float()
        shares = (shares / shares.sum(dim=1, keepdim=True)).transpose(1, 2)  # (B, K, N)
        before = rollout(expanded[:block])
        found = rollout(expanded[: block + 1])[:, 0]
        torch.testing.assert_close(found, (rollout(attention[block : block + 1]) @ shares @ before)[:, 0])
    assert class_token_mask(rollout(expanded), (8, 8)).shape == (2, 8, 8)


def test_patches_have_the_grad_cam_of_their_cluster_in_the_last_attention():
    model = merging(20)
    _, attention, clusters = model.forward_with_clusters(IMAGES[:1])
    maps = class_maps(model, IMAGES[:1], torch.tensor([1, 2]), clusters)["Grad-CAM"].flatten(1)
    numbers = clusters[2].assignment[0, 1:]
    assert attention[3].shape[-1] == clusters[2].kept.shape[1] == 13
    for cluster in range(1, 13):
        members = maps[:, numbers == cluster]
        assert (members == members[:, :1]).all()


@pytest.mark.parametrize(
    "keywords, message",
    [
        ({"tome_r": 3, "token_reduction": "facility"}, "tome_r 3 needs token_reduction tome, not facility"),
        ({"tome_r": 3}, "tome_r 3 needs token_reduction tome, not none"),
        ({"tome_r": 3, "token_reduction": "topk"}, "unknown token reduction 'topk'"),
        ({"tome_r": 3, "token_reduction": "tome", "keep_tokens": 9}, "tome_r 3 and keep_tokens 9 exclude each other"),
        ({"tome_r": 3, "token_reduction": "tome", "reduction_layer": 1}, "tome_r 3 and reduction_layer 1 exclude"),
        ({"tome_r": -1, "token_reduction": "tome"}, "tome_r -1 is not a number of tokens, 0 or above"),
        ({"token_reduction": "tome"}, "needs keep_tokens, or tome_r instead of keep_tokens and reduction_layer"),
    ],
)
def test_wrong_keywords_are_named_in_the_error(keywords, message):
    with pytest.raises(ValueError, match=message):
        build_model("ViT-Mini_4", 32, **keywords)


@pytest.mark.parametrize(
    "model_type, message",
    [("Conformer-Mini_4", "tome_r 3 is for ViTs; a Conformer keeps"), ("ResNet-Mini_Flops", "has no tokens; t")],
)
def test_other_models_do_not_merge_in_every_block(model_type, message):
    with pytest.raises(ValueError, match=message):
        build_model(model_type, 32, token_reduction="tome", tome_r=3)


@pytest.mark.parametrize(
    "flags, message",
    [
        ((*TOME, 1, "--keep_tokens", 2), "tome_r 1 and keep_tokens 2 exclude each other"),
        (("--tome_r", 1), "tome_r 1 needs token_reduction tome, not none"),
        ((*TOME, -1), "-1 is not a whole number, 0 or above"),
        ((*TOME, 1, "--model_type", "Conformer-Mini_4"), "tome_r 1 is for ViTs"),
    ],
)
def test_wrong_flags_are_named_in_one_line(flags, message, tiny_flags, main_fails):
    assert message in main_fails(train, *tiny_flags(*flags))


def test_given_flags_replace_those_of_the_run_that_they_exclude():
    one_layer = {"token_reduction": "tome", "keep_tokens": 0.5, "reduction_layer": 2}
    every_block = {"token_reduction": "tome", "tome_r": 4}
    assert token_reduction_of(one_layer, {"tome_r": 4}) == every_block
    assert token_reduction_of(every_block, one_layer) == one_layer
    assert token_reduction_of(every_block, {"tome_r": 2}) == {**every_block, "tome_r": 2}
    assert token_reduction_of(every_block, {"token_reduction": "none"}) == {"token_reduction": "none"}


def test_given_flags_replace_recorded_ones_that_they_exclude(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"flags": {"token_reduction": "tome", "tome_r": 4}}')
    given = ["--config", str(path), "--name", "again"]
    parser = train_parser()
    assert parser.parse_args(given).tome_r == 4
    args = parser.parse_args([*given, "--keep_tokens", "0.5", "--reduction_layer", "2"])
    assert (args.token_reduction, args.tome_r, args.keep_tokens, args.reduction_layer) == ("tome", None, 0.5, 2)
    path.write_text('{"flags": {"token_reduction": "tome", "keep_tokens": 0.5, "reduction_layer": 2}}')
    args = parser.parse_args([*given, "--tome_r", "3"])
    assert (args.tome_r, args.keep_tokens, args.reduction_layer) == (3, None, None)


def test_a_run_is_resumed_repeated_and_restored_with_its_reduction(tiny_flags, monkeypatch, tmp_path, capsys):
    """Four steps, interrupted or not, end with the same bits; --config repeats them; flags of evaluate.py replace r."""
    given = (*TOME, 1, "--num_steps", 4, "--eval_every", 2, "--dropout_rate", 0.1, "--log_attention_every", 2)
    flags = tiny_flags(*given)
    weights, rows = train_run(flags, monkeypatch)
    folder = run_dir(flags)
    assert read_config(folder)["flags"]["tome_r"] == 1
    stop_after(2, monkeypatch)
    with pytest.raises(SystemExit):
        train_run(tiny_flags(*given, "--name", "stopped"), monkeypatch)
    resumed, _ = train_run(tiny_flags(*given, "--name", "stopped", "--resume"), monkeypatch, "stopped")
    assert_same_bits(resumed, weights)
    again = ["--config", folder / "config.json", "--name", "again", "--output_dir", folder.parent]
    assert_same_bits(train_run(again, monkeypatch, "again")[0], weights)
    path = folder / "last.safetensors"
    assert SavedModel.load(path).model.reduction == EveryBlock(1, (1, 1, 1, 0, 0, 0), 1)
    other = {"keep_tokens": 1, "reduction_layer": 2}
    assert SavedModel.load(path, token_reduction=other).model.reduction == Reduction("tome", 1, 2)
    image = write_images(tmp_path, [(8, 8)])[0]
    call_main(evaluate, ["--checkpoint", path, "--tome_r", 2, image], monkeypatch)
    assert rows[-1]["test_accuracy"] >= 0 and str(image.name) in capsys.readouterr().out
