"""The models: `build_model` builds one by its published name."""

import difflib

from models.bit_resnet import BiTResNet
from models.configs import CHOICES, CONFORMERS, RESNETS, VITS, config_of, total_stride
from models.conformer import Conformer
from models.norms import TOKEN_NORMS
from models.npz import CheckpointError, num_classes_of
from models.token_reduction import REDUCTION_METHODS, TOKEN_REDUCTIONS
from models.vision_transformer import VisionTransformer

MODEL_TYPES = (*VITS, *CONFORMERS, *RESNETS)
NORM_TYPES = tuple(TOKEN_NORMS)

__all__ = [
    "CONFORMERS",
    "MODEL_TYPES",
    "NORM_TYPES",
    "REDUCTION_METHODS",
    "RESNETS",
    "TOKEN_REDUCTIONS",
    "VITS",
    "CheckpointError",
    "build_model",
    "canonical_model_type",
    "num_classes_of",
    "pixels_per_patch",
]


def canonical_model_type(name):
    """The name in MODEL_TYPES for `name`; Google writes hybrids with a plus: `R50+ViT-B_16`.

    Raises ValueError, which suggests the most similar names, if the name is unknown.
    """
    canonical = name.replace("+", "-")
    if canonical in MODEL_TYPES:
        return canonical
    nearest = difflib.get_close_matches(canonical, MODEL_TYPES, n=3, cutoff=0.5) or MODEL_TYPES
    raise ValueError(f"unknown model type {name!r}; did you mean {', '.join(nearest)}?")


def build_model(
    model_type,
    img_size=224,
    num_classes=10,
    norm_type="LN",
    token_reduction=None,
    keep_tokens=None,
    reduction_layer=None,
    tome_r=None,
    **overrides,
):
    """A model with newly initialised weights: (B, 3, H, W) images -> (B, num_classes) logits.

    `img_size` is the side in pixels or (height, width); ResNets accept any size. `norm_type` is the norm of a ViT's
    tokens. With a `token_reduction`, "facility", "tome" or "random", a ViT keeps `keep_tokens` of its patches after
    `reduction_layer` blocks: an int is a number of patches, a float a share of them like 0.25. "tome" can have `tome_r`
    in place of both, the number of tokens to merge in every block. A Conformer uses "facility" by default, and the
    other two values from its config; "none" keeps all patches. `overrides` replace fields of the model's config
    (models/configs.py), e.g. `num_layers=2` or `dropout_rate=0.1`.
    Raises ValueError for an unknown model type, field, norm type or token reduction, for a field's value of another
    type or out of range, and for an image size that is not a multiple of the patch size.
    """
    model_type = canonical_model_type(model_type)
    config = config_of(model_type).copy_and_resolve_references()
    if unknown := sorted(set(overrides) - set(config)):
        raise ValueError(f"{model_type} has no field {unknown[0]!r}; it has {', '.join(config)}")
    set_fields(config, overrides)
    if model_type not in RESNETS and config.hidden_size % config.num_heads:
        raise ValueError(f"hidden_size {config.hidden_size} is not a multiple of num_heads {config.num_heads}")
    reduction = {"token_reduction": token_reduction, "keep_tokens": keep_tokens, "reduction_layer": reduction_layer}
    reduction = {name: value for name, value in {**reduction, "tome_r": tome_r}.items() if value is not None}
    if model_type not in RESNETS:
        network = VisionTransformer if model_type in VITS else Conformer
        return network(config, img_size, num_classes, norm_type, **reduction)
    if norm_type != "LN":
        raise ValueError(f"{model_type} always has GroupNorm; the norm type {norm_type!r} is for ViTs")
    if reduction not in ({}, {"token_reduction": "none"}):
        raise ValueError(f"{model_type} has no tokens; {next(iter(reduction))} is for ViTs and Conformers")
    return BiTResNet(config, num_classes=num_classes)


def set_fields(config, overrides):
    """Replace fields of a config, {name: value}. Raises ValueError for a value of another type or out of range."""
    for name, value in overrides.items():
        numbers = [number for number in (value if isinstance(value, tuple) else [value]) if isinstance(number, int)]
        if name.endswith("_rate"):
            if isinstance(value, int | float) and not 0 <= value < 1:
                raise ValueError(f"{name} is at least 0 and less than 1, not {value}")
        elif min(numbers, default=1) < 1:
            raise ValueError(f"{name} is greater than 0, not {value}")
        if value not in CHOICES.get(name, (value,)):
            raise ValueError(f"{name} is {' or '.join(CHOICES[name])}, not {value!r}")
        try:
            config[name] = value
        except TypeError as error:
            kind = type(config[name]).__name__
            raise ValueError(f"{name} has values of the type {kind} like {config[name]!r}, not {value!r}") from error


def pixels_per_patch(model_type, **overrides):
    """The number of pixels that an image's side should be a multiple of: the patch size, or a ResNet's stride.

    `overrides` as in `build_model`; unknown fields are ignored.
    """
    config = config_of(canonical_model_type(model_type)).copy_and_resolve_references()
    set_fields(config, {name: value for name, value in overrides.items() if name in config})
    return total_stride(config)
