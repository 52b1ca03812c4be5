"""What a checkpoint looks at in pictures, and the curves of runs over each other, as PNG files.

Without --rollout, --blocks, --heads, --distance, --clusters, --positions and --filters all of them are drawn. A CNN,
which has no attention, gets Grad-CAM of the class that it predicts.
"""

import os
from pathlib import Path

import torch

from evaluate import checkpoint_title, load_model, mean_std_of, prepare_image, readable
from models import TOKEN_REDUCTIONS, canonical_model_type
from utils.data.augmentation import normalise
from utils.data.datasets import DATASETS
from utils.data.images import centre_crop, centre_square, check_image, images_below, read_image
from utils.errors import UserError, run_script
from utils.flag_groups import add_checkpoint_flags, add_token_reduction_flags, token_reduction_of
from utils.flag_types import Parser, natural
from utils.parallel.processes import choose_device
from utils.records.run_folder import read_run
from utils.visualize import (
    UNIFORM,
    attention_distance,
    attention_of,
    class_token_mask,
    grad_cam,
    plot_attention,
    plot_attention_distance,
    plot_clusters,
    plot_filters,
    plot_heads,
    plot_pictures,
    plot_position_similarity,
    plot_runs,
    position_similarity,
    principal_filters,
    rollout,
    save,
    shrunk,
)

GRID = 24  # pictures at most
KINDS = ("rollout", "blocks", "heads", "distance", "clusters", "positions", "filters")
OF_IMAGES = {"rollout", "blocks", "heads", "distance", "clusters"}


def main():
    args = parse_flags()
    check_output(args.output_dir)
    if args.curves:
        write(plot_runs(runs_of(args.curves)), args, "curves")
    if args.checkpoint:
        model, classes, img_size, flags = load_model(
            args.checkpoint, args.model_type, args.img_size, args.download, token_reduction_of({}, vars(args))
        )
        model.to(choose_device()).eval()
        name = checkpoint_title(args.checkpoint)
        draw = draw_attention if hasattr(model, "forward_with_attention") else draw_grad_cam
        draw(model, readable(classes), img_size, name, args, flags)


def parse_flags():
    parser = Parser(__doc__)
    group = parser.add_argument_group("model")
    add_checkpoint_flags(group, canonical_model_type)
    add_token_reduction_flags(group, TOKEN_REDUCTIONS, default="the run's own")
    pictures = parser.add_argument_group("pictures")
    pictures.add_argument("--image", nargs="+", default=[], metavar="PATH", help="picture files, or folders of them")
    pictures.add_argument("--rollout", action="store_true", help="attention of all blocks multiplied through")
    pictures.add_argument(
        "--blocks", type=natural, nargs="+", metavar="N", help="single blocks, counted from 0; default: 0 3 6 9"
    )
    pictures.add_argument("--heads", action="store_true", help="every head of the --blocks")
    pictures.add_argument(
        "--distance", action="store_true", help="mean attention distance of each head, over all images"
    )
    pictures.add_argument(
        "--clusters", action="store_true", help="which patches a token reduction merged, and a dot on those it kept"
    )
    pictures.add_argument("--positions", action="store_true", help="similarity of the position embeddings")
    pictures.add_argument("--filters", action="store_true", help="principal components of the first filters")
    pictures.add_argument("--curves", nargs="+", metavar="DIR", help="folders of runs: their loss and accuracy")
    pictures.add_argument(
        "--output_dir",
        metavar="DIR",
        help="where to write; default: the folder pictures/ beside the checkpoint, or in the current folder",
    )
    args = parser.parse_args()
    if not args.checkpoint and not args.curves:
        raise UserError("there is nothing to draw; give a --checkpoint, or runs by --curves")
    beside = Path(args.checkpoint).parent if args.checkpoint else Path()
    args.output_dir = Path(args.output_dir or beside / "pictures")
    kinds = [kind for kind in KINDS if getattr(args, kind)]
    if not args.checkpoint and (kinds or args.image):
        raise UserError(f"--{kinds[0] if kinds else 'image'} needs --checkpoint")
    if not args.image and OF_IMAGES.intersection(kinds):
        raise UserError(f"--{next(kind for kind in kinds if kind in OF_IMAGES)} needs --image")
    args.image = [path for given in args.image for path in (images_below(given) if os.path.isdir(given) else [given])]
    for path in args.image:
        check_image(path)
    return args


def check_output(folder, flag="--output_dir"):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} can't be made: {error.strerror}; see {flag}") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder} can't be written; see {flag}")


def draw_attention(model, classes, img_size, name, args, flags):
    """All pictures of a ViT's attention that the flags ask for."""
    depth = len(model.blocks)
    wanted = {kind for kind in KINDS if getattr(args, kind)}
    if args.heads:
        wanted.discard("blocks")  # --blocks then says which blocks' heads
    if not wanted:
        wanted = set(KINDS) if args.image else set(KINDS) - OF_IMAGES
    if args.clusters and not model.reduction:
        if args.token_reduction in (None, "none"):
            raise UserError(f"--clusters: {args.checkpoint} merges no tokens; give --token_reduction")
        raise UserError(f"--clusters: --keep_tokens {args.keep_tokens} keeps all patches; give a smaller number")
    if not model.reduction:
        wanted.discard("clusters")
    beyond = [block for block in args.blocks or () if block >= depth]
    if beyond:
        raise UserError(f"--blocks {beyond[0]}: the model has the blocks 0 to {depth - 1}")
    blocks = args.blocks or blocks_to_draw(depth)
    if "positions" in wanted:
        similarity = position_similarity(model.pos_embed, model.patch_embed.grid_size)
        write(plot_position_similarity(similarity, name), args, "positions")
    if "filters" in wanted:
        filters = principal_filters(first_layer(model).weight)
        write(plot_filters(filters, f"{name}: principal components of the first filters"), args, "filters")
    if not wanted & OF_IMAGES:
        return
    grid_size = model.patch_embed.grid_size
    grid, merged, distances = [], [], 0
    for path, label in zip(args.image, labels_of(args.image), strict=True):
        image = read_image(path)
        logits, attention, clusters = look_at_clusters(model, image, img_size, flags)
        image, best = shrunk(seen(image, flags)), caption(logits, classes)
        title = f"{Path(path).name}: {best}\n{name}"
        if "rollout" in wanted:
            mask = class_token_mask(rollout(attention)[0], grid_size).cpu()
            write(plot_attention(image, {"attention rollout": mask}, title), args, f"{label}-rollout")
            if len(grid) < GRID:
                grid.append((image, mask, f"{Path(path).name}\n{best}"))
        if "clusters" in wanted:
            merged.append((image, patches_of(clusters, grid_size), f"{Path(path).name}\n{best}"))
            write(plot_clusters(*([part] for part in merged[-1]), merging(model, name)), args, f"{label}-clusters")
            merged = merged[:GRID]
        if "distance" in wanted:
            distances = distances + attention_distance(attention, grid_size, model.patch_embed.img_size)
        single = torch.stack([class_token_mask(attention[block][0], grid_size) for block in blocks]).cpu()
        if "blocks" in wanted:
            means = {f"block {block}": mask for block, mask in zip(blocks, single.mean(dim=1), strict=True)}
            write(plot_attention(image, means, title), args, f"{label}-blocks")
        if "heads" in wanted:
            write(plot_heads(image, single, blocks, title), args, f"{label}-heads")
    write_grid(grid, args, f"{name}: attention rollout")
    if len(merged) > 1:
        title = f"{merging(model, name)}{the_first(merged, args)}"
        write(plot_clusters(*zip(*merged, strict=True), title), args, "clusters")
    if "distance" in wanted:
        title = f"{name}\n{len(args.image)} images at {img_size}x{img_size}"
        write(plot_attention_distance(distances / len(args.image), title), args, "distance")


def blocks_to_draw(depth):
    """0, 3, 6 and 9, as far as a model of `depth` blocks has them."""
    return [block for block in (0, 3, 6, 9) if block < depth]


def draw_grad_cam(model, classes, img_size, name, args, flags):
    """Grad-CAM of a CNN for each picture's predicted class."""
    for kind in KINDS:
        if getattr(args, kind):
            raise UserError(f"{args.checkpoint} is a CNN without attention; leave --{kind} away and it gets Grad-CAM")
    if not args.image:
        raise UserError("Grad-CAM needs --image")
    device = next(model.parameters()).device
    unit = "relative to the mean over the image"
    grid = []
    for path, label in zip(args.image, labels_of(args.image), strict=True):
        image = read_image(path)
        batch = batch_of(image, img_size, flags, device)
        with torch.no_grad():
            logits = model(batch)
        mask = grad_cam(model, model.stages[-1].blocks, batch, logits.argmax(dim=1))[0].cpu()
        image, best = shrunk(seen(image, flags)), caption(logits, classes)
        if len(grid) < GRID:
            grid.append((image, mask, f"{Path(path).name}\n{best}"))
        title = f"{Path(path).name}: {best}\n{name}"
        write(plot_attention(image, {"Grad-CAM": mask}, title, unit), args, f"{label}-grad_cam")
    write_grid(grid, args, f"{name}: Grad-CAM", unit)


def write_grid(grid, args, title, unit=UNIFORM):
    """Several pictures side by side, [(picture, mask, caption), ...]; a single one needs no grid."""
    if len(grid) > 1:
        write(plot_pictures(*zip(*grid, strict=True), f"{title}{the_first(grid, args)}", unit), args, "grid")


def the_first(grid, args):
    return f", the first {len(grid)} of {len(args.image)} pictures" if len(grid) < len(args.image) else ""


def merging(model, name):
    """What `plot_clusters` shows."""
    method, keep, layer = model.reduction
    patches = model.patch_embed.grid_size[0] * model.patch_embed.grid_size[1]
    return f"{name}: {patches} patches merged into {keep} after block {layer} ({method})"


def patches_of(clusters, grid_size):
    """(numbers of the clusters (rows, columns), [(row, column), ...] of the kept patches) of the first image."""
    numbers = (clusters.assignment[0, 1:] - 1).unflatten(0, grid_size).cpu()
    return numbers, [divmod(patch - 1, grid_size[1]) for patch in clusters.kept[0, 1:].tolist()]


def first_layer(model):
    """The convolution that sees the image: a ViT's patch embedding, the root of a hybrid's stem."""
    return model.patch_embed.stem.conv_root if model.patch_embed.stem else model.patch_embed.proj


def look(model, image, img_size, flags=None):
    """(logits, attention) of one picture, uint8 (3, H, W), for the model of a run with these flags, if of one."""
    return look_at_clusters(model, image, img_size, flags)[:2]


@torch.no_grad()
def look_at_clusters(model, image, img_size, flags=None):
    """The same and the Clusters of the token reduction, or None."""
    return attention_of(model, batch_of(image, img_size, flags, model.pos_embed.device))


def batch_of(image, img_size, flags, device):
    """The model's input (1, 3, img_size, img_size), as in the evaluation of the run with these flags."""
    return normalise(prepare_image(image, img_size, flags)[None].to(device), mean_std_of(flags or {}))


def seen(image, flags):
    """The part of a picture, (3, H, W), that the model gets to see: less than all after a run on centre crops."""
    cropped = flags and DATASETS[flags["dataset"]].prepare is centre_crop
    return centre_square(image) if cropped else image


def caption(logits, classes):
    probability, best = logits.float().softmax(dim=1)[0].max(dim=0)
    return f"{classes[best]} {100 * probability:.0f} %"


def labels_of(paths):
    """The pictures' parts of file names, each another: folder and name, since classes are folders, and a number."""
    labels = []
    for path in map(Path, paths):
        folder = path.resolve().parent.name
        label = f"{folder}-{path.stem}" if folder else path.stem
        number = sum(other == label or other.startswith(f"{label}~") for other in labels)
        labels.append(f"{label}~{number + 1}" if number else label)
    return labels


def runs_of(folders):
    """{label: [metrics]} of runs for `plot_runs`."""
    runs = {}
    for folder in folders:
        flags, metrics = read_run(folder)
        label = f"{flags['name']}: {flags['model_type']} on {flags['dataset']}"
        runs[f"{label} ({folder})" if label in runs else label] = [metrics]
    return runs


def write(figure, args, name):
    path = args.output_dir / f"{name}.png"
    save(figure, path)
    print(path)


if __name__ == "__main__":
    run_script(main)
