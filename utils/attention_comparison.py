"""The attention of several models to the same image in one figure, one row per model."""

import torch

from utils.attention import attention_of, class_token_mask, first_head, rollout
from utils.errors import UserError
from utils.figures import plot_attention_matrices, plot_attention_rows, prediction_caption


def check_comparable(models):
    """Raise UserError unless {path: SavedModel} are ViTs that see the same patches of the same part of an image."""
    found = {}
    for path, saved in models.items():
        if not hasattr(saved.model, "forward_with_attention"):
            raise UserError(f"{path} is a CNN without attention; give several --checkpoint files of ViTs alone")
        rows, columns = saved.model.patch_embed.grid_size
        found.setdefault(f"{rows}x{columns} patches of {'the centre' if saved.crops else 'the whole'}", path)
    if len(found) > 1:
        seen = ", ".join(f"{path} sees {patches}" for patches, path in found.items())
        raise UserError(f"several --checkpoint files need the same patches of an image; {seen}")


@torch.no_grad()
def compare_attention(models, blocks, picture, title, kinds=("blocks", "matrix")):
    """{kind: Figure}: "blocks" are maps over the `picture` (3, H, W), "matrix" the weights of the first head.

    `models` is {label: (ViT, its input (1, 3, H, W), class names)}; all ViTs have the same grid of patches. The maps
    are the attention rollout, and the class token's attention in the `blocks`, the mean of the heads.
    """
    maps, matrices = {}, {}
    for label, (model, images, classes) in models.items():
        logits, attention, _ = attention_of(model, images)
        grid_size = model.patch_embed.grid_size
        row = f"{label}\npredicted:\n{prediction_caption(logits, classes)}"
        means = {f"block {block}": attention[block].mean(dim=1) for block in blocks}
        of_model = {"attention rollout": rollout(attention), **means}
        maps[row] = {name: class_token_mask(weights[0], grid_size).cpu() for name, weights in of_model.items()}
        matrices[row] = first_head(attention, blocks)[0]
    figures = {}
    if "blocks" in kinds:
        figures["blocks"] = plot_attention_rows(picture, maps, f"{title}: attention of the class token")
    if "matrix" in kinds:
        title = f"{title}: attention weights of the first head"
        figures["matrix"] = plot_attention_matrices(matrices, blocks, grid_size, title)
    return figures
