"""BiT's ResNetV2 (Kolesnikov et al., 2020), exact to google-research/big_transfer, and the two CNNs cut from it.

Pre-activation bottlenecks with GroupNorm and weight standardisation; all padding is symmetric.

Two CNNs are compared with the hybrid R50-ViT-B_16. Both consist of the first units of R50x3:

- ResNet50x3_Params has as many parameters as the hybrid: the root, all of blocks 1 to 3, and instead of block 4 (6144
  channels) one unit that halves the size again and keeps the 3072 channels.
- ResNet50x3_Flops has as many FLOPs as the hybrid: the root, all of blocks 1 and 2, and the first two units of block 3.

The state dict has timm's names, so timm can load a BiT's state dict.
"""

import torch
import torch.nn.functional as F
from torch import nn

from models import npz
from models.configs import resnet
from models.convolution import StdConv2d, to_channels_last, to_fast_layout
from models.formats import arrays_of
from models.norms import GroupNorm


class BiTResNet(nn.Module):
    """Images (B, 3, H, W) of any size -> logits (B, num_classes)."""

    def __init__(self, config, num_classes=10):
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.stem = Root(config)
        self.stages = nn.ModuleList()
        channels = config.root_width
        for i, (units, width) in enumerate(zip(config.resnet_layers, config.stage_widths, strict=True)):
            stage = nn.Module()
            stage.blocks = nn.Sequential()
            for j in range(units):
                stride = 2 if i > 0 and j == 0 else 1
                stage.blocks.append(PreActBottleneck(config, channels, width, stride))
                channels = width
            self.stages.append(stage)
        self.norm = GroupNorm(channels, config.group_norm_eps, config.num_groups)
        self.head = Head(channels, num_classes)

    def forward(self, images):
        x = to_fast_layout(self.stem(to_channels_last(images)))  # the stem has no GroupNorm
        for stage in self.stages:
            x = stage.blocks(x)
        return self.head(self.norm(x, relu=True))

    def load_from(self, arrays, head="zero"):
        """Load Google's checkpoint, a mapping from key to array, e.g. `np.load("BiT-M-R50x1.npz")`.

        `head` and the errors are those of VisionTransformer.load_from. A model that was cut from a larger one
        loads what it shares with the larger one's checkpoint. Returns npz.Loaded, which reports what it does not share.
        """
        return npz.load(self, npz.resnet_rows(self), arrays, head, source_shapes=self.source_shapes())

    def load_checkpoint(self, checkpoint, head="zero"):
        """Load a checkpoint of another library or of a run (models/formats); arguments and errors as in `load_from`."""
        sources = {"resnet": lambda config, img_size, num_classes: BiTResNet(config, num_classes)}
        return self.load_from(arrays_of(checkpoint, sources), head)

    def export_npz(self):
        """The weights under Google's keys, {key: float32 array}; `load_from(arrays, head="keep")` restores them."""
        return npz.export(self, npz.resnet_rows(self))

    def source_shapes(self):
        """{key: shape} in the checkpoint of the ResNet that this one was cut from; empty if it was not cut."""
        config = self.config
        if config.cut_from is None:
            return {}
        full_config = resnet(
            config.cut_from, config.root_width, root_stride=config.root_stride, num_groups=config.num_groups
        )
        with torch.device("meta"):
            return {row.key: tuple(row.view.shape) for row in npz.resnet_rows(BiTResNet(full_config))}


class Root(nn.Module):
    """Images -> features (B, root_width, H / root_stride, W / root_stride)."""

    def __init__(self, config):
        super().__init__()
        self.has_max_pool = config.root_stride == 4
        kernel_size, stride = (7, 2) if self.has_max_pool else (3, 1)  # the root of small images keeps their size
        self.conv = StdConv2d(config, 3, config.root_width, kernel_size, stride)

    def forward(self, x):
        x = self.conv(x)
        if self.has_max_pool:
            x = F.max_pool2d(
                F.pad(x, (1, 1, 1, 1)), kernel_size=3, stride=2
            )  # BiT pads with zeros, although x may be negative
        return x


class PreActBottleneck(nn.Module):
    """1x1, 3x3 (strided), 1x1 convolutions, each after GroupNorm and ReLU, added to the (projected) input."""

    is_block = True

    def __init__(self, config, in_channels, out_channels, stride):
        super().__init__()
        norm = {"eps": config.group_norm_eps, "num_groups": config.num_groups}
        width = out_channels // 4
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential()
            self.downsample.add_module("conv", StdConv2d(config, in_channels, out_channels, 1, stride))
        self.norm1 = GroupNorm(in_channels, **norm)
        self.conv1 = StdConv2d(config, in_channels, width, 1)
        self.norm2 = GroupNorm(width, **norm)
        self.conv2 = StdConv2d(config, width, width, 3, stride)
        self.norm3 = GroupNorm(width, **norm)
        self.conv3 = StdConv2d(config, width, out_channels, 1)

    def forward(self, x):
        activated = self.norm1(x, relu=True)
        residual = self.downsample(activated) if self.downsample else x
        x = self.conv1(activated)
        x = self.conv2(self.norm2(x, relu=True))
        return residual + self.conv3(self.norm3(x, relu=True))


class Head(nn.Module):
    """Features (B, C, H, W) -> their mean over the image -> logits (B, num_classes)."""

    def __init__(self, channels, num_classes):
        super().__init__()
        self.fc = nn.Conv2d(channels, num_classes, kernel_size=1)
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x):
        return self.fc(x.mean(dim=(2, 3), keepdim=True)).flatten(1)
