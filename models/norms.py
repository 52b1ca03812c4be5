"""Normalisation over tokens and feature maps, in float32 whatever the type of the activations."""

import torch.nn.functional as F
from torch import nn


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last dimension, epsilon 1e-6 (Flax's default).

    16-bit activations may meet float32 weights (AMP level O2): the CPU kernel takes the mix as it is.
    """

    def __init__(self, hidden_size):
        super().__init__(hidden_size, eps=1e-6)

    def forward(self, x):
        if x.dtype == self.weight.dtype or x.device.type == "cpu":
            return super().forward(x)
        return super().forward(x.float()).to(x.dtype)


class GroupNorm(nn.GroupNorm):
    """GroupNorm of a feature map (B, C, H, W); every ResNet of Google's checkpoints has 32 groups."""

    def __init__(self, num_channels, eps, num_groups):
        super().__init__(num_groups, num_channels, eps=eps)

    def forward(self, x):
        if x.dtype == self.weight.dtype or x.device.type == "cpu":
            return super().forward(x)
        return F.group_norm(x.float(), self.num_groups, self.weight, self.bias, self.eps).to(x.dtype)


TOKEN_NORMS = {"LN": LayerNorm}


def token_norm(norm_type, hidden_size):
    """The normalisation of a ViT's tokens (B, N, hidden_size) by its short name; ValueError if unknown."""
    if norm_type not in TOKEN_NORMS:
        raise ValueError(f"unknown norm type {norm_type!r}; there is {', '.join(TOKEN_NORMS)}")
    return TOKEN_NORMS[norm_type](hidden_size)
