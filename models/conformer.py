"""Conformer: a ViT processes the whole image, its tokens are merged into a few, and a CNN processes these.

The ViT's blocks before the token reduction are those of models/vision_transformer.py, so any ViT's checkpoint provides
their weights. k = g x g of the patches are kept, each other patch is merged into one of them
(models/token_reduction.py), and the k merged tokens form a g x g grid. BiT's pre-activation bottlenecks process the
grid as a feature map, and the head reads the map's mean, as in BiT. The class token takes part in the ViT's attention,
because checkpoints were trained with it, and is dropped after the last block.

The grid is formed as follows. The kept patches are sorted by their row in the image, then by column. The first g of
them are the grid's first row, the next g its second row, and so on. Each row is then sorted by column. A 3x3
convolution treats neighbouring cells as close to each other: with this order, a token that is above another one in the
grid is never below it in the image, and a token that is left of another one in its row is never to its right. Every
cell holds exactly one token for any choice of patches. A grid of fixed image positions would have to merge tokens again
or leave cells empty. If all patches are kept, their order does not change. The grid contains no other information about
the positions, but the tokens still contain their position embeddings.
"""

import math

import torch
from torch import nn

from models import npz
from models.bit_resnet import Head, PreActBottleneck
from models.convolution import to_fast_layout
from models.norms import GroupNorm, NoNorm
from models.token_reduction import check_layer, make_reduction, patches_to_keep
from models.vision_transformer import VisionTransformer


class Conformer(VisionTransformer):
    """Images (B, 3, H, W) -> logits (B, num_classes), read from the mean of the CNN's features."""

    reads_class_token = False

    def __init__(
        self,
        config,
        img_size=224,
        num_classes=10,
        norm_type="LN",
        token_reduction="facility",
        keep_tokens=None,
        reduction_layer=None,
        tome_r=None,
    ):
        """`keep_tokens`, a square number, and `reduction_layer`, a number of blocks, are the config's if None.

        A share of the patches is rounded to the nearest square. `token_reduction="none"` keeps all patches.
        """
        super().__init__(config, img_size, num_classes, norm_type)
        if tome_r is not None:
            raise ValueError(f"tome_r {tome_r} is for ViTs; a Conformer keeps a square number of patches, keep_tokens")
        layer = config.reduction_layer if reduction_layer is None else reduction_layer
        num_patches = math.prod(self.patch_embed.grid_size)
        self.grid_size = self.patch_embed.grid_size
        if token_reduction == "none":
            check_layer(layer, config.num_layers)
            make_reduction(
                "none", keep_tokens, None, num_patches, config.num_layers
            )  # raises ValueError for keep_tokens
        else:
            side = grid_side(config.keep_tokens if keep_tokens is None else keep_tokens, num_patches)
            self.set_reduction(make_reduction(token_reduction, side**2, layer, num_patches, config.num_layers))
        if self.reduction:
            self.grid_size = (side, side)
        self.blocks = self.blocks[:layer]
        self.norm = NoNorm()  # the first bottleneck begins with a norm
        self.cnn = nn.Sequential()
        channels = config.hidden_size
        for _ in range(config.cnn_units):
            self.cnn.append(PreActBottleneck(config, channels, config.cnn_width, 1))
            channels = config.cnn_width
        self.cnn_norm = GroupNorm(channels, config.group_norm_eps, config.num_groups)
        self.head = Head(channels, num_classes)

    def classify(self, x, clusters=()):
        x = self.to_grid(x[:, 1:], clusters)  # (B, hidden, g, g)
        return self.head(self.cnn_norm(self.cnn(x), relu=True))

    def compile(self, **options):
        """As VisionTransformer.compile; the CNN is compiled as a whole."""
        super().compile(**options)
        self.cnn.compile(**options)

    def to_grid(self, x, clusters):
        """The kept patches (B, g * g, hidden), in their order in the image -> (B, hidden, g, g)."""
        if clusters:
            columns = (clusters[-1].kept[:, 1:] - 1) % self.patch_embed.grid_size[1]
            within_row = columns.unflatten(1, self.grid_size).argsort(dim=2, stable=True)  # (B, g, g)
            row_starts = torch.arange(0, x.shape[1], self.grid_size[1], device=x.device)
            order = (within_row + row_starts[:, None]).flatten(1)
            x = x.gather(1, order[..., None].expand_as(x))
        return to_fast_layout(x.transpose(1, 2).unflatten(2, self.grid_size))

    def load_from(self, arrays, head="zero"):
        """Load a ViT's checkpoint without its later blocks and last norm, or a Conformer's checkpoint.

        `head` and the errors are those of VisionTransformer.load_from; a ViT's head does not fit. Returns npz.Loaded,
        which reports the weights that keep their initial values.
        """
        rows = npz.conformer_rows(self)
        own = [row.key for row in rows if row.key.startswith("conformer/")]
        if not set(own).isdisjoint(arrays):
            return npz.load(self, rows, arrays, head, grid_size=self.patch_embed.grid_size)
        later = dict.fromkeys(key for key in arrays if npz.is_after_block(key, len(self.blocks)))
        return npz.load(self, rows, arrays, head, self.patch_embed.grid_size, source_shapes=later, initialised=own)

    @staticmethod
    def sources():
        return {"vit": VisionTransformer, "conformer": Conformer}

    def export_npz(self):
        """The weights under Google's keys, {key: float32 array}; `load_from(arrays, head="keep")` restores them."""
        return npz.export(self, npz.conformer_rows(self))


def grid_side(keep_tokens, num_patches):
    """g of the g x g patches to keep. Raises ValueError for a number that is not a square."""
    keep = patches_to_keep(keep_tokens, num_patches)
    side = math.isqrt(keep)
    if isinstance(keep_tokens, float):
        return min(round(keep**0.5), math.isqrt(num_patches))
    if side**2 != keep:
        raise ValueError(f"keep_tokens {keep} is not a square number, which a Conformer needs; {side**2} is one")
    return side
