"""Figures of models: attention over images, clusters of patches, position embeddings and filters; and a common style.

Every `plot_...` function returns a Figure; `save` writes it as PNG. The colours can be told apart in print and by
colour-blind readers. Images are uint8 (3, H, W), masks (rows, columns). utils/curves.py draws runs.
"""

import math
import textwrap

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm, hsv_to_rgb
from matplotlib.figure import Figure  # not pyplot, which has global state and would change a notebook's backend

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
TRAIN, TEST = OKABE_ITO[:2]  # blue and vermilion
HEAT = "viridis"
UNIFORM = "attention relative to uniform"  # the unit of masks: 1 where all patches have the same attention
MEAN = "relative to the mean over the image"  # the unit of maps of a class


def save(figure, path):
    figure.savefig(path, dpi=120)


def escape_math(text):
    """Keep matplotlib from reading the text between two dollar signs as a formula."""
    return text.replace("$", r"\$")


def wrap_text(text, width):
    """Break lines after at most `width` characters, in addition to the breaks that `text` has."""
    lines = escape_math(text).splitlines()
    return "\n".join(part for line in lines for part in textwrap.wrap(line, width) or [""])


def style_axes(axes):
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def downscale(image, max_side=512):
    """Reduce an image to at most `max_side` pixels per side, which is enough for a panel."""
    height, width = image.shape[1:]
    factor = max_side / max(height, width)
    if factor >= 1:
        return image
    size = (max(1, round(factor * height)), max(1, round(factor * width)))
    return F.interpolate(image[None].float(), size=size, mode="area")[0].round().to(torch.uint8)


def upsample(mask, size):
    """Resize a mask (rows, columns) to (height, width), linear between the centres of the patches."""
    return F.interpolate(mask[None, None].float(), size=tuple(size), mode="bilinear", align_corners=False)[0, 0]


def blocks_to_draw(depth):
    """The first block of each quarter of `depth` blocks; 0, 3, 6 and 9 of 12."""
    return sorted({quarter * depth // 4 for quarter in range(4)})


def prediction_caption(logits, classes, number=None):
    """A class and its probability, such as "cat 87 %", for logits (1, classes); by default the most probable class."""
    probabilities = logits.float().softmax(dim=1)[0]
    number = probabilities.argmax() if number is None else number
    return f"{classes[number]} {100 * probabilities[number]:.0f} %"


def overlay(axes, image, mask, limits):
    """Draw the image in grey and its mask over it in colour; returns the mappable for a colour bar."""
    height, width = image.shape[1:]
    factor = math.ceil(256 / max(height, width))  # on a small image the mask would be coarse
    heat = upsample(mask.cpu(), (factor * height, factor * width))
    extent = (0, width, height, 0)
    axes.imshow(image.float().mean(dim=0).numpy(), cmap="gray", vmin=0, vmax=255, extent=extent)
    drawn = axes.imshow(heat.numpy(), cmap=HEAT, vmin=limits[0], vmax=limits[1], alpha=0.65, extent=extent)
    axes.set_axis_off()
    return drawn


def colour_bar(figure, drawn, label, **where):
    """A colour bar that is opaque although its overlay is not."""
    bar = figure.colorbar(drawn, label=label, **where)
    bar.solids.set_alpha(1)


def plot_attention(image, masks, title, unit=UNIFORM):
    """The image, and next to it each mask of {name: mask} drawn over it."""
    height = 2.5 * min(2.0, max(0.1, image.shape[1] / image.shape[2])) + 1.5
    figure = Figure(figsize=(2.6 * (1 + len(masks)), height), layout="constrained")
    panels = figure.subplots(1, 1 + len(masks))
    panels[0].imshow(image.permute(1, 2, 0).numpy())
    panels[0].set_title("input", fontsize="medium")
    panels[0].set_axis_off()
    for axes, (name, mask) in zip(panels[1:], masks.items(), strict=True):
        drawn = overlay(axes, image, mask, (0, max(mask.max().item(), 1.0)))
        axes.set_title(escape_math(name), fontsize="medium")
        below = axes.inset_axes([0.03, -0.1, 0.94, 0.045])  # takes no space from its panel, so panels stay aligned
        colour_bar(figure, drawn, "", cax=below, orientation="horizontal")
    figure.suptitle(wrap_text(title, 28 * len(panels)), fontsize="medium")
    figure.supxlabel(unit, fontsize="small")
    return figure


def plot_attention_rows(image, rows, title, unit=UNIFORM):
    """One row for each of `rows`, {label: {name: mask}}: the image, and next to it the row's masks drawn over it.

    All masks of a name, which are a column, have one scale, so they can be compared.
    """
    names = list(next(iter(rows.values())))
    shape = min(2.0, max(0.1, image.shape[1] / image.shape[2]))
    figure = Figure(figsize=(1.4 + 1.7 * (1 + len(names)), 1.3 + 1.7 * shape * len(rows)), layout="constrained")
    heights = [*[1] * len(rows), 0.06 / shape]  # the last row holds the colour bars
    panels = figure.subplots(len(heights), 1 + len(names), squeeze=False, height_ratios=heights)
    panels[0, 0].set_title("input", fontsize="medium")
    panels[-1, 0].set_axis_off()
    for axes, label in zip(panels[:-1, 0], rows, strict=True):
        axes.imshow(image.permute(1, 2, 0).numpy())
        axes.set_axis_off()
        axes.text(-0.08, 0.5, wrap_text(label, 24), transform=axes.transAxes, ha="right", va="center")
    for column, name in zip(panels.T[1:], names, strict=True):
        masks = [masks_of_row[name] for masks_of_row in rows.values()]
        limits = (0, max(1.0, *(mask.max().item() for mask in masks)))
        for axes, mask in zip(column[:-1], masks, strict=True):
            drawn = overlay(axes, image, mask, limits)
        column[0].set_title(escape_math(name), fontsize="medium")
        colour_bar(figure, drawn, "", cax=column[-1], orientation="horizontal")
    figure.suptitle(wrap_text(title, 20 * (1 + len(names))), fontsize="medium")
    figure.supxlabel(unit, fontsize="small")
    return figure


def plot_attention_matrices(rows, blocks, grid_size, title):
    """One row of panels for each of `rows`, {label: matrices (blocks, N, N)}, one column per block.

    A row of a matrix is a query, a column a key: the class token, then the patches row by row, with a line at the start
    of each row of patches. All matrices have one logarithmic scale, from a tenth of uniform attention to 1.
    """
    tokens = next(iter(rows.values())).shape[-1]
    side = min(4.8, max(2.2, tokens / 120))  # a pixel per token, up to 577 tokens
    width = (2.4 if any(rows) else 1.9) + side * len(blocks)
    figure = Figure(figsize=(width, 1.3 + side * len(rows)), layout="compressed")
    panels = figure.subplots(len(rows), len(blocks), squeeze=False, sharex=True, sharey=True)
    scale = LogNorm(0.1 / tokens, 1, clip=True)  # linear colours would show only the model with the largest weights
    starts = 0.5 + grid_size[1] * np.arange(grid_size[0])
    numbers = np.arange(0, grid_size[0], math.ceil(grid_size[0] / 8))
    for row, (label, matrices) in zip(panels, rows.items(), strict=True):
        for axes, matrix in zip(row, matrices, strict=True):
            drawn = axes.imshow(matrix.numpy(), cmap=HEAT, norm=scale)
            for draw_lines in (axes.hlines, axes.vlines):
                draw_lines(starts, -0.5, tokens - 0.5, colors="white", linewidths=0.4, alpha=0.5)
            axes.tick_params(length=2, labelsize="x-small")
            axes.set_xticks(starts[numbers] + grid_size[1] / 2, numbers)
            axes.set_yticks(starts[numbers] + grid_size[1] / 2, numbers)
        row[0].set_ylabel(wrap_text(label, 24))
    for axes, block in zip(panels[0], blocks, strict=True):
        axes.set_title(f"block {block}", fontsize="medium")
    colour_bar(figure, drawn, "attention weight", ax=panels, extend="min", shrink=0.9)
    figure.suptitle(wrap_text(title, 20 * (1 + len(blocks))), fontsize="medium")
    order = "column: key, row: query; first the class token, then the patches, numbered by their row in the image"
    figure.supxlabel(wrap_text(order, 26 * (1 + len(blocks))), fontsize="small")
    return figure


def plot_heads(image, masks, blocks, title):
    """One row for each of `blocks`, one column per head; `masks` is (blocks, heads, rows, columns)."""
    rows, columns = masks.shape[:2]
    shape = min(2.5, max(0.1, image.shape[1] / image.shape[2]))
    figure = Figure(figsize=(1.3 + 1.25 * columns, 1 + (0.1 + 1.2 * shape) * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    limits = (0, masks.quantile(0.999).item())
    for row, block in enumerate(blocks):
        for head in range(columns):
            axes = panels[row, head]
            drawn = overlay(axes, image, masks[row, head], limits)
            if row == 0:
                axes.set_title(f"head {head}", fontsize="small")
        panels[row, 0].text(-0.08, 0.5, f"block {block}", transform=panels[row, 0].transAxes, rotation=90,
                            ha="right", va="center", fontsize="small")  # fmt: skip
    colour_bar(figure, drawn, UNIFORM, ax=panels, extend="max", shrink=0.9)
    figure.suptitle(wrap_text(title, 14 * (columns + 1)), fontsize="medium")
    return figure


def plot_image_grid(images, masks, captions, title, unit=UNIFORM, columns=6):
    """A grid of images, each above its mask; all masks have one scale."""
    rows = math.ceil(len(images) / columns)
    columns = math.ceil(len(images) / rows)
    figure = Figure(figsize=(1.2 + 1.7 * columns, 0.7 + 3.7 * rows), layout="constrained")
    panels = figure.subplots(2 * rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    limits = (0, max(mask.max().item() for mask in masks))
    for i, (image, mask, caption) in enumerate(zip(images, masks, captions, strict=True)):
        above, below = panels[2 * (i // columns) : 2 * (i // columns) + 2, i % columns]
        above.imshow(image.permute(1, 2, 0).numpy())
        above.set_title(wrap_text(caption, 20), fontsize="small")
        drawn = overlay(below, image, mask, limits)
    colour_bar(figure, drawn, unit, ax=panels, shrink=0.7)
    figure.suptitle(wrap_text(title, 20 * (columns + 1)), fontsize="medium")
    return figure


def plot_clusters(images, clusters, captions, title, columns=6):
    """A grid of images, each above its clusters of merged patches; a single image is drawn next to its clusters.

    `clusters` has for each image what `utils.attention.cluster_grid` returns.
    """
    rows = math.ceil(len(images) / columns)
    columns = math.ceil(len(images) / rows)
    single = len(images) == 1
    figure = Figure(figsize=(6, 3.8) if single else (0.4 + 2.6 * columns, 0.7 + 5.4 * rows), layout="constrained")
    panels = figure.subplots(1, 2).reshape(2, 1) if single else figure.subplots(2 * rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for i, (image, (numbers, kept), caption) in enumerate(zip(images, clusters, captions, strict=True)):
        above, below = panels[2 * (i // columns) : 2 * (i // columns) + 2, i % columns]
        above.imshow(image.permute(1, 2, 0).numpy())
        above.set_title(wrap_text(caption, 28), fontsize="small")
        draw_clusters(below, image, numbers, kept)
    figure.suptitle(wrap_text(title, 60 if single else 30 * columns), fontsize="medium")
    return figure


def draw_clusters(axes, image, numbers, kept):
    """Draw each patch in the mean colour of its cluster, and around each cluster a frame in the cluster's own colour.

    `numbers` (rows, columns) is each patch's cluster, `kept` [(row, column), ...] the patches that were kept, which get
    a dot. The frame identifies a cluster also where its patches are not connected, as in ToMe's figures.
    """
    rows, columns = numbers.shape
    aspect = image.shape[1] / image.shape[2] * columns / rows  # that of the image, for any grid
    colours = cluster_colours(image, numbers).numpy()
    axes.imshow(colours, extent=(0, columns, rows, 0), interpolation="nearest", aspect=aspect)
    hues = [hsv_to_rgb((0.618034 * number % 1, 0.9, 1.0)) for number in range(len(kept))]  # neighbours differ
    lines, owners = cluster_frames(numbers)
    axes.add_collection(LineCollection(lines, colors=[hues[owner] for owner in owners], linewidths=1.2))
    centres = np.array(kept) + 0.5
    axes.scatter(centres[:, 1], centres[:, 0], s=12, c=hues, edgecolors="black", linewidths=0.5, zorder=3)


def cluster_colours(image, numbers):
    """Each patch in the mean colour of all patches with its number: (rows, columns) -> uint8 (rows, columns, 3)."""
    patches = F.adaptive_avg_pool2d(image.float(), numbers.shape).flatten(1)  # (3, patches)
    members = F.one_hot(numbers.flatten()).float()  # (patches, clusters)
    means = (patches @ members) / members.sum(dim=0).clamp(min=1)
    return means[:, numbers].round().to(torch.uint8).permute(1, 2, 0)


def cluster_frames(numbers):
    """The sides of patches, numbered (rows, columns), at which their cluster ends: ([((x, y), (x, y)), ...], numbers).

    The second list has the number of the cluster that each line belongs to.
    """
    inset = 0.06  # so the frames of two neighbours do not cover each other
    outside = F.pad(numbers, (1, 1, 1, 1), value=-1)
    lines, owners = [], []
    for down, right in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        neighbour = outside[1 + down : 1 + down + numbers.shape[0], 1 + right : 1 + right + numbers.shape[1]]
        for row, column in (numbers != neighbour).nonzero().tolist():
            y, x = row + 0.5 + (0.5 - inset) * down, column + 0.5 + (0.5 - inset) * right  # middle of the side
            lines.append(tuple((x + half * down, y + half * right) for half in (-0.5, 0.5)))
            owners.append(int(numbers[row, column]))
    return lines, owners


def plot_attention_distance(distances, title):
    """Mean attention distance (blocks, heads) in pixels: a dot per head, a line for the mean over heads."""
    figure = Figure(figsize=(5.5, 3.8), layout="constrained")
    axes = figure.subplots()
    blocks, heads = distances.shape
    axes.scatter(np.repeat(np.arange(blocks), heads), distances.flatten(), s=18, color=TRAIN, alpha=0.7, label="a head")
    axes.plot(np.arange(blocks), distances.mean(dim=1), color=TEST, label="mean of the heads")
    axes.set(xlabel="block", ylabel="mean attention distance (pixels)", xticks=range(0, blocks, max(1, blocks // 12)))
    axes.set_ylim(0, max(1.0, 1.1 * distances.max().item()))
    axes.set_title(escape_math(title), fontsize="medium")
    axes.legend(frameon=False)
    style_axes(axes)
    return figure


def plot_position_similarity(similarity, title):
    """A tile for each patch, at the patch's place: the similarity of its position embedding to all others."""
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
    axes.set_title(escape_math(title), fontsize="medium")
    axes.spines[:].set_visible(False)
    figure.colorbar(drawn, ax=axes, label="cosine similarity of position embeddings", shrink=0.9)
    return figure


def plot_filters(filters, title):
    """Filters as RGB images (count, h, w, 3) in [0, 1], the first component first."""
    columns = min(7, len(filters))
    rows = math.ceil(len(filters) / columns)
    figure = Figure(figsize=(0.85 * columns, 0.5 + 0.85 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for axes, kernel in zip(panels.flat, filters, strict=False):
        axes.imshow(kernel.numpy(), interpolation="nearest")
    figure.suptitle(escape_math(title), fontsize="medium")
    return figure
