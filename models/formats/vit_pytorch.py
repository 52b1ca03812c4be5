"""ViT-pytorch (github.com/jeonsworld/ViT-pytorch), an earlier port of Google's ViT, and its descendants.

It has the exact GELU and the LayerNorm epsilon 1e-6. Its hybrids, whose padding is symmetric, are refused.
"""

from models.formats.fields import vit_config
from models.formats.names import table, to_ours
from models.formats.refused import check_vit, refuse_unsupported

EMBEDDINGS, LAYER = "transformer.embeddings.", "transformer.encoder.layer.{n}."
NAMES = table(
    ("cls_token", f"{EMBEDDINGS}cls_token"),
    ("pos_embed", f"{EMBEDDINGS}position_embeddings"),
    ("patch_embed.proj", f"{EMBEDDINGS}patch_embeddings"),
    ("blocks.{n}.norm1", f"{LAYER}attention_norm"),
    ("blocks.{n}.attn.qkv", tuple(f"{LAYER}attn.{part}" for part in ("query", "key", "value"))),
    ("blocks.{n}.attn.proj", f"{LAYER}attn.out"),
    ("blocks.{n}.norm2", f"{LAYER}ffn_norm"),
    ("blocks.{n}.mlp.fc1", f"{LAYER}ffn.fc1"),
    ("blocks.{n}.mlp.fc2", f"{LAYER}ffn.fc2"),
    ("norm", "transformer.encoder.encoder_norm"),
)


def is_vit(tensors):
    """Whether the names are those of ViT-pytorch."""
    return f"{EMBEDDINGS}patch_embeddings.weight" in tensors


def facts(checkpoint, num_heads=None):
    """{field of formats.Found: value}. Raises CheckpointError for a model that this project does not have."""
    refuse_unsupported(checkpoint.tensors)
    state = to_ours(checkpoint.tensors, NAMES)
    check_vit(state)
    return {
        "format": "ViT-pytorch",
        "state": state,
        "config": vit_config(state, num_heads, gelu="exact", layer_norm_eps=1e-6),
        "img_size": None,
        "mean_std": "half",
        "classes": None,
        "assumed": {"num_heads", "mean_std"},
    }
