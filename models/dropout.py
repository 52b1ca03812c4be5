"""Dropout with masks that depend on the sample, not on the batch it is in."""

import torch
import torch.nn.functional as F
from torch import nn


class Dropout(nn.Module):
    """Dropout of (B, ...) activations.

    After `seed_samples`, the mask of a sample depends on its key only. So the same elements are dropped with one
    process and with four, with and without gradient accumulation, and in a resumed run. Without keys it is
    `torch.nn.Dropout`.
    """

    def __init__(self, rate):
        super().__init__()
        self.rate = rate
        self.keys = None

    def seed_samples(self, keys):
        """`keys` are random bits, int32 (B, 2): one row per sample, different ones in each layer."""
        self.keys = keys

    def forward(self, x):
        if not self.training or self.rate == 0.0:
            return x
        if self.keys is None:
            return F.dropout(x, self.rate)
        dropped = dropout_mask(self.keys, x[0].numel(), self.rate).view(x.shape)
        return (x * (1 / (1 - self.rate))).masked_fill(dropped, 0.0)

    def extra_repr(self):
        return f"rate={self.rate}"


class StochasticDepth(Dropout):
    """Drops the whole residual branch (B, ...) of a sample, with the keys of Dropout (Huang et al., 2016)."""

    def forward(self, x):
        if not self.training or self.rate == 0.0:
            return x
        return x * super().forward(x.new_ones(len(x), *[1] * (x.ndim - 1)))


def dropout_mask(keys, count, rate):
    """A bool tensor (B, count), True with probability `rate`, row b from keys[b] = (factor, offset).

    Row b is factor * e + offset modulo 2**32 with scrambled element indices e: two-universal hashing
    (Dietzfelbinger et al., 1997), with two integer operations per element on every device.
    """
    threshold = int(rate * 2**32) - 2**31
    return random_numbers(keys, count) < threshold


def random_order(keys, count):
    """A random permutation of `count` indices for each row of keys: int64 (B, count)."""
    # Scrambled once more: the sums below are in almost the same order for keys that are almost proportional.
    return scramble(random_numbers(keys, count)).argsort(dim=1)


def random_numbers(keys, count):
    """int32 (B, count): see `dropout_mask`. No row has a number twice."""
    elements = scramble(torch.arange(count, dtype=torch.int32, device=keys.device))
    return torch.addcmul(keys[:, 1:], keys[:, :1] | 1, elements)


def scramble(x):
    """A bijection of int32 numbers whose results look random (Wellons' `lowbias32` hash)."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    return x ^ ((x >> 16) & 0xFFFF)
