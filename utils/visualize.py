"""Pictures of what a model looks at and of how runs went.

First what is computed from attention weights, then the drawing. Figures are returned; `save` writes them as PNG.
Colours are those that print well and that the colour-blind can tell apart.
"""

import math
import textwrap

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.collections import LineCollection
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure  # not pyplot: nothing global, and a notebook keeps its own backend
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
TRAIN, TEST = OKABE_ITO[:2]  # blue and vermilion
HEAT = "viridis"
UNIFORM = "attention relative to uniform"  # the unit of masks: 1 where every patch gets the same


def attention_of(model, images):
    """Logits, attention weights and Clusters of a ViT's `forward_with_clusters`, the weights of every block expanded.

    So they are (B, heads, N, N) also after a token reduction.
    """
    logits, attention, clusters = model.forward_with_clusters(images)
    if clusters is not None:
        attention = expand_attention(attention, clusters.assignment)
    return logits, attention, clusters


def expand_attention(attention, assignment):
    """A list of attention weights among all N tokens or K clusters of them -> all of them (B, heads, N, N).

    `assignment` (B, N) numbers each token's cluster. A member looks where its cluster looks, and gets an equal part of
    what its cluster gets: so rows still sum to 1, and the class token's rollout is that of the merged tokens.
    """
    members = F.one_hot(assignment).float()  # (B, N, K)
    shares = members / members.sum(dim=1, keepdim=True)
    expanded = members[:, None], shares[:, None].transpose(-2, -1)
    return [
        weights if weights.shape[-1] == assignment.shape[1] else expanded[0] @ weights.float() @ expanded[1]
        for weights in attention
    ]


def rollout(attention):
    """Attention rollout (Abnar and Zuidema, 2020): how much each token's output draws on each input token.

    `attention` is a list of (B, heads, N, N), first block first; returns (B, N, N), rows sum to 1. Each block's heads
    are averaged, the residual connection is added as the identity and the rows are normalised again.
    """
    joint = None
    for weights in attention:
        mixed = weights.float().mean(dim=1)
        mixed = mixed + torch.eye(mixed.shape[-1], device=mixed.device)
        mixed = mixed / mixed.sum(dim=-1, keepdim=True)
        joint = mixed if joint is None else mixed @ joint
    return joint


def class_token_mask(weights, grid_size):
    """The class token's row of (..., N, N) over the patches, relative to uniform: (..., rows, columns), mean 1."""
    row = weights[..., 0, 1:].float()
    row = row / row.mean(dim=-1, keepdim=True).clamp(min=1e-12)
    return row.unflatten(-1, grid_size)


def upsample(mask, size):
    """A mask (rows, columns) as large as its picture, (height, width), linear between the patches' centres."""
    return F.interpolate(mask[None, None].float(), size=tuple(size), mode="bilinear", align_corners=False)[0, 0]


def attention_distance(attention, grid_size, img_size):
    """Mean attention distance in pixels (figure 7 of the ViT paper), (blocks, heads), over images and patches.

    Of a patch that is the mean distance to the others, weighted by its attention to them; the class token is left
    out. `img_size` is the input's (height, width) in pixels.
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


def position_similarity(pos_embed, grid_size):
    """Cosine similarity of each patch's position embedding to each other's: (rows, columns, rows, columns)."""
    patches = F.normalize(pos_embed[0, 1:].detach().float(), dim=1)
    return (patches @ patches.T).view(*grid_size, *grid_size).cpu()


def principal_filters(kernels, count=28):
    """The first principal components of kernels (filters, 3, h, w), as RGB pictures (count, h, w, 3) in [0, 1]."""
    flat = kernels.detach().float().cpu().flatten(1)
    _, _, components = torch.linalg.svd(flat - flat.mean(dim=0), full_matrices=False)
    count = min(count, len(flat) - 1)  # less their mean, n filters span n - 1 directions
    pictures = components[:count].view(-1, *kernels.shape[1:]).permute(0, 2, 3, 1)
    return 0.5 + 0.5 * pictures / pictures.abs().amax(dim=(1, 2, 3), keepdim=True)


def grad_cam(model, layer, images, classes):
    """Grad-CAM (Selvaraju et al., 2017) of a CNN for `classes` (B,), relative to its mean: (B, rows, columns).

    By captum, PyTorch's own library for this: it is kept up with PyTorch and needs nothing beside it.
    """
    from captum.attr import LayerGradCam

    with torch.enable_grad():
        maps = LayerGradCam(model, layer).attribute(images, classes, relu_attributions=True)[:, 0].detach()
    return maps / maps.mean(dim=(1, 2), keepdim=True).clamp(min=1e-12)


def save(figure, path):
    figure.savefig(path, dpi=120)


def plain(text):
    """A dollar sign begins a formula in matplotlib; names are none."""
    return text.replace("$", r"\$")


def shrunk(picture, side=512):
    """A picture, uint8 (3, H, W), of at most `side` pixels a side: enough for a panel."""
    height, width = picture.shape[1:]
    factor = side / max(height, width)
    if factor >= 1:
        return picture
    size = (max(1, round(factor * height)), max(1, round(factor * width)))
    return F.interpolate(picture[None].float(), size=size, mode="area")[0].round().to(torch.uint8)


def wrapped(text, width):
    """At most `width` characters a line; its own lines stay."""
    lines = plain(text).splitlines()
    return "\n".join(part for line in lines for part in textwrap.wrap(line, width) or [""])


def overlay(axes, picture, mask, limits):
    """`picture`, uint8 (3, H, W), in grey under its mask (rows, columns) in colour; returns what a colour bar needs."""
    height, width = picture.shape[1:]
    factor = math.ceil(256 / max(height, width))  # a small picture would make the mask coarse
    heat = upsample(mask.cpu(), (factor * height, factor * width))
    place = {"extent": (0, width, height, 0)}
    axes.imshow(picture.float().mean(dim=0).numpy(), cmap="gray", vmin=0, vmax=255, **place)
    drawn = axes.imshow(heat.numpy(), cmap=HEAT, vmin=limits[0], vmax=limits[1], alpha=0.65, **place)
    axes.set_axis_off()
    return drawn


def colour_bar(figure, drawn, label, **where):
    bar = figure.colorbar(drawn, label=label, **where)
    bar.solids.set_alpha(1)


def plot_attention(picture, masks, title, unit=UNIFORM):
    """The picture, uint8 (3, H, W), and beside it each mask of {name: (rows, columns)} laid over it."""
    height = 2.5 * min(2.0, max(0.1, picture.shape[1] / picture.shape[2])) + 1.5
    figure = Figure(figsize=(2.6 * (1 + len(masks)), height), layout="constrained")
    panels = figure.subplots(1, 1 + len(masks))
    panels[0].imshow(picture.permute(1, 2, 0).numpy())
    panels[0].set_title("input", fontsize="medium")
    panels[0].set_axis_off()
    for axes, (name, mask) in zip(panels[1:], masks.items(), strict=True):
        drawn = overlay(axes, picture, mask, (0, max(mask.max().item(), 1.0)))
        axes.set_title(plain(name), fontsize="medium")
        below = axes.inset_axes([0.03, -0.1, 0.94, 0.045])  # takes no room from its panel, so all stay aligned
        colour_bar(figure, drawn, "", cax=below, orientation="horizontal")
    figure.suptitle(wrapped(title, 28 * len(panels)), fontsize="medium")
    figure.supxlabel(unit, fontsize="small")
    return figure


def plot_attention_rows(picture, rows, title):
    """The picture and beside it its masks, in a row for each of `rows`, {label: {name: (rows, columns)}}.

    A column, which is a name, has one scale, so that its masks can be compared.
    """
    names = list(next(iter(rows.values())))
    shape = min(2.0, max(0.1, picture.shape[1] / picture.shape[2]))
    figure = Figure(figsize=(1.4 + 1.7 * (1 + len(names)), 1.3 + 1.7 * shape * len(rows)), layout="constrained")
    heights = [*[1] * len(rows), 0.06 / shape]  # the colour bars stand in a row of their own
    panels = figure.subplots(len(heights), 1 + len(names), squeeze=False, height_ratios=heights)
    panels[0, 0].set_title("input", fontsize="medium")
    panels[-1, 0].set_axis_off()
    for axes, label in zip(panels[:-1, 0], rows, strict=True):
        axes.imshow(picture.permute(1, 2, 0).numpy())
        axes.set_axis_off()
        axes.text(-0.08, 0.5, plain(label), transform=axes.transAxes, ha="right", va="center")
    for column, name in zip(panels.T[1:], names, strict=True):
        masks = [masks_of_row[name] for masks_of_row in rows.values()]
        limits = (0, max(1.0, *(mask.max().item() for mask in masks)))
        for axes, mask in zip(column[:-1], masks, strict=True):
            drawn = overlay(axes, picture, mask, limits)
        column[0].set_title(plain(name), fontsize="medium")
        colour_bar(figure, drawn, "", cax=column[-1], orientation="horizontal")
    figure.suptitle(wrapped(title, 20 * (1 + len(names))), fontsize="medium")
    figure.supxlabel(UNIFORM, fontsize="small")
    return figure


def plot_heads(picture, masks, blocks, title):
    """A row for each of `blocks`, a column for each head; `masks` is (blocks, heads, rows, columns)."""
    rows, columns = masks.shape[:2]
    shape = min(2.5, max(0.1, picture.shape[1] / picture.shape[2]))
    figure = Figure(figsize=(1.3 + 1.25 * columns, 1 + (0.1 + 1.2 * shape) * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    limits = (0, masks.quantile(0.999).item())
    for row, block in enumerate(blocks):
        for head in range(columns):
            axes = panels[row, head]
            drawn = overlay(axes, picture, masks[row, head], limits)
            if row == 0:
                axes.set_title(f"head {head}", fontsize="small")
        panels[row, 0].text(-0.08, 0.5, f"block {block}", transform=panels[row, 0].transAxes, rotation=90,
                            ha="right", va="center", fontsize="small")  # fmt: skip
    colour_bar(figure, drawn, UNIFORM, ax=panels, extend="max", shrink=0.9)
    figure.suptitle(wrapped(title, 14 * (columns + 1)), fontsize="medium")
    return figure


def plot_pictures(pictures, masks, captions, title, unit=UNIFORM, columns=6):
    """A grid of pictures, uint8 (3, H, W) each, every one above its mask (rows, columns) on a common scale."""
    rows = math.ceil(len(pictures) / columns)
    columns = math.ceil(len(pictures) / rows)
    figure = Figure(figsize=(1.2 + 1.7 * columns, 0.7 + 3.7 * rows), layout="constrained")
    panels = figure.subplots(2 * rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    limits = (0, max(mask.max().item() for mask in masks))
    for i, (picture, mask, caption) in enumerate(zip(pictures, masks, captions, strict=True)):
        above, below = panels[2 * (i // columns) : 2 * (i // columns) + 2, i % columns]
        above.imshow(picture.permute(1, 2, 0).numpy())
        above.set_title(wrapped(caption, 20), fontsize="small")
        drawn = overlay(below, picture, mask, limits)
    colour_bar(figure, drawn, unit, ax=panels, shrink=0.7)
    figure.suptitle(wrapped(title, 20 * (columns + 1)), fontsize="medium")
    return figure


def plot_clusters(pictures, clusters, captions, title, columns=6):
    """Pictures, uint8 (3, H, W), each above its patches in the mean colour of what they were merged with.

    `clusters` has for each picture (numbers (rows, columns) of the patches' clusters, places [(row, column), ...] of
    the kept patches). A cluster is framed in a colour of its own, also where it lies in pieces, as in ToMe's figures;
    its kept patch has a dot of this colour.
    """
    rows = math.ceil(len(pictures) / columns)
    columns = math.ceil(len(pictures) / rows)
    alone = len(pictures) == 1  # then side by side
    figure = Figure(figsize=(6, 3.8) if alone else (0.4 + 2.6 * columns, 0.7 + 5.4 * rows), layout="constrained")
    panels = figure.subplots(1, 2).reshape(2, 1) if alone else figure.subplots(2 * rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for i, (picture, (numbers, kept), caption) in enumerate(zip(pictures, clusters, captions, strict=True)):
        above, below = panels[2 * (i // columns) : 2 * (i // columns) + 2, i % columns]
        above.imshow(picture.permute(1, 2, 0).numpy())
        above.set_title(wrapped(caption, 28), fontsize="small")
        size = numbers.shape
        aspect = picture.shape[1] / picture.shape[2] * size[1] / size[0]  # the picture's, whatever the grid is
        place = {"extent": (0, size[1], size[0], 0), "interpolation": "nearest", "aspect": aspect}
        below.imshow(cluster_colours(picture, numbers).numpy(), **place)
        hues = [hsv_to_rgb((0.618034 * number % 1, 0.9, 1.0)) for number in range(len(kept))]  # neighbours differ
        lines, owners = cluster_frames(numbers)
        below.add_collection(LineCollection(lines, colors=[hues[owner] for owner in owners], linewidths=1.2))
        places = np.array(kept) + 0.5
        below.scatter(places[:, 1], places[:, 0], s=12, c=hues, edgecolors="black", linewidths=0.5, zorder=3)
    figure.suptitle(wrapped(title, 60 if alone else 30 * columns), fontsize="medium")
    return figure


def cluster_colours(picture, numbers):
    """Each patch (rows, columns, 3), uint8, in the mean colour of all patches with its number (rows, columns)."""
    patches = F.adaptive_avg_pool2d(picture.float(), numbers.shape).flatten(1)  # (3, patches)
    members = F.one_hot(numbers.flatten()).float()  # (patches, clusters)
    means = (patches @ members) / members.sum(dim=0).clamp(min=1)
    return means[:, numbers].round().to(torch.uint8).permute(1, 2, 0)


def cluster_frames(numbers):
    """The sides of patches, numbered (rows, columns), where their cluster ends: [((x, y), (x, y)), ...], its number."""
    inset = 0.06  # so that both clusters' frames are seen
    outside = F.pad(numbers, (1, 1, 1, 1), value=-1)
    lines, owners = [], []
    for down, right in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        neighbour = outside[1 + down : 1 + down + numbers.shape[0], 1 + right : 1 + right + numbers.shape[1]]
        for row, column in (numbers != neighbour).nonzero().tolist():
            y, x = row + 0.5 + (0.5 - inset) * down, column + 0.5 + (0.5 - inset) * right  # the side's middle
            lines.append(tuple((x + half * down, y + half * right) for half in (-0.5, 0.5)))
            owners.append(int(numbers[row, column]))
    return lines, owners


def plot_attention_distance(distances, title):
    """Mean attention distance (blocks, heads) in pixels: a dot for each head, a line for their mean."""
    figure = Figure(figsize=(5.5, 3.8), layout="constrained")
    axes = figure.subplots()
    blocks, heads = distances.shape
    axes.scatter(np.repeat(np.arange(blocks), heads), distances.flatten(), s=18, color=TRAIN, alpha=0.7, label="a head")
    axes.plot(np.arange(blocks), distances.mean(dim=1), color=TEST, label="mean of the heads")
    axes.set(xlabel="block", ylabel="mean attention distance (pixels)", xticks=range(0, blocks, max(1, blocks // 12)))
    axes.set_ylim(0, max(1.0, 1.1 * distances.max().item()))
    axes.set_title(plain(title), fontsize="medium")
    axes.legend(frameon=False)
    tidy(axes)
    return figure


def plot_position_similarity(similarity, title):
    """A tile for each patch, at its place: how alike its position embedding is to every other patch's."""
    rows, columns = similarity.shape[:2]
    framed = F.pad(similarity, (0, 1, 0, 1), value=float("nan"))  # (rows, columns, rows + 1, columns + 1)
    mosaic = framed.permute(0, 2, 1, 3).reshape(rows * (rows + 1), columns * (columns + 1))[:-1, :-1]
    figure = Figure(figsize=(6.2, 5.2 * max(0.4, rows / columns)), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(mosaic.numpy(), cmap=HEAT, vmin=-1, vmax=1, interpolation="nearest")
    every = [max(1, count // 8) for count in (rows, columns)]
    axes.set_yticks(np.arange(0, rows, every[0]) * (rows + 1) + rows / 2 - 0.5, range(0, rows, every[0]))
    axes.set_xticks(np.arange(0, columns, every[1]) * (columns + 1) + columns / 2 - 0.5, range(0, columns, every[1]))
    axes.set(xlabel="column of the patch", ylabel="row of the patch")
    axes.set_title(plain(title), fontsize="medium")
    axes.spines[:].set_visible(False)
    figure.colorbar(drawn, ax=axes, label="cosine similarity of position embeddings", shrink=0.9)
    return figure


def plot_filters(pictures, title):
    """RGB pictures (count, h, w, 3) of filters, the first component first."""
    columns = min(7, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    figure = Figure(figsize=(0.85 * columns, 0.5 + 0.85 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for axes, picture in zip(panels.flat, pictures, strict=False):
        axes.imshow(picture.numpy(), interpolation="nearest")
    figure.suptitle(plain(title), fontsize="medium")
    return figure


def plot_curves(metrics, title):
    """Loss and accuracy over the steps, training and test."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    few = len(metrics["step"]) < 30
    for name, colour, style in (("train", TRAIN, "--"), ("test", TEST, "-")):
        look = {"color": colour, "linestyle": style, "marker": "o" if few else "", "markersize": 3, "label": name}
        loss.plot(metrics["step"], metrics[f"{name}_loss"], **look)
        accuracy.plot(metrics["step"], [100 * value for value in metrics[f"{name}_accuracy"]], **look)
    best = max(metrics["test_accuracy"])
    accuracy.set_title(f"best test accuracy {100 * best:.2f} %", fontsize="medium")
    loss.set_title(plain(title), fontsize="medium")
    label_curves(loss, accuracy)
    for axes in (loss, accuracy):
        axes.legend(frameon=False)
    return figure


def plot_runs(runs, title=""):
    """Test loss and accuracy of runs over each other, training dashed; {label: [metrics of a seed, ...]}.

    Several seeds are drawn as their mean and, for the test set, the range between lowest and highest.
    """
    figure = Figure(figsize=(10, 4 + 0.2 * len(runs)), layout="constrained")
    panels = figure.subplots(1, 2)
    for number, (label, seeds) in enumerate(runs.items()):
        colour = OKABE_ITO[number % len(OKABE_ITO)]
        steps = seeds[0]["step"]
        few = {"marker": "o", "markersize": 3} if len(steps) < 30 else {}
        for axes, quantity, factor in zip(panels, ("loss", "accuracy"), (1, 100), strict=True):
            for part, style in (("train", "--"), ("test", "-")):
                values = factor * np.array([metrics[f"{part}_{quantity}"] for metrics in seeds])
                look = {"color": colour, "linestyle": style, "label": label if part == "test" else None, **few}
                axes.plot(steps, values.mean(axis=0), linewidth=1.8 if part == "test" else 1, **look)
                if part == "test" and len(seeds) > 1:
                    axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2, lw=0)
    label_curves(*panels)
    handles, labels = panels[0].get_legend_handles_labels()
    handles.append(Line2D([], [], color="grey", linestyle="--", linewidth=1))
    columns = min(len(handles), max(1, 100 // max(map(len, labels))))
    figure.legend(handles, [*map(plain, labels), "training"], loc="outside lower center", ncols=columns, frameon=False)
    figure.suptitle(plain(title), fontsize="medium")
    return figure


def label_curves(loss, accuracy):
    loss.set_ylabel("cross-entropy (nats)")
    accuracy.set_ylabel("top-1 accuracy (%)")
    for axes in (loss, accuracy):
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))  # five digits a step must not touch
        axes.yaxis.get_major_formatter().set_useOffset(False)
        tidy(axes)


def tidy(axes):
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def plot_confusion_matrix(confusion, classes, title):
    """Rows are true classes, columns predictions, each row as a share of its class's images."""
    shares = confusion.double() / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    few = len(classes) <= 20
    side = min(12.0, 3 + 0.4 * len(classes)) if few else 9
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow((100 * shares).numpy(), cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(picture, ax=axes, label="share of the true class (%)", shrink=0.8)
    axes.set(xlabel="predicted class", ylabel="true class", title=plain(title))
    if few:
        labels = [plain(name) for name in classes]
        axes.set_xticks(range(len(classes)), labels, rotation=45, ha="right")
        axes.set_yticks(range(len(classes)), labels)
        for row, column in confusion.nonzero().tolist():
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, int(confusion[row, column]), ha="center", va="center", color=colour, fontsize=7)
    return figure
