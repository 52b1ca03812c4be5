"""Token reduction: choose k representative tokens and merge each other token into the most similar of them.

Facility location  f(S) = sum_i max_{j in S} s(i, j) over the patches i measures how well the chosen patches S represent
                   all patches. f is monotone and submodular, so greedy picks reach at least 1 - 1/e of the maximum.
ToMe               bipartite soft matching (Bolya et al., 2023): every second token is matched with the most similar of
                   the other tokens, and the best matches are merged. This is repeated with the means of the merged
                   tokens' keys until k tokens remain. Each round merges at most a quarter of the tokens: more would
                   merge nearly every second token, independent of the image. (The original ToMe merges a few tokens
                   in each block.)

Both compare the keys of the attention in the block before the reduction, averaged over the heads as in ToMe:
s(i, j) = (1 + cos(key_i, key_j)) / 2, which is not negative. Of exactly equal choices the one of lowest index is taken.
No gradient flows through the choice. The class token is always kept, and no token is merged into it.

Merging exact duplicates does not change the output: their mean is equal to them, and attention weights a merged token
by its size. This holds for the norms LN and Rescale, and for BN in evaluation. The statistics of GN, and of BN in
training, count a merged token once.
"""

import contextlib
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Clusters(NamedTuple):
    """Which tokens were merged, including the class token (token 0, cluster 0)."""

    kept: torch.Tensor  # (B, K) the token that represents each cluster, ascending
    assignment: torch.Tensor  # (B, N) the cluster of each token, 0 to K - 1


class Reduction(NamedTuple):
    """After `layer` blocks, `keep` patches are kept, chosen by `method`."""

    method: str
    keep: int
    layer: int


def make_reduction(token_reduction, keep_tokens, reduction_layer, num_patches, last_layer):
    """The Reduction for the keywords of `build_model`; None if all patches are kept. Raises ValueError.

    `reduction_layer` is 1 to `last_layer`.
    """
    if token_reduction not in TOKEN_REDUCTIONS:
        raise ValueError(f"unknown token reduction {token_reduction!r}; there is {', '.join(TOKEN_REDUCTIONS)}")
    given = {"keep_tokens": keep_tokens, "reduction_layer": reduction_layer}
    for name, value in given.items():
        if token_reduction == "none" and value is not None:
            raise ValueError(f"{name} {value} needs a token_reduction: {' or '.join(REDUCTION_METHODS)}")
        if token_reduction != "none" and value is None:
            raise ValueError(f"token_reduction {token_reduction} needs {name}")
    if token_reduction == "none":
        return None
    check_layer(reduction_layer, last_layer)
    keep = patches_to_keep(keep_tokens, num_patches)
    return Reduction(token_reduction, keep, reduction_layer) if keep < num_patches else None


def check_layer(reduction_layer, last_layer):
    """Raises ValueError for a layer that the model does not have."""
    if not 1 <= reduction_layer <= last_layer:
        raise ValueError(f"reduction_layer {reduction_layer} is not one of the model's 1 to {last_layer}")


def patches_to_keep(keep_tokens, num_patches):
    """`keep_tokens`, a count (int) or a share of the patches (float), as a count. Raises ValueError."""
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
    """The attention's keys (B, heads, 1 + patches, head_dim), class token first -> 1 + `keep` Clusters."""
    with without_autocast(keys.device):
        kept, assignment = REDUCTION_METHODS[reduction.method](
            keys[:, :, 1:].mean(dim=1, dtype=torch.float32), reduction.keep
        )
    return Clusters(F.pad(kept + 1, (1, 0)), F.pad(assignment + 1, (1, 0)))


def merge_tokens(x, clusters, sizes=None):
    """Tokens (B, N, C) -> (the clusters' means (B, K, C), their sizes (B, K)).

    `sizes` (B, N) is the number of patches that each token represents already, by default 1; it is the token's weight
    in the mean. The means are a matrix product: differentiable and deterministic.
    """
    indices = torch.arange(clusters.kept.shape[1], device=x.device)
    weights = (clusters.assignment[:, None] == indices[:, None]).float()  # (B, K, N)
    if sizes is not None:
        weights = weights * sizes[:, None]
    totals = weights.sum(dim=-1)
    with without_autocast(x.device):
        # Divided before the product, because a sum of many tokens may overflow in float16.
        return (weights / totals[..., None]).to(x.dtype) @ x, totals


def unmerge_tokens(x, clusters):
    """The clusters' values (B, K, ...), copied to their tokens: (B, N, ...)."""
    index = clusters.assignment.view(*clusters.assignment.shape, *[1] * (x.ndim - 2))
    return x.gather(1, index.expand(-1, -1, *x.shape[2:]))


def size_bias(sizes, dtype):
    """ToMe's proportional attention: a bias (B, 1, 1, K) of the scores that weights a token of size n as n tokens."""
    return sizes.log().to(dtype)[:, None, None]


def similarity(keys):
    """Keys (B, N, C) -> s (B, N, N), their cosines mapped to [0, 1]; exactly symmetric, with ones on the diagonal."""
    keys = F.normalize(keys, dim=-1)
    s = (0.5 + 0.5 * keys @ keys.transpose(1, 2)).clamp(min=0)
    s = torch.maximum(s, s.transpose(1, 2))
    return s.masked_fill(torch.eye(s.shape[1], dtype=torch.bool, device=s.device), 1)


def coverage(s, kept):
    """f(S) (B,) of the patches `kept` (B, k), which are indices into s (B, N, N)."""
    return gather_rows(s, kept).amax(dim=1).sum(dim=-1)


@torch.library.custom_op("token_reduction::facility_location", mutates_args=())
def facility_location(s: torch.Tensor, k: int) -> torch.Tensor:
    """The k greedy picks (B, k) that maximise f, in order; s (B, N, N) >= 0 has one row per candidate.

    A custom operator, because torch.compile would unroll the k rounds, which takes minutes.
    """
    best = s.new_zeros(len(s), 1, s.shape[-1])  # how well the picks so far represent each token
    extended = torch.empty_like(s)
    picks = torch.empty(len(s), k, dtype=torch.long, device=s.device)
    for n in range(k):
        values = torch.maximum(s, best, out=extended).sum(dim=-1)  # (B, N): f of the picks so far and one more
        pick = values.scatter_(1, picks[:, :n], -torch.inf).argmax(dim=1, keepdim=True)
        picks[:, n : n + 1] = pick
        best = torch.maximum(best, gather_rows(s, pick))
    return picks


@facility_location.register_fake
def _(s, k):
    return s.new_empty(s.shape[0], k, dtype=torch.long)


def upper_bound(s, k):
    """An upper bound (B,) of f(S) for k candidates: the minimum over t of f(S_t) + the k largest gains, S_t greedy.

    By submodularity, the gain of several candidates is at most the sum of their single gains.
    """
    best = torch.zeros_like(s[:, :1])
    bounds = []
    for pick in facility_location(s, s.shape[1]).split(1, dim=1):
        gains = (s - best).clamp(min=0).sum(dim=-1)
        bounds.append(best.sum(dim=(1, 2)) + gains.topk(k).values.sum(dim=1))
        best = torch.maximum(best, gather_rows(s, pick))
    return torch.stack(bounds).amin(dim=0)


def facility_clusters(keys, k):
    """Keys of the patches (B, N, C) -> kept (B, k), assignment (B, N); see Clusters, but without the class token."""
    s = similarity(keys)
    # Two tokens that are nearest to each other gain the same. In float64, sums of float32 values do not depend on their
    # order, so the index decides; in float32, rounding would decide, and it differs with the size of the batch.
    exact = (s.cpu() if s.device.type == "mps" else s).double()  # Apple's GPUs have no float64
    kept = facility_location(exact, k).to(s.device).sort(dim=1).values
    assignment = gather_rows(s, kept).argmax(dim=1)
    # Each kept token is in its own cluster, also if two kept tokens are equal, so no cluster is empty.
    return kept, assignment.scatter(1, kept, torch.arange(k, device=s.device).expand_as(kept))


def tome_clusters(keys, k):
    """As `facility_clusters`, by bipartite soft matching; a cluster's token is the one others merge into."""
    batch, n, _ = keys.shape
    assignment = kept = torch.arange(n, device=keys.device).expand(batch, -1)
    sizes = None
    while n > k:
        count = min(n - k, max(1, n // 4))  # merged in this round
        unit = F.normalize(keys, dim=-1)
        score, partner = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).max(dim=-1)  # (B, even tokens)
        # A stable sort, because topk leaves open which of several equal matches it takes.
        best_matches = score.argsort(dim=1, descending=True, stable=True)[:, :count]
        indices = torch.arange(n, device=keys.device).expand(batch, -1)
        target = indices.scatter(1, 2 * best_matches, 2 * partner.gather(1, best_matches) + 1)  # (B, n)
        is_merged = (target != indices).int()
        remaining = is_merged.argsort(dim=1, stable=True)[:, : n - count]  # (B, n - count), ascending
        new_assignment = ((1 - is_merged).cumsum(dim=1) - 1).gather(1, target)
        keys, sizes = merge_tokens(keys, Clusters(remaining, new_assignment), sizes)
        assignment, kept = new_assignment.gather(1, assignment), kept.gather(1, remaining)
        n -= count
    return kept, assignment


def gather_rows(s, indices):
    """Rows `indices` (B, k) of s (B, N, M): (B, k, M)."""
    return s.gather(1, indices[..., None].expand(-1, -1, s.shape[-1]))


def without_autocast(device):
    """Disable autocast; the meta device, on which FLOPs are counted, does not support it."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


REDUCTION_METHODS = {"facility": facility_clusters, "tome": tome_clusters}
TOKEN_REDUCTIONS = ("none", *REDUCTION_METHODS)
