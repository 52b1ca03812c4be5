"""A saved model ready for use: its module, its classes, and how it prepares an image."""

import difflib
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from models import MODEL_TYPES, build_model, num_classes_of
from utils.data.augmentation import normalise
from utils.data.datasets import DATASETS
from utils.data.images import centre_crop, centre_square, stretch
from utils.errors import UserError
from utils.flag_groups import token_reduction_of
from utils.pretrained import download as download_published
from utils.pretrained import load_pretrained, model_type_of, open_npz
from utils.records.run_folder import read_config
from utils.records.weights import load_into, load_weights

# SHA-256 of ImageNet-1k's sorted class ids (wnids), joined by spaces; torchvision lists the names in this order.
IMAGENET_WNIDS_SHA256 = "791ce0333040dd249d13133f90d28ef0263ffc01e5de0afd85b3e32048d7d456"


@dataclass
class SavedModel:
    """A model from a run's .safetensors file or from an .npz file.

    `model` is a plain module in evaluation mode: images (B, 3, img_size, img_size) -> logits (B, classes). `classes`
    are readable names, `flags` those of the training run, or {} for an .npz file. `title` is for figures.
    """

    model: nn.Module
    classes: list
    img_size: int
    flags: dict
    title: str

    @classmethod
    def load(cls, path, model_type=None, img_size=None, download=False, token_reduction=None):
        """Load a run's .safetensors file, or an .npz file, which `download` fetches if it does not exist.

        `model_type` and `img_size` are found in the run or in the file unless given. `token_reduction` has keywords of
        `build_model` that replace those of the run: token_reduction, keep_tokens, reduction_layer. Raises UserError.
        """
        path = Path(path)
        if download and path.suffix == ".npz" and not path.exists():
            download_published(path)
        load = load_npz if path.suffix == ".npz" else load_run
        model, classes, img_size, flags = load(path, model_type, img_size, token_reduction or {})
        title = "/".join(path.resolve().parts[-2:])  # the folder has the name of the run
        return cls(model.eval(), classes, img_size, flags, title)

    def to(self, device):
        self.model.to(device)
        return self

    @property
    def mean_std(self):
        """The run's --mean_std. Google's models, and runs older than the flag, have "half"."""
        return self.flags.get("mean_std", "half")

    def prepare(self, image):
        """The model's input, as in the run's evaluation: uint8 (3, H, W) -> float32 (1, 3, img_size, img_size)."""
        resize = DATASETS[self.flags["dataset"]].prepare if self.flags else stretch
        images = resize(image, (self.img_size, self.img_size))[None]
        return normalise(images.to(next(self.model.parameters()).device), self.mean_std)

    def class_number(self, name):
        """The number of the class with this name, or whose number this is, counted from 0. Raises UserError."""
        if name in self.classes:
            return self.classes.index(name)
        if name.isdecimal() and int(name) < len(self.classes):
            return int(name)
        nearest = [known for known in self.classes if name and name.lower() in known.lower()]
        nearest = nearest or difflib.get_close_matches(name, self.classes, cutoff=0.4)
        hint = f"did you mean {', '.join(nearest[:3])}?" if nearest else f"there is {', '.join(self.classes[:3])}, ..."
        raise UserError(f"unknown class {name!r}; {hint} Numbers from 0 to {len(self.classes) - 1} are accepted too")

    def visible_part(self, image):
        """The part of an image (3, H, W) that `prepare` keeps: all of it, or its centre if the run evaluates crops."""
        crops = self.flags and DATASETS[self.flags["dataset"]].prepare is centre_crop
        return centre_square(image) if crops else image


def distinct_labels(models, paths):
    """A label for each SavedModel: its norm, its run, its file or its path, the first of which differs for all."""
    norms = [saved.flags.get("norm_type", "LN") for saved in models]
    runs = [saved.flags.get("name", saved.title) for saved in models]
    for labels in (norms, runs, [saved.title for saved in models]):
        if len(set(labels)) == len(models):
            return labels
    return paths


def load_run(path, model_type, img_size, token_reduction):
    """(model, names of its classes, image size, flags) of a run's .safetensors file."""
    weights, _ = load_weights(path)
    config = read_config(path.parent) or {}
    if not {"flags", "classes"} <= config.keys():
        raise UserError(f"{path.parent} has no config.json of a run, so the model of {path.name} is unknown")
    flags, classes = config["flags"], config["classes"]
    model_type = model_type or flags["model_type"]
    keywords = {"norm_type": flags.get("norm_type", "LN"), **token_reduction_of(flags, token_reduction)}
    model = make_model(model_type, flags["img_size"], len(classes), **keywords)
    load_into(model, weights, path)
    img_size = img_size or flags["img_size"]
    if img_size != flags["img_size"]:
        resized = make_model(model_type, img_size, len(classes), **keywords)
        resized.load_from(model.export_npz(), head="keep")
        model = resized
    return model, readable_names(classes), img_size, flags


def load_npz(path, model_type, img_size, token_reduction):
    """(model, names of its classes, image size, no flags) of an .npz file that has a head."""
    arrays = open_npz(path)
    model_type = model_type or model_type_of(path, MODEL_TYPES)
    if model_type is None:
        raise UserError(f"{path} is not named after a model; name it with --model_type")
    num_classes = num_classes_of(arrays)
    if num_classes is None:
        raise UserError(f"{path} has no head, so it can't classify; fine-tune it with train.py")
    img_size = img_size or pretrained_img_size(arrays, model_type)
    model = make_model(model_type, img_size, num_classes, **token_reduction)
    load_pretrained(model, path, model_type, head="keep")
    return model, class_names(num_classes), img_size, {}


def pretrained_img_size(arrays, model_type):
    """The side in pixels of the square images that the checkpoint's position embeddings are for, or 224 without any."""
    key = "Transformer/posembed_input/pos_embedding"
    if key not in arrays:
        return 224
    with torch.device("meta"):
        rows, _ = make_model(model_type, img_size=224).patch_embed.grid_size
    return 224 // rows * round((arrays[key].shape[1] - 1) ** 0.5)


def make_model(*arguments, **keywords):
    """`build_model` whose ValueError is a UserError."""
    try:
        return build_model(*arguments, **keywords)
    except ValueError as error:
        raise UserError(str(error)) from error


def class_names(num_classes):
    """ImageNet's names for 1000 classes, from torchvision; otherwise "class 0", "class 1", ..."""
    if num_classes == 1000:
        from torchvision.models import ResNet50_Weights

        return ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    return [f"class {number}" for number in range(num_classes)]


def readable_names(classes):
    """ImageNet's 1000 class ids with their names, such as "tench (n01440764)"; other classes are returned unchanged."""
    if hashlib.sha256(" ".join(classes).encode()).hexdigest() != IMAGENET_WNIDS_SHA256:
        return classes
    return [f"{name} ({wnid})" for name, wnid in zip(class_names(1000), classes, strict=True)]
