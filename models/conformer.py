"""Conformer: a ViT looks at the whole image, its tokens are merged into a few, a CNN goes on with these.

The ViT's blocks up to the token reduction are those of models/vision_transformer.py, so their weights come from any
ViT's checkpoint. Of the patches k = g x g are kept, each other one is merged into one of them
(models/token_reduction.py), and the k merged tokens are laid out on a g x g grid. BiT's pre-activation bottlenecks
work on that as on any feature map, then its mean goes to the head, as in BiT. The class token has served by then: it
took part in the ViT's attention, which its checkpoint is made for, and goes no further.

How the grid is formed: the kept patches are ranked by their row in the image (by column where equal); the first g of
them are the grid's first row, the next g its second, and so on; within a row they are put in order of their column.
A bottleneck's 3x3 convolution takes neighbours for near: so what lies above another token in the grid is never
lower in the image than it, and what lies left of another in its row is never further right. No cell is empty and none
holds two tokens, wherever the patches lie, which a grid of fixed places in the image can't do: it would undo the choice
by merging once more, or by leaving gaps where the image is plain. Kept whole, the patches lie as they did. The order
is all that the grid knows of the places; the tokens still carry their position embeddings.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from models import npz
from models.bit_resnet import Bottleneck, Head
from models.hybrid_stem import fast_layout
from models.norms import GroupNorm, NoNorm
from models.token_reduction import check_layer, make_reduction, patches_to_keep
from models.vision_transformer import VisionTransformer


class Conformer(VisionTransformer):
    """Images (B, 3, H, W) -> logits (B, num_classes), read from the mean of the CNN's features."""

    def __init__(
        self,
        config,
        img_size=224,
        num_classes=10,
        norm_type="LN",
        token_reduction="facility",
        keep_tokens=None,
        reduction_layer=None,
    ):
        """`keep_tokens`, a square number, and `reduction_layer`, a count of blocks, are the config's where None.

        A share of the patches is rounded to the nearest square. With the `token_reduction` "none" all patches stay.
        """
        super().__init__(config, img_size, num_classes, norm_type)
        layer = config.reduction_layer if reduction_layer is None else reduction_layer
        num_patches = math.prod(self.patch_embed.grid_size)
        self.reduction, self.grid_size = None, self.patch_embed.grid_size
        if token_reduction == "none":
            check_layer(layer, config.num_layers)
            make_reduction("none", keep_tokens, None, num_patches, config.num_layers)  # a number has no meaning then
        else:
            side = grid_side(config.keep_tokens if keep_tokens is None else keep_tokens, num_patches)
            self.reduction = make_reduction(token_reduction, side**2, layer, num_patches, config.num_layers)
        if self.reduction:
            self.grid_size = (side, side)
        self.blocks = self.blocks[:layer]
        self.norm = NoNorm()  # the first bottleneck begins with a norm
        self.cnn = nn.Sequential()
        channels = config.hidden_size
        for _ in range(config.cnn_units):
            self.cnn.append(Bottleneck(channels, config.cnn_width, 1, config.num_groups))
            channels = config.cnn_width
        self.cnn_norm = GroupNorm(channels, 1e-5, config.num_groups)
        self.head = Head(channels, num_classes)

    def classify(self, x, clusters=None):
        x = self.on_grid(x[:, 1:], clusters)  # (B, hidden, g, g)
        return self.head(F.relu(self.cnn_norm(self.cnn(x)), inplace=True))

    def compile(self, **options):
        """As VisionTransformer.compile, and the CNN as a whole."""
        super().compile(**options)
        self.cnn.compile(**options)

    def on_grid(self, x, clusters):
        """The kept patches (B, g * g, hidden), in their order in the image -> (B, hidden, g, g)."""
        if clusters is not None:
            columns = (clusters.kept[:, 1:] - 1) % self.patch_embed.grid_size[1]
            within = columns.unflatten(1, self.grid_size).argsort(dim=2, stable=True)  # (B, g, g)
            first = torch.arange(0, x.shape[1], self.grid_size[1], device=x.device)  # of each row
            order = (within + first[:, None]).flatten(1)
            x = x.gather(1, order[..., None].expand_as(x))
        return fast_layout(x.transpose(1, 2).unflatten(2, self.grid_size))

    def load_from(self, arrays, head="zero"):
        """Load a ViT's checkpoint, whose later blocks and last norm are left out, or a Conformer's own.

        `head` and the errors are those of VisionTransformer.load_from; a ViT's head does not fit. Returns npz.Loaded,
        which names what keeps its initial values.
        """
        rows = npz.conformer_rows(self)
        own = [row.key for row in rows if row.key.startswith("conformer/")]
        if not set(own).isdisjoint(arrays):
            return npz.load(self, rows, arrays, head, grid_size=self.patch_embed.grid_size)
        later = dict.fromkeys(key for key in arrays if npz.is_after_block(key, len(self.blocks)))
        return npz.load(self, rows, arrays, head, self.patch_embed.grid_size, source_shapes=later, initialised=own)

    def export_npz(self):
        """The weights under Google's keys, {key: float32 array}; `load_from(arrays, head="keep")` takes them back."""
        return npz.export(self, npz.conformer_rows(self))


def grid_side(keep_tokens, num_patches):
    """g of the g x g patches to keep. Raises ValueError for a count that is no square."""
    keep = patches_to_keep(keep_tokens, num_patches)
    side = math.isqrt(keep)
    if isinstance(keep_tokens, float):
        return min(round(keep**0.5), math.isqrt(num_patches))
    if side**2 != keep:
        raise ValueError(f"keep_tokens {keep} is no square number, which a Conformer needs; {side**2} is one")
    return side
