"""Numbers computed from a model's attention weights, position embeddings, filters and gradients.

N is the number of tokens: the class token and one token per patch. utils/figures.py draws these numbers.
"""

import torch
import torch.nn.functional as F
from torch import nn


def attention_of(model, images):
    """(logits, attention, clusters) of a ViT for images (B, 3, H, W).

    `attention` is a list with one tensor (B, heads, N, N) per block, first block first. After a token reduction the
    weights among clusters are expanded to all tokens. `clusters` is a list with the Clusters after each merge of
    tokens, empty without a token reduction.
    """
    logits, attention, clusters = model.forward_with_clusters(images)
    return logits, expand_attention(attention, clusters), clusters


def expand_attention(attention, clusters):
    """Expand a list of attention weights among N tokens or K clusters of them to weights (B, heads, N, N).

    `clusters` is that of `attention_of`; K shows which of them a block has. A token has the attention of its cluster,
    and receives an equal share of what its cluster receives. So rows still sum to 1, and the rollout of the class token
    is the same as among clusters.
    """
    factors = {each.kept.shape[1]: expansion(each.assignment) for each in clusters}
    expanded = []
    for weights in attention:
        members, shares = factors.get(weights.shape[-1], (None, None))
        expanded.append(weights if members is None else members @ weights.float() @ shares)
    return expanded


def expansion(assignment):
    """Factors (B, 1, N, K) and (B, 1, K, N) that expand weights among clusters; `assignment` (B, N) as in Clusters."""
    members = F.one_hot(assignment).float()  # (B, N, K)
    shares = members / members.sum(dim=1, keepdim=True)
    return members[:, None], shares[:, None].transpose(-2, -1)


def rollout(attention):
    """Attention rollout (Abnar and Zuidema, 2020): how much each output token depends on each input token.

    `attention` is a list of (B, heads, N, N), first block first. Returns (B, N, N); rows sum to 1. The heads of each
    block are averaged, the identity is added for the residual connection, and the rows are normalised again.
    """
    joint = None
    for weights in attention:
        mixed = weights.float().mean(dim=1)
        mixed = mixed + torch.eye(mixed.shape[-1], device=mixed.device)
        mixed = mixed / mixed.sum(dim=-1, keepdim=True)
        joint = mixed if joint is None else mixed @ joint
    return joint


def first_head(attention, blocks):
    """The attention matrices of the first head in some `blocks`: (B, len(blocks), N, N) on the CPU, query by key."""
    return torch.stack([attention[block][:, 0].float() for block in blocks], dim=1).cpu()


def class_token_mask(weights, grid_size):
    """Attention of the class token to each patch, relative to uniform: (..., N, N) -> (..., rows, columns), mean 1."""
    row = weights[..., 0, 1:].float()
    row = row / row.mean(dim=-1, keepdim=True).clamp(min=1e-12)
    return row.unflatten(-1, grid_size)


def attention_distance(attention, grid_size, img_size):
    """Mean attention distance in pixels (figure 7 of the ViT paper): (blocks, heads).

    For a patch this is the mean distance to all patches, weighted by its attention to them, without the class token;
    it is averaged over patches and images. `img_size` is (height, width) of the input in pixels.
    """
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in grid_size), indexing="ij")
    patch_size = torch.tensor(img_size) / torch.tensor(grid_size)
    places = torch.stack([rows.flatten(), columns.flatten()], dim=1) * patch_size
    distances = torch.cdist(places, places).to(attention[0].device)  # (patches, patches)
    means = []
    for weights in attention:
        among_patches = weights[:, :, 1:, 1:].float()
        among_patches = among_patches / among_patches.sum(dim=-1, keepdim=True).clamp(min=1e-12)
        means.append((among_patches * distances).sum(dim=-1).mean(dim=(0, 2)))
    return torch.stack(means).cpu()


def cluster_grid(clusters, grid_size):
    """The first image's Clusters after one merge on the grid of patches, without the class token.

    Returns each patch's cluster number (rows, columns) and the [(row, column), ...] of the patches that were kept.
    """
    numbers = (clusters.assignment[0, 1:] - 1).unflatten(0, grid_size).cpu()
    return numbers, [divmod(patch - 1, grid_size[1]) for patch in clusters.kept[0, 1:].tolist()]


def position_similarity(pos_embed, grid_size):
    """Cosine similarity between the position embeddings of all patches: (rows, columns, rows, columns)."""
    patches = F.normalize(pos_embed[0, 1:].detach().float(), dim=1)
    return (patches @ patches.T).view(*grid_size, *grid_size).cpu()


def first_convolution(model):
    """A ViT's patch embedding, or the root convolution of a hybrid's stem."""
    return model.patch_embed.stem.conv_root if model.patch_embed.stem else model.patch_embed.proj


def principal_filters(kernels, count=28):
    """The first principal components of kernels (filters, 3, h, w), as RGB images (count, h, w, 3) in [0, 1]."""
    flat = kernels.detach().float().cpu().flatten(1)
    _, _, components = torch.linalg.svd(flat - flat.mean(dim=0), full_matrices=False)
    count = min(count, len(flat) - 1)  # n filters minus their mean span n - 1 directions
    images = components[:count].view(-1, *kernels.shape[1:]).permute(0, 2, 3, 1)
    return 0.5 + 0.5 * images / images.abs().amax(dim=(1, 2, 3), keepdim=True)


def class_maps(model, image, classes, clusters=()):
    """Maps of the patches that speak for each of `classes` (C,): {name: (C, rows, columns)} relative to their mean.

    `image` is (1, 3, H, W). A CNN has only Grad-CAM. `clusters` are those that `attention_of` returns for the image.
    """
    images = image.expand(len(classes), -1, -1, -1)
    if not hasattr(model, "forward_with_attention"):
        return {"Grad-CAM": grad_cam(model, model.stages[-1].blocks, images, classes).cpu()}
    relevance = class_relevance(model, images, classes)
    return {
        "Grad-CAM": token_grad_cam(model, images, classes, clusters).cpu(),
        "attention relevance": class_token_mask(relevance, model.patch_embed.grid_size).cpu(),
    }


def grad_cam(model, layer, images, classes):
    """Grad-CAM (Selvaraju et al., 2017) of a CNN for `classes` (B,), relative to its mean: (B, rows, columns).

    `layer` is the module whose output is weighted by its gradients. Computed by captum, PyTorch's own library.
    """
    from captum.attr import LayerGradCam

    with torch.enable_grad():
        maps = LayerGradCam(model, layer).attribute(images, classes, relu_attributions=True)[:, 0].detach()
    return maps / maps.mean(dim=(1, 2), keepdim=True).clamp(min=1e-12)


def token_grad_cam(model, images, classes, clusters=()):
    """Grad-CAM on the last block of a ViT for `classes` (B,), relative to its mean: (B, rows, columns).

    The feature map is the patches' input of the last attention, after its norm: the head reads the class token only,
    so no class depends on what the last block returns for the patches. `clusters` are those that `attention_of` returns
    for the images, or for one that all are equal to; each patch gets the value of its cluster.
    """
    from captum.attr import LayerGradCam

    feature_map = nn.Identity()  # (B, hidden, patches), channels first as captum expects them

    def replace_patches(module, inputs, x):
        return torch.cat([x[:, :1], feature_map(x[:, 1:].transpose(1, 2)).transpose(1, 2)], dim=1)

    with torch.enable_grad(), model.blocks[-1].norm1.register_forward_hook(replace_patches):
        images = images.detach().requires_grad_()  # so that there is a graph also if the weights are frozen
        maps = LayerGradCam(model, feature_map).attribute(images, classes, relu_attributions=True)[:, 0].detach()
    for each in clusters:
        if each.kept.shape[1] == 1 + maps.shape[1]:  # those of the last block's attention
            maps = maps.gather(1, each.assignment[:, 1:].expand(len(maps), -1) - 1)
            break
    maps = maps / maps.mean(dim=1, keepdim=True).clamp(min=1e-12)
    return maps.unflatten(1, model.patch_embed.grid_size)


def class_relevance(model, images, classes):
    """Relevance of each input token to each output token of a ViT for the logits of `classes` (B,): (B, N, N).

    Equations 5 and 6 of Chefer et al. (2021), "Generic Attention-model Explainability": R starts as the identity, and
    each block, first block first, adds E_h[(grad A * A)^+] R, where E_h is the mean over heads and grad A the gradient
    of the class's logit with respect to the attention weights A. The class token's row explains the logit. After a
    token reduction the products are expanded to all tokens as in `expand_attention`.
    """
    with torch.enable_grad():
        images = images.detach().requires_grad_()  # so that there is a graph also if the weights are frozen
        logits, attention, clusters = model.forward_with_clusters(images)
        gradients = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), attention)
    products = [
        (gradient * weights.detach()).clamp(min=0).mean(dim=1, keepdim=True).float()
        for gradient, weights in zip(gradients, attention, strict=True)
    ]
    products = expand_attention(products, clusters)
    relevance = torch.eye(products[0].shape[-1], device=images.device)
    for product in products:
        relevance = relevance + product[:, 0] @ relevance
    return relevance
