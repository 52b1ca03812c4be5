"""Writing a model for another library so that it is complete and checked, or not there."""

import importlib.metadata
import os
import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageOps

from utils.data.images import errors_name, read_image
from utils.errors import UserError
from utils.hub import one_line
from utils.records.files import move_file

BATCH = 8  # images that are compared at once


def write_checked(target, saved, card, path, images, overwrite):
    """Write the model of a SavedModel to `path` and compare the result with it; return the report of `compare`.

    `target` and `card` are those of models/formats/exports.py, `images` are paths. Raises UserError; `path` is then as
    it was before.
    """
    path = Path(path)
    check_output(target, path, overwrite)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        made = Path(folder) / path.name
        try:
            target.write(saved.model, card, made)
        except ImportError as error:
            raise UserError(missing(target, error)) from error
        except ValueError as error:
            raise UserError(f"{saved.title}: {error}") from error
        report = compare(target, saved, made, images)
        publish(target, made, path)
    return {"output": str(path), **report, "usage": target.usage.format(path=str(path))}


def check_output(target, path, overwrite):
    """Whether the files can be written. Raises UserError."""
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path} can't be written: {path.parent} is not a folder that exists and can be written")
    if target.is_folder:
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file; this target is a folder")
        found = sorted(file.name for file in path.iterdir()) if path.exists() else []
        if others := set(found).difference(target.files):
            raise UserError(f"{path} holds other files, such as {min(others)}; name a folder of its own")
    else:
        if path.suffix != target.files[0] or path.is_dir():
            raise UserError(f"{path} can't be written: this target is a file whose name ends with {target.files[0]}")
        found = [path.with_suffix(suffix) for suffix in target.files if path.with_suffix(suffix).exists()]
    if found and not overwrite:
        raise UserError(f"{path if target.is_folder else found[0]} exists; add --overwrite to replace it")


def compare(target, saved, made, images):
    """The report on the logits of what was written, {"checked": what loaded it, or None, ...}.

    Raises UserError if the library can't load it, or if the logits differ by more than the target's bound.
    """
    try:
        loaded = target.load(made, saved.model)
    except ImportError as error:
        return {"checked": None, "install": missing(target, error)}
    except Exception as error:  # whichever the library raises
        raise UserError(f"nothing is written: {library_of(target)} can't load it: {one_line(error)}") from error
    run, bound = target.reference(saved.model), target.bound(saved.model)
    batches = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
    results = [compare_batch(saved, run, loaded, batch) for batch in batches]
    differences, same_choice, same_class, same_prepared = map(torch.cat, zip(*results, strict=True))
    if not same_choice.any():
        raise UserError(f"nothing is written: on none of the {len(images)} images were the same tokens chosen")
    largest = differences[same_choice].max().item()
    if not largest <= bound:  # NaN is not
        raise UserError(
            f"nothing is written: the logits of {library_of(target)} differ by {largest:.1e}, relative to their norm; "
            f"expected at most {bound}"
        )
    return {
        "checked": library_of(target),
        "images": len(images),
        "largest_relative_difference": largest,
        "bound": bound,
        "same_class": same_class.sum().item(),
        "same_class_prepared_by_library": same_prepared.sum().item() if loaded.prepare else None,
        "other_tokens_chosen": (~same_choice).sum().item(),
    }


@torch.no_grad()
def compare_batch(saved, run, loaded, paths):
    """Of the images, each (B,): the relative differences of the logits, whether a token reduction chose the same
    tokens, whether the class is the same, and whether it is if the library prepares the images."""
    images = torch.cat([saved.prepare(read_image(path)) for path in paths])
    (logits, *choices), (found, *found_choices) = run(images), loaded.run(images)
    differences = (found - logits).norm(dim=1) / logits.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    same_choice = torch.ones(len(paths), dtype=torch.bool)
    for ours, theirs in zip(choices, found_choices, strict=True):
        same_choice &= (ours == theirs).all(dim=1)
    classes = logits.argmax(dim=1)
    prepared = torch.stack([loaded.prepare(open_image(path)) for path in paths]) if loaded.prepare else images
    return differences, same_choice, found.argmax(dim=1) == classes, loaded.run(prepared)[0].argmax(dim=1) == classes


def open_image(path):
    """The image as one of Pillow, which other libraries take."""
    with errors_name(path), Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def publish(target, made, path):
    """Move what was written to its place; the folder of `made` is deleted afterwards."""
    if target.is_folder:
        path.mkdir(exist_ok=True)
        for file in sorted(made.iterdir()):
            move_file(file, path / file.name)
        return
    for suffix in reversed(target.files):  # the model itself last
        if made.with_suffix(suffix).exists():
            move_file(made.with_suffix(suffix), path.with_suffix(suffix))
        else:
            path.with_suffix(suffix).unlink(missing_ok=True)


def missing(target, error):
    """What to do about an ImportError."""
    return f"{error.name or error} is missing: pip install {' '.join(target.packages)}"


def library_of(target):
    """The library that loads what is written, and its version."""
    name = target.packages[-1]
    return f"{name} {importlib.metadata.version(name)}"
