"""Recipes: training flags chosen by the number of training images, their size and the batch size.

A recipe fills the flags that are not given. Those that are given win, and the rest follows from them: the learning rate
from the batch size, warm-up and decay steps from the number of steps.
"""

import functools
import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

from utils.data.datasets import DataOptions, read_split
from utils.data.images import header_size
from utils.data.loading import spread_indices
from utils.errors import UserError
from utils.parallel.processes import one_process

MAX_PASSES = 200  # over the training images
SAMPLE = 256  # image files whose headers give the size of the images
SMALL, LARGE = 20_000, 500_000  # training images from which a recipe trains longer
SCRATCH_PASSES = 100
SCRATCH_GRID = (4, 16)  # the least and most patches per side
SCRATCH_PIXELS = 224  # the largest side
SCRATCH_BORDER = 1 / 8  # of the image size on each side, of which a crop is taken


class TrainingImages(NamedTuple):
    """What a recipe depends on."""

    count: int
    height: int  # in pixels; the median
    width: int

    def __str__(self):
        return f"{self.count:,} training images of {self.height}x{self.width} pixels"


class Recipe(NamedTuple):
    """The flags of a recipe."""

    batch_size: int
    flags: Callable  # (TrainingImages, batch size, pixels per patch) -> {flag: value} without --train_batch_size
    fine_tunes: bool = True


def parse_with_recipe(parser, pixels_per_patch, arguments=None):
    """(flags, text): the flags, and what --pretrained_dir and --recipe have chosen for those that are not given.

    `pixels_per_patch(flags)` is the number of which image sizes are multiples. A --recipe reads the data set's labels,
    perhaps after a download, and headers of image files. Raises UserError.
    """
    flags, given = parser.parse_given(arguments)
    given = {name: value for name, value in vars(flags).items() if name in given}
    text = parser.complete(flags, given)
    if not flags.recipe:
        return flags, text
    if flags.config:
        raise UserError("--recipe chooses flags that are not given, but --config gives them all; omit one of the two")
    images = training_images(flags.dataset, DataOptions.from_flags(flags))
    chosen, capped = choose(flags.recipe, images, pixels_per_patch(flags), given)
    vars(flags).update(chosen)
    return flags, "\n".join(filter(None, [text, description(flags, images, chosen, capped)]))


@functools.cache  # for the runs of a sweep
def training_images(dataset, options):
    """The TrainingImages of a data set, whose pixels are not read if they are in files. Raises UserError."""
    quiet = one_process()._replace(rank=1)  # the first process prints a note, as the training will
    images = read_split(dataset, "train", options, quiet).images
    if not isinstance(images, list):
        return TrainingImages(len(images), *images.shape[2:])
    return TrainingImages(len(images), *median_size([images[row] for row in spread_indices(len(images), SAMPLE)]))


def median_size(paths):
    """Medians of (heights, widths) of image files. Raises UserError if no header can be read."""
    sizes = []
    for path in paths:
        try:
            sizes.append(header_size(path))
        except UserError as error:
            unreadable = error
    if not sizes:
        raise unreadable
    return tuple(statistics.median_low(sides) for sides in zip(*sizes, strict=True))


def choose(name, images, patch, given):
    """({flag: value} that a recipe chooses, the number of steps that the cap has shortened or None).

    `patch` is the number of pixels of which image sizes are multiples, `given` are flags that win, {flag: value}.
    Raises UserError.
    """
    recipe = RECIPES[name]
    batch = given.get("train_batch_size") or largest_batch(recipe.batch_size, images.count)
    flags = {"train_batch_size": batch, **recipe.flags(images, batch, patch)}
    if given.get("optimizer", flags["optimizer"]) != flags["optimizer"] and "learning_rate" not in given:
        raise UserError(
            f"--recipe {name} has a learning rate for --optimizer {flags['optimizer']}; with {given['optimizer']} give "
            "--learning_rate too"
        )
    capped = set_length(flags, images.count, given)
    set_sizes(flags, patch, given)
    if given.get("decay_type", flags["decay_type"]) != "step":
        flags.pop("decay_steps", None)
    return {flag: value for flag, value in flags.items() if flag not in given}, capped


def largest_batch(batch_size, count):
    """The recipe's batch size, halved until no batch contains an image twice."""
    while batch_size > max(1, count):
        batch_size //= 2
    return batch_size


def set_length(flags, count, given):
    """Set the number of steps, and scale warm-up and decay steps with it; returns what was more than MAX_PASSES."""
    planned, batch = flags["num_steps"], flags["train_batch_size"]
    if "epochs" in given:
        steps = math.ceil(given["epochs"] * count / batch)
        del flags["num_steps"]
    else:
        steps = given.get("num_steps") or max(1, min(planned, MAX_PASSES * count // batch))
        flags["num_steps"] = steps
    flags["warmup_steps"] = round(flags["warmup_steps"] * steps / planned)
    if "decay_steps" in flags:
        flags["decay_steps"] = [max(1, round(step * steps / planned)) for step in flags["decay_steps"]]
    return planned if steps < planned and not {"epochs", "num_steps"} & given.keys() else None


def set_sizes(flags, patch, given):
    """Round the image size to the patch grid; what is in pixels keeps its ratio to it."""
    planned = flags["img_size"]
    flags["img_size"] = given.get("img_size") or max(1, math.floor(planned / patch + 0.5)) * patch
    for flag in ("resize_size", "crop_padding"):
        if {"min_crop_scale", "resize_size", "crop_padding"} & given.keys():
            flags.pop(flag, None)
        elif flag in flags:
            flags[flag] = max(1, round(flags[flag] * flags["img_size"] / planned))


def bit(images, batch, patch):
    """BiT-HyperRule (Kolesnikov et al., 2020), as released in google-research/big_transfer: fine-tuning by SGD."""
    steps, warmup, decay_steps = 20_000, 500, [6_000, 12_000, 18_000]
    if images.count < SMALL:
        steps, warmup, decay_steps = 500, 100, [200, 300, 400]
    elif images.count < LARGE:
        steps, warmup, decay_steps = 10_000, 500, [3_000, 6_000, 9_000]
    resized, cropped = (160, 128) if images.height * images.width < 96 * 96 else (512, 480)
    return {
        "num_steps": steps,
        "optimizer": "sgd",
        "learning_rate": 0.003 * batch / 512,
        "weight_decay": 0.0,
        "warmup_steps": warmup,
        "decay_type": "step",
        "decay_steps": decay_steps,
        "max_grad_norm": 0.0,
        "resize_size": resized,
        "img_size": cropped,
        "horizontal_flip": True,
        "mixup": 0.0 if images.count < SMALL else 0.1,
    }


def vit(images, batch, patch):
    """The fine-tuning of Vision Transformers (Dosovitskiy et al., 2021), with the lengths of BiT-HyperRule.

    Crop and flip are those of the released code, google-research/vision_transformer.
    """
    steps, warmup = (500, 100) if images.count < SMALL else (10_000 if images.count < LARGE else 20_000, 500)
    return {
        "num_steps": steps,
        "optimizer": "sgd",
        "learning_rate": 0.03 * batch / 512,
        "weight_decay": 0.0,
        "warmup_steps": warmup,
        "decay_type": "cosine",
        "max_grad_norm": 1.0,
        "img_size": 384,
        "min_crop_scale": 0.05,
        "horizontal_flip": True,
    }


def scratch(images, batch, patch):
    """Small models on small images from scratch, by Muon; docs/from-scratch.md has the search.

    The learning rate grows with the root of the batch size.
    """
    steps = math.ceil(SCRATCH_PASSES * images.count / batch)
    least, most = (patches * patch for patches in SCRATCH_GRID)
    img_size = min(max(math.sqrt(images.height * images.width), least), most, SCRATCH_PIXELS)
    return {
        "num_steps": steps,
        "optimizer": "muon",
        "learning_rate": 4e-3 * math.sqrt(batch / 128),
        "weight_decay": 0.5,
        "warmup_steps": round(0.05 * steps),
        "decay_type": "cosine",
        "max_grad_norm": 1.0,
        "label_smoothing": 0.1,
        "img_size": img_size,
        "crop_padding": SCRATCH_BORDER * img_size,
        "horizontal_flip": True,
    }


RECIPES = {"bit": Recipe(512, bit), "vit": Recipe(512, vit), "scratch": Recipe(128, scratch, fine_tunes=False)}


def description(flags, images, chosen, capped):
    """What the recipe has chosen, in two lines, and a warning if it does not suit the weights."""
    lines = [f"recipe {flags.recipe}, {images}"]
    if capped:
        lines[0] += f": {flags.num_steps:,} steps in place of {capped:,}, because of the cap of {MAX_PASSES} passes"
    lines.append("  chosen: " + " ".join(as_typed(flag, value) for flag, value in chosen.items()))
    fine_tunes = RECIPES[flags.recipe].fine_tunes
    if fine_tunes and not flags.pretrained_dir:
        lines.append(f"warning: --recipe {flags.recipe} is for fine-tuning, but no --pretrained_dir is given")
    if flags.pretrained_dir and not fine_tunes:
        lines.append(f"warning: --recipe {flags.recipe} is for training from scratch, without --pretrained_dir")
    return "\n".join(lines)


def as_typed(flag, value):
    """The flag as one would give it."""
    if value is True:
        return f"--{flag}"
    values = value if isinstance(value, list) else [value]
    return " ".join([f"--{flag}", *(f"{item:g}" if isinstance(item, float) else str(item) for item in values)])
