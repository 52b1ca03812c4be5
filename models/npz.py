"""Google's checkpoint names <-> our state dict: one table, read both ways.

Each row pairs a key with a view of our parameter in Google's layout. Loading copies the array into the
view, exporting copies the view out, and the view's shape is what an error calls expected.
"""

import re
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from models.norms import Bias, LayerNorm, TokenBatchNorm, TokenGroupNorm

# The released files count the modules of a block across types, later ones by type.
SPELLINGS = (
    (re.compile(r"(?<=/)MultiHeadDotProductAttention_0(?=/)"), "MultiHeadDotProductAttention_1"),
    (re.compile(r"(?<=/)LayerNorm_1(?=/)"), "LayerNorm_2"),
    (re.compile(r"(?<=/)MlpBlock_0(?=/)"), "MlpBlock_3"),
)
HEADS = ("head/", "resnet/head/")
POS_EMBED = "Transformer/posembed_input/pos_embedding"


class CheckpointError(ValueError):
    """A checkpoint does not fit the model; one line says which key and why."""


class Loaded(NamedTuple):
    """What `load_from` did not take over: our keys that keep their initial values, the checkpoint's that were left out.

    Its text says so in a line.
    """

    initialised: list
    left_out: list

    def __str__(self):
        if not self.initialised:
            return "everything is loaded"
        norms = [key for key in self.initialised if is_token_norm(key)]
        others = [key for key in self.initialised if not is_token_norm(key)]
        texts = []
        if norms:
            left_out = sum(map(is_token_norm, self.left_out))
            texts.append(
                f"{left_out} arrays of another norm are left out, {len(norms)} of the model's own "
                "keep their initial values, everything else is loaded"
            )
        if others:
            parts = sorted({re.sub(r"/(a/|b/|c/|gamma|beta).*", "", key) for key in others})
            texts.append(f"no weights of the right shape for {len(others)} arrays of {', '.join(parts)}: initialised")
        return "; ".join(reversed(texts))


class Entry(NamedTuple):
    """`view` is our parameter, or a slice of it, in the layout of the array that Google keeps under `key`."""

    key: str
    view: torch.Tensor


def vit_rows(model):
    """The table of a ViT or hybrid, head and `pre_logits` included."""
    rows = [*encoder_rows(model), *token_norm_rows("Transformer/encoder_norm", model.norm)]
    if model.pre_logits is not None:
        rows += linear_rows("pre_logits", model.pre_logits)
    return rows + linear_rows("head", model.head)


def conformer_rows(model):
    """The table of a Conformer: a ViT's as far as its blocks go, then names of its own."""
    rows = encoder_rows(model)
    for number, unit in enumerate(model.cnn, start=1):
        rows += bottleneck_rows(f"conformer/unit{number:02d}", unit)
    rows += norm_rows("conformer/group_norm", model.cnn_norm, scale="gamma", bias="beta")
    return rows + conv_rows("head/conv2d", model.head.fc)


def encoder_rows(model):
    """Embeddings and blocks of a ViT or hybrid."""
    rows = [Entry("cls", model.cls_token), Entry(POS_EMBED, model.pos_embed)]
    if model.patch_embed.stem:
        rows += stem_rows(model.patch_embed.stem)
    rows += conv_rows("embedding", model.patch_embed.proj)
    for i, block in enumerate(model.blocks):
        prefix = f"Transformer/encoderblock_{i}"
        rows += token_norm_rows(f"{prefix}/LayerNorm_0", block.norm1, block.add1)
        rows += attention_rows(f"{prefix}/MultiHeadDotProductAttention_1", block.attn)
        rows += token_norm_rows(f"{prefix}/LayerNorm_2", block.norm2, block.add2)
        rows += linear_rows(f"{prefix}/MlpBlock_3/Dense_0", block.mlp.fc1)
        rows += linear_rows(f"{prefix}/MlpBlock_3/Dense_1", block.mlp.fc2)
    return rows


def linear_rows(key, layer):
    return [Entry(f"{key}/kernel", layer.weight.t()), Entry(f"{key}/bias", layer.bias)]  # (in, out)


def conv_rows(key, layer):
    rows = [Entry(f"{key}/kernel", layer.weight.permute(2, 3, 1, 0))]  # HWIO
    return rows if layer.bias is None else [*rows, Entry(f"{key}/bias", layer.bias)]


def norm_rows(key, norm, scale="scale", bias="bias"):
    return [Entry(f"{key}/{scale}", norm.weight), Entry(f"{key}/{bias}", norm.bias)]


def token_norm_rows(key, norm, add=None):
    """`key` stands for Google's LayerNorm; what is in its place has a name of its own, as in Flax."""
    if isinstance(norm, TokenBatchNorm):
        key = key.replace("LayerNorm", "BatchNorm").replace("encoder_norm", "encoder_batch_norm")
        running = [Entry(f"{key}/mean", norm.running_mean), Entry(f"{key}/var", norm.running_var)]
        return norm_rows(key, norm) + running
    if isinstance(norm, TokenGroupNorm):
        return norm_rows(key.replace("LayerNorm", "GroupNorm").replace("encoder_norm", "encoder_group_norm"), norm)
    if isinstance(norm, Bias):
        key = key.replace("LayerNorm", "Rescale")
        return [Entry(f"{key}/bias", norm.bias), Entry(f"{key}/multiplier", add.weight)]
    return norm_rows(key, norm) if isinstance(norm, LayerNorm) else []


def attention_rows(key, attention):
    rows = []
    heads = attention.num_heads
    parts = zip(("query", "key", "value"), attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3), strict=True)
    for part, weight, bias in parts:
        kernel = weight.t().unflatten(1, (heads, -1))  # (hidden, heads, head_dim)
        rows += [Entry(f"{key}/{part}/kernel", kernel), Entry(f"{key}/{part}/bias", bias.unflatten(0, (heads, -1)))]
    kernel = attention.proj.weight.t().unflatten(0, (heads, -1))  # (heads, head_dim, hidden)
    return [*rows, Entry(f"{key}/out/kernel", kernel), Entry(f"{key}/out/bias", attention.proj.bias)]


def stem_rows(stem):
    """The stem's modules carry the names of the keys; a GroupNorm's arrays are (1, 1, 1, C)."""
    rows = []
    for name, module in stem.named_modules():
        key = name.replace(".", "/")
        if isinstance(module, nn.Conv2d):
            rows += conv_rows(key, module)
        elif isinstance(module, nn.GroupNorm):
            rows += [Entry(row.key, row.view.view(1, 1, 1, -1)) for row in norm_rows(key, module)]
    return rows


def resnet_rows(model):
    """The table of a BiT ResNet, head included."""
    rows = conv_rows("resnet/root_block/standardized_conv2d", model.stem.conv)
    for i, stage in enumerate(model.stages):
        for j, unit in enumerate(stage.blocks):
            rows += bottleneck_rows(f"resnet/block{i + 1}/unit{j + 1:02d}", unit)
    rows += norm_rows("resnet/group_norm", model.norm, scale="gamma", bias="beta")
    return rows + conv_rows("resnet/head/conv2d", model.head.fc)


def bottleneck_rows(key, unit):
    rows = []
    parts = (("a", unit.norm1, unit.conv1), ("b", unit.norm2, unit.conv2), ("c", unit.norm3, unit.conv3))
    for part, norm, conv in parts:
        rows += norm_rows(f"{key}/{part}/group_norm", norm, scale="gamma", bias="beta")
        rows += conv_rows(f"{key}/{part}/standardized_conv2d", conv)
    if unit.downsample:
        rows += conv_rows(f"{key}/a/proj/standardized_conv2d", unit.downsample.conv)
    return rows


@torch.no_grad()
def load(rows, arrays, head, grid_size=None, whole=None, new=()):
    """Fill the views of `rows` from `arrays`, one at a time; see VisionTransformer.load_from.

    Position embeddings are resized to `grid_size`. `whole` is {key: shape} of a larger model that this one was cut
    from: its other keys may be left over, and where its shape is another, our initial values stay. They also stay
    where the checkpoint has another norm than the model, and those of the keys `new`. Returns Loaded.
    """
    if head not in ("zero", "keep"):
        raise ValueError(f"head is 'zero' or 'keep', not {head!r}")
    whole = whole or {}
    found = {canonical_key(key): key for key in arrays}
    wanted = [row for row in rows if head == "keep" or not is_head(row.key)]
    initialised, other_norm = norms_that_differ(wanted, found)
    initialised = [*initialised, *new]
    wanted = [row for row in wanted if row.key not in initialised]
    check_keys(wanted, found, spare={*whole, *other_norm})
    for row in wanted:
        array = np.asarray(arrays[found[row.key]])
        if not np.issubdtype(array.dtype, np.floating):
            raise CheckpointError(f"{found[row.key]} holds {array.dtype}, expected floating-point numbers")
        if row.key == POS_EMBED and array.ndim == 3 and array.shape != row.view.shape:
            array = resize_pos_embed(array.astype(np.float32), grid_size)  # scipy does not take float16
        if array.ndim == 1 and row.view.shape == (1, 1, 1, array.size):
            array = array.reshape(row.view.shape)  # a GroupNorm as later versions of Flax store it
        if array.shape == row.view.shape:
            row.view.copy_(torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)))
        elif array.shape == whole.get(row.key) and not is_head(row.key):
            initialised.append(row.key)
        else:
            raise CheckpointError(shape_message(found[row.key], array.shape, row))
    if head == "zero":
        for row in rows:
            if is_head(row.key):
                row.view.zero_()
    taken = {row.key for row in wanted}.difference(initialised)
    return Loaded(initialised, [key for name, key in found.items() if name not in taken and not is_head(name)])


def export(rows):
    return {row.key: row.view.detach().float().cpu().numpy().copy() for row in rows}


def canonical_key(key):
    for pattern, released in SPELLINGS:
        key = pattern.sub(released, key)
    return key


def is_head(key):
    return key.startswith((*HEADS, "pre_logits/"))


def is_beyond(key, blocks):
    """Whether a ViT's key belongs behind its first `blocks` blocks, the head aside."""
    number = re.match(r"Transformer/encoderblock_(\d+)/", key)
    return int(number[1]) >= blocks if number else re.match(r"Transformer/encoder_(\w+_)?norm/", key) is not None


def is_token_norm(key):
    return re.search(r"/(Layer|Batch|Group)Norm_\d/|/Rescale_\d/|/encoder_(batch_|group_)?norm/", key) is not None


def norms_that_differ(rows, found):
    """(keys of the model's norm, keys of the checkpoint's) where the two are of different types, else empty lists."""
    ours = [row.key for row in rows if is_token_norm(row.key)]
    theirs = [name for name in found if is_token_norm(name)]
    differ = theirs and not set(ours).intersection(theirs)
    return (ours, theirs) if differ else ([], [])


def num_classes_of(arrays):
    """How many classes the checkpoint's head tells apart, or None if it has no head."""
    biases = [arrays[key] for key in ("head/bias", "head/conv2d/bias", "resnet/head/conv2d/bias") if key in arrays]
    return len(biases[0]) if biases else None


def set_pre_logits(model, arrays, head):
    """A kept head needs the layer below it: ImageNet-21k checkpoints have one, others do not."""
    model.pre_logits = None
    if head == "keep" and "pre_logits/kernel" in arrays:
        size_in, size_out = arrays["pre_logits/kernel"].shape
        weight = model.head.weight
        model.pre_logits = nn.Linear(size_in, size_out, device=weight.device, dtype=weight.dtype)


def check_keys(rows, found, spare):
    expected = {row.key: row for row in rows}
    missing = [row for row in rows if row.key not in found]
    if missing:
        shape = tuple(missing[0].view.shape)
        raise CheckpointError(f"{missing[0].key} is missing, expected shape {shape}{and_more(missing)}")
    left_over = [key for name, key in found.items() if name not in expected and name not in spare and not is_head(name)]
    if left_over:
        raise CheckpointError(f"{left_over[0]} is left over, the model has no such weights{and_more(left_over)}")


def and_more(keys):
    return f" (and {len(keys) - 1} more keys)" if len(keys) > 1 else ""


def shape_message(key, shape, row):
    message = f"{key} has shape {tuple(shape)}, expected {tuple(row.view.shape)}"
    if row.key.startswith(HEADS):
        message += f": the checkpoint has {shape[-1]} classes, the model {row.view.shape[-1]}"
    return message


def resize_pos_embed(array, grid_size):
    """Position embeddings (1, 1 + h * h, hidden) of a square grid -> (1, 1 + H * W, hidden).

    Linear interpolation between the outermost positions, as Google's `checkpoint.interpolate_posembed`;
    the class token's is left alone.
    """
    from scipy import ndimage  # a slow import that a checkpoint of the model's own grid need not pay

    cls, grid = array[:, :1], array[0, 1:]
    side = round(len(grid) ** 0.5)
    if side * side != len(grid) or not side:
        raise CheckpointError(f"{POS_EMBED} has shape {array.shape}: its grid is not square, so it can't be resized")
    zoom = (grid_size[0] / side, grid_size[1] / side, 1)
    grid = ndimage.zoom(grid.reshape(side, side, -1), zoom, order=1)
    return np.concatenate([cls, grid.reshape(1, -1, array.shape[-1])], axis=1)
