"""timm's ViT, hybrid (vit_*_r*_s*) and BiT (resnetv2_*_bit); DeiT and DINO have the names of timm's ViT.

Our names are timm's, except for those of a hybrid's stem. timm standardises kernels by sqrt(variance + 1e-8), and its
GroupNorm has the epsilon 1e-5 in the hybrid's stem too (timm/layers/std_conv.py, models/resnetv2.py).
"""

import re

import torch

from models.configs import STANDARDISATION as NUMERIC
from models.formats.fields import grid_side, nearest_model_type, resnet_config, vit_config
from models.formats.names import mean_std_text, table, to_ours, to_theirs
from models.formats.refused import check_vit, owner_of, refuse_fields, refuse_for_export, refuse_unsupported
from models.npz import CheckpointError

STEM, UNIT = "patch_embed.stem.", "patch_embed.stem.block{n+1}.unit{n+1}."
BACKBONE, BLOCK = "patch_embed.backbone.", "patch_embed.backbone.stages.{n}.blocks.{n}."
ROOT = table((f"{STEM}conv_root", f"{BACKBONE}stem.conv"), (f"{STEM}gn_root", f"{BACKBONE}stem.norm"))
ROOT_WITHOUT_STAGES = table((f"{STEM}conv_root", f"{BACKBONE}conv"), (f"{STEM}gn_root", f"{BACKBONE}norm"))
UNITS = table(
    *((f"{UNIT}conv{i}", f"{BLOCK}conv{i}") for i in (1, 2, 3)),
    *((f"{UNIT}gn{i}", f"{BLOCK}norm{i}") for i in (1, 2, 3)),
    (f"{UNIT}conv_proj", f"{BLOCK}downsample.conv"),
    (f"{UNIT}gn_proj", f"{BLOCK}downsample.norm"),
)
PRE_LOGITS = table(("pre_logits", "pre_logits.fc"))  # earlier versions only
NAMES = (*ROOT, *ROOT_WITHOUT_STAGES, *UNITS, *PRE_LOGITS)

STANDARDISATION = {"standardisation": "var", "standardisation_eps": 1e-8, "group_norm_eps": 1e-5}
GELUS = {"gelu": "exact", "gelu_tanh": "tanh"}  # {act_layer: our name}
HEADS = {"test_vit": 2}  # of architectures without the usual number
ENTRIES = {"model": "DeiT", "teacher": "DINO"}  # of a pickle

VIT = "vit_base_patch16_224"  # for all ViTs: its arguments replace every size
HYBRIDS = {  # {units of the stages: an architecture}; its arguments replace the sizes of the blocks
    (): "vit_tiny_r_s16_p8_224",
    (2, 2, 2, 2): "vit_small_r26_s32_224",
    (3, 4, 9): "vit_base_r50_s16_224",
    (3, 4, 6, 3): "vit_large_r50_s32_224",
}
STEM_FIELDS = {"root_width": 64, "root_stride": 4, "num_groups": 32, **STANDARDISATION}
RESNET_FIELDS = {"root_stride": 4, "num_groups": 32, **STANDARDISATION}
RESNETS = {  # {(units of the stages, width of the root): the architecture}
    ((3, 4, 6, 3), 64): "resnetv2_50x1_bit",
    ((3, 4, 6, 3), 192): "resnetv2_50x3_bit",
    ((3, 4, 23, 3), 64): "resnetv2_101x1_bit",
    ((3, 4, 23, 3), 192): "resnetv2_101x3_bit",
    ((3, 8, 36, 3), 128): "resnetv2_152x2_bit",
    ((3, 8, 36, 3), 256): "resnetv2_152x4_bit",
}


def is_vit(tensors):
    """Whether the names are those of timm's ViT."""
    return all(any(name.startswith(part) for name in tensors) for part in ("patch_embed.", "blocks.0."))


def is_resnet(tensors):
    """Whether the names are those of timm's BiT."""
    return any(name.startswith("stages.0.blocks.0.") for name in tensors) and any(
        name.startswith("stem.conv") for name in tensors
    )


def facts(checkpoint, num_heads=None):
    """{field of formats.Found: value}. Raises CheckpointError for a model that this project does not have."""
    config = checkpoint.config or {}
    architecture = config.get("architecture", "")
    tensors = without_dino_head(checkpoint.tensors)
    refuse_unsupported(tensors, owner_of(architecture) if architecture else None)
    published = config.get("pretrained_cfg", config)
    settings = config.get("model_args") or {}
    found = {"format": "timm", "classes": config.get("label_names"), "assumed": set()}
    if is_resnet(tensors):
        size = published.get("input_size", (3, 224, 224))[-1]
        found |= {"state": tensors, "config": resnet_config(tensors, **STANDARDISATION), "img_size": size}
        mean_std = "half"
    else:
        state = to_ours(tensors, NAMES)
        check_vit(state, architecture or "the checkpoint")
        state["pos_embed"] = with_class_position(state["pos_embed"])
        fields = vit_fields(config, settings)
        heads = settings.get("num_heads") or HEADS.get(architecture)
        known = vit_config(state, heads or num_heads, STANDARDISATION, **fields)
        found |= {"state": state, "config": known, "img_size": None}
        found["assumed"] |= set() if architecture else {"gelu", "num_heads"}
        has_head = "head.weight" in state
        mean_std = "imagenet" if checkpoint.entry in ENTRIES or not has_head else "half"
        found["format"] = ENTRIES.get(checkpoint.entry, "timm" if has_head or architecture else "timm or DINO")
    if "mean" in published and "std" in published:
        mean_std = mean_std_text(published["mean"], published["std"])
    else:
        found["assumed"].add("mean_std")
    return found | {"mean_std": mean_std}


def vit_fields(config, settings):
    """The fields of a ViT's config that its weights do not show. Raises CheckpointError for unknown ones."""
    activation = settings.get("act_layer") or "gelu"
    if activation not in GELUS:
        raise CheckpointError(f"act_layer {activation} is not supported; there is {', '.join(GELUS)}")
    if config.get("global_pool", "token") not in ("token", ""):
        raise CheckpointError(f"global_pool {config['global_pool']} is not supported: this model reads the class token")
    if settings.get("norm_layer") not in (None, "layernorm"):
        raise CheckpointError(f"norm_layer {settings['norm_layer']} is not supported; there is layernorm")
    return {"gelu": GELUS[activation], "layer_norm_eps": 1e-6}


def without_dino_head(tensors):
    """The tensors without DINO's projection head."""
    return {name: tensor for name, tensor in tensors.items() if not re.match(r"head\.(mlp|last_layer)\.", name)}


def with_class_position(pos_embed):
    """Position embeddings (1, 1 + N, hidden): a zero for the class token if it has none (`no_embed_class`)."""
    try:
        grid_side(pos_embed)
    except CheckpointError:
        padded = torch.nn.functional.pad(pos_embed, (0, 0, 1, 0))
        grid_side(padded)
        return padded
    return pos_embed


def exported(model, card):
    """({name: tensor}, config.json) of a model for `timm.create_model("local-dir:...")`. Raises CheckpointError."""
    refuse_for_export(model, "timm")
    is_vit = "hidden_size" in model.config
    architecture, arguments = vit_arguments(model.config, card.img_size) if is_vit else (resnet_name(model.config), {})
    tensors = model.state_dict()
    first = "stem.conv"
    if is_vit:
        stages = model.config.resnet_layers
        tensors = to_theirs(tensors, (*(ROOT if stages else ROOT_WITHOUT_STAGES), *UNITS))
        first = "patch_embed.proj" if stages is None else f"{BACKBONE}{'stem.' if stages else ''}conv"
    published = {
        "num_classes": model.num_classes,
        "input_size": [3, card.img_size, card.img_size],
        "fixed_input_size": is_vit,
        "interpolation": "bilinear",
        "crop_pct": card.img_size / card.shorter_side if card.shorter_side else 1.0,
        "crop_mode": "center" if card.shorter_side else "squash",
        "mean": card.mean,
        "std": card.std,
        "first_conv": first,
        "classifier": "head" if is_vit else "head.fc",
    }
    config = {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "num_features": tensors[f"{published['classifier']}.weight"].shape[1],
        "global_pool": "token" if is_vit else "avg",
        "label_names": card.classes,
        "model_args": arguments,
        "pretrained_cfg": published,
    }
    return tensors, config


def vit_arguments(config, img_size):
    """(architecture, arguments) of timm's ViT or hybrid. Raises CheckpointError."""
    refuse_fields(config, {"layer_norm_eps": 1e-6}, "timm's ViTs", numeric=("layer_norm_eps",))
    architecture, ratio = VIT, config.mlp_dim / config.hidden_size
    if config.resnet_layers is not None:
        refuse_fields(config, STEM_FIELDS, "timm's hybrids", NUMERIC)
        architecture = architecture_of(HYBRIDS, tuple(config.resnet_layers), config)
    return architecture, {
        "img_size": img_size,
        "patch_size": config.patch_size,
        "embed_dim": config.hidden_size,
        "depth": config.num_layers,
        "num_heads": config.num_heads,
        "mlp_ratio": ratio if int(config.hidden_size * ratio) == config.mlp_dim else ratio + 0.5 / config.hidden_size,
        "act_layer": next(theirs for theirs, ours in GELUS.items() if ours == config.gelu),
    }


def resnet_name(config):
    """The architecture of a BiT. Raises CheckpointError."""
    refuse_fields(config, RESNET_FIELDS, "timm's BiTs", NUMERIC)
    widths = tuple(4 * config.root_width * 2**stage for stage in range(len(config.resnet_layers)))
    refuse_fields(config, {"stage_widths": widths}, "timm's BiTs")
    return architecture_of(RESNETS, (tuple(config.resnet_layers), config.root_width), config)


def architecture_of(names, key, config):
    """The entry of a table. Raises CheckpointError that names the model without one."""
    if key not in names:
        model_type, _ = nearest_model_type(config)
        raise CheckpointError(
            f"timm has no architecture with {tuple(config.resnet_layers)} units and a root of {config.root_width} "
            f"channels (nearest model type: {model_type}); export it to onnx or npz"
        )
    return names[key]
