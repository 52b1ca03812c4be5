"""Fewer tokens: choose k that stand for all, merge every other one into its most similar, go on with the k.

Facility location  f(S) = sum_i max_{j in S} s(i, j) over the patches i: how well the chosen ones S represent all.
                   f is monotone and submodular, so greedy picks reach at least 1 - 1/e of the best possible f(S).
ToMe               bipartite soft matching (Bolya et al., 2023): every second token is matched with its most similar
                   of the others, and the best matches are merged. It is repeated, on the merged tokens' mean keys,
                   until k are left, a quarter of the tokens at most each time: more would take nearly all of every
                   second one, whatever the image shows. (ToMe itself merges a few tokens in each block.)

Both compare the keys of the attention in the block before the reduction, averaged over the heads as in ToMe:
s(i, j) = (1 + cos(key_i, key_j)) / 2, which is not negative. No gradient flows through the choice. The class token
takes no part: it is always kept, and nothing is merged into it.

Merging exact duplicates changes no output: the mean is theirs, and attention counts a merged token by its size. That
holds for the norms LN and Rescale, and for BN in evaluation; the statistics of GN, and of BN in training, count a
merged token once.
"""

import contextlib
from typing import NamedTuple

import torch
import torch.nn.functional as F

from models.configs import CONFORMERS


class Clusters(NamedTuple):
    """Which token stands for which, the class token (token 0, cluster 0) included."""

    kept: torch.Tensor  # (B, K) the token that each cluster is named after, ascending
    assignment: torch.Tensor  # (B, N) the number of each token's cluster


class Reduction(NamedTuple):
    """After `layer` blocks, `keep` patches stay of all, chosen by `method`."""

    method: str
    keep: int
    layer: int


def make_reduction(token_reduction, keep_tokens, reduction_layer, num_patches, last_layer):
    """The Reduction that the keywords of `build_model` ask for, None for none. Raises ValueError.

    `reduction_layer` is 1 to `last_layer`. Keeping all patches is no reduction.
    """
    if token_reduction not in TOKEN_REDUCTIONS:
        raise ValueError(f"unknown token reduction {token_reduction!r}; there is {', '.join(TOKEN_REDUCTIONS)}")
    given = {"keep_tokens": keep_tokens, "reduction_layer": reduction_layer}
    for name, value in given.items():
        if token_reduction == "none" and value is not None:
            raise ValueError(f"{name} {value} needs a token_reduction: {' or '.join(METHODS)}")
        if token_reduction != "none" and value is None:
            raise ValueError(f"token_reduction {token_reduction} needs {name}")
    if token_reduction == "none":
        return None
    check_layer(reduction_layer, last_layer)
    keep = patches_to_keep(keep_tokens, num_patches)
    return Reduction(token_reduction, keep, reduction_layer) if keep < num_patches else None


def check_layer(reduction_layer, last_layer):
    if not 1 <= reduction_layer <= last_layer:
        raise ValueError(f"reduction_layer {reduction_layer} is not one of the model's 1 to {last_layer}")


def patches_to_keep(keep_tokens, num_patches):
    """`keep_tokens` as a count: an int is one, a float is a share of the patches. Raises ValueError."""
    if isinstance(keep_tokens, float) and 0 < keep_tokens <= 1:
        return max(1, round(keep_tokens * num_patches))
    if isinstance(keep_tokens, int) and 0 < keep_tokens <= num_patches:
        return keep_tokens
    raise ValueError(
        f"keep_tokens {keep_tokens} is neither a count from 1 to the model's {num_patches} patches "
        "nor a share like 0.25"
    )


@torch.no_grad()
def cluster_tokens(keys, reduction):
    """The attention's keys (B, heads, 1 + patches, head_dim), class token first -> Clusters, 1 + `keep` of them."""
    with without_autocast(keys.device):
        kept, assignment = METHODS[reduction.method](keys[:, :, 1:].mean(dim=1, dtype=torch.float32), reduction.keep)
    return Clusters(F.pad(kept + 1, (1, 0)), F.pad(assignment + 1, (1, 0)))


def merge(x, clusters, sizes=None):
    """Tokens (B, N, C) -> (the clusters' means (B, K, C), their sizes (B, K)).

    `sizes` (B, N) says how many patches each token stands for already, one where it is left away; it is a member's
    weight in the mean. A matrix product: differentiable, and in the same order every time.
    """
    numbers = torch.arange(clusters.kept.shape[1], device=x.device)
    weights = (clusters.assignment[:, None] == numbers[:, None]).float()  # (B, K, N)
    if sizes is not None:
        weights = weights * sizes[:, None]
    totals = weights.sum(dim=-1)
    with without_autocast(x.device):
        # Divided before the product: a sum of many tokens may be beyond float16.
        return (weights / totals[..., None]).to(x.dtype) @ x, totals


def unmerge(x, clusters):
    """The clusters' values (B, K, ...) at their members' places: (B, N, ...)."""
    index = clusters.assignment.view(*clusters.assignment.shape, *[1] * (x.ndim - 2))
    return x.gather(1, index.expand(-1, -1, *x.shape[2:]))


def proportional(sizes, dtype):
    """What attention adds to its scores after a merge (B, 1, 1, K): a token of size n counts as n equal ones."""
    return sizes.log().to(dtype)[:, None, None]


def similarity(keys):
    """Keys (B, N, C) -> s (B, N, N), cosines shifted to 0 ... 1."""
    keys = F.normalize(keys, dim=-1)
    return (0.5 + 0.5 * keys @ keys.transpose(1, 2)).clamp(min=0)


def coverage(s, kept):
    """f(S) of the patches `kept` (B, k), each among those that s (B, N, N) compares: (B,)."""
    return rows_of(s, kept).amax(dim=1).sum(dim=-1)


@torch.library.custom_op("token_reduction::facility_location", mutates_args=())
def facility_location(s: torch.Tensor, k: int) -> torch.Tensor:
    """The k greedy picks (B, k), in their order, that maximise f; s (B, N, N), not negative, has a row a candidate.

    An operator of its own, since torch.compile would write the k rounds out one by one, and take minutes for it.
    """
    best = s.new_zeros(len(s), 1, s.shape[-1])  # how well each token is represented so far
    with_one_more = torch.empty_like(s)
    picks = torch.empty(len(s), k, dtype=torch.long, device=s.device)
    for n in range(k):
        values = torch.maximum(s, best, out=with_one_more).sum(dim=-1)  # (B, N): f of the picks so far and one more
        pick = values.scatter_(1, picks[:, :n], -torch.inf).argmax(dim=1, keepdim=True)
        picks[:, n : n + 1] = pick
        best = torch.maximum(best, rows_of(s, pick))
    return picks


@facility_location.register_fake
def _(s, k):
    return s.new_empty(len(s), k, dtype=torch.long)


def upper_bound(s, k):
    """What f(S) of no k candidates exceeds, (B,): the lowest of f(S_t) + the k largest gains over S_t, S_t greedy's.

    By submodularity candidates gain together at most the sum of what each gains alone.
    """
    best = torch.zeros_like(s[:, :1])
    bounds = []
    for pick in facility_location(s, s.shape[1]).split(1, dim=1):
        gains = (s - best).clamp(min=0).sum(dim=-1)
        bounds.append(best.sum(dim=(1, 2)) + gains.topk(k).values.sum(dim=1))
        best = torch.maximum(best, rows_of(s, pick))
    return torch.stack(bounds).amin(dim=0)


def facility_clusters(keys, k):
    """(kept (B, k), assignment (B, N)) among the patches alone, from their keys (B, N, C)."""
    s = similarity(keys)
    kept = facility_location(s, k).sort(dim=1).values
    assignment = rows_of(s, kept).argmax(dim=1)
    # Of two equal tokens that both are kept, each stands for itself, so no cluster is empty.
    return kept, assignment.scatter(1, kept, torch.arange(k, device=s.device).expand_as(kept))


def tome_clusters(keys, k):
    """The same by bipartite soft matching; a cluster is named after the token that the others were merged into."""
    batch, n, _ = keys.shape
    assignment = kept = torch.arange(n, device=keys.device).expand(batch, -1)
    sizes = None
    while n > k:
        count = min(n - k, max(1, n // 4))  # merged in this round
        unit = F.normalize(keys, dim=-1)
        score, partner = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).max(dim=-1)  # (B, even tokens)
        leaving = score.topk(count).indices
        everyone = torch.arange(n, device=keys.device).expand(batch, -1)
        target = everyone.scatter(1, 2 * leaving, 2 * partner.gather(1, leaving) + 1)  # (B, n)
        gone = (target != everyone).int()
        stay = gone.argsort(dim=1, stable=True)[:, : n - count]  # (B, n - count), ascending
        renumbered = ((1 - gone).cumsum(dim=1) - 1).gather(1, target)
        keys, sizes = merge(keys, Clusters(stay, renumbered), sizes)
        assignment, kept = renumbered.gather(1, assignment), kept.gather(1, stay)
        n -= count
    return kept, assignment


def rows_of(s, indices):
    """Rows `indices` (B, k) of s (B, N, M): (B, k, M)."""
    return s.gather(1, indices[..., None].expand(-1, -1, s.shape[-1]))


def without_autocast(device):
    """Products in the type of their factors; the meta device, on which FLOPs are counted, knows no autocast."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


METHODS = {"facility": facility_clusters, "tome": tome_clusters}
TOKEN_REDUCTIONS = ("none", *METHODS)


def reduction_grid(model_type, keep_tokens, reduction_layer):
    """{(method, patches kept): (model type, keywords of `build_model`)} to compare the reductions of a ViT.

    The ViT without reduction is ("none", "all"); the last one is the ViT's Conformer, if there is one.
    """
    layer = {"reduction_layer": reduction_layer}
    grid = {("none", "all"): (model_type, {})}
    for keep in keep_tokens:
        for method in METHODS:
            grid[method, keep] = (model_type, {"token_reduction": method, "keep_tokens": keep, **layer})
    conformer = model_type.replace("ViT", "Conformer")
    if conformer in CONFORMERS:
        grid[conformer, CONFORMERS[conformer].keep_tokens] = (conformer, layer)
    return grid


def choice_of_tokens(model, batch_size):
    """A function that only chooses the tokens of a ViT or Conformer, from random keys, to be timed."""
    weight, attention = model.blocks[0].attn.qkv.weight, model.blocks[0].attn
    size = (batch_size, attention.num_heads, model.pos_embed.shape[1], weight.shape[1] // attention.num_heads)
    keys = torch.randn(size, device=weight.device).to(weight.dtype)
    return lambda: cluster_tokens(keys, model.reduction)
