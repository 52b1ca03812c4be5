"""Vision Transformer and hybrid (Dosovitskiy et al., 2021), exact to google-research/vision_transformer.

The state dict has timm's names, so timm can load a ViT's state dict; its GELU is the exact one by default.
"""

import torch
from torch import nn

from models import npz
from models.attention import attend, attention_weights
from models.dropout import Dropout, StochasticDepth
from models.formats import arrays_of
from models.linear import GELUS, Linear, linear
from models.norms import final_norm, residual, token_norm
from models.patch_embed import PatchEmbed
from models.token_reduction import (
    EveryBlock,
    RandomChoice,
    cluster_tokens,
    compose,
    make_reduction,
    match_tokens,
    merge_in_every_block,
    merge_tokens,
    size_bias,
)


class VisionTransformer(nn.Module):
    """Images (B, 3, H, W) -> logits (B, num_classes), read from the class token."""

    reads_class_token = True  # and no other token

    def __init__(
        self,
        config,
        img_size=224,
        num_classes=10,
        norm_type="LN",
        token_reduction="none",
        keep_tokens=None,
        reduction_layer=None,
        tome_r=None,
    ):
        """`token_reduction` merges the patches after `reduction_layer` blocks, or ToMe merges `tome_r` in each block.

        See models/token_reduction.py.
        """
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.patch_embed = PatchEmbed(config, img_size)
        num_patches = self.patch_embed.grid_size[0] * self.patch_embed.grid_size[1]
        asked = {"token_reduction": token_reduction, "keep_tokens": keep_tokens, "reduction_layer": reduction_layer}
        if tome_r is not None:
            self.set_reduction(merge_in_every_block(tome_r, asked, num_patches, config.num_layers))
        else:  # a reduction after the last block would save nothing
            self.set_reduction(make_reduction(**asked, num_patches=num_patches, last_layer=config.num_layers - 1))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + num_patches, config.hidden_size).normal_(std=0.02))
        self.pos_drop = Dropout(config.dropout_rate)
        block = MergingBlock if isinstance(self.reduction, EveryBlock) else Block
        self.blocks = nn.ModuleList(block(config, norm_type, index) for index in range(config.num_layers))
        self.norm = final_norm(norm_type, config.hidden_size, config.layer_norm_eps)
        self.pre_logits = None  # Linear and tanh, only with a pretrained head that was trained with it
        self.head = nn.Linear(config.hidden_size, num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def set_reduction(self, reduction):
        """Merge tokens by a Reduction, EveryBlock or None of models/token_reduction.py."""
        self.reduction = reduction
        self.random_choice = RandomChoice() if getattr(reduction, "method", None) == "random" else None

    def forward(self, images):
        return self.classify(*self.encode(images))

    def forward_with_attention(self, images):
        """Logits, and a list with one tensor of attention weights (B, heads, N, N) per block; rows sum to 1.

        N is smaller after a token reduction.
        """
        logits, attention, _ = self.forward_with_clusters(images)
        return logits, attention

    def forward_with_clusters(self, images):
        """Logits, attention weights, and a list with the Clusters (models/token_reduction.py) after each merge.

        The Clusters are of the model's own tokens, also after several merges.
        """
        attention = []
        x, clusters = self.encode(images, attention)
        return self.classify(x, clusters), attention, clusters

    def encode(self, images, attention=None):
        """Images (B, 3, H, W) through all blocks -> (tokens (B, N, hidden), Clusters after each merge).

        Each block's attention weights are appended to the list `attention`, if given. Otherwise, in training, the last
        block computes the class token only, if nothing reads the other tokens; the gradients are the same.
        """
        x = self.embed(images)
        skips_patches = self.training and torch.is_grad_enabled() and self.reads_class_token and self.has_token_norms()
        if isinstance(self.reduction, EveryBlock):
            return self.encode_merging(x, attention, skips_patches)
        sizes, merges = None, []
        for layer, block in enumerate(self.blocks, start=1):
            reduces = self.reduction is not None and layer == self.reduction.layer
            if attention is not None:
                x, keys, weights = block.forward_with_attention(x, sizes)
                attention.append(weights)
            elif reduces:
                x, keys = block(x, sizes, with_keys=True)
            else:
                x = block(x, sizes, class_token_only=skips_patches and layer == len(self.blocks))
            if reduces:
                seeds = self.random_choice(images) if self.random_choice is not None else None
                merges.append(cluster_tokens(keys, self.reduction, seeds))
                x, sizes = merge_tokens(x, merges[-1])  # (B, 1 + keep, hidden)
        return x, merges

    def encode_merging(self, x, attention, skips_patches):
        """`encode` through blocks that merge tokens; the Clusters are composed only if there is a list `attention`."""
        sizes, merges, clusters = None, [], None
        for block, count in zip(self.blocks, self.reduction.merged, strict=True):
            if attention is None:
                x, sizes, _ = block(x, sizes, count, skips_patches and block is self.blocks[-1])
                continue
            x, sizes, merged, weights = block.forward_with_attention(x, sizes, count)
            attention.append(weights)
            if count:
                clusters = compose(clusters, merged)
                merges.append(clusters)
        return x, merges

    def has_token_norms(self):
        """Whether the norms after the last attention normalise each token alone."""
        return self.blocks[-1].norm2.per_token and self.norm.per_token

    def embed(self, images):
        """Patches with position embeddings, class token first: (B, 3, H, W) -> (B, N, hidden)."""
        x = self.patch_embed(images)
        # shape[0], because len() would make the batch size of an exported graph a constant
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
        return self.pos_drop(x + self.pos_embed)

    def classify(self, x, clusters=()):
        """Encoded tokens (B, N, hidden) -> logits (B, num_classes); a Conformer needs the `clusters` of `encode`."""
        x = self.norm(x[:, 0]) if self.norm.per_token else self.norm(x)[:, 0]  # (B, hidden)
        if self.pre_logits is not None:
            x = torch.tanh(self.pre_logits(x))
        return self.head(x)

    def compile(self, **options):
        """As torch.nn.Module.compile, but part by part: a compiled block serves all that compute the same."""
        for part in (self.patch_embed, *self.blocks):
            part.compile(**options)

    def load_from(self, arrays, head="zero"):
        """Load Google's checkpoint, a mapping from key to array, e.g. `np.load("ViT-B_16.npz")`.

        `head="zero"` starts a new task with a head of zeros; `head="keep"` loads the checkpoint's head and its
        `pre_logits` layer, if it has one. Position embeddings of another grid are resized. Arrays of another norm type
        are left out. Returns npz.Loaded, which reports what was not loaded. Raises CheckpointError, which names the
        key, the shape found and the shape expected, for a key that is missing, left over or of another shape; the
        model's weights are then undefined.
        """
        npz.set_pre_logits(self, arrays, head)
        return npz.load(self, npz.vit_rows(self), arrays, head, grid_size=self.patch_embed.grid_size)

    def load_checkpoint(self, checkpoint, head="zero"):
        """Load a checkpoint of another library or of a run (models/formats); arguments and errors as in `load_from`."""
        return self.load_from(arrays_of(checkpoint, self.sources(), self.config.num_heads), head)

    @staticmethod
    def sources():
        """{family: class} of the models whose weights these ones can be."""
        return {"vit": VisionTransformer}

    def export_npz(self):
        """The weights under Google's keys, {key: float32 array}; `load_from(arrays, head="keep")` restores them."""
        return npz.export(self, npz.vit_rows(self))


class Block(nn.Module):
    """Pre-norm encoder block: attention, then MLP, each added to the residual stream (B, N, hidden)."""

    is_block = True  # a repeated unit: activations are recomputed and weights sharded per block

    def __init__(self, config, norm_type, index):
        super().__init__()
        drop_path_rate = config.drop_path_rate * index / max(1, config.num_layers - 1)  # 0 in the first block
        self.norm1 = token_norm(norm_type, config.hidden_size, config.layer_norm_eps)
        self.attn = Attention(config)
        self.drop_path1 = StochasticDepth(drop_path_rate)
        self.add1 = residual(norm_type, 2 * index + 1)
        self.norm2 = token_norm(norm_type, config.hidden_size, config.layer_norm_eps)
        self.mlp = Mlp(config)
        self.drop_path2 = StochasticDepth(drop_path_rate)
        self.add2 = residual(norm_type, 2 * index + 2)

    def forward(self, x, sizes=None, with_keys=False, class_token_only=False):
        """The output, (B, 1, hidden) with `class_token_only`, and if `with_keys` the keys (B, heads, N, head_dim).

        `sizes` (B, N) is the number of patches that each token represents; None: all are single.
        """
        out, keys = self.attn.forward_with_keys(self.norm1(x), sizes, class_token_only)
        x = self.add_mlp(self.add_attention(x[:, :1] if class_token_only else x, out))
        return (x, keys) if with_keys else x

    def forward_with_attention(self, x, sizes=None):
        """The output, the keys and the attention weights (B, heads, N, N)."""
        out, keys, weights = self.attn.forward_with_weights(self.norm1(x), sizes)
        return self.add_mlp(self.add_attention(x, out)), keys, weights

    def add_attention(self, x, out):
        """Add the attention's output to the residual stream x."""
        return self.add1(x, self.drop_path1(out))

    def add_mlp(self, x):
        """Add the MLP to the residual stream x."""
        return self.add2(x, self.drop_path2(self.mlp(self.norm2(x))))


class MergingBlock(Block):
    """A block that merges `count` tokens between attention and MLP, as published for ToMe."""

    def forward(self, x, sizes, count, class_token_only=False):
        """(tokens (B, N - count, hidden), their sizes, Clusters); sizes and Clusters may be None if count is 0.

        With `class_token_only` nothing is merged, because a merge does not change the class token.
        """
        if class_token_only:
            return super().forward(x, sizes, class_token_only=True), sizes, None
        out, keys = self.attn.forward_with_keys(self.norm1(x), sizes)
        return self.merge_and_add(x, out, keys, sizes, count)

    def forward_with_attention(self, x, sizes, count):
        """As `forward`, and the attention weights (B, heads, N, N)."""
        out, keys, weights = self.attn.forward_with_weights(self.norm1(x), sizes)
        return *self.merge_and_add(x, out, keys, sizes, count), weights

    def merge_and_add(self, x, out, keys, sizes, count):
        """Add the attention's output to the residual stream x, merge tokens, and add the MLP."""
        x, clusters = self.add_attention(x, out), None
        if count:
            clusters = match_tokens(keys, count)
            x, sizes = merge_tokens(x, clusters, sizes)
        return self.add_mlp(x), sizes, clusters


class Attention(nn.Module):
    """Multi-head self-attention (B, N, hidden) -> (B, N, hidden); query, key and value in one projection."""

    stacked_weights = {"qkv.weight": 3}  # {parameter: how many weight matrices it stacks}; optimizers may split it

    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = Linear(config.hidden_size, config.hidden_size)
        self.proj_drop = Dropout(config.dropout_rate)
        for weight in (*self.qkv.weight.chunk(3), self.proj.weight):
            nn.init.xavier_uniform_(weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x, sizes=None):
        return self.forward_with_keys(x, sizes)[0]

    def forward_with_keys(self, x, sizes=None, class_token_only=False):
        """The output, (B, 1, hidden) with `class_token_only`, and the keys (B, heads, N, head_dim)."""
        q, k, v = self.project_class_query(x) if class_token_only else self.project(x)
        return self.merge_heads(attend(q, k, v, size_bias(sizes, q.dtype))), k

    def forward_with_weights(self, x, sizes=None):
        """The output, the keys and the attention weights (B, heads, N, N), which the fused kernel never computes."""
        q, k, v = self.project(x)
        weights = attention_weights(q, k, size_bias(sizes, q.dtype))
        return self.merge_heads(weights @ v), k, weights

    def project(self, x):
        """(B, N, hidden) -> query, key, value, each (B, heads, N, head_dim)."""
        # unbound from (B, N, 3, heads, head_dim), next to each other in memory: their gradients need one copy, not two
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def project_class_query(self, x):
        """As `project` with the class token's query only: (B, heads, 1, head_dim)."""
        sizes = (x.shape[-1], 2 * x.shape[-1])
        (query, keys_values), (query_bias, other_biases) = self.qkv.weight.split(sizes), self.qkv.bias.split(sizes)
        q = linear(x[:, 0], query, query_bias).unflatten(-1, (self.num_heads, 1, -1))
        k, v = linear(x, keys_values, other_biases).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        return q, k.transpose(1, 2), v.transpose(1, 2)

    def merge_heads(self, x):
        """(B, heads, N, head_dim) -> (B, N, hidden), through the output projection."""
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class Mlp(nn.Module):
    """Two linear layers with the config's GELU between them."""

    def __init__(self, config):
        super().__init__()
        self.linear_gelu = GELUS[config.gelu]
        self.fc1 = Linear(config.hidden_size, config.mlp_dim)
        self.drop1 = Dropout(config.dropout_rate)
        self.fc2 = Linear(config.mlp_dim, config.hidden_size)
        self.drop2 = Dropout(config.dropout_rate)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)

    def forward(self, x):
        x = self.linear_gelu(x, self.fc1)
        return self.drop2(self.fc2(self.drop1(x)))
