"""Hugging Face's ViTForImageClassification, ViTModel and BitForImageClassification, as transformers saves them.

ViT's weights have two spellings: that of transformers 4, and that of its modules in transformers 5. BiT standardises
kernels by sqrt(variance + 1e-8) (transformers/models/bit/modeling_bit.py).
"""

import re

from models.configs import STANDARDISATION as NUMERIC
from models.formats.fields import resnet_config, vit_config
from models.formats.names import mean_std_text, table, to_ours, to_theirs
from models.formats.refused import check_vit, owner_of, refuse_fields, refuse_for_export, refuse_unsupported
from models.npz import CheckpointError

LAYER, LATER = "encoder.layer.{n}.", "layers.{n}."
VIT_NAMES = table(
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    ("blocks.{n}.norm1", f"{LAYER}layernorm_before"),
    ("blocks.{n}.attn.qkv", tuple(f"{LAYER}attention.attention.{part}" for part in ("query", "key", "value"))),
    ("blocks.{n}.attn.proj", f"{LAYER}attention.output.dense"),
    ("blocks.{n}.norm2", f"{LAYER}layernorm_after"),
    ("blocks.{n}.mlp.fc1", f"{LAYER}intermediate.dense"),
    ("blocks.{n}.mlp.fc2", f"{LAYER}output.dense"),
    ("norm", "layernorm"),
    ("head", "classifier"),
    ("blocks.{n}.norm1", f"{LATER}layernorm_before"),
    ("blocks.{n}.attn.qkv", tuple(f"{LATER}attention.{part}_proj" for part in "qkv")),
    ("blocks.{n}.attn.proj", f"{LATER}attention.o_proj"),
    ("blocks.{n}.norm2", f"{LATER}layernorm_after"),
    ("blocks.{n}.mlp.fc1", f"{LATER}mlp.fc1"),
    ("blocks.{n}.mlp.fc2", f"{LATER}mlp.fc2"),
)
UNIT, THEIRS = "stages.{n}.blocks.{n}.", "encoder.stages.{n}.layers.{n}."
BIT_NAMES = table(
    ("stem.conv", "embedder.convolution"),
    *((f"{UNIT}{part}", f"{THEIRS}{part}") for part in ("norm1", "conv1", "norm2", "conv2", "norm3", "conv3")),
    (f"{UNIT}downsample.conv", f"{THEIRS}downsample.conv"),
    ("norm", "norm"),
    ("head.fc", "classifier.1"),
)
GELUS = {
    **dict.fromkeys(("gelu", "gelu_python"), "exact"),
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate"), "tanh"),
}
STANDARDISATION = {"standardisation": "var", "standardisation_eps": 1e-8, "group_norm_eps": 1e-5}
DEFAULT_EPS = 1e-12  # ViTConfig's
HIDDEN_ACT = {"exact": "gelu", "tanh": "gelu_pytorch_tanh"}  # to write
BILINEAR = 2  # of Pillow
CHANNEL_DIVISOR = 32  # of a BiT's stages: a bottleneck has a quarter of the channels, rounded to a multiple of 8


def is_vit(tensors):
    """Whether the names are those of a ViT."""
    return any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in tensors)


def is_resnet(tensors):
    """Whether the names are those of a BiT."""
    return any(name.endswith("embedder.convolution.weight") for name in tensors)


def facts(checkpoint, num_heads=None):
    """{field of formats.Found: value}. Raises CheckpointError for a model that this project does not have."""
    config = checkpoint.config or {}
    model_type = config.get("model_type")
    tensors = {re.sub(r"^(vit|bit)\.", "", name): tensor for name, tensor in checkpoint.tensors.items()}
    refuse_unsupported(tensors, owner_of(model_type) if model_type not in (None, "vit", "bit") else None)
    if model_type not in (None, "vit", "bit"):
        raise CheckpointError(f"transformers' model type {model_type} is not supported; there is vit and bit")
    found = {
        "format": "transformers",
        "classes": classes_of(config),
        "assumed": set(),
        **(vit_facts(tensors, config, num_heads) if is_vit(tensors) else bit_facts(tensors, config)),
    }
    found["assumed"] |= set() if config or not is_vit(tensors) else {"gelu", "num_heads", "layer_norm_eps"}
    preprocessor = checkpoint.preprocessor or {}
    if "image_mean" in preprocessor and "image_std" in preprocessor and preprocessor.get("do_normalize", True):
        return found | {"mean_std": mean_std_text(preprocessor["image_mean"], preprocessor["image_std"])}
    if preprocessor.get("do_normalize") is False:
        return found | {"mean_std": mean_std_text((0,) * 3, (1,) * 3)}
    return found | {"mean_std": "half", "assumed": found["assumed"] | {"mean_std"}}


def vit_facts(tensors, config, num_heads):
    """What is particular to a ViT; its pooler, which a classifier does not use, is left out."""
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("pooler.")}
    tensors.pop("embeddings.mask_token", None)
    state = to_ours(tensors, VIT_NAMES)
    check_vit(state)
    activation = config.get("hidden_act", "gelu")
    if activation not in GELUS:
        raise CheckpointError(f"hidden_act {activation} is not supported; there is {', '.join(GELUS)}")
    num_heads = config.get("num_attention_heads") or (12 if config else num_heads)  # 12: ViTConfig's default
    fields = {"gelu": GELUS[activation], "layer_norm_eps": config.get("layer_norm_eps", DEFAULT_EPS)}
    return {"state": state, "config": vit_config(state, num_heads, **fields), "img_size": None}


def bit_facts(tensors, config):
    """What is particular to a BiT."""
    expected = {
        "layer_type": "preactivation",
        "hidden_act": "relu",
        "global_padding": None,
        "embedding_dynamic_padding": False,
        "output_stride": 32,
    }
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise CheckpointError(f"{name} {config[name]} is not supported; BiT has {value}")
    state = to_ours(tensors, BIT_NAMES)
    if "head.fc.weight" in state:
        state["head.fc.weight"] = state["head.fc.weight"][:, :, None, None]
    known = resnet_config(state, num_groups=config.get("num_groups", 32), **STANDARDISATION)
    return {"state": state, "config": known, "img_size": 224}


def classes_of(config):
    """The names of the classes, or None if they are only numbered."""
    names = {int(number): name for number, name in (config.get("id2label") or {}).items()}
    if not names or all(name == f"LABEL_{number}" for number, name in names.items()):
        return None
    return [names[number] for number in sorted(names)]


def exported(model, card):
    """({name: tensor}, config.json, preprocessor_config.json) for transformers. Raises CheckpointError."""
    refuse_for_export(model, "transformers")
    is_vit = "hidden_size" in model.config
    architecture, fields = vit_settings(model, card.img_size) if is_vit else bit_settings(model.config)
    tensors = to_theirs(model.state_dict(), VIT_NAMES if is_vit else BIT_NAMES)
    prefix = f"{fields['model_type']}."
    tensors = {name if name.startswith("classifier.") else prefix + name: each for name, each in tensors.items()}
    if not is_vit:
        tensors["classifier.1.weight"] = tensors["classifier.1.weight"].flatten(1)
    config = {
        "architectures": [architecture],
        **fields,
        "id2label": {str(number): name for number, name in enumerate(card.classes)},
        "label2id": {name: number for number, name in enumerate(card.classes)},
    }
    return tensors, config, preprocessor_of(card)


def vit_settings(model, img_size):
    """(class, fields of ViTConfig). Raises CheckpointError for a hybrid."""
    config = model.config
    if config.resnet_layers is not None:
        raise CheckpointError("transformers' ViT has no ResNet stem (hybrid); export it to onnx or npz")
    return "ViTForImageClassification", {
        "model_type": "vit",
        "image_size": img_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "hidden_act": HIDDEN_ACT[config.gelu],
        "layer_norm_eps": config.layer_norm_eps,
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def bit_settings(config):
    """(class, fields of BitConfig). Raises CheckpointError."""
    refuse_fields(config, {"root_stride": 4, **STANDARDISATION}, "transformers' BiTs", NUMERIC)
    if width := next((width for width in config.stage_widths if width % CHANNEL_DIVISOR), None):
        raise CheckpointError(
            f"transformers' BiTs have multiples of {CHANNEL_DIVISOR} channels, this model has {width}; export it to "
            "onnx or npz"
        )
    return "BitForImageClassification", {
        "model_type": "bit",
        "layer_type": "preactivation",
        "embedding_size": config.root_width,
        "hidden_sizes": list(config.stage_widths),
        "depths": list(config.resnet_layers),
        "num_groups": config.num_groups,
    }


def preprocessor_of(card):
    """preprocessor_config.json: images are resized as here, without or with a centre crop."""
    square = {"height": card.img_size, "width": card.img_size}
    resize = {"image_processor_type": "ViTImageProcessor", "size": square}
    if card.shorter_side:
        resize = {
            "image_processor_type": "BitImageProcessor",
            "size": {"shortest_edge": card.shorter_side},
            "do_center_crop": True,
            "crop_size": square,
        }
    return {
        **resize,
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": BILINEAR,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": card.mean,
        "image_std": card.std,
    }
