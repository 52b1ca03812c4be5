"""Checkpoints of other libraries and of runs -> our model's config and state dict, and from there Google's arrays.

`identify` decides by the file's metadata, then by its config.json, then by the names of the weights. Each format is a
module with `facts`, and with a table of names that is read both ways (models/formats/names.py). A checkpoint is an
object with these attributes (utils/checkpoint_files.py reads one):

tensors       {name: tensor}, also without memory: the config is derived from shapes
metadata      {name: text} of a .safetensors file
config        config.json as a dictionary, or None
preprocessor  preprocessor_config.json as a dictionary, or None
entry         the entry of a pickle that holds the tensors, such as "model" or "teacher", or None
"""

import re
from typing import NamedTuple

import torch
from ml_collections import ConfigDict

from models import npz
from models.configs import total_stride
from models.formats import runs, timm, transformers, vit_pytorch
from models.formats.fields import grid_side, nearest_model_type
from models.npz import CheckpointError, and_more

MODULES = (vit_pytorch, transformers, timm)
PREFIXES = re.compile(r"^(module\.|_orig_mod\.|timm_model\.)+")
FAMILIES = {"vit": "a ViT", "conformer": "a Conformer", "resnet": "a BiT ResNet"}
KNOWN = "Google's .npz, runs of this project, timm, transformers, DeiT, DINO and ViT-pytorch"


class Found(NamedTuple):
    """What a checkpoint holds."""

    format: str
    config: ConfigDict
    """The model's config (models/configs.py)."""
    model_type: str
    """The run's model type, or the nearest one."""
    fields: dict
    """{field: value} of the config that differ from those of the model type."""
    state: dict
    """{name: tensor} with the names of our state dict."""
    img_size: int
    num_classes: int | None
    """None without a head."""
    classes: list | None
    """Names of the classes, if they are known."""
    mean_std: str
    """The value of the flag --mean_std: half, imagenet, or three means and three standard deviations with commas."""
    assumed: set
    """What the checkpoint does not say: some of gelu, num_heads, layer_norm_eps, mean_std."""
    keywords: dict
    """Keywords of a ViT or Conformer: norm_type, token_reduction, keep_tokens, reduction_layer, tome_r."""


def identify(checkpoint, num_heads=None):
    """The Found of a checkpoint; `num_heads` is used if the checkpoint does not say it.

    Raises CheckpointError, which names what our models do not have.
    """
    if runs.is_run(checkpoint):
        facts = runs.facts(checkpoint)
    else:
        checkpoint = without_prefixes(checkpoint)
        module = next((m for m in MODULES if m.is_vit(checkpoint.tensors) or is_resnet_of(m, checkpoint)), None)
        if module is None:
            raise CheckpointError(f"its format is unknown ({describe(checkpoint)}); there is {KNOWN}")
        facts = module.facts(checkpoint, num_heads)
    for name, tensor in facts["state"].items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"{name} holds {tensor.dtype}, expected floating-point numbers")
    head = next((facts["state"][name] for name in ("head.weight", "head.fc.weight") if name in facts["state"]), None)
    if "model_type" not in facts:
        facts["model_type"], facts["fields"] = nearest_model_type(facts["config"])
    facts["img_size"] = facts["img_size"] or trained_size(facts["config"], facts["state"])
    return Found(**{"keywords": {}, **facts, "num_classes": None if head is None else len(head)})


def is_resnet_of(module, checkpoint):
    return hasattr(module, "is_resnet") and module.is_resnet(checkpoint.tensors)


def describe(checkpoint):
    """Something that helps to recognise a checkpoint of an unknown format."""
    model_type = (checkpoint.config or {}).get("model_type")
    if model_type:
        return f"model type {model_type}"
    return f"first name {next(iter(checkpoint.tensors), 'none')}"


def without_prefixes(checkpoint):
    """The checkpoint without prefixes of wrappers, without what is next to a backbone, and without a run's config."""
    tensors = {PREFIXES.sub("", name): tensor for name, tensor in checkpoint.tensors.items()}
    if any(name.startswith("backbone.") for name in tensors):
        tensors = {
            name.removeprefix("backbone."): tensor for name, tensor in tensors.items() if name.startswith("backbone.")
        }
    config = checkpoint.config if checkpoint.config and "flags" not in checkpoint.config else None
    return checkpoint._replace(tensors=tensors, config=config)


def trained_size(config, state):
    """The side in pixels of the square images that the position embeddings are for."""
    return grid_side(state["pos_embed"]) * total_stride(config)


def arrays_of(checkpoint, networks, num_heads=None):
    """{key: array} under Google's keys of the model in a checkpoint, as its `export_npz` returns them.

    `networks` are {"vit", "conformer" or "resnet": function of (config, img_size, num_classes, **keywords)}. Without a
    head there are no keys of one. Raises CheckpointError for another model, and for weights that do not fit.
    """
    found = identify(checkpoint, num_heads)
    family = family_of(found.config)
    if family not in networks:
        raise CheckpointError(f"it holds {FAMILIES[family]}")
    with torch.device("meta"):
        source = networks[family](found.config, found.img_size, found.num_classes or 1, **found.keywords)
        if "pre_logits.weight" in found.state:
            source.pre_logits = torch.nn.Linear(*reversed(found.state["pre_logits.weight"].shape))
    expected, state = source.state_dict(), dict(found.state)
    if found.num_classes is None:
        state |= {name: torch.zeros(expected[name].shape) for name in expected if name.startswith("head.")}
    check_state(state, expected)
    source.load_state_dict(state, assign=True)
    arrays = source.export_npz()
    return arrays if found.num_classes else {key: array for key, array in arrays.items() if not npz.is_head(key)}


def check_state(state, expected):
    """Raise CheckpointError for a weight that is missing, left over or of another shape than the `expected` one."""
    missing = [name for name in expected if name not in state]
    if missing:
        shape = tuple(expected[missing[0]].shape)
        raise CheckpointError(f"{missing[0]} is missing, expected shape {shape}{and_more(missing)}")
    left_over = [name for name in state if name not in expected]
    if left_over:
        raise CheckpointError(f"{left_over[0]} is left over, the model has no such weights{and_more(left_over)}")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}")


def family_of(config):
    """The key in FAMILIES of a model's config."""
    if "hidden_size" not in config:
        return "resnet"
    return "conformer" if "cnn_units" in config else "vit"
