"""The embedding of patches: of the image, or of the feature map of a hybrid's ResNet stem."""

from torch import nn

from models.convolution import lecun_normal_
from models.hybrid_stem import ResNetStem
from models.linear import linear


class PatchEmbed(nn.Module):
    """Images (B, 3, H, W) -> embedded patches (B, N, hidden), row by row."""

    def __init__(self, config, img_size):
        super().__init__()
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.stem = None if config.resnet_layers is None else ResNetStem(config)
        self.patch_size = config.patch_size
        stride = self.patch_size * (self.stem.stride if self.stem else 1)
        if any(size < stride or size % stride for size in self.img_size):
            raise ValueError(f"image size {img_size} is not a multiple of the model's patch size {stride}")
        self.grid_size = tuple(size // stride for size in self.img_size)
        in_channels = self.stem.out_channels if self.stem else 3
        self.proj = nn.Conv2d(in_channels, config.hidden_size, self.patch_size, stride=self.patch_size)
        lecun_normal_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, images):
        if images.shape[-2:] != self.img_size:
            raise ValueError(f"images are {tuple(images.shape[-2:])}, the model was built for {self.img_size}")
        x = self.stem(images) if self.stem else images
        return linear(split_into_patches(x, self.patch_size), self.proj.weight.flatten(1), self.proj.bias)


def split_into_patches(x, size):
    """(B, C, H, W) -> (B, N, C * size * size), row by row, each patch ordered as a convolution's kernel.

    Patches do not overlap, so one matrix product embeds them; cuDNN's convolution takes eight times as long.
    """
    x = x.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # (B, C, rows, size, columns, size)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
