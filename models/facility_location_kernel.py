"""The rounds of facility location in one Triton kernel: one program per image, without any value written in between."""

import torch
import triton
import triton.language as tl

TILE = 8192  # similarities that a program reads at a time, which its registers must hold in float64
WARPS = 8


def apply(s, k):
    """As models.facility_location.facility_location, with sums in float64; s (B, N, N) of any floating-point type."""
    batch, tokens, _ = s.shape
    picks = torch.empty(batch, k, dtype=torch.long, device=s.device)
    with torch.cuda.device_of(s):
        pick_greedily[(batch,)](s.contiguous(), picks, tokens, k, **tile_sizes(tokens, k), num_warps=WARPS)
    return picks


def trial(device):
    """Raises an exception if the kernel does not work on the device."""
    s = torch.tensor([[4.0, 3, 0], [3, 4, 2], [0, 2, 4]], device=device)
    if apply(s[None], 3).tolist() != [[1, 2, 0]]:
        raise ArithmeticError("it does not choose the right tokens")


def tile_sizes(tokens, k):
    """The sizes of a program's blocks, which Triton wants to be powers of two."""
    columns, ranks = triton.next_power_of_2(tokens), triton.next_power_of_2(k)
    return {"columns": columns, "ranks": ranks, "rows": max(1, min(columns, TILE // columns))}


@triton.jit
def pick_greedily(s, picks, tokens, k, columns: tl.constexpr, ranks: tl.constexpr, rows: tl.constexpr):
    """Write the k picks of one image. s and picks are pointers to the first of all images."""
    image = tl.program_id(0).to(tl.int64)  # a batch may have more than 2**31 similarities
    s += image * tokens * tokens
    column, rank = tl.arange(0, columns), tl.arange(0, ranks)
    best = tl.zeros([columns], tl.float64)  # how well the picks so far represent each token
    picked = tl.full([ranks], -1, tl.int32)
    for n in range(k):
        highest, pick = tl.full([], -1.0, tl.float64), tl.full([], 0, tl.int32)
        for first in range(0, tokens, rows):
            row = first + tl.arange(0, rows)
            inside = (row < tokens)[:, None] & (column < tokens)[None, :]
            tile = tl.load(s + row[:, None] * tokens + column[None, :], mask=inside, other=0.0)
            values = tl.sum(tl.maximum(tile.to(tl.float64), best[None, :]), axis=1)
            is_picked = tl.max((row[:, None] == picked[None, :]).to(tl.int32), axis=1)
            values = tl.where((is_picked == 0) & (row < tokens), values, -1.0)
            value, place = tl.max(values, axis=0, return_indices=True)  # of equal ones the first
            pick = tl.where(value > highest, first + place, pick)
            highest = tl.maximum(highest, value)
        picked = tl.where(rank == n, pick, picked)
        row_of_pick = tl.load(s + pick * tokens + column, mask=column < tokens, other=0.0)
        best = tl.maximum(best, row_of_pick.to(tl.float64))
    tl.store(picks + image * k + rank, picked.to(tl.int64), mask=rank < k)
