"""Normalisation over feature maps and over tokens, and what stands in its place, in float32 whatever the activations.

The four norm types of a ViT (tokens x are (B, N, C)):

LN       LayerNorm over C, epsilon 1e-6 (Flax's default)
BN       batch normalisation over B and N for each channel, over the batches of all processes together
GN       GroupNorm over N and C in 4 groups
Rescale  no normalisation (Shao et al., 2020): a learnable bias b before each residual branch F, and for the k-th
         branch, counted from 1, x <- sqrt(k / (k + 1)) * x + sqrt(1 / (k + 1)) * m * F(x + b) with a learnable m that
         starts at 1. Branches of variance 1 keep the variance of x as it is, at any depth; a plain sum grows with k.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last dimension, epsilon 1e-6.

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


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch normalisation of tokens (B, N, C) over B and N, in training over the batches of all processes together.

    Evaluation uses the running statistics (momentum 0.1). No memory is moved: channels stay last.
    """

    def __init__(self, hidden_size):
        super().__init__(hidden_size)
        self.num_batches_tracked = None  # only a changing momentum needs it

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *others):
        """BatchNorm1d would add num_batches_tracked to a state dict of no version, as one from a file is."""
        super()._load_from_state_dict(state_dict, prefix, {**local_metadata, "version": 2}, *others)

    def forward(self, x):
        weight, bias = self.weight.float(), self.bias.float()
        if self.training and dist.is_initialized() and dist.get_world_size() > 1:
            return self.over_processes(x, weight, bias)
        rows = x.reshape(-1, x.shape[-1])
        running = (self.running_mean, self.running_var)
        return F.batch_norm(rows, *running, weight, bias, self.training, self.momentum, self.eps).view_as(x)

    def over_processes(self, x, weight, bias):
        """The processes' batches are of one size, so their means and variances may be averaged."""
        size = dist.get_world_size()
        mean = SumOverProcesses.apply(x.float().mean(dim=(0, 1))) / size
        centred = x.float() - mean
        variance = SumOverProcesses.apply(centred.square().mean(dim=(0, 1))) / size
        with torch.no_grad():
            count = size * x[..., 0].numel()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        return torch.addcmul(bias, centred, weight * (variance + self.eps).rsqrt()).to(x.dtype)


class SumOverProcesses(torch.autograd.Function):
    """The sum of all processes' tensors; each of them hands its gradient to all."""

    @staticmethod
    def forward(context, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(context, gradient):
        return SumOverProcesses.forward(context, gradient)


class TokenGroupNorm(nn.GroupNorm):
    """GroupNorm of tokens (B, N, C) over N and C in 4 groups, epsilon 1e-6. No memory is moved: channels stay last."""

    def __init__(self, hidden_size):
        super().__init__(4, hidden_size, eps=1e-6)

    def forward(self, x):
        if x.device.type == "cpu":
            channels_last = x.transpose(1, 2).unsqueeze(2)  # (B, C, 1, N) without a copy
            return super().forward(channels_last).squeeze(2).transpose(1, 2)
        return self.over_groups(x)

    def over_groups(self, x):
        """For GPUs, whose own kernel would put the channels first."""
        groups = x.unflatten(-1, (self.num_groups, -1))  # (B, N, groups, C / groups)
        variance, mean = torch.var_mean(groups.float(), dim=(1, 3), correction=0, keepdim=True)
        scale = self.weight.float().view(self.num_groups, -1) * (variance + self.eps).rsqrt()  # (B, 1, groups, ...)
        shift = self.bias.float().view(self.num_groups, -1) - mean * scale
        return torch.addcmul(shift, groups, scale).flatten(2).to(x.dtype)


class Bias(nn.Module):
    """What stands before a branch of Rescale in a norm's place: x + b, with b learnable, at first 0."""

    def __init__(self, hidden_size):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x):
        return x + self.bias.to(x.dtype)


class Residual(nn.Module):
    """x + branch"""

    def forward(self, x, branch):
        return x + branch


class RescaledResidual(nn.Module):
    """The k-th residual connection of Rescale, counted from 1; `weight` is its learnable m."""

    def __init__(self, k):
        super().__init__()
        self.identity_scale, self.branch_scale = math.sqrt(k / (k + 1)), math.sqrt(1 / (k + 1))
        # The same as a tensor: by numbers of its own, each k would be compiled anew.
        self.register_buffer("scales", torch.tensor([self.identity_scale, self.branch_scale]), persistent=False)
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x, branch):
        if torch.compiler.is_compiling():  # in one pass, whose sums are float32
            identity_scale, branch_scale = self.scales.unbind()
            return (identity_scale * x.float() + branch_scale * self.weight.float() * branch.float()).to(x.dtype)
        # What changes is summed first: a scaled x rounded to 16 bits would let the variance grow with the depth.
        branch = (self.branch_scale * self.weight).to(x.dtype) * branch
        return x + torch.sub(branch, x, alpha=1 - self.identity_scale)


TOKEN_NORMS = {"LN": LayerNorm, "BN": TokenBatchNorm, "GN": TokenGroupNorm, "Rescale": Bias}


def token_norm(norm_type, hidden_size):
    """What stands before a residual branch by its short name; ValueError if unknown."""
    if norm_type not in TOKEN_NORMS:
        raise ValueError(f"unknown norm type {norm_type!r}; there is {', '.join(TOKEN_NORMS)}")
    return TOKEN_NORMS[norm_type](hidden_size)


def final_norm(norm_type, hidden_size):
    """The same behind the last block: Rescale has nothing there."""
    return nn.Identity() if norm_type == "Rescale" else token_norm(norm_type, hidden_size)


def residual(norm_type, k):
    """The k-th residual connection of a model, counted from 1."""
    return RescaledResidual(k) if norm_type == "Rescale" else Residual()
