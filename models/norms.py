"""Normalisation of feature maps and of tokens, and its replacement, in float32 for activations of any type.

The four norm types of a ViT (tokens x are (B, N, C)):

LN       LayerNorm over C; epsilon 1e-6 (Flax's default) unless the model's config has another
BN       batch normalisation over B and N for each channel, over the batches of all processes together
GN       GroupNorm over N and C in 4 groups
Rescale  no normalisation (Shao et al., 2020): a learnable bias b before each residual branch F, and for the k-th
         branch, counted from 1, x <- sqrt(k / (k + 1)) * x + sqrt(1 / (k + 1)) * m * F(x + b) with a learnable m that
         starts at 1. Branches of variance 1 preserve the variance of x at any depth; with a plain sum it grows with k.

A new norm type is a class with the attributes of TokenNorm and a line in TOKEN_NORMS. Checkpoints and mixed precision
read these attributes, and a missing one is an error.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from models.probing import load_kernel


class TokenNorm:
    """What the class of a norm type declares; `__init__` takes the hidden size, `forward` tokens (B, N, C)."""

    block_key: str
    """Name in the blocks of a checkpoint: "LayerNorm" in `Transformer/encoderblock_0/LayerNorm_0/scale`."""
    final_key: str | None
    """Name after the last block: "encoder_norm" in `Transformer/encoder_norm/scale`. None: no final norm."""
    array_names: dict[str, str]
    """Its parameters and persistent buffers -> their names in a checkpoint: {"weight": "scale"}."""
    stays_float32: bool
    """Whether its parameters stay in float32 at AMP level O2."""
    per_token: bool
    """Whether each token is normalised alone, so that the final norm can be applied to the class token only."""
    residual: type
    """The class of a block's residual connections; `__init__` takes their number k, `array_names` as above."""


class Residual(nn.Module):
    """x + branch"""

    array_names = {}

    def __init__(self, k):
        super().__init__()

    def forward(self, x, branch):
        return x + branch


class RescaledResidual(nn.Module):
    """The k-th residual connection of Rescale, counted from 1; `weight` is its learnable m."""

    array_names = {"weight": "multiplier"}

    def __init__(self, k):
        super().__init__()
        self.identity_scale, self.branch_scale = math.sqrt(k / (k + 1)), math.sqrt(1 / (k + 1))
        # Also as a tensor: with Python numbers, a block would be compiled again for each k.
        self.register_buffer("scales", torch.tensor([self.identity_scale, self.branch_scale]), persistent=False)
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x, branch):
        if torch.compiler.is_compiling():  # one fused pass that sums in float32
            identity_scale, branch_scale = self.scales.unbind()
            return (identity_scale * x.float() + branch_scale * self.weight.float() * branch.float()).to(x.dtype)
        # The change of x is computed first: rounding a scaled x to 16 bits would let the variance grow with the depth.
        branch = (self.branch_scale * self.weight).to(x.dtype) * branch
        return x + torch.sub(branch, x, alpha=1 - self.identity_scale)


class LayerNorm(TokenNorm, nn.LayerNorm):
    """LayerNorm over the last dimension, epsilon 1e-6 unless `token_norm` sets another.

    At AMP level O2 the activations are 16-bit and the weights float32, which the CPU kernel accepts.
    """

    block_key, final_key = "LayerNorm", "encoder_norm"
    array_names = {"weight": "scale", "bias": "bias"}
    stays_float32 = True
    per_token = True
    residual = Residual

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

    def forward(self, x, relu=False):
        """The normalised map, with `relu` the ReLU of it."""
        if (kernel := kernel_for(x)) and x.is_contiguous(memory_format=torch.channels_last):
            rows = x.permute(0, 2, 3, 1).flatten(1, 2)
            y = kernel(rows, self.weight, self.bias, self.num_groups, self.eps, relu)
            return y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        if x.dtype == self.weight.dtype or x.device.type == "cpu":
            y = super().forward(x)
        else:
            y = F.group_norm(x.float(), self.num_groups, self.weight, self.bias, self.eps).to(x.dtype)
        return F.relu(y, inplace=True) if relu else y


def kernel_for(x):
    """The function `apply` of models/group_norm_kernel.py if it is to normalise x, else None."""
    if x.is_cuda and x.dtype != torch.float64 and not torch.compiler.is_compiling():
        return load_kernel("group_norm_kernel", x.device)
    return None


class TokenBatchNorm(TokenNorm, nn.BatchNorm1d):
    """Batch normalisation of tokens (B, N, C) over B and N, in training over the batches of all processes together.

    Evaluation uses the running statistics (momentum 0.1). Channels stay last in memory.
    """

    block_key, final_key = "BatchNorm", "encoder_batch_norm"
    array_names = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    stays_float32 = True
    per_token = False
    residual = Residual

    def __init__(self, hidden_size):
        super().__init__(hidden_size)
        self.num_batches_tracked = None  # used only by a cumulative average

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *others):
        """Set a version: without one, as in a file, BatchNorm1d would expect num_batches_tracked."""
        super()._load_from_state_dict(state_dict, prefix, {**local_metadata, "version": 2}, *others)

    def forward(self, x):
        weight, bias = self.weight.float(), self.bias.float()
        if self.training and dist.is_initialized() and dist.get_world_size() > 1:
            return self.over_all_processes(x, weight, bias)
        rows = x.reshape(-1, x.shape[-1])
        running = (self.running_mean, self.running_var)
        return F.batch_norm(rows, *running, weight, bias, self.training, self.momentum, self.eps).view_as(x)

    def over_all_processes(self, x, weight, bias):
        """All processes have batches of the same size, so their means and variances can be averaged."""
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
    """The sum of a tensor over all processes; the gradient is summed over them as well."""

    @staticmethod
    def forward(context, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(context, gradient):
        return SumOverProcesses.forward(context, gradient)


class TokenGroupNorm(TokenNorm, nn.GroupNorm):
    """GroupNorm of tokens (B, N, C) over N and C in 4 groups, epsilon 1e-6. Channels stay last in memory."""

    block_key, final_key = "GroupNorm", "encoder_group_norm"
    array_names = {"weight": "scale", "bias": "bias"}
    stays_float32 = True
    per_token = False
    residual = Residual

    def __init__(self, hidden_size):
        super().__init__(4, hidden_size, eps=1e-6)

    def forward(self, x):
        if x.device.type == "cpu":
            channels_last = x.transpose(1, 2).unsqueeze(2)  # (B, C, 1, N) without a copy
            return super().forward(channels_last).squeeze(2).transpose(1, 2)
        if (kernel := kernel_for(x)) and x.is_contiguous():
            return kernel(x, self.weight, self.bias, self.num_groups, self.eps, False)
        return self.over_groups(x)

    def over_groups(self, x):
        """By operators of which none moves the channels first in memory, and which torch.compile fuses."""
        groups = x.unflatten(-1, (self.num_groups, -1))  # (B, N, groups, C / groups)
        variance, mean = torch.var_mean(groups.float(), dim=(1, 3), correction=0, keepdim=True)
        scale = self.weight.float().view(self.num_groups, -1) * (variance + self.eps).rsqrt()  # (B, 1, groups, ...)
        shift = self.bias.float().view(self.num_groups, -1) - mean * scale
        return torch.addcmul(shift, groups, scale).flatten(2).to(x.dtype)


class Bias(TokenNorm, nn.Module):
    """Rescale's replacement of a norm before a branch: x + b; b is learnable and starts at 0."""

    block_key, final_key = "Rescale", None
    array_names = {"bias": "bias"}
    stays_float32 = False
    per_token = True
    residual = RescaledResidual

    def __init__(self, hidden_size):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x):
        return x + self.bias.to(x.dtype)


class NoNorm(nn.Identity):
    """After the last block of a model that has no norm there."""

    final_key = None
    array_names = {}
    per_token = True


TOKEN_NORMS = {"LN": LayerNorm, "BN": TokenBatchNorm, "GN": TokenGroupNorm, "Rescale": Bias}


def norm_class(norm_type):
    """The class of a norm type. Raises ValueError if it is unknown, or if the class does not declare all it must."""
    if norm_type not in TOKEN_NORMS:
        raise ValueError(f"unknown norm type {norm_type!r}; there is {', '.join(TOKEN_NORMS)}")
    norm = TOKEN_NORMS[norm_type]
    missing = [name for name in TokenNorm.__annotations__ if not hasattr(norm, name)]
    if missing:
        raise ValueError(f"norm type {norm_type!r}: {norm.__name__} does not declare {', '.join(missing)}")
    for other_type, other in TOKEN_NORMS.items():
        for name in ("block_key", "final_key"):
            key = getattr(norm, name)
            if other is not norm and key is not None and key == getattr(other, name, None):
                raise ValueError(f"norm types {norm_type!r} and {other_type!r} have the same {name} {key!r}")
    return norm


def token_norm(norm_type, hidden_size, layer_norm_eps=1e-6):
    """The norm before a residual branch, by its short name. Raises ValueError as `norm_class`."""
    norm = with_array_names(norm_type, norm_class(norm_type)(hidden_size))
    if norm_type == "LN":
        norm.eps = layer_norm_eps
    for module in norm.modules():  # a norm may be made of several modules
        module.stays_float32 = norm.stays_float32
    return norm


def final_norm(norm_type, hidden_size, layer_norm_eps=1e-6):
    """The norm after the last block; NoNorm if the norm type has none there."""
    return NoNorm() if norm_class(norm_type).final_key is None else token_norm(norm_type, hidden_size, layer_norm_eps)


def residual(norm_type, k):
    """The k-th residual connection of a model, counted from 1."""
    return with_array_names(norm_type, norm_class(norm_type).residual(k))


def with_array_names(norm_type, module):
    """`module` itself. Raises ValueError unless its `array_names` name all its parameters and persistent buffers."""
    found, declared = set(module.state_dict()), set(module.array_names)
    if found != declared:
        name = min(found ^ declared)
        problem = "does not name its" if name in found else "names a missing"
        raise ValueError(f"norm type {norm_type!r}: {type(module).__name__}.array_names {problem} {name!r}")
    return module


def norm_type_of(keys):
    """The norm type of the blocks in a checkpoint with these keys; None if there is none."""
    modules = {key.split("/")[2].rpartition("_")[0] for key in keys if key.startswith("Transformer/encoderblock_")}
    return next((name for name in TOKEN_NORMS if norm_class(name).block_key in modules), None)


def is_token_norm(key):
    """Whether a checkpoint's key belongs to any of TOKEN_NORMS, in a block or after the last one."""
    match key.split("/"):
        case ["Transformer", block, module, *_] if block.startswith("encoderblock_"):
            return module.rpartition("_")[0] in {norm_class(norm_type).block_key for norm_type in TOKEN_NORMS}
    return is_final_norm(key)


def is_final_norm(key):
    """Whether a checkpoint's key belongs to any of TOKEN_NORMS after the last block."""
    match key.split("/"):
        case ["Transformer", module, _, *_]:
            return module in {norm_class(norm_type).final_key for norm_type in TOKEN_NORMS}
    return False
