"""What other Vision Transformers have and this model does not, by the names of weights, and the other way round."""

import re

from models.configs import format_fields
from models.norms import TOKEN_NORMS
from models.npz import CheckpointError

OWNERS = ("DINOv3", "DINOv2", "DeiT-3", "CaiT", "BEiT", "SigLIP", "CLIP", "EVA", "Swin", "MobileViT")
# {regular expression: what the model has}; the first that is found is reported.
PARTS = {
    r"\.ls[12]\.|\.layer_?scale|lambda_?[12]$|\.gamma_?[12]$": "LayerScale",
    r"^(reg_token|register_tokens?|storage_tokens?)$|\.register_tokens$": "register tokens",
    r"(^|\.)(dist_token|distillation_token)$|head_dist\.|distillation_classifier\.": "a distillation token",
    r"\.mlp\.(w12|w3|fc1_g|gate_proj|weights_in)\.": "SwiGLU",
    r"relative_position|rel_pos": "relative position bias",
    r"\.attn\.[qk]_norm\.|\.attention\.[qk]_norm\.": "a norm of queries and keys",
    r"\.attn\.(q_bias|v_bias)$": "queries and values with a bias, but keys without one",
    r"^hybrid_model\.|embeddings\.hybrid_model\.": "a ResNet stem with symmetric padding (a hybrid of ViT-pytorch)",
    r"running_mean$": "batch normalisation",
    r"^stem\.conv1\.|backbone\.(stem\.)?conv1\.|patch_embed\.backbone\.\d": "a deep stem of several convolutions",
    r"^norm_pre\.|^pre_layrnorm\.|patch_embed\.norm\.": "a norm before its first block",
    r"^fc_norm\.": "a head that reads the mean of the patches",
    r"^attn_pool\.": "a head with attention pooling",
    r"\.(attn|mlp)\.norm\.": "a norm inside of its branches",
    r"\.attns\.|\.ffns\.|blocks\.\d+\.in_proj\.": "parallel branches in its blocks",
    r"^rope|\.rope": "rotary position embeddings",
    r"^decoder": "a decoder",
    r"part_head\.|part_layer\.|part_select": "a selection of parts (TransFG)",
}


def refuse_unsupported(tensors, owner=None):
    """Raise CheckpointError that names the first part that this project's models lack; `owner` names their model."""
    for expression, part in PARTS.items():
        if name := next((name for name in tensors if re.search(expression, name)), None):
            if owner is None:
                owner = "DINOv2" if "mask_token" in tensors and part == "LayerScale" else "the checkpoint"
            raise CheckpointError(f"{owner} has {part}, which this model does not have ({name})")


def owner_of(name):
    """The usual name of a model in a library's name such as vit_small_patch14_dinov2.lvd142m; else the name itself."""
    plain = name.lower().replace("-", "").replace("_", "")
    return next((owner for owner in OWNERS if owner.lower().replace("-", "") in plain), name)


def check_vit(state, owner="the checkpoint"):
    """Raise CheckpointError if a ViT with our names lacks what each of our models has."""
    if "cls_token" not in state:
        raise CheckpointError(f"{owner} has no class token, from which this model computes its logits")
    if "pos_embed" not in state:
        raise CheckpointError(f"{owner} has no learned position embeddings (pos_embed)")
    if "blocks.0.attn.qkv.weight" in state and "blocks.0.attn.qkv.bias" not in state:
        raise CheckpointError(f"{owner} has queries, keys and values without bias, which this model does not have")


def refuse_for_export(model, library):
    """Raise CheckpointError that names what this ViT, hybrid, Conformer or ResNet has and another `library` lacks."""
    if "hidden_size" not in model.config:
        return
    norm_type = next(name for name, norm in TOKEN_NORMS.items() if type(model.blocks[0].norm1) is norm)
    parts = {
        "a Conformer's CNN": "cnn_units" in model.config,
        f"the norm {norm_type} of tokens": norm_type != "LN",
        "a token reduction": model.reduction is not None,
        "the layer pre_logits before the head": model.pre_logits is not None,
    }
    if part := next((part for part, is_present in parts.items() if is_present), None):
        raise CheckpointError(f"{library} has no model with {part}; export it to onnx or npz")


def refuse_fields(config, expected, owner, numeric=()):
    """Raise CheckpointError unless the config has the `expected` {field: value}, which all models of the `owner` have.

    The error suggests to set the fields in `numeric`, if no other one differs.
    """
    differing = {name: value for name, value in expected.items() if config[name] != value}
    if not differing:
        return
    name, value = next(iter(differing.items()))
    way_out = "export it to onnx or npz"
    if set(differing) <= set(numeric):
        flag = f"--model_fields {' '.join(format_fields(differing))}"
        way_out += f", or accept their rule, which changes the logits, by {flag}"
    raise CheckpointError(f"{owner} have {name} {value}, this model has {config[name]}; {way_out}")
