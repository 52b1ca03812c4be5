"""The ResNet in front of a hybrid ViT (google-research/vision_transformer `models_resnet.py`).

Post-activation bottlenecks with GroupNorm and weight standardisation; all padding is TensorFlow's SAME.
Modules carry the names of the checkpoint's keys.
"""

import torch
import torch.nn.functional as F
from torch import nn

from models.norms import GroupNorm


class ResNetStem(nn.Module):
    """Images (B, 3, H, W) -> features (B, out_channels, H / stride, W / stride)."""

    def __init__(self, config):
        """The first stage keeps the size, each later one halves it; for the fields see models/configs.py."""
        super().__init__()
        self.pools = config.root_stride == 4
        kernel_size, stride = (7, 2) if self.pools else (3, 1)  # small images keep their size
        self.conv_root = StdConv2d(3, config.root_width, kernel_size, stride)
        self.gn_root = GroupNorm(config.root_width, 1e-6, config.num_groups)
        self.stride = config.root_stride
        self.out_channels = config.root_width
        self.stages = len(config.resnet_layers)
        for i, units in enumerate(config.resnet_layers):
            stage = nn.Sequential()
            width = config.root_width * 2**i
            for j in range(units):
                stride = 2 if i > 0 and j == 0 else 1
                stage.add_module(f"unit{j + 1}", Bottleneck(self.out_channels, width, stride, config.num_groups))
                self.stride *= stride
                self.out_channels = 4 * width
            self.add_module(f"block{i + 1}", stage)

    def forward(self, x):
        x = fast_layout(x)
        x = F.relu(self.gn_root(self.conv_root(x)), inplace=True)
        if self.pools:
            # Activations are >= 0, so zeros pad the maximum as TensorFlow's -inf does.
            x = max_pool(pad_same(x, kernel_size=3, stride=2))
        for i in range(self.stages):
            x = getattr(self, f"block{i + 1}")(x)
        return x


class Bottleneck(nn.Module):
    """1x1, 3x3 (strided), 1x1 convolutions to `4 * width` channels, added to the (projected) input, then ReLU."""

    is_block = True

    def __init__(self, in_channels, width, stride, num_groups):
        super().__init__()
        out_channels = 4 * width
        self.conv1 = StdConv2d(in_channels, width, kernel_size=1)
        self.gn1 = GroupNorm(width, 1e-6, num_groups)
        self.conv2 = StdConv2d(width, width, kernel_size=3, stride=stride)
        self.gn2 = GroupNorm(width, 1e-6, num_groups)
        self.conv3 = StdConv2d(width, out_channels, kernel_size=1)
        self.gn3 = GroupNorm(out_channels, 1e-6, num_groups)
        nn.init.zeros_(self.gn3.weight)
        self.projects = stride != 1 or in_channels != out_channels
        if self.projects:
            self.conv_proj = StdConv2d(in_channels, out_channels, kernel_size=1, stride=stride)
            self.gn_proj = GroupNorm(out_channels, 1e-6, num_groups)

    def forward(self, x):
        residual = self.gn_proj(self.conv_proj(x)) if self.projects else x
        x = F.relu(self.gn1(self.conv1(x)), inplace=True)
        x = F.relu(self.gn2(self.conv2(x)), inplace=True)
        return F.relu(residual + self.gn3(self.conv3(x)), inplace=True)


class StdConv2d(nn.Conv2d):
    """Convolution without bias, its kernels standardised by `std + 1e-5`, with SAME padding."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1):
        super().__init__(in_channels, out_channels, kernel_size, stride, bias=False)

    def reset_parameters(self):
        lecun_normal_(self.weight)

    def forward(self, x):
        weight = self.weight.flatten(1).float()
        weight = weight - weight.mean(dim=1, keepdim=True)
        std = torch.linalg.vector_norm(weight, dim=1, keepdim=True) * weight.shape[1] ** -0.5
        weight = (weight / (std + 1e-5)).to(self.weight.dtype).view_as(self.weight)
        x = pad_same(x, self.kernel_size[0], self.stride[0])
        return convolve(x, weight, self.stride[0])


def convolve(x, weight, stride, padding=0):
    """F.conv2d of (B, C, H, W) by (O, C, k, k), on a CPU as a matrix product for each image where k is 1.

    Only where an image has more pixels than channels: then the weights' gradients, formed for each image before they
    are summed, are smaller than its feature maps.
    """
    if x.device.type == "cpu" and weight.shape[2:] == (1, 1):
        x, stride = x[:, :, ::stride, ::stride], 1
        if x[0, 0].numel() > min(weight.shape[:2]):
            return (weight.flatten(1).expand(len(x), -1, -1) @ x.flatten(2)).unflatten(2, x.shape[2:])
    return F.conv2d(x, weight, stride=stride, padding=padding)


def fast_layout(x):
    """Maps (B, C, H, W) contiguous on a CPU, channels-last elsewhere, as GPUs like them best.

    A CPU's channels-last GroupNorm takes many times as long backwards, and loses a digit in float32.
    """
    return x.contiguous(memory_format=torch.contiguous_format if x.is_cpu else torch.channels_last)


def max_pool(x):
    """3x3 maxima at stride 2 without padding, in x's memory format; a CPU is fast in channels-last only."""
    pooled = F.max_pool2d(x.contiguous(memory_format=torch.channels_last), kernel_size=3, stride=2)
    return pooled.contiguous() if x.is_contiguous() else pooled


def pad_same(x, kernel_size, stride):
    """TensorFlow's SAME: the output has ceil(size / stride) pixels; the odd pixel goes to the bottom and right."""
    height, width = (max(kernel_size - (stride if size % stride == 0 else size % stride), 0) for size in x.shape[-2:])
    if height == width == 0:
        return x
    return F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))


def lecun_normal_(weight):
    """Flax's default initialiser: normal of variance 1 / fan_in, truncated at two standard deviations."""
    fan_in = weight[0].numel()
    std = fan_in**-0.5 / 0.87962566103423978  # the truncated normal's own standard deviation
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
