"""What a checkpoint looks at in pictures, and the curves of runs over each other, as PNG files.

Without --rollout, --blocks, --heads, --distance, --positions and --filters all of them are drawn. A CNN, which has no
attention, gets Grad-CAM of the class that it predicts.
"""

import os
from pathlib import Path

import torch

from evaluate import load_model, prepare_image
from models import canonical_model_type
from utils.arguments import Parser, add_checkpoint_flags, natural
from utils.augmentation import normalise
from utils.datasets import pictures_below, read_image
from utils.errors import UserError, run_script
from utils.tracking import read_run
from utils.visualize import (
    attention_distance,
    class_token_mask,
    grad_cam,
    plot_attention,
    plot_attention_distance,
    plot_filters,
    plot_heads,
    plot_pictures,
    plot_position_similarity,
    plot_runs,
    position_similarity,
    principal_filters,
    rollout,
    save,
)

GRID = 24  # pictures at most


def main():
    args = parse_flags()
    if args.curves:
        write(plot_runs(*runs_of(args.curves)), args, "curves")
    if args.checkpoint:
        model, classes, img_size, _ = load_model(args.checkpoint, args.model_type, args.img_size, args.download)
        model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        name = f"{Path(args.checkpoint).parent.name}/{Path(args.checkpoint).name}"
        if hasattr(model, "forward_with_attention"):
            draw_attention(model, classes, img_size, name, args)
        else:
            draw_grad_cam(model, classes, img_size, name, args)


def parse_flags():
    parser = Parser(__doc__)
    add_checkpoint_flags(parser.add_argument_group("model"), canonical_model_type)
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
    pictures.add_argument("--positions", action="store_true", help="similarity of the position embeddings")
    pictures.add_argument("--filters", action="store_true", help="principal components of the first filters")
    pictures.add_argument("--curves", nargs="+", metavar="DIR", help="folders of runs: their loss and accuracy")
    pictures.add_argument(
        "--output_dir", metavar="DIR", help="where to write; default: pictures/ beside the checkpoint, or here"
    )
    args = parser.parse_args()
    if not args.checkpoint and not args.curves:
        raise UserError("there is nothing to draw; give a --checkpoint, or runs by --curves")
    beside = Path(args.checkpoint).parent if args.checkpoint else Path()
    args.output_dir = Path(args.output_dir or beside / "pictures")
    args.image = [path for given in args.image for path in (pictures_below(given) if os.path.isdir(given) else [given])]
    return args


def draw_attention(model, classes, img_size, name, args):
    """All pictures of a ViT's attention that the flags ask for."""
    depth = len(model.blocks)
    wanted = {kind for kind in ("rollout", "heads", "distance", "positions", "filters") if getattr(args, kind)}
    if args.blocks and not args.heads:
        wanted.add("blocks")
    of_images = {"rollout", "blocks", "heads", "distance"}
    if not wanted:
        wanted = {"positions", "filters"} | (of_images if args.image else set())
    elif wanted & of_images and not args.image:
        raise UserError(f"--{min(wanted & of_images)} needs --image")
    beyond = [block for block in args.blocks or () if block >= depth]
    if beyond:
        raise UserError(f"--blocks {beyond[0]}: the model has the blocks 0 to {depth - 1}")
    blocks = args.blocks or [block for block in (0, 3, 6, 9) if block < depth]
    images = [read_image(path) for path in args.image]  # an unreadable one is said before any picture is written

    if "positions" in wanted:
        similarity = position_similarity(model.pos_embed, model.patch_embed.grid_size)
        write(plot_position_similarity(similarity, name), args, "positions")
    if "filters" in wanted:
        filters = principal_filters(first_layer(model).weight)
        write(plot_filters(filters, f"{name}: principal components of the first filters"), args, "filters")
    if not wanted & of_images:
        return
    grid_size = model.patch_embed.grid_size
    masks, captions, distances = [], [], 0
    for path, image in zip(args.image, images, strict=True):
        logits, attention = look(model, image, img_size)
        attention = [weights.cpu() for weights in attention]
        masks.append(class_token_mask(rollout(attention)[0], grid_size))
        captions.append(caption(logits, classes))
        distances = distances + attention_distance(attention, grid_size, model.patch_embed.img_size)
        title = f"{Path(path).name}: {captions[-1]} ({name})"
        if "rollout" in wanted:
            write(plot_attention(image, {"attention rollout": masks[-1]}, title), args, f"{label_of(path)}-rollout")
        single = torch.stack([class_token_mask(attention[block][0], grid_size) for block in blocks])
        if "blocks" in wanted:
            means = {f"block {block}": mask for block, mask in zip(blocks, single.mean(dim=1), strict=True)}
            write(plot_attention(image, means, title), args, f"{label_of(path)}-blocks")
        if "heads" in wanted:
            write(plot_heads(image, single, blocks, title), args, f"{label_of(path)}-heads")
    if "rollout" in wanted and len(images) > 1:
        shown = slice(GRID)
        title = f"{name}: attention rollout"
        write(plot_pictures(images[shown], masks[shown], captions[shown], title), args, "grid")
    if "distance" in wanted:
        title = f"{name}: {len(images)} images at {img_size}x{img_size}"
        write(plot_attention_distance(distances / len(images), title), args, "distance")


def draw_grad_cam(model, classes, img_size, name, args):
    for kind in ("rollout", "blocks", "heads", "distance", "positions", "filters"):
        if getattr(args, kind):
            raise UserError(f"{args.checkpoint} is a CNN without attention; leave --{kind} away and it gets Grad-CAM")
    if not args.image:
        raise UserError("Grad-CAM needs --image")
    for path, image in [(path, read_image(path)) for path in args.image]:
        device = next(model.parameters()).device
        batch = normalise(prepare_image(image, img_size)[None].to(device))
        with torch.no_grad():
            logits = model(batch)
        mask = grad_cam(model, model.stages[-1].blocks, batch, logits.argmax(dim=1))[0]
        title = f"{Path(path).name}: {caption(logits, classes)} ({name})"
        figure = plot_attention(image, {"Grad-CAM": mask.cpu()}, title, unit="relative to the mean over the image")
        write(figure, args, f"{label_of(path)}-grad_cam")


def first_layer(model):
    """The convolution that sees the image: a ViT's patch embedding, the root of a hybrid's stem."""
    return model.patch_embed.stem.conv_root if model.patch_embed.stem else model.patch_embed.proj


@torch.no_grad()
def look(model, image, img_size):
    """(logits, attention) of one picture, uint8 (3, H, W)."""
    batch = normalise(prepare_image(image, img_size)[None].to(model.pos_embed.device))
    return model.forward_with_attention(batch)


def caption(logits, classes):
    probability, best = logits.float().softmax(dim=1)[0].max(dim=0)
    return f"{classes[best]} {100 * probability:.0f} %"


def label_of(path):
    """A picture's part of file names: that of its folder belongs to it, since classes are folders."""
    return "-".join(Path(path).with_suffix("").parts[-2:])


def runs_of(folders):
    """({label: [metrics]}, title) of runs for `plot_runs`."""
    runs = {}
    for folder in folders:
        flags, metrics = read_run(folder)
        label = f"{flags['name']}: {flags['model_type']} on {flags['dataset']}"
        runs[f"{label} ({folder})" if label in runs else label] = [metrics]
    return runs, ""


def write(figure, args, name):
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        path = args.output_dir / f"{name}.png"
        save(figure, path)
    except OSError as error:
        raise UserError(f"{args.output_dir} can't be written: {error.strerror}; see --output_dir") from error
    print(path)


if __name__ == "__main__":
    run_script(main)
