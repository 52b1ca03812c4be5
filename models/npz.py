"""Google's checkpoint names <-> our state dict: one table, read both ways.

Each row pairs a key with a view of our parameter in Google's layout. Loading copies the array into the view, exporting
copies the view to an array, and errors report the view's shape as the expected one. The rows of a model must contain
each of its parameters and persistent buffers exactly once.
"""

import bisect
import re
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from models.norms import is_final_norm, is_token_norm

# The released files number the modules of a block across types, later files number each type separately.
SPELLINGS = (
    (re.compile(r"(?<=/)MultiHeadDotProductAttention_0(?=/)"), "MultiHeadDotProductAttention_1"),
    (re.compile(r"(?<=/)LayerNorm_1(?=/)"), "LayerNorm_2"),
    (re.compile(r"(?<=/)MlpBlock_0(?=/)"), "MlpBlock_3"),
)
HEADS = ("head/", "resnet/head/")
POS_EMBED = "Transformer/posembed_input/pos_embedding"


class CheckpointError(ValueError):
    """A checkpoint and a model do not fit together; the message is one line that names the key and the reason."""


class Loaded(NamedTuple):
    """What `load_from` did not load: the model's keys that keep their initial values, and the checkpoint's unused keys.

    `str()` summarises it in one line.
    """

    initialised: list
    left_out: list

    def __str__(self):
        if not self.initialised:
            left_out = f"{len(self.left_out)} arrays are left out, everything else is loaded"
            return left_out if self.left_out else "everything is loaded"
        norms = [key for key in self.initialised if is_token_norm(key)]
        others = [key for key in self.initialised if not is_token_norm(key)]
        texts = []
        if others:
            parts = sorted({re.sub(r"/(a/|b/|c/|gamma|beta).*", "", key) for key in others})
            texts.append(f"no weights of the right shape for {len(others)} arrays of {', '.join(parts)}: initialised")
        if norms:
            left_out = sum(map(is_token_norm, self.left_out))
            texts.append(
                f"{left_out} arrays of another norm are left out, {len(norms)} of the model's own "
                "keep their initial values, everything else is loaded"
            )
        return "; ".join(texts)


class Row(NamedTuple):
    """`view` is a parameter or buffer of the model, or a slice of it, in the layout of Google's array under `key`."""

    key: str
    view: torch.Tensor


def vit_rows(model):
    """The table of a ViT or hybrid, including the head and `pre_logits`."""
    rows = [*encoder_rows(model), *token_norm_rows(f"Transformer/{model.norm.final_key}", model.norm)]
    if model.pre_logits is not None:
        rows += linear_rows("pre_logits", model.pre_logits)
    return rows + linear_rows("head", model.head)


def conformer_rows(model):
    """The table of a Conformer: a ViT's up to its last block, then names of its own."""
    rows = encoder_rows(model)
    for number, unit in enumerate(model.cnn, start=1):
        rows += bottleneck_rows(f"conformer/unit{number:02d}", unit)
    rows += norm_rows("conformer/group_norm", model.cnn_norm, scale="gamma", bias="beta")
    return rows + conv_rows("head/conv2d", model.head.fc)


def encoder_rows(model):
    """Embeddings and blocks of a ViT or hybrid."""
    rows = [Row("cls", model.cls_token), Row(POS_EMBED, model.pos_embed)]
    if model.patch_embed.stem:
        rows += stem_rows(model.patch_embed.stem)
    rows += conv_rows("embedding", model.patch_embed.proj)
    for i, block in enumerate(model.blocks):
        prefix = f"Transformer/encoderblock_{i}"
        for number, norm, residual in ((0, block.norm1, block.add1), (2, block.norm2, block.add2)):
            key = f"{prefix}/{norm.block_key}_{number}"
            rows += token_norm_rows(key, norm) + token_norm_rows(key, residual)
        rows += attention_rows(f"{prefix}/MultiHeadDotProductAttention_1", block.attn)
        rows += linear_rows(f"{prefix}/MlpBlock_3/Dense_0", block.mlp.fc1)
        rows += linear_rows(f"{prefix}/MlpBlock_3/Dense_1", block.mlp.fc2)
    return rows


def linear_rows(key, layer):
    return [Row(f"{key}/kernel", layer.weight.t()), Row(f"{key}/bias", layer.bias)]  # (in, out)


def conv_rows(key, layer):
    rows = [Row(f"{key}/kernel", layer.weight.permute(2, 3, 1, 0))]  # HWIO
    return rows if layer.bias is None else [*rows, Row(f"{key}/bias", layer.bias)]


def norm_rows(key, norm, scale="scale", bias="bias"):
    return [Row(f"{key}/{scale}", norm.weight), Row(f"{key}/{bias}", norm.bias)]


def token_norm_rows(key, module):
    """The rows that a norm of tokens, or its residual connection, declares (models/norms.py)."""
    return [Row(f"{key}/{array}", attrgetter(name)(module)) for name, array in module.array_names.items()]


def attention_rows(key, attention):
    rows = []
    heads = attention.num_heads
    parts = zip(("query", "key", "value"), attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3), strict=True)
    for part, weight, bias in parts:
        kernel = weight.t().unflatten(1, (heads, -1))  # (hidden, heads, head_dim)
        rows += [Row(f"{key}/{part}/kernel", kernel), Row(f"{key}/{part}/bias", bias.unflatten(0, (heads, -1)))]
    kernel = attention.proj.weight.t().unflatten(0, (heads, -1))  # (heads, head_dim, hidden)
    return [*rows, Row(f"{key}/out/kernel", kernel), Row(f"{key}/out/bias", attention.proj.bias)]


def stem_rows(stem):
    """The stem's modules are named as the keys; a GroupNorm's arrays are (1, 1, 1, C)."""
    rows = []
    for name, module in stem.named_modules():
        key = name.replace(".", "/")
        if isinstance(module, nn.Conv2d):
            rows += conv_rows(key, module)
        elif isinstance(module, nn.GroupNorm):
            rows += [Row(row.key, row.view.view(1, 1, 1, -1)) for row in norm_rows(key, module)]
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
def load(model, rows, arrays, head, grid_size=None, source_shapes=None, initialised=()):
    """Copy `arrays` into the views of the model's `rows`, one at a time; see VisionTransformer.load_from.

    Position embeddings are resized to `grid_size`. `source_shapes` is {key: shape} of a larger model that this one was
    cut from: its other keys may be left over, and weights whose shape differs from it keep their initial values. So do
    the norms if the checkpoint has those of another norm type, and the keys in `initialised`. Returns Loaded.
    """
    if head not in ("zero", "keep"):
        raise ValueError(f"head is 'zero' or 'keep', not {head!r}")
    check_rows(model, rows)
    source_shapes = source_shapes or {}
    original_keys = {canonical_key(key): key for key in arrays}
    wanted = [row for row in rows if head == "keep" or not is_head(row.key)]
    own_norm, other_norm = norms_that_differ(wanted, original_keys)
    initialised = [*own_norm, *initialised]
    wanted = [row for row in wanted if row.key not in initialised]
    check_keys(wanted, original_keys, ignored={*source_shapes, *other_norm})
    for row in wanted:
        array = read_array(arrays, original_keys[row.key], row, grid_size)
        if array.shape == row.view.shape:
            row.view.copy_(torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)))
        elif array.shape == source_shapes.get(row.key) and not is_head(row.key):
            initialised.append(row.key)
        else:
            raise CheckpointError(shape_message(original_keys[row.key], array.shape, row))
    if head == "zero":
        for row in rows:
            if is_head(row.key):
                row.view.zero_()
    loaded = {row.key for row in wanted}.difference(initialised)
    left_out = [key for name, key in original_keys.items() if name not in loaded and not is_head(name)]
    return Loaded(initialised, left_out)


def read_array(arrays, key, row, grid_size):
    """The array for `row` under the checkpoint's `key`, position embeddings resized to `grid_size`."""
    array = np.asarray(arrays[key])
    if not np.issubdtype(array.dtype, np.floating):
        raise CheckpointError(f"{key} holds {array.dtype}, expected floating-point numbers")
    if row.key == POS_EMBED and array.ndim == 3 and array.shape != row.view.shape:
        return resize_pos_embed(array.astype(np.float32), grid_size)  # scipy does not accept float16
    if array.ndim == 1 and row.view.shape == (1, 1, 1, array.size):
        return array.reshape(row.view.shape)  # a GroupNorm as later versions of Flax store it
    return array


def export(model, rows):
    """{key: float32 array} of all weights of the model."""
    check_rows(model, rows)
    return {row.key: row.view.detach().float().cpu().numpy().copy() for row in rows}


def check_rows(model, rows):
    """Raise CheckpointError unless `rows` contain each parameter and persistent buffer exactly once, by unique keys."""
    keys = sorted(row.key for row in rows)
    repeated = [key for key, following in zip(keys, keys[1:], strict=False) if key == following]
    if repeated:
        raise CheckpointError(f"two weights of the model have the checkpoint key {repeated[0]}{and_more(repeated)}")
    tensors = model.state_dict(keep_vars=True)
    if any(tensor.is_meta for tensor in tensors.values()):
        return  # tensors without memory cannot be told apart
    names = sorted(tensors, key=lambda name: tensors[name].data_ptr())
    addresses = [tensors[name].data_ptr() for name in names]
    views = {name: [] for name in names}
    for row in rows:
        views[names[bisect.bisect(addresses, row.view.data_ptr()) - 1]].append(row.view)
    for name, tensor in tensors.items():
        distinct = {view.data_ptr() for view in views[name]}
        size = sum(view.numel() for view in views[name])
        if size != tensor.numel() or len(distinct) != len(views[name]):
            times = "more than once" if size >= tensor.numel() else "in part" if size else "not at all"
            raise CheckpointError(f"{name} is {times} in the model's table of checkpoint keys (models/npz.py)")


def canonical_key(key):
    for pattern, released in SPELLINGS:
        key = pattern.sub(released, key)
    return key


def is_head(key):
    return key.startswith((*HEADS, "pre_logits/"))


def is_after_block(key, num_blocks):
    """Whether a ViT's key belongs to a part after its first `num_blocks` blocks, except for the head."""
    number = re.match(r"Transformer/encoderblock_(\d+)/", key)
    return int(number[1]) >= num_blocks if number else is_final_norm(key)


def norms_that_differ(rows, checkpoint_keys):
    """(keys of the model's norms, of the checkpoint's norms) if they are of different types, else empty lists."""
    ours = [row.key for row in rows if is_token_norm(row.key)]
    theirs = [key for key in checkpoint_keys if is_token_norm(key)]
    differ = theirs and not set(ours).intersection(theirs)
    return (ours, theirs) if differ else ([], [])


def num_classes_of(arrays):
    """The number of classes of the checkpoint's head, or None if it has no head."""
    biases = [arrays[key] for key in ("head/bias", "head/conv2d/bias", "resnet/head/conv2d/bias") if key in arrays]
    return len(biases[0]) if biases else None


def set_pre_logits(model, arrays, head):
    """Add the `pre_logits` layer if a kept head needs it: only ImageNet-21k checkpoints have one."""
    model.pre_logits = None
    if head == "keep" and "pre_logits/kernel" in arrays:
        size_in, size_out = arrays["pre_logits/kernel"].shape
        weight = model.head.weight
        model.pre_logits = nn.Linear(size_in, size_out, device=weight.device, dtype=weight.dtype)


def check_keys(rows, original_keys, ignored):
    """Raise CheckpointError for a missing key, and for one that is left over and not `ignored`."""
    expected = {row.key for row in rows}
    missing = [row for row in rows if row.key not in original_keys]
    if missing:
        shape = tuple(missing[0].view.shape)
        raise CheckpointError(f"{missing[0].key} is missing, expected shape {shape}{and_more(missing)}")
    left_over = [
        key for name, key in original_keys.items() if name not in expected and name not in ignored and not is_head(name)
    ]
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
    the class token's embedding is not changed.
    """
    from scipy import ndimage  # a slow import, needed only for another grid

    cls, grid = array[:, :1], array[0, 1:]
    side = round(len(grid) ** 0.5)
    if side * side != len(grid) or not side:
        raise CheckpointError(f"{POS_EMBED} has shape {array.shape}: its grid is not square, so it can't be resized")
    zoom = (grid_size[0] / side, grid_size[1] / side, 1)
    grid = ndimage.zoom(grid.reshape(side, side, -1), zoom, order=1)
    return np.concatenate([cls, grid.reshape(1, -1, array.shape[-1])], axis=1)
