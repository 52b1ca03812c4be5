"""Dropout whose masks depend on the sample, not on the batch that it happens to share."""

import torch
import torch.nn.functional as F
from torch import nn


class Dropout(nn.Module):
    """Dropout of (B, ...) activations.

    After `seed_samples` the mask of sample b is a function of its key alone, so one process and four,
    an undivided batch and its accumulated parts, a run and its resumption all drop the same elements.
    Without keys it is `torch.nn.Dropout`.
    """

    def __init__(self, rate):
        super().__init__()
        self.rate = rate
        self.keys = None

    def seed_samples(self, keys):
        """`keys` are random words, int32 (B, 2), one row a sample, other ones in every layer."""
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
    """Drops all of a sample's residual branch (B, ...), by the rule of Dropout (Huang et al., 2016)."""

    def forward(self, x):
        if not self.training or self.rate == 0.0:
            return x
        return x * super().forward(x.new_ones(len(x), *[1] * (x.ndim - 1)))


def dropout_mask(keys, count, rate):
    """A bool tensor (B, count), True with probability `rate`, row b from keys[b] = (factor, offset).

    Row b is factor * e + offset modulo 2**32 over scrambled element numbers e: two-universal hashing
    (Dietzfelbinger et al., 1997), at two integer operations an element on every device.
    """
    elements = scramble(torch.arange(count, dtype=torch.int32, device=keys.device))
    factor, offset = keys[:, :1] | 1, keys[:, 1:]
    threshold = int(rate * 2**32) - 2**31
    return torch.addcmul(offset, factor, elements) < threshold


def scramble(x):
    """A bijection of int32 words that looks random (Wellons' `lowbias32` hash)."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    return x ^ ((x >> 16) & 0xFFFF)
