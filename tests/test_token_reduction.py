"""Facility location against brute force and lazy greedy, merging, and ViTs with both."""

import heapq
import itertools
import json

import numpy as np
import pytest
import torch
import torch._dynamo.testing

import evaluate
import train
from helpers import (
    assert_same_bits,
    call_main,
    read_config,
    script,
    stop_after,
    succeed,
    train_run,
    write_images,
)
from inference import SavedModel
from models import REDUCTION_METHODS, build_model
from models.dropout import random_order
from models.facility_location import facility_location
from models.token_reduction import (
    Clusters,
    Reduction,
    cluster_tokens,
    coverage,
    facility_clusters,
    keys_of_images,
    merge_tokens,
    random_clusters,
    similarity,
    tome_clusters,
    unmerge_tokens,
    upper_bound,
)
from synthetic import make_images, randomised
from utils.attention import attention_of, class_token_mask, rollout
from utils.data.stream import dropout_keys

SMALL = {"hidden_size": 32, "mlp_dim": 64, "num_heads": 2, "num_layers": 4}


def small(model_type="ViT-Mini_4", img_size=32, **keywords):
    return build_model(model_type, img_size, **{**SMALL, **keywords})


def reduced(method, keep_tokens=0.25, reduction_layer=2, **keywords):
    return small(token_reduction=method, keep_tokens=keep_tokens, reduction_layer=reduction_layer, **keywords)


def random_similarity(batch, tokens, seed=0, features=8):
    random = torch.Generator().manual_seed(seed)
    return similarity(torch.randn(batch, tokens, features, generator=random, dtype=torch.float64))


def f(s, chosen):
    """By the definition, one image: s (N, N)."""
    return sum(max((s[i, j] for j in chosen), default=0.0) for i in range(len(s)))


def test_similarity_is_the_shifted_cosine():
    keys = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]]])
    expected = torch.tensor([[[1.0, 0.5, 0.0], [0.5, 1.0, 0.5], [0.0, 0.5, 1.0]]])
    torch.testing.assert_close(similarity(keys), expected)
    assert similarity(torch.cat([keys, -keys], dim=1)).min() == 0


def test_coverage_is_monotone_and_submodular():
    """More tokens never cover less, and a token gains less if more are chosen already."""
    s = random_similarity(20, 12)
    orders = np.random.default_rng(0).permuted(np.tile(np.arange(12), (20, 1)), axis=1)
    for number, order in enumerate(orders.tolist()):
        a, b, x = order[:3], order[:7], order[7]
        few, more, few_x, more_x = (
            coverage(s[number : number + 1], torch.tensor([chosen])).item() for chosen in (a, b, [*a, x], [*b, x])
        )
        assert few == pytest.approx(f(s[number].numpy(), a))
        assert few <= more <= more_x
        assert few_x - few >= more_x - more - 1e-12


@pytest.mark.parametrize("k", [1, 2, 4])
def test_greedy_is_near_the_optimum(k):
    s = random_similarity(10, 11)
    found = coverage(s, facility_location(s, k))
    subsets = torch.tensor(list(itertools.combinations(range(11), k)))
    best = torch.stack([coverage(s, subset.expand(10, -1)) for subset in subsets]).amax(dim=0)
    assert (found >= (1 - 1 / np.e) * best).all()
    assert (found <= best + 1e-9).all()
    assert (best <= upper_bound(s, k) + 1e-9).all() and (upper_bound(s, k) <= 11).all()
    if k == 1:
        torch.testing.assert_close(found, best)


def lazy_greedy(s, k):
    """Minoux's accelerated greedy on one image: a gain is computed again only if its old value is the largest."""
    best, picks = np.zeros(len(s)), []
    heap = [(-s[j].sum(), j, 0) for j in range(len(s))]
    heapq.heapify(heap)
    while len(picks) < k:
        _, j, age = heapq.heappop(heap)
        if age == len(picks):
            picks.append(j)
            best = np.maximum(best, s[j])
        else:
            heapq.heappush(heap, (-np.maximum(s[j] - best, 0).sum(), j, len(picks)))
    return picks


@pytest.mark.parametrize("tokens, k", [(196, 49), (196, 147), (64, 16)])
def test_picks_are_those_of_lazy_greedy(tokens, k):
    # Weighted, because two tokens that are nearest to each other gain the same, and rounding would decide.
    s = random_similarity(4, tokens, features=64) * torch.rand(4, 1, tokens, dtype=torch.float64)
    picks = facility_location(s, k)
    assert picks.tolist() == [lazy_greedy(one, k) for one in s.numpy()]
    single = facility_location(s.float(), k)  # near ties may be decided differently, which costs almost nothing
    torch.testing.assert_close(coverage(s, single), coverage(s, picks), rtol=1e-4, atol=0)


def test_no_token_is_picked_twice_where_none_gains():
    s = similarity(torch.ones(1, 6, 4))
    assert sorted(facility_location(s, 6)[0].tolist()) == list(range(6))
    kept, assignment = facility_clusters(torch.ones(1, 6, 4), 3)
    assert assignment[0, kept[0]].tolist() == [0, 1, 2]


@pytest.mark.parametrize("clusters_of", [facility_clusters, tome_clusters, random_clusters])
@pytest.mark.parametrize("tokens, k", [(16, 16), (16, 9), (17, 4), (17, 1)])
def test_clusters_partition_the_tokens_and_hold_their_representatives(clusters_of, tokens, k):
    """Each token belongs to one cluster, and its representative belongs to it; representatives ascend."""
    keys = torch.randn(3, tokens, 8, generator=torch.Generator().manual_seed(1))
    kept, assignment = clusters_of(keys, k)
    assert kept.shape == (3, k) and assignment.shape == (3, tokens)
    assert (kept.diff(dim=1) > 0).all()
    assert torch.equal(assignment.gather(1, kept), torch.arange(k).expand(3, -1))
    if clusters_of is not tome_clusters:
        s = similarity(keys)
        own = s.gather(2, kept.gather(1, assignment)[..., None])[..., 0]
        nearest = s.gather(2, kept[:, None].expand(-1, tokens, -1)).amax(dim=-1)
        torch.testing.assert_close(own, nearest)
        torch.testing.assert_close(own.sum(dim=1), coverage(s, kept))


def test_random_patches_are_a_uniform_choice():
    """Each patch and each pair of patches is chosen as often as in uniform subsets, within five standard deviations."""
    draws, n, k = 20000, 24, 6
    order = random_order(dropout_keys(3, np.arange(draws), 1, torch.device("cpu"))[0], n)
    assert torch.equal(order.sort(dim=1).values, torch.arange(n).expand(draws, -1))
    chosen = torch.zeros(draws, n, dtype=torch.float64).scatter(1, order[:, :k], 1.0)
    for found, p in (
        (chosen.mean(dim=0), k / n),
        ((chosen.T @ chosen / draws)[torch.ones(n, n).triu(1) > 0], k * (k - 1) / (n * (n - 1))),
    ):
        assert (found - p).abs().max() < 5 * (p * (1 - p) / draws) ** 0.5


def test_a_random_choice_depends_on_the_key_of_the_image_and_in_evaluation_on_its_pixels():
    """In training also without dropout; the batch and the number of processes or micro-batches do not matter."""
    model = randomised(reduced("random")).train()
    images = torch.from_numpy(make_images(32, batch=4))
    positions = np.array([5, 40, 7, 1])

    def clusters(*numbers):
        keys = dropout_keys(0, positions[[*numbers]], 1, torch.device("cpu"))[0]
        model.random_choice.seed_samples(keys)
        return model.forward_with_clusters(images[[*numbers]])[2][0]

    with torch.no_grad():
        together, parts = clusters(0, 1, 2, 3), [clusters(1, 0), clusters(2, 3)]
        for found, numbers in zip(parts, ([1, 0], [2, 3]), strict=True):
            assert torch.equal(found.kept, together.kept[numbers])
            assert torch.equal(found.assignment, together.assignment[numbers])
        assert len({tuple(kept) for kept in together.kept.tolist()}) == 4
        model.eval()
        kept = model.forward_with_clusters(images)[2][0].kept
        assert len({tuple(patches) for patches in kept.tolist()}) == 4
        assert torch.equal(model.forward_with_clusters(images[2:3])[2][0].kept, kept[2:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_random_bits_of_similar_images_are_independent(dtype):
    """One pixel changes them; each bit is set in half of the images, and the patches are kept equally often."""
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)).repeat(1000, 1, 1, 1).to(dtype)
    images[:, 0, 0, 0] = torch.linspace(-1000, 1000, 1000).to(dtype)
    images = images.unique(dim=0)
    keys = keys_of_images(images)
    assert len(keys.unique(dim=0)) == len(images) > 300
    bits = (keys[:, :, None] >> torch.arange(32)) & 1
    assert (bits.double().mean(dim=0) - 0.5).abs().max() < 5 * 0.5 / len(images) ** 0.5
    kept = random_clusters(torch.randn(len(images), 16, 4), 4, keys)[0]
    often = kept.flatten().bincount(minlength=16) / len(images)
    assert (often - 0.25).abs().max() < 5 * (0.25 * 0.75 / len(images)) ** 0.5


def test_patches_that_a_random_choice_drops_are_merged_into_the_most_similar():
    keys = torch.randn(2, 3, 21, 4, generator=torch.Generator().manual_seed(5))
    clusters = cluster_tokens(keys, Reduction("random", 5, 1), dropout_keys(1, np.arange(2), 1, keys.device)[0])
    patches = keys.mean(dim=1)
    for image, patch in itertools.product(range(2), range(1, 21)):
        kept = clusters.kept[image, 1:].tolist()
        cosines = torch.cosine_similarity(patches[image, kept], patches[image, patch, None])
        nearest = patch if patch in kept else kept[cosines.argmax()]
        assert clusters.kept[image, clusters.assignment[image, patch]] == nearest


def test_runs_with_random_patches_do_not_depend_on_micro_batches_and_resume(tiny_flags, monkeypatch):
    """The losses are those of whole batches, and an interrupted run ends with the same bits; without dropout."""
    flags = ("--token_reduction", "random", "--reduction_layer", 2, "--keep_tokens", 8, "--img_size", 16)
    flags += ("--num_steps", 4, "--eval_every", 2, "--optimizer", "adamw", "--learning_rate", 1e-3)
    weights, rows = train_run(tiny_flags(*flags), monkeypatch)
    divided = train_run(tiny_flags(*flags, "--name", "b", "--gradient_accumulation_steps", 4), monkeypatch, "b")[1]
    for name in ("train_loss", "test_loss"):
        assert [row[name] for row in divided] == pytest.approx([row[name] for row in rows], rel=1e-4)
    stop_after(2, monkeypatch)
    with pytest.raises(SystemExit):
        train_run(tiny_flags(*flags, "--name", "c"), monkeypatch)
    resumed, _ = train_run(tiny_flags(*flags, "--name", "c", "--resume"), monkeypatch, "c")
    assert_same_bits(resumed, weights)


def test_tome_merges_the_best_matches_first():
    """One of six tokens per round: first 0 into its equal 3, then 1 into 4, both into 5, all these into 3."""
    angles = torch.tensor([[0.0, 40.0, 120.0, 0.0, 41.0, 80.0]]).deg2rad()
    keys = torch.stack([angles.cos(), angles.sin()], dim=-1)
    found = {k: [tensor[0].tolist() for tensor in tome_clusters(keys, k)] for k in (5, 4, 3, 2)}
    assert found == {
        5: [[1, 2, 3, 4, 5], [2, 0, 1, 2, 3, 4]],
        4: [[2, 3, 4, 5], [1, 2, 0, 1, 2, 3]],
        3: [[2, 3, 5], [1, 2, 0, 1, 2, 2]],
        2: [[2, 3], [1, 1, 0, 1, 1, 1]],
    }


def test_tome_merges_a_quarter_at_once():
    """Of tokens 0 to 7 the two that have equals among those of odd number."""
    keys = torch.eye(8)[None].clone()
    keys[0, 2], keys[0, 6] = keys[0, 7], keys[0, 1]
    kept, assignment = tome_clusters(keys, 6)
    assert kept.tolist() == [[0, 1, 3, 4, 5, 7]]
    assert assignment.tolist() == [[0, 1, 5, 2, 3, 4, 1, 5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", REDUCTION_METHODS)
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_of_equal_patches_the_first_are_chosen(compiled, method, dtype):
    """48 of 64 patches of a constant image. ToMe matches each even patch with patch 1 and merges the first 16.

    A random choice does not depend on the keys; the others are merged into the first one it kept.
    """
    choose = torch.compile(cluster_tokens, fullgraph=True) if compiled else cluster_tokens
    kept, assignment = choose(torch.ones(3, 2, 65, 16, dtype=dtype), Reduction(method, 48, 1))
    positions = random_order(torch.zeros(1, 2, dtype=torch.int32), 64)[0, :48]
    first = {"facility": [*range(48)], "tome": [*range(1, 32, 2), *range(32, 64)], "random": sorted(positions.tolist())}
    first = first[method]
    assert (kept[:, 1:] - 1).tolist() == [first] * 3
    clusters = [first.index(patch) if patch in first else 0 for patch in range(64)]
    assert (assignment[:, 1:] - 1).tolist() == [clusters] * 3


@pytest.mark.parametrize("method, keep", [("facility", 32), ("tome", 48)])
def test_of_duplicated_patches_the_first_are_chosen(method, keep):
    """The lower half repeats the upper half, shifted by one patch so that ToMe can match them."""
    upper = torch.randn(3, 1, 32, 16, generator=torch.Generator().manual_seed(2)).sign()  # so similarities are exact
    keys = torch.cat([torch.ones(3, 1, 1, 16), upper, upper.roll(1, dims=2)], dim=2).expand(-1, 2, -1, -1)
    kept, _ = cluster_tokens(keys, Reduction(method, keep, 1))
    # ToMe merges the first 16 of 32 even patches that have a duplicate, into it.
    first = {"facility": [*range(32)], "tome": [*range(1, 32, 2), *range(32, 64)]}[method]
    assert (kept[:, 1:] - 1).tolist() == [first] * 3


@pytest.mark.parametrize("k", [16, 48])
def test_tokens_that_are_nearest_to_each_other_gain_the_same_and_the_first_is_kept(k):
    """As greedy in integers picks. In float32 the order of a sum would decide, and it differs with the batch size."""
    keys = torch.rand(4, 64, 32, generator=torch.Generator().manual_seed(3))  # so s is at least 0.5
    s = (similarity(keys) * 2**24).long()
    assert torch.equal(s, s.transpose(1, 2)) and (s.diagonal(dim1=1, dim2=2) == 2**24).all()
    best, picks = torch.zeros(4, 1, 64, dtype=torch.long), []
    for _ in range(k):
        values = torch.maximum(s, best).sum(dim=-1)
        for image, tokens in enumerate(zip(*picks, strict=True)):
            values[image, list(tokens)] = -1
        picks.append(values.argmax(dim=1).tolist())
        best = torch.maximum(best, s[torch.arange(4), picks[-1]][:, None])
    kept, _ = facility_clusters(keys, k)
    assert kept.tolist() == [sorted(tokens) for tokens in zip(*picks, strict=True)]


@pytest.mark.parametrize("method", REDUCTION_METHODS)
def test_the_class_token_is_kept_and_alone(method):
    """Also if patches have the same key as the class token."""
    keys = torch.randn(2, 3, 10, 4)
    keys[:, :, 3:6] = keys[:, :, :1]
    clusters = cluster_tokens(keys, Reduction(method, 3, 1))
    assert clusters.kept.shape == (2, 4)
    assert (clusters.kept[:, 0] == 0).all() and (clusters.assignment[:, 0] == 0).all()
    assert (clusters.assignment[:, 1:] > 0).all()
    x = torch.randn(2, 10, 5)
    merged, sizes = merge_tokens(x, clusters)
    assert torch.equal(merged[:, 0], x[:, 0])
    assert (sizes[:, 0] == 1).all() and (sizes.sum(dim=1) == 10).all()


def test_merged_tokens_are_weighted_means():
    x = torch.tensor([[[1.0], [2.0], [4.0], [7.0]]], requires_grad=True)
    clusters = Clusters(torch.tensor([[0, 1]]), torch.tensor([[0, 1, 0, 1]]))
    merged, sizes = merge_tokens(x, clusters)
    assert (merged.tolist(), sizes.tolist()) == ([[[2.5], [4.5]]], [[2, 2]])
    merged, sizes = merge_tokens(x, clusters, torch.tensor([[3.0, 1.0, 1.0, 4.0]]))
    assert (merged.tolist(), sizes.tolist()) == ([[[1.75], [6.0]]], [[4, 5]])
    merged[0, 1].sum().backward()
    assert x.grad[0, :, 0].tolist() == pytest.approx([0, 0.2, 0, 0.8])


@pytest.mark.parametrize("method", REDUCTION_METHODS)
def test_unmerge_puts_each_value_back_to_its_members(method):
    keys = torch.randn(2, 1, 17, 4)
    clusters = cluster_tokens(keys, Reduction(method, 5, 1))
    values = torch.randn(2, 6, 3)
    spread = unmerge_tokens(values, clusters)
    for image, token in itertools.product(range(2), range(17)):
        assert torch.equal(spread[image, token], values[image, clusters.assignment[image, token]])
    again, _ = merge_tokens(spread, clusters)
    torch.testing.assert_close(again, values)
    assert torch.equal(unmerge_tokens(values[..., 0], clusters), spread[..., 0])


@pytest.mark.parametrize("method, keep_tokens", [("facility", 32), ("tome", 48)])
@pytest.mark.parametrize(
    "dtype, exact, norm_type",
    [
        (torch.float32, 1e-5, "LN"),
        (torch.bfloat16, 0.03, "LN"),
        (torch.float32, 1e-5, "BN"),
        (torch.float32, 1e-5, "Rescale"),
    ],
)
def test_merging_exact_duplicates_does_not_change_the_output(method, keep_tokens, dtype, exact, norm_type):
    """32 kinds of patches, each twice, without position embeddings: 32 tokens can stand for all 64.

    ToMe in one round: in the next it would miss some equals.
    """
    images = torch.from_numpy(make_images(32))
    images[..., 16:, :] = images[..., :16, :]  # the lower half repeats the patches of the upper half
    whole = randomised(small(norm_type=norm_type)).eval()
    whole.pos_embed.data.zero_()
    # ToMe matches patches of even index with those of odd index, so the rows are shifted by one patch.
    images[..., 16:, :] = images[..., 16:, :].roll(4, dims=-1)
    assert (whole.embed(images)[:, 1:].unique(dim=1).shape[1]) == 32
    model = reduced(method, keep_tokens=keep_tokens, norm_type=norm_type).eval()
    model.load_state_dict(whole.state_dict())
    whole.to(dtype), model.to(dtype)
    with torch.no_grad():
        expected = whole(images.to(dtype))
        found, attention, [clusters] = model.forward_with_clusters(images.to(dtype))
        torch.testing.assert_close(found, expected, rtol=exact, atol=exact)
        torch.testing.assert_close(model(images.to(dtype)), expected, rtol=exact, atol=exact)
    assert all(image.bincount().max() == 2 for image in clusters.assignment[:, 1:])
    assert [weights.shape[-1] for weights in attention] == [65, 65, 1 + keep_tokens, 1 + keep_tokens]


def test_without_the_sizes_the_output_changes(monkeypatch):
    """So the test above can fail. Here the sizes differ."""
    model = randomised(reduced("facility", keep_tokens=20))
    images = torch.from_numpy(make_images(32))
    with torch.no_grad():
        proportional = model(images)
        monkeypatch.setattr("models.vision_transformer.size_bias", lambda sizes, dtype: None)
        assert (model(images) - proportional).abs().max() > 1e-3


@pytest.mark.parametrize("method", REDUCTION_METHODS)
@pytest.mark.parametrize("keep_tokens", [64, 1.0])
def test_keeping_all_changes_nothing(method, keep_tokens):
    whole = randomised(small())
    model = reduced(method, keep_tokens=keep_tokens).eval()
    model.load_state_dict(whole.state_dict())
    images = torch.from_numpy(make_images(32))
    assert torch.equal(model(images), whole(images))
    model.reduction = Reduction(method, 64, 2)  # with a reduction that keeps all
    torch.testing.assert_close(model(images), whole(images), rtol=1e-6, atol=1e-6)
    clusters = cluster_tokens(torch.randn(2, 1, 65, 4), model.reduction)
    assert torch.equal(clusters.kept, clusters.assignment)


@pytest.mark.parametrize("method", REDUCTION_METHODS)
@pytest.mark.parametrize(
    "model_type, dtype", [("ViT-Mini_4", "float32"), ("ViT-Mini_4", "bfloat16"), ("R26-ViT-Mini_4", "float32")]
)
@pytest.mark.parametrize("norm_type", ["LN", "GN"])
def test_training_reaches_every_weight(method, model_type, dtype, norm_type):
    """In bfloat16 as well, which has its own attention on a CPU."""
    dtype = getattr(torch, dtype)
    model = randomised(reduced(method, model_type=model_type, norm_type=norm_type)).train().to(dtype)
    model(torch.from_numpy(make_images(32)).to(dtype)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name


@pytest.mark.slow
@pytest.mark.parametrize("method", REDUCTION_METHODS)
def test_a_compiled_model_gives_the_same(method):
    model = randomised(reduced(method, keep_tokens=9))
    images = torch.from_numpy(make_images(32))
    with torch.no_grad():
        expected = model(images)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(images), expected, rtol=1e-5, atol=1e-5)


def test_expanded_attention_gives_the_rollout_of_the_merged_tokens():
    """It equals the rollout of the small matrices with the merge as one more factor."""
    model = randomised(reduced("facility", keep_tokens=9))
    images = torch.from_numpy(make_images(32))
    with torch.no_grad():
        _, attention, [clusters] = model.forward_with_clusters(images)
        _, expanded, _ = attention_of(model, images)
    assert [weights.shape for weights in expanded] == [(2, 2, 65, 65)] * 4
    torch.testing.assert_close(torch.stack(expanded).sum(dim=-1), torch.ones(4, 2, 2, 65))
    merged, _ = merge_tokens(rollout(attention[:2]), clusters)  # (B, 10, 65)
    expected = (rollout(attention[2:]) @ merged)[:, 0]
    torch.testing.assert_close(rollout(expanded)[:, 0], expected)
    assert class_token_mask(rollout(expanded), (8, 8)).shape == (2, 8, 8)
    assert all(map(torch.equal, expanded[:2], attention[:2]))


@pytest.mark.parametrize(
    "keywords, message",
    [
        ({"token_reduction": "topk"}, "unknown token reduction 'topk'; there is none, facility, tome, random"),
        ({"token_reduction": "tome", "keep_tokens": 9}, "token_reduction tome needs reduction_layer"),
        ({"token_reduction": "tome", "reduction_layer": 1}, "token_reduction tome needs keep_tokens"),
        ({"keep_tokens": 9}, "keep_tokens 9 needs a token_reduction: facility or tome or random"),
        ({"reduction_layer": 2}, "reduction_layer 2 needs a token_reduction: facility or tome or random"),
    ],
)
def test_wrong_keywords_are_named_in_the_error(keywords, message):
    with pytest.raises(ValueError, match=message):
        small(**keywords)


@pytest.mark.parametrize("keep_tokens", [0, 65, -1, 1.5, 0.0])
def test_a_wrong_number_of_tokens_is_an_error(keep_tokens):
    with pytest.raises(ValueError, match=f"keep_tokens {keep_tokens} is neither a count from 1 to the model's 64"):
        reduced("facility", keep_tokens=keep_tokens)


@pytest.mark.parametrize("layer", [0, 4, 5])
def test_a_wrong_layer_is_an_error(layer):
    with pytest.raises(ValueError, match=f"reduction_layer {layer} is not one of the model's 1 to 3"):
        reduced("facility", reduction_layer=layer)


def test_token_reduction_of_a_resnet_is_an_error():
    with pytest.raises(ValueError, match="ResNet-Mini_Flops has no tokens"):
        build_model("ResNet-Mini_Flops", token_reduction="facility", keep_tokens=0.5, reduction_layer=2)


GIVEN = ("--token_reduction", "facility", "--reduction_layer", 2)


@pytest.mark.parametrize(
    "flags, message",
    [
        ((*GIVEN, "--keep_tokens", 5), "keep_tokens 5 is neither a count from 1 to the model's 4 patches nor a share"),
        ((*GIVEN, "--keep_tokens", "many"), "many is not a number above 0 and at most 1"),
        ((*GIVEN, "--keep_tokens", 0), "0 is not a whole number above 0"),
        (
            (*GIVEN[:2], "--reduction_layer", 6, "--keep_tokens", 2),
            "reduction_layer 6 is not one of the model's 1 to 5",
        ),
        (("--keep_tokens", 0.25), "keep_tokens 0.25 needs a token_reduction: facility or tome or random"),
        (("--token_reduction", "facilty"), "unknown token reduction 'facilty'"),
    ],
)
def test_wrong_flags_are_named_in_one_line(flags, message, tiny_flags, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        call_main(train, tiny_flags(*flags), monkeypatch)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error and error.count("\n") == 1


def test_a_run_is_restored_with_its_reduction(tiny_flags, tmp_path, monkeypatch, capsys):
    """evaluate.py uses the run's reduction, or the one of its own flags."""
    flags = (*GIVEN, "--keep_tokens", 0.5, "--num_steps", 2, "--eval_every", 2, "--log_attention_every", 2)
    call_main(train, tiny_flags(*flags), monkeypatch)
    run_dir = tmp_path / "output" / "run"
    assert read_config(run_dir)["flags"]["keep_tokens"] == 0.5
    path = run_dir / "last.safetensors"
    assert SavedModel.load(path).model.reduction == Reduction("facility", 2, 2)
    assert SavedModel.load(path, img_size=16).model.reduction == Reduction("facility", 8, 2)
    other = {"token_reduction": "tome", "keep_tokens": 1}
    assert SavedModel.load(path, token_reduction=other).model.reduction == Reduction("tome", 1, 2)
    assert SavedModel.load(path, token_reduction={"token_reduction": "none"}).model.reduction is None
    capsys.readouterr()
    flags = ["--checkpoint", run_dir / "last.safetensors", "--keep_tokens", 5, write_images(tmp_path, [(8, 8)])[0]]
    with pytest.raises(SystemExit) as stopped:
        call_main(evaluate, flags, monkeypatch)
    assert stopped.value.code == 2
    assert "the model's 4 patches" in capsys.readouterr().err


def test_a_pretrained_model_is_reduced_without_training(tmp_path, monkeypatch, capsys):
    """Google's .npz with the three flags: the results are those of a model built that way, not of an unreduced one."""
    model = randomised(build_model("ViT-Mini_4", 32, num_classes=3))
    np.savez(tmp_path / "ViT-Mini_4.npz", **model.export_npz())
    image = write_images(tmp_path / "images", [(32, 32)])[0]
    answers = []
    for flags in ([], [*GIVEN, "--keep_tokens", "7"], [*GIVEN, "--keep_tokens", "64"]):
        command = ["--checkpoint", tmp_path / "ViT-Mini_4.npz", "--img_size", 32, "--json", *flags, image]
        call_main(evaluate, command, monkeypatch)
        answers.append(json.loads(capsys.readouterr().out)[0]["classes"])
    assert answers[0] == answers[2]
    assert answers[0] != answers[1]


@pytest.mark.slow
def test_figures_of_a_reduced_model(tmp_path):
    """A reduced model has all kinds of figures; those of clusters need one."""
    np.savez(tmp_path / "ViT-Mini_4.npz", **randomised(build_model("ViT-Mini_4", 32, num_classes=3)).export_npz())
    write_images(tmp_path / "images", [(40, 50), (32, 32)])
    command = ["visualize.py", "--checkpoint", tmp_path / "ViT-Mini_4.npz", "--image", tmp_path / "images"]
    command += ["--output_dir", tmp_path / "out"]
    succeed(*command, *GIVEN, "--keep_tokens", 0.25)
    drawn = {path.stem for path in (tmp_path / "out").iterdir()}
    kinds = ("rollout", "blocks", "heads", "clusters")
    assert drawn >= {f"images-00{i}-{kind}" for i in range(2) for kind in kinds} | {"clusters", "distance"}
    done = script(*command, "--clusters")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "merges no tokens; give for example --token_reduction" in done.stderr


@pytest.mark.parametrize(
    "keywords, graphs",
    [
        ({}, 3),  # the patch embedding, the blocks, the last block, which computes the class token only
        ({"norm_type": "Rescale"}, 3),
        ({"norm_type": "BN"}, 2),  # which needs all tokens of the last block
        ({"dropout_rate": 0.1, "drop_path_rate": 0.0}, 3),
        # the blocks before the reduction, the block that returns its keys, the blocks after it, the last block
        ({"token_reduction": "facility", "keep_tokens": 16, "reduction_layer": 4}, 5),
    ],
)
def test_a_block_is_compiled_once_for_all(keywords, graphs):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    model = randomised(build_model("ViT-Nano_4", 32, **keywords)).train()
    for number, layer in enumerate(layer for layer in model.modules() if hasattr(layer, "seed_samples")):
        layer.seed_samples(torch.full((2, 2), number + 1, dtype=torch.int32))
    images = torch.from_numpy(make_images(32))
    expected = model(images)
    model.compile(backend=counter)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == graphs
