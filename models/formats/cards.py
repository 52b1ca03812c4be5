"""What describes an exported model in addition to its weights, and the .json file next to them that says it."""

import json
from typing import NamedTuple

from models.configs import format_fields
from models.formats.fields import nearest_model_type
from models.formats.names import mean_std_text
from models.npz import CheckpointError

INPUT = "images"


class Card(NamedTuple):
    """What an exported model carries in addition to its weights."""

    img_size: int
    classes: list
    """Names, one per logit."""
    mean: tuple
    std: tuple
    """Of the three channels, as fractions of 255."""
    shorter_side: int | None
    """In pixels, to which an image is resized before its centre is cropped. None: the whole image is resized."""


class Described(NamedTuple):
    """What a .json file says of the model next to it."""

    flags: dict
    """{flag of evaluate.py: value} of the model."""
    img_size: int
    classes: list
    crops: bool
    """Whether images are resized by their shorter side and cropped."""


def write_description(path, content):
    """Write the `description` of a model to the .json file at `path`."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def description(model, card):
    """The description of a model and its Card, {name: what JSON can express}."""
    model_type, fields = nearest_model_type(model.config)
    reduction, size = getattr(model, "reduction", None), card.img_size
    resize = {"height": size, "width": size}
    if card.shorter_side:
        resize = {"shorter_side": card.shorter_side, "centre_crop": size}
    return {
        "model_type": model_type,
        "model_fields": format_fields(fields),
        "token_reduction": reduction.keywords if reduction else {},
        "input": {"name": INPUT, "type": "float32", "shape": ["batch", 3, size, size], "channels": "RGB"},
        "preprocessing": {
            "resize": {**resize, "interpolation": "bilinear, antialiased"},
            "scale": 1 / 255,
            "mean": card.mean,
            "std": card.std,
        },
        "classes": card.classes,
    }


def read_description(path):
    """The Described of a .json file that `write_description` wrote. Raises CheckpointError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        preprocessing = content["preprocessing"]
        flags = {
            "model_type": content["model_type"],
            "model_fields": list(content["model_fields"]),
            "mean_std": mean_std_text(preprocessing["mean"], preprocessing["std"]),
            **content["token_reduction"],
        }
        classes = [str(name) for name in content["classes"]]
        crops = "centre_crop" in preprocessing["resize"]
        return Described(flags, int(content["input"]["shape"][-1]), classes, crops)
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        raise CheckpointError(
            f"{path} does not describe an exported model, rename it if it is another file: {error!r}"
        ) from error
