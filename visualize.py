"""Draw the attention of a saved model, and the loss and accuracy of runs, as PNG files.

Without a flag from --rollout to --filters, all of these figures that are possible are drawn. A CNN has no attention;
for each image it gets the Grad-CAM of the class that it predicts. Several ViTs are compared by their maps and matrices.
"""

from pathlib import Path
from typing import NamedTuple

import torch

from inference import SavedModel, distinct_labels
from models import TOKEN_REDUCTIONS, canonical_model_type
from models.conformer import Conformer
from utils.attention import (
    attention_distance,
    attention_of,
    class_maps,
    class_token_mask,
    cluster_grid,
    first_convolution,
    first_head,
    position_similarity,
    principal_filters,
    rollout,
)
from utils.attention_comparison import check_comparable, compare_attention
from utils.checkpoint_files import folder_of
from utils.checks import make_output_folder
from utils.curves import plot_runs
from utils.data.images import check_image, images_of, read_image, unique_stems
from utils.errors import UserError, run_script
from utils.figures import (
    MEAN,
    UNIFORM,
    blocks_to_draw,
    downscale,
    plot_attention,
    plot_attention_distance,
    plot_attention_matrices,
    plot_attention_rows,
    plot_clusters,
    plot_filters,
    plot_heads,
    plot_image_grid,
    plot_position_similarity,
    prediction_caption,
    save,
)
from utils.flag_groups import add_checkpoint_flags, add_token_reduction_flags, token_reduction_of
from utils.flag_types import Parser, natural
from utils.parallel.processes import choose_device
from utils.records.run_folder import read_runs

MAX_GRID = 24  # images in the figures of several images
KINDS = ("rollout", "class", "blocks", "heads", "matrix", "distance", "clusters", "positions", "filters")
KINDS_OF_IMAGES = set(KINDS) - {"positions", "filters"}
KINDS_OF_SEVERAL = ("blocks", "matrix")  # that compare models


def main():
    args = parse_flags()
    make_output_folder(args.output_dir, "--output_dir")
    if args.curves:
        write(plot_runs(read_runs(args.curves)), args, "curves")
    if args.checkpoint:
        reduction = token_reduction_of({}, vars(args))
        options = (args.model_type, args.img_size, args.download, reduction, vars(args))
        models = [SavedModel.load(path, *options).to(choose_device()) for path in args.checkpoint]
        if len(models) > 1:
            compare_models(models, args)
            return
        args.class_numbers = [models[0].class_number(name) for name in vars(args)["class"] or ()]
        check_kinds(models[0], args.checkpoint[0], given_kinds(args))
        if hasattr(models[0].model, "forward_with_attention"):
            draw_attention(models[0], args)
        else:
            draw_grad_cams(models[0], args)


def parse_flags():
    args = make_parser().parse_args()
    if not args.checkpoint and not args.curves:
        raise UserError("there is nothing to draw; give a --checkpoint, or runs with --curves")
    folder = folder_of(args.checkpoint[0]) if args.checkpoint and len(args.checkpoint) == 1 else Path()
    args.output_dir = Path(args.output_dir or folder / "pictures")
    kinds = given_kinds(args)
    if len(args.checkpoint or ()) > 1:
        if alone := [kind for kind in kinds if kind not in KINDS_OF_SEVERAL]:
            reason = "--blocks, with the rollout, and --matrix compare several"
            raise UserError(f"--{alone[0]} is for one --checkpoint; {reason}")
        if not args.image:
            raise UserError("several --checkpoint files need --image: their attention to it is compared")
        if not kinds:
            args.blocks, args.matrix = [], True
    if not args.checkpoint and (kinds or args.image):
        raise UserError(f"--{kinds[0] if kinds else 'image'} needs --checkpoint")
    if not args.image and KINDS_OF_IMAGES.intersection(kinds):
        raise UserError(f"--{next(kind for kind in kinds if kind in KINDS_OF_IMAGES)} needs --image")
    args.image = images_of(args.image)
    for path in args.image:
        check_image(path)
    return args


def given_kinds(args):
    """The kinds of figures that have a flag; a --class without a name is an empty list."""
    return [kind for kind in KINDS if getattr(args, kind) not in (None, False)]


def check_kinds(saved, path, kinds):
    """Raise UserError for a kind of figure that the SavedModel of the file `path` does not have."""
    for kind in kinds:
        if kind == "class" and not saved.has_head:
            raise UserError(f"--class: {path} has no head, so it has no classes")
        if kind != "class" and not hasattr(saved.model, "forward_with_attention"):
            raise UserError(f"{path} is a CNN without attention; omit --{kind} to draw its Grad-CAM")
        if kind == "class" and isinstance(saved.model, Conformer):
            raise UserError(f"--class: {path} is a Conformer, whose head does not read the class token")


def make_parser():
    parser = Parser(__doc__)
    group = parser.add_argument_group("model")
    add_checkpoint_flags(group, canonical_model_type, several="Several are compared by --blocks and --matrix.")
    add_token_reduction_flags(group, TOKEN_REDUCTIONS, default="that of the run")
    group = parser.add_argument_group("figures")
    group.add_argument(
        "--image", nargs="+", default=[], metavar="PATH", help="Image files, or folders of them; default: none."
    )
    group.add_argument("--rollout", action="store_true", help="Draw the attention rollout over all blocks.")
    group.add_argument(
        "--class",
        nargs="*",
        metavar="NAME",
        help="Draw Grad-CAM and attention relevance for these classes, given by their names or their numbers from 0; "
        "without NAME for the predicted class.",
    )
    group.add_argument(
        "--blocks", type=natural, nargs="+", metavar="N", help="Draw single blocks, counted from 0; default: four."
    )
    group.add_argument("--heads", action="store_true", help="Draw every head of the --blocks.")
    group.add_argument(
        "--matrix",
        action="store_true",
        help="Draw the attention matrix of the first head in the --blocks.",
    )
    group.add_argument(
        "--distance", action="store_true", help="Draw the mean attention distance of each head, over all images."
    )
    group.add_argument(
        "--clusters", action="store_true", help="Draw which patches a token reduction merged, and mark those it kept."
    )
    group.add_argument("--positions", action="store_true", help="Draw the similarity of the position embeddings.")
    group.add_argument("--filters", action="store_true", help="Draw the principal components of the first filters.")
    group.add_argument(
        "--curves", nargs="+", metavar="DIR", help="Draw the loss and accuracy of the runs in these folders."
    )
    group.add_argument(
        "--output_dir",
        metavar="DIR",
        help="The folder for the figures; default: pictures/ next to a single checkpoint, or in the current folder.",
    )
    return parser


def draw_attention(saved, args):
    """Draw the figures of a ViT that the flags ask for."""
    model = saved.model
    kinds = kinds_to_draw(model, args, saved.has_head)
    blocks = blocks_of([saved], args)
    if "positions" in kinds:
        similarity = position_similarity(model.pos_embed, model.patch_embed.grid_size)
        write(plot_position_similarity(similarity, saved.title), args, "positions")
    if "filters" in kinds:
        filters = principal_filters(first_convolution(model).weight)
        write(plot_filters(filters, f"{saved.title}: principal components of the first filters"), args, "filters")
    if kinds & KINDS_OF_IMAGES:
        draw_attention_of_images(saved, kinds, blocks, args)


def blocks_of(models, args):
    """The --blocks, by default four of those that all models have. Raises UserError."""
    depth = min(len(saved.model.blocks) for saved in models)
    for block in args.blocks or ():
        if block >= depth:
            raise UserError(f"--blocks {block}: the model has the blocks 0 to {depth - 1}")
    return args.blocks or blocks_to_draw(depth)


def kinds_to_draw(model, args, has_head=True):
    """The kinds of figures that the flags ask for, by default all that are possible. Raises UserError."""
    kinds = set(given_kinds(args))
    if args.heads or args.matrix:
        kinds.discard("blocks")  # --blocks then selects the blocks of these figures
    if not kinds:
        kinds = set(KINDS) if args.image else set(KINDS) - KINDS_OF_IMAGES
    if isinstance(model, Conformer) or not has_head:
        kinds.discard("class")
    if model.reduction:
        return kinds
    if args.clusters and args.token_reduction in (None, "none"):
        example = "--token_reduction facility --keep_tokens 0.25 --reduction_layer 2"
        raise UserError(f"--clusters: {args.checkpoint[0]} merges no tokens; give for example {example}")
    if args.clusters and args.tome_r == 0:
        raise UserError("--clusters: --tome_r 0 merges no tokens; give a larger number")
    if args.clusters:
        raise UserError(f"--clusters: --keep_tokens {args.keep_tokens} keeps all patches; give a smaller number")
    return kinds - {"clusters"}


class Prediction(NamedTuple):
    """One image and what a model predicts for it."""

    image: torch.Tensor  # the part that the model gets, uint8 (3, H, W), reduced for drawing
    stem: str  # start of the file names of its figures
    caption: str  # of a figure of several images
    title: str  # of a figure of its own


def describe_prediction(saved, path, stem, image, logits):
    predicted, name = prediction_caption(logits, saved.classes), Path(path).name
    image = downscale(saved.visible_part(image))
    return Prediction(image, stem, f"{name}\n{predicted}", f"{name}: {predicted}\n{saved.title}")


@torch.no_grad()
def draw_attention_of_images(saved, kinds, blocks, args):
    """The figures of each image, then those of all images together."""
    patch_embed = saved.model.patch_embed
    rollouts, merged, distances = [], [], []
    for path, stem in zip(args.image, unique_stems(args.image), strict=True):
        image = read_image(path)
        images = saved.prepare(image)
        logits, attention, clusters = attention_of(saved.model, images)
        prediction = describe_prediction(saved, path, stem, image, logits)
        if "rollout" in kinds:
            mask = class_token_mask(rollout(attention)[0], patch_embed.grid_size).cpu()
            draw_mask(prediction, {"attention rollout": mask}, args, "rollout")
            rollouts = [*rollouts, (prediction.image, mask, prediction.caption)][:MAX_GRID]
        if "clusters" in kinds:
            part = (prediction.image, cluster_grid(clusters[-1], patch_embed.grid_size), prediction.caption)
            draw_clusters([part], clusters_title(saved), args, f"{stem}-clusters")
            merged = [*merged, part][:MAX_GRID]
        if "class" in kinds:
            draw_classes(saved, prediction, images, logits, args, clusters)
        if "matrix" in kinds:
            title = f"{prediction.title}: attention weights of the first head"
            matrices = {"": first_head(attention, blocks)[0]}
            write(plot_attention_matrices(matrices, blocks, patch_embed.grid_size, title), args, f"{stem}-matrix")
        if "distance" in kinds:
            distances.append(attention_distance(attention, patch_embed.grid_size, patch_embed.img_size))
        masks = torch.stack([class_token_mask(attention[block][0], patch_embed.grid_size) for block in blocks]).cpu()
        if "blocks" in kinds:
            means = zip(blocks, masks.mean(dim=1), strict=True)
            draw_mask(prediction, {f"block {block}": mask for block, mask in means}, args, "blocks")
        if "heads" in kinds:
            write(plot_heads(prediction.image, masks, blocks, prediction.title), args, f"{stem}-heads")
    draw_grid(rollouts, f"{saved.title}: attention rollout", args)
    if len(merged) > 1:
        draw_clusters(merged, f"{clusters_title(saved)}{first_images(merged, args)}", args, "clusters")
    if "distance" in kinds:
        title = f"{saved.title}\n{len(args.image)} images at {saved.img_size}x{saved.img_size}"
        write(plot_attention_distance(sum(distances) / len(distances), title), args, "distance")


def draw_classes(saved, prediction, images, logits, args, clusters=()):
    """The figure of one image with the maps of each --class, by default of the predicted one, one row per class."""
    numbers = args.class_numbers or [logits.argmax().item()]
    maps = class_maps(saved.model, images, torch.tensor(numbers, device=images.device), clusters)
    rows = {
        prediction_caption(logits, saved.classes, number): {name: masks[i] for name, masks in maps.items()}
        for i, number in enumerate(numbers)
    }
    write(plot_attention_rows(prediction.image, rows, prediction.title, MEAN), args, f"{prediction.stem}-class")


@torch.no_grad()
def compare_models(models, args):
    """For each image the attention of several models, one row per model. Raises UserError."""
    check_comparable(dict(zip(args.checkpoint, models, strict=True)))
    kinds = ["matrix"] if args.matrix and args.blocks else given_kinds(args)  # --blocks then selects those of --matrix
    blocks, labels = blocks_of(models, args), distinct_labels(models, args.checkpoint)
    for path, stem in zip(args.image, unique_stems(args.image), strict=True):
        image = read_image(path)
        inputs = [(saved.model, saved.prepare(image), saved.classes) for saved in models]
        rows, picture = dict(zip(labels, inputs, strict=True)), downscale(models[0].visible_part(image))
        for kind, figure in compare_attention(rows, blocks, picture, Path(path).name, kinds).items():
            write(figure, args, f"{stem}-{kind}")


def draw_grad_cams(saved, args):
    """Grad-CAM of a CNN for each --class, by default the predicted class of each image."""
    model = saved.model
    if not args.image:
        raise UserError("Grad-CAM needs --image")
    masks = []
    for path, stem in zip(args.image, unique_stems(args.image), strict=True):
        image = read_image(path)
        images = saved.prepare(image)
        with torch.no_grad():
            logits = model(images)
        prediction = describe_prediction(saved, path, stem, image, logits)
        if given_kinds(args):
            draw_classes(saved, prediction, images, logits, args)
            continue
        mask = class_maps(model, images, logits.argmax(dim=1))["Grad-CAM"][0]
        draw_mask(prediction, {"Grad-CAM": mask}, args, "grad_cam", MEAN)
        masks = [*masks, (prediction.image, mask, prediction.caption)][:MAX_GRID]
    draw_grid(masks, f"{saved.title}: Grad-CAM", args, MEAN)


def draw_mask(prediction, masks, args, kind, unit=UNIFORM):
    """The figure of one image with its masks, {name: (rows, columns)}."""
    write(plot_attention(prediction.image, masks, prediction.title, unit), args, f"{prediction.stem}-{kind}")


def draw_grid(parts, title, args, unit=UNIFORM):
    """The figure of several images and their masks, [(image, mask, caption), ...]; a single image needs none."""
    if len(parts) > 1:
        title = f"{title}{first_images(parts, args)}"
        write(plot_image_grid(*zip(*parts, strict=True), title, unit), args, "grid")


def draw_clusters(parts, title, args, name):
    """The figure of one or several images and their clusters, [(image, cluster grid, caption), ...]."""
    write(plot_clusters(*zip(*parts, strict=True), title), args, name)


def clusters_title(saved):
    rows, columns = saved.model.patch_embed.grid_size
    return f"{saved.title}: {rows * columns} patches merged into {saved.model.reduction}"


def first_images(parts, args):
    """An addition to a title where a figure does not show all images."""
    return f", the first {len(parts)} of {len(args.image)} images" if len(parts) < len(args.image) else ""


def write(figure, args, name):
    path = args.output_dir / f"{name}.png"
    save(figure, path)
    print(path)


if __name__ == "__main__":
    run_script(main)
