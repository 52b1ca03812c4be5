"""The ResNet stem of a hybrid ViT (google-research/vision_transformer `models_resnet.py`).

Post-activation bottlenecks with GroupNorm and weight standardisation; all padding is TensorFlow's SAME.
The modules have the names of the checkpoint's keys.
"""

import torch.nn.functional as F
from torch import nn

from models.convolution import StdConv2dSame, max_pool, pad_same, to_fast_layout
from models.norms import GroupNorm


class ResNetStem(nn.Module):
    """Images (B, 3, H, W) -> features (B, out_channels, H / stride, W / stride)."""

    def __init__(self, config):
        """The first stage keeps the image size, each later one halves it; models/configs.py describes the fields."""
        super().__init__()
        self.has_max_pool = config.root_stride == 4
        kernel_size, stride = (7, 2) if self.has_max_pool else (3, 1)  # the stem of small images keeps their size
        self.conv_root = StdConv2dSame(config, 3, config.root_width, kernel_size, stride)
        self.gn_root = GroupNorm(config.root_width, config.group_norm_eps, config.num_groups)
        self.stride = config.root_stride
        self.out_channels = config.root_width
        self.num_stages = len(config.resnet_layers)
        for i, units in enumerate(config.resnet_layers):
            stage = nn.Sequential()
            width = config.root_width * 2**i
            for j in range(units):
                stride = 2 if i > 0 and j == 0 else 1
                stage.add_module(f"unit{j + 1}", PostActBottleneck(config, self.out_channels, width, stride))
                self.stride *= stride
                self.out_channels = 4 * width
            self.add_module(f"block{i + 1}", stage)

    def forward(self, x):
        x = to_fast_layout(x)
        x = self.gn_root(self.conv_root(x), relu=True)
        if self.has_max_pool:
            # Activations are >= 0, so padding with zeros gives the same maxima as TensorFlow's -inf.
            x = max_pool(pad_same(x, kernel_size=3, stride=2))
        for i in range(self.num_stages):
            x = getattr(self, f"block{i + 1}")(x)
        return x


class PostActBottleneck(nn.Module):
    """1x1, 3x3 (strided), 1x1 convolutions to `4 * width` channels, added to the (projected) input, then ReLU."""

    is_block = True

    def __init__(self, config, in_channels, width, stride):
        super().__init__()
        norm = {"eps": config.group_norm_eps, "num_groups": config.num_groups}
        out_channels = 4 * width
        self.conv1 = StdConv2dSame(config, in_channels, width, kernel_size=1)
        self.gn1 = GroupNorm(width, **norm)
        self.conv2 = StdConv2dSame(config, width, width, kernel_size=3, stride=stride)
        self.gn2 = GroupNorm(width, **norm)
        self.conv3 = StdConv2dSame(config, width, out_channels, kernel_size=1)
        self.gn3 = GroupNorm(out_channels, **norm)
        nn.init.zeros_(self.gn3.weight)
        self.has_projection = stride != 1 or in_channels != out_channels
        if self.has_projection:
            self.conv_proj = StdConv2dSame(config, in_channels, out_channels, kernel_size=1, stride=stride)
            self.gn_proj = GroupNorm(out_channels, **norm)

    def forward(self, x):
        residual = self.gn_proj(self.conv_proj(x)) if self.has_projection else x
        x = self.gn1(self.conv1(x), relu=True)
        x = self.gn2(self.conv2(x), relu=True)
        return F.relu(residual + self.gn3(self.conv3(x)), inplace=True)
