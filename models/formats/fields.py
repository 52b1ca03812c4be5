"""The config of a model that is derived from the shapes of its weights, and the nearest published model type."""

import math
import re

from models.configs import CONFORMERS, RESNETS, VITS, resnet, vit
from models.npz import CheckpointError

HEADS = {1280: 16, 1408: 16, 1664: 16}  # of the published hidden sizes that do not have heads of 64 channels
HEAD_DIM = 64
NOT_DERIVED = ("dropout_rate", "drop_path_rate", "cut_from")


def count(state, pattern):
    """The number of modules that a regular expression with one group, a number from 0, finds in the names."""
    numbers = {int(found[1]) for found in (re.match(pattern, name) for name in state) if found}
    return len(numbers)


def shape_of(state, name):
    """The shape of a weight. Raises CheckpointError if it is missing."""
    if name not in state:
        raise CheckpointError(f"{name} is missing")
    return tuple(state[name].shape)


def heads_of(hidden_size):
    """The number of attention heads that is usual for a hidden size. Raises CheckpointError if there is none."""
    if hidden_size not in HEADS and hidden_size % HEAD_DIM:
        raise CheckpointError(
            f"the number of attention heads can't be derived from the hidden size {hidden_size}; give it by num_heads=N"
        )
    return HEADS.get(hidden_size, hidden_size // HEAD_DIM)


def vit_config(state, num_heads, standardisation=None, **fields):
    """The config of a ViT or hybrid with our names; `standardisation` are the fields of a hybrid's convolutions."""
    stem = {}
    if "patch_embed.stem.conv_root.weight" in state:
        stages = count(state, r"patch_embed\.stem\.block(\d+)\.")
        root_width, *_, kernel_size = shape_of(state, "patch_embed.stem.conv_root.weight")
        stem = {
            "resnet_layers": tuple(
                count(state, rf"patch_embed\.stem\.block{i + 1}\.unit(\d+)\.") for i in range(stages)
            ),
            "root_width": root_width,
            "root_stride": root_stride(kernel_size),
            **(standardisation or {}),
        }
    mlp_dim, hidden_size = shape_of(state, "blocks.0.mlp.fc1.weight")
    return vit(
        patch_size=shape_of(state, "patch_embed.proj.weight")[-1],
        hidden_size=hidden_size,
        mlp_dim=mlp_dim,
        num_heads=num_heads or heads_of(hidden_size),
        num_layers=count(state, r"blocks\.(\d+)\."),
        **stem,
        **fields,
    )


def resnet_config(state, **fields):
    """The config of a BiT ResNet with our names."""
    stages = range(count(state, r"stages\.(\d+)\."))
    root_width, *_, kernel_size = shape_of(state, "stem.conv.weight")
    layers = tuple(count(state, rf"stages\.{i}\.blocks\.(\d+)\.") for i in stages)
    config = resnet(layers, root_width, root_stride=root_stride(kernel_size), **fields)
    config.stage_widths = tuple(shape_of(state, f"stages.{i}.blocks.0.conv3.weight")[0] for i in stages)
    return config


def root_stride(kernel_size):
    """The stride of a ResNet's root, whose convolution is 7x7, or 3x3 for small images."""
    return 4 if kernel_size == 7 else 1


def grid_side(pos_embed):
    """The number of patches per side of position embeddings (1, 1 + side * side, hidden). Raises CheckpointError."""
    patches = pos_embed.shape[1] - 1
    side = math.isqrt(patches)
    if side * side != patches or not side:
        raise CheckpointError(f"the position embeddings of shape {tuple(pos_embed.shape)} are not for a square grid")
    return side


def nearest_model_type(config):
    """The model type that differs in the fewest fields from a model's config, and {field: value} of these."""
    candidates = {name: other for name, other in {**VITS, **CONFORMERS, **RESNETS}.items() if set(other) == set(config)}
    differences = {
        name: changed_fields(config, other) for name, other in candidates.items() if not other.get("cut_from")
    }
    name = min(differences, key=lambda name: len(differences[name]))
    return name, differences[name]


def changed_fields(config, other):
    """{field: value} of a config's fields that the `other` config lacks or has with another value."""
    return {name: value for name, value in config.items() if name not in NOT_DERIVED and other.get(name) != value}
