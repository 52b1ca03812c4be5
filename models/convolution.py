"""Convolutions with weight standardisation, and what the ResNets need around them.

Google's two code bases differ: the hybrid's stem (google-research/vision_transformer) has StdConv2dSame, BiT
(google-research/big_transfer) has StdConv2d. The rule of the standardisation is a field of the model's config.
"""

import torch
import torch.nn.functional as F
from torch import nn


class StdConv2d(nn.Conv2d):
    """Convolution without bias whose kernels are standardised as the config says, with symmetric padding (BiT)."""

    def __init__(self, config, in_channels, out_channels, kernel_size, stride=1):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
        self.standardise, self.eps = STANDARDISATIONS[config.standardisation], config.standardisation_eps

    def reset_parameters(self):
        lecun_normal_(self.weight)

    def forward(self, x):
        return conv2d(x, self.standardise(self.weight, self.eps), self.stride[0], self.padding[0])


class StdConv2dSame(StdConv2d):
    """StdConv2d with TensorFlow's SAME padding (the hybrid's stem)."""

    def forward(self, x):
        x = pad_same(x, self.kernel_size[0], self.stride[0])
        return conv2d(x, self.standardise(self.weight, self.eps), self.stride[0])


def divide_by_std(weight, eps):
    """The kernels of `weight` (O, C, k, k), centred and divided by std + eps, in float32: google-research's hybrids."""
    kernels = weight.flatten(1).float()
    kernels = kernels - kernels.mean(dim=1, keepdim=True)
    std = torch.linalg.vector_norm(kernels, dim=1, keepdim=True) * kernels.shape[1] ** -0.5
    return (kernels / (std + eps)).to(weight.dtype).view_as(weight)


def divide_by_sqrt_var(weight, eps):
    """The same divided by sqrt(variance + eps): BiT, timm and transformers."""
    # BatchNorm over a batch of one computes the same in one kernel, and 16-bit weights in float32.
    return F.batch_norm(weight.flatten(1)[None], None, None, training=True, eps=eps).view_as(weight)


STANDARDISATIONS = {"std": divide_by_std, "var": divide_by_sqrt_var}


def conv2d(x, weight, stride, padding=0):
    """F.conv2d of (B, C, H, W) with (O, C, k, k), on a CPU as one matrix product per image if k is 1.

    Only if an image has more pixels than channels: the gradients of the weights are computed per image and then summed,
    so otherwise they would take more memory than the feature maps. An exported graph has plain convolutions.
    """
    if x.device.type == "cpu" and weight.shape[2:] == (1, 1) and not torch.compiler.is_exporting():
        x, stride = x[:, :, ::stride, ::stride], 1
        if x.shape[2:].numel() > min(weight.shape[:2]):
            return (weight.flatten(1).expand(len(x), -1, -1) @ x.flatten(2)).unflatten(2, x.shape[2:])
    return F.conv2d(x, weight, stride=stride, padding=padding)


def to_fast_layout(x):
    """Feature maps (B, C, H, W) in the memory format that is faster: contiguous on a CPU, channels-last on a GPU.

    On a CPU, the backward pass of a channels-last GroupNorm takes many times as long, and loses a digit in float32.
    """
    return x.contiguous() if x.is_cpu else to_channels_last(x)


def to_channels_last(x):
    """Feature maps (B, C, H, W) in channels-last memory format, but contiguous on Apple's GPUs.

    There channels-last tensors have given wrong gradients (github.com/pytorch/pytorch/issues/175189).
    """
    return x.contiguous(memory_format=torch.contiguous_format if x.device.type == "mps" else torch.channels_last)


def max_pool(x):
    """3x3 max-pooling with stride 2, without padding, in x's memory format; CPUs are fast in channels-last only."""
    pooled = F.max_pool2d(to_channels_last(x), kernel_size=3, stride=2)
    return pooled.contiguous() if x.is_contiguous() else pooled


def pad_same(x, kernel_size, stride):
    """TensorFlow's SAME padding: the output has ceil(size / stride) pixels; an odd pixel is at the bottom and right."""
    height, width = (max(kernel_size - (stride if size % stride == 0 else size % stride), 0) for size in x.shape[-2:])
    if height == width == 0:
        return x
    return F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))


def lecun_normal_(weight):
    """Flax's default initialiser: normal of variance 1 / fan_in, truncated at two standard deviations."""
    fan_in = weight[0].numel()
    std = fan_in**-0.5 / 0.87962566103423978  # the truncated normal's own standard deviation
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
