"""Token reduction: choose k representative tokens and merge each other token into the most similar of them.

Facility location  f(S) = sum_i max_{j in S} s(i, j) over the patches i measures how well the chosen patches S represent
                   all patches. f is monotone and submodular, so greedy picks reach at least 1 - 1/e of the maximum.
ToMe               bipartite soft matching (Bolya et al., 2023): every second token is matched with the most similar of
                   the other tokens, and the best matches are merged. This is repeated with the means of the merged
                   tokens' keys until k tokens remain. Each round merges at most a quarter of the tokens: more would
                   merge nearly every second token, independent of the image.
random             k patches at random, the baseline: in training others for each image in each step, in evaluation
                   those that the image's pixels decide. The other patches are merged as by facility location, so that
                   only the choice differs.

ToMe also merges as published, r tokens in every block between its attention and its MLP (`EveryBlock`).

All compare the keys of the attention in the block before the reduction, averaged over the heads as in ToMe:
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

from models.dropout import Dropout, random_order, scramble
from models.facility_location import facility_location


class Clusters(NamedTuple):
    """Which tokens were merged, including the class token (token 0, cluster 0)."""

    kept: torch.Tensor  # (B, K) the token that represents each cluster, ascending except in EveryBlock
    assignment: torch.Tensor  # (B, N) the cluster of each token, 0 to K - 1


class Reduction(NamedTuple):
    """After `layer` blocks, `keep` patches are kept, chosen by `method`."""

    method: str
    keep: int
    layer: int

    def __str__(self):
        return f"{self.keep} after block {self.layer} ({self.method})"

    @property
    def keywords(self):
        """Those of `build_model` for it."""
        return {"token_reduction": self.method, "keep_tokens": self.keep, "reduction_layer": self.layer}


class EveryBlock(NamedTuple):
    """Each block merges tokens by one matching of ToMe; after all blocks `keep` patches are kept."""

    r: int
    merged: tuple  # the number of tokens that each block merges: r, or as many as its matching can
    keep: int

    def __str__(self):
        return f"{self.keep}, {self.r} in every block (tome)"

    @property
    def keywords(self):
        """Those of `build_model` for it."""
        return {"token_reduction": "tome", "tome_r": self.r}


def make_reduction(token_reduction, keep_tokens, reduction_layer, num_patches, last_layer):
    """The Reduction for the keywords of `build_model`; None if all patches are kept. Raises ValueError.

    `reduction_layer` is 1 to `last_layer`.
    """
    check_name(token_reduction)
    given = {"keep_tokens": keep_tokens, "reduction_layer": reduction_layer}
    for name, value in given.items():
        if token_reduction == "none" and value is not None:
            raise ValueError(f"{name} {value} needs a token_reduction: {' or '.join(REDUCTION_METHODS)}")
        if token_reduction != "none" and value is None:
            instead = ", or tome_r instead of keep_tokens and reduction_layer" if token_reduction == "tome" else ""
            raise ValueError(f"token_reduction {token_reduction} needs {name}{instead}")
    if token_reduction == "none":
        return None
    check_layer(reduction_layer, last_layer)
    keep = patches_to_keep(keep_tokens, num_patches)
    return Reduction(token_reduction, keep, reduction_layer) if keep < num_patches else None


def merge_in_every_block(tome_r, others, num_patches, num_layers):
    """The EveryBlock for the keyword `tome_r` of `build_model`; None if no tokens are merged. Raises ValueError.

    `others` are the further keywords of the reduction, {name: value}.
    """
    method = others["token_reduction"]
    check_name(method)
    if method != "tome":
        raise ValueError(f"tome_r {tome_r} needs token_reduction tome, not {method}")
    for name in ("keep_tokens", "reduction_layer"):
        if others[name] is not None:
            raise ValueError(
                f"tome_r {tome_r} and {name} {others[name]} exclude each other: ToMe merges tome_r tokens in every "
                "block, or after reduction_layer blocks all but keep_tokens"
            )
    if tome_r < 0:
        raise ValueError(f"tome_r {tome_r} is not a number of tokens, 0 or above")
    merged, patches = [], num_patches
    for _ in range(num_layers):
        merged.append(min(tome_r, patches // 2))  # of 1 + patches tokens, the half without the class token at most
        patches -= merged[-1]
    return EveryBlock(tome_r, tuple(merged), patches) if patches < num_patches else None


def check_name(token_reduction):
    """Raises ValueError for an unknown token reduction."""
    if token_reduction not in TOKEN_REDUCTIONS:
        raise ValueError(f"unknown token reduction {token_reduction!r}; there is {', '.join(TOKEN_REDUCTIONS)}")


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
def cluster_tokens(keys, reduction, seeds=None):
    """The attention's keys (B, heads, 1 + patches, head_dim), class token first -> 1 + `keep` Clusters.

    `seeds` are those of a RandomChoice, if the model has one.
    """
    choose = REDUCTION_METHODS[reduction.method]
    drawn = {} if seeds is None else {"seeds": seeds}
    with without_autocast(keys.device):
        kept, assignment = choose(keys[:, :, 1:].mean(dim=1, dtype=torch.float32), reduction.keep, **drawn)
    return Clusters(F.pad(kept + 1, (1, 0)), F.pad(assignment + 1, (1, 0)))


@torch.no_grad()
def match_tokens(keys, count):
    """The attention's keys (B, heads, N, head_dim), class token first -> N - count Clusters by one matching of ToMe.

    As published, the tokens of even index, then those of odd index remain.
    """
    with without_autocast(keys.device):
        return merge_matches(keys.mean(dim=1, dtype=torch.float32), count, as_published=True)


def compose(first, second):
    """The Clusters of two merges, the second one of the tokens that the first one left; `first` may be None."""
    if first is None:
        return second
    return Clusters(first.kept.gather(1, second.kept), second.assignment.gather(1, first.assignment))


def merge_tokens(x, clusters, sizes=None):
    """Tokens (B, N, C) -> (the clusters' means (B, K, C), their sizes (B, K)).

    `sizes` (B, N) is the number of patches that each token represents already, by default 1; it is the token's weight
    in the mean. The means are a matrix product: differentiable and deterministic. Sizes are integers, which mixed
    precision does not round.
    """
    indices = torch.arange(clusters.kept.shape[1], device=x.device)
    weights = (clusters.assignment[:, None] == indices[:, None]).float()  # (B, K, N)
    if sizes is not None:
        weights = weights * sizes[:, None]
    totals = weights.sum(dim=-1)
    with without_autocast(x.device):
        # Divided before the product, because a sum of many tokens may overflow in float16.
        return (weights / totals[..., None]).to(x.dtype) @ x, totals.long()


def unmerge_tokens(x, clusters):
    """The clusters' values (B, K, ...), copied to their tokens: (B, N, ...)."""
    index = clusters.assignment.view(*clusters.assignment.shape, *[1] * (x.ndim - 2))
    return x.gather(1, index.expand(-1, -1, *x.shape[2:]))


def size_bias(sizes, dtype):
    """ToMe's proportional attention: a bias (B, 1, 1, K) of the scores that weights a token of size n as n tokens.

    None without sizes.
    """
    return None if sizes is None else sizes.log().to(dtype)[:, None, None]


def similarity(keys):
    """Keys (B, N, C) -> s (B, N, N), their cosines mapped to [0, 1]; exactly symmetric, with ones on the diagonal."""
    keys = F.normalize(keys, dim=-1)
    s = (0.5 + 0.5 * keys @ keys.transpose(1, 2)).clamp(min=0)
    s = torch.maximum(s, s.transpose(1, 2))
    return s.masked_fill(torch.eye(s.shape[1], dtype=torch.bool, device=s.device), 1)


def coverage(s, kept):
    """f(S) (B,) of the patches `kept` (B, k), which are indices into s (B, N, N)."""
    return gather_rows(s, kept).amax(dim=1).sum(dim=-1)


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
    exact = s.cpu() if s.device.type == "mps" else s  # Apple's GPUs have no float64
    exact = exact if s.is_cuda else exact.double()  # the kernel of a GPU adds in float64 anyway
    kept = facility_location(exact, k).to(s.device).sort(dim=1).values
    return kept, assign(s, kept)


def random_clusters(keys, k, seeds=None):
    """As `facility_clusters`, of random patches by `seeds`, int32 (B, 2); without them the same for all images."""
    batch, n, _ = keys.shape
    seeds = torch.zeros(1, 2, dtype=torch.int32, device=keys.device) if seeds is None else seeds
    kept = random_order(seeds, n)[:, :k].sort(dim=1).values.expand(batch, -1)
    return kept, assign(similarity(keys), kept)


def assign(s, kept):
    """The most similar of the patches `kept` (B, k) to each patch, as its index in `kept`: (B, N)."""
    assignment = gather_rows(s, kept).argmax(dim=1)
    # Each kept token is in its own cluster, also if two kept tokens are equal, so no cluster is empty.
    return assignment.scatter(1, kept, torch.arange(kept.shape[1], device=s.device).expand_as(kept))


def tome_clusters(keys, k):
    """As `facility_clusters`, by bipartite soft matching; a cluster's token is the one others merge into."""
    batch, n, _ = keys.shape
    indices = torch.arange(n, device=keys.device).expand(batch, -1)
    clusters, sizes = Clusters(indices, indices), None
    while n > k:
        count = min(n - k, max(1, n // 4))  # merged in this round
        merged = merge_matches(keys, count)
        keys, sizes = merge_tokens(keys, merged, sizes)
        clusters = compose(clusters, merged)
        n -= count
    return clusters


def merge_matches(keys, count, as_published=False):
    """Keys (B, N, C) -> N - count Clusters: of the tokens of even index `count` merge into the most similar odd one.

    `as_published` token 0 is not merged, and all tokens of even index come before those of odd index.
    """
    n = keys.shape[1]
    unit = F.normalize(keys, dim=-1)
    score, partner = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).max(dim=-1)  # (B, even tokens)
    if as_published:
        score[:, 0] = -torch.inf
    # A stable sort, because topk leaves open which of several equal matches it takes.
    best_matches = score.argsort(dim=1, descending=True, stable=True)[:, :count]
    indices = torch.arange(n, device=keys.device).expand(keys.shape[:2])  # len() would fix the size of exported batches
    target = indices.scatter(1, 2 * best_matches, 2 * partner.gather(1, best_matches) + 1)  # (B, N)
    rank = 2 * (target != indices).long()  # what is merged comes last
    order = (rank + indices % 2 if as_published else rank).argsort(dim=1, stable=True)
    number = order.scatter(1, order, indices)  # the place of each token in this order
    return Clusters(order[:, : n - count], number.gather(1, target))


def gather_rows(s, indices):
    """Rows `indices` (B, k) of s (B, N, M): (B, k, M)."""
    return s.gather(1, indices[..., None].expand(-1, -1, s.shape[-1]))


def without_autocast(device):
    """Disable autocast; the meta device, on which FLOPs are counted, does not support it."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


class RandomChoice(Dropout):
    """Draws the random bits of `random_clusters`: in training with the keys of Dropout, else from an image's pixels."""

    stays_random = True  # in training, also where everything around it is frozen

    def __init__(self):
        super().__init__(rate=1.0)

    def forward(self, x):
        """`seeds` of `cluster_tokens` for images x (B, ...)."""
        if not self.training:
            return keys_of_images(x)
        if self.keys is not None:
            return self.keys
        return torch.randint(-(2**31), 2**31, (len(x), 2), device=x.device).int()


def keys_of_images(images):
    """Random bits, int32 (B, 2), from the pixels in steps of 1/64: other ones for each image, in any batch the same."""
    pixels = scramble((images.float() * 64).round().flatten(1).int())
    places = scramble(torch.arange(1, pixels.shape[1] + 1, dtype=torch.int32, device=images.device))
    # Sums of int64 do not overflow, which an exported model would compute differently.
    sums = torch.stack([(pixels * places).long().sum(dim=1), (pixels ^ places).long().sum(dim=1)], dim=1)
    return scramble((sums % (2**31 - 1)).int())


REDUCTION_METHODS = {"facility": facility_clusters, "tome": tome_clusters, "random": random_clusters}
TOKEN_REDUCTIONS = ("none", *REDUCTION_METHODS)
