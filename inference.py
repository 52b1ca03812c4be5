"""A saved model ready for use: its module, its classes, and how it prepares an image."""

import copy
import difflib
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from models import MODEL_TYPES, RESNETS, build_model, canonical_model_type, num_classes_of, pixels_per_patch
from models.configs import STANDARDISATION, config_of, fields_of_flags, format_fields, parse_fields
from models.formats import FAMILIES, family_of, identify
from models.formats.cards import Card, Described, read_description
from models.formats.exports import TARGETS
from models.formats.runs import is_run
from models.norms import norm_type_of
from utils.checkpoint_files import holds_npz, read_checkpoint
from utils.class_names import class_names, readable_names
from utils.data.augmentation import mean_and_std, normalise
from utils.data.datasets import DATASETS
from utils.data.images import VALIDATION_RESIZE, centre_crop, centre_square, images_of, stretch
from utils.errors import UserError
from utils.exports import write_checked
from utils.flag_groups import mean_std, token_reduction_of
from utils.hub import is_hub_name, local_folder
from utils.parallel.precision import Precision
from utils.parallel.processes import one_process
from utils.predictions import predict
from utils.pretrained import download as download_published
from utils.pretrained import load_pretrained, model_type_of, open_npz
from utils.records.run_folder import read_config
from utils.records.weights import load_into, load_weights
from utils.terminal import say_on_stderr

NUMERIC_OF_TOKENS = ("gelu", "layer_norm_eps")
NUMERIC = (*NUMERIC_OF_TOKENS, *STANDARDISATION)  # fields that the shapes of weights do not show
CHECK_IMAGES = Path(__file__).parent / "img" / "digits"  # on which an exported model is compared with this one


@dataclass
class SavedModel:
    """A model from a run's .safetensors file, from an .npz file or from a checkpoint of another library.

    `model` is a plain module in evaluation mode: images (B, 3, img_size, img_size) -> logits (B, classes). `classes`
    are readable names, `flags` those of the training run, or {} without one. `title` is for figures. `mean_std` is
    the name of the mean and standard deviation of the pixels, or a text of their six numbers. A model that `crops`
    gets the centre of an image, others the whole. Without `has_head` there are features and attention, and logits of 0.
    """

    model: nn.Module
    classes: list
    img_size: int
    flags: dict
    title: str
    mean_std: str = "half"  # Google's models have it, and runs older than the flag
    crops: bool = False
    has_head: bool = True
    knows_classes: bool = False  # whether `classes` are those it was trained on, not only numbers or a library's names

    @classmethod
    def load(
        cls, path, model_type=None, img_size=None, download=False, token_reduction=None, given=None, needs_head=False
    ):
        """Load a checkpoint of any format; `download` fetches one of Google or of Hugging Face if it does not exist.

        `model_type` and `img_size` are found in the run or in the file unless given. `token_reduction` has keywords of
        `build_model` that replace those of the run: token_reduction, keep_tokens, reduction_layer, tome_r. `given` may
        have values of the flags gelu, model_fields and mean_std, which replace the checkpoint's. Raises UserError, also
        for a checkpoint of another library without a head if it `needs_head`.
        """
        given = {name: (given or {}).get(name) for name in ("gelu", "model_fields", "mean_std")}
        given = {name: value for name, value in {**given, "model_type": model_type}.items() if value is not None}
        if download and is_hub_name(path):
            local_folder(path, download=True)
        elif download and Path(path).suffix == ".npz" and not Path(path).exists():
            download_published(path)
        load = loader_of(path)
        if needs_head and load is load_foreign and identified(path, given).num_classes is None:
            raise UserError(f"{path} has no head, so it can't classify; fine-tune it with train.py")
        loaded = load(path, given, img_size, token_reduction or {})
        title = "/".join(Path(path).resolve().parts[-2:])  # the folder has the name of the run
        if "mean_std" in given:
            loaded["mean_std"] = given["mean_std"]
        return cls(loaded.pop("model").eval(), title=title, **loaded)

    def to(self, device):
        self.model.to(device)
        return self

    def prepare(self, image):
        """The model's input, as in the run's evaluation: uint8 (3, H, W) -> float32 (1, 3, img_size, img_size)."""
        images = self.resize(image, (self.img_size, self.img_size))[None]
        return normalise(images.to(self.device), self.mean_std)

    @property
    def resize(self):
        """How images are resized: a function (uint8 (3, H, W), img_size) -> uint8 (3, *img_size)."""
        return centre_crop if self.crops else stretch

    @property
    def device(self):
        """The device of the model's weights."""
        return next(self.model.parameters()).device

    def predict(self, paths, batch_size=64, num_workers=None):
        """The most probable classes of images: [{"image": path, "classes": [{"class", "probability"}, ...]}, ...].

        `paths` is the path of an image or of a folder, a glob pattern, or a list of them. At most five classes are
        returned, the most probable first. An image that can't be read has no classes and an "error". Images are read by
        `num_workers` processes, by default one per core, if they are more than one batch. Raises UserError for a path
        that does not exist, and if no image can be read.
        """
        paths = images_of([paths] if isinstance(paths, str | os.PathLike) else paths)
        precision = Precision("O0", torch.float32, self.device)
        return predict(self, paths, batch_size, num_workers, precision, one_process(self.device))

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
        return centre_square(image) if self.crops else image

    def export(self, target, path, images=CHECK_IMAGES, overwrite=False):
        """Write the model for another library, a key of models.formats.exports.TARGETS; return a report, a dictionary.

        `path` is a folder for "timm" and "hf", a file for "npz" and "onnx". The result is loaded by its library and
        compared on the CPU, on `images` as those of `predict`. Raises UserError for a model that the format can't
        express, for an existing `path` unless `overwrite`, and if the logits differ; then no file is left.
        """
        if not self.has_head:
            raise UserError(f"{self.title} has no head, so it can't classify; fine-tune it with train.py")
        mean, std = mean_and_std(self.mean_std)
        shorter_side = round(self.img_size * VALIDATION_RESIZE) if self.crops else None
        card = Card(self.img_size, list(self.classes), mean, std, shorter_side)
        images = images_of([images] if isinstance(images, str | os.PathLike) else images)
        on_cpu = self if self.device.type == "cpu" else replace(self, model=copy.deepcopy(self.model).cpu())
        return write_checked(TARGETS[target], on_cpu, card, path, images, overwrite)


def distinct_labels(models, paths):
    """A label for each SavedModel: its norm, its run, its file or its path, the first of which differs for all."""
    norms = [saved.flags.get("norm_type", "LN") for saved in models]
    runs = [saved.flags.get("name", saved.title) for saved in models]
    for labels in (norms, runs, [saved.title for saved in models]):
        if len(set(labels)) == len(models):
            return labels
    return paths


def loader_of(path):
    """`load_npz`, `load_run` or `load_foreign`, whichever loads the file. Raises UserError."""
    if holds_npz(path):
        return load_npz
    checkpoint = read_checkpoint(path, shapes_only=True)
    is_unknown = Path(path).suffix == ".safetensors" and not checkpoint.config and "step" in checkpoint.metadata
    return load_run if is_unknown or is_run(checkpoint) else load_foreign


def load_run(path, given, img_size, token_reduction):
    """{field of SavedModel: value} of a run's .safetensors file."""
    path = Path(path)
    weights, _ = load_weights(path)
    config = read_config(path.parent) or {}
    if not {"flags", "classes"} <= config.keys():
        raise UserError(f"{path.parent} has no config.json of a run, so the model of {path.name} is unknown")
    flags, classes = config["flags"], config["classes"]
    model_type = given.get("model_type") or flags["model_type"]
    keywords = {**fields_of_flags(flags), **fields_of_flags(given), **token_reduction_of(flags, token_reduction)}
    if model_type not in RESNETS:
        keywords["norm_type"] = flags.get("norm_type", "LN")
    model = make_model(model_type, flags["img_size"], len(classes), **keywords)
    load_into(model, weights, path)
    img_size = img_size or flags["img_size"]
    if img_size != flags["img_size"]:
        resized = make_model(model_type, img_size, len(classes), **keywords)
        resized.load_from(model.export_npz(), head="keep")
        model = resized
    return {
        "model": model,
        "classes": readable_names(classes),
        "img_size": img_size,
        "flags": flags,
        "mean_std": flags.get("mean_std", "half"),
        "crops": DATASETS[flags["dataset"]].prepare is centre_crop,
        "knows_classes": True,
    }


def load_npz(path, given, img_size, token_reduction):
    """{field of SavedModel: value} of an .npz file that has a head; an export has a .json file next to it."""
    arrays, described = open_npz(path), description_of(path, given)
    model_type = given.get("model_type") or described.flags.get("model_type") or model_type_of(path, MODEL_TYPES)
    if model_type is None:
        raise UserError(f"{path} is not named after a model; name it with --model_type")
    num_classes = num_classes_of(arrays)
    if num_classes is None:
        raise UserError(f"{path} has no head, so it can't classify; fine-tune it with train.py")
    classes = described.classes or class_names(num_classes)
    if len(classes) != num_classes:
        raise UserError(f"{description_file(path)} names {len(classes)} classes, but {path} has {num_classes}")
    fields = {**fields_of_flags(described.flags), **fields_of_flags(given)}
    keywords = {**token_reduction_of(described.flags, token_reduction), **fields}
    if norm_type := norm_type_of(arrays):
        keywords["norm_type"] = norm_type
    img_size = img_size or described.img_size or pretrained_img_size(arrays, model_type, fields)
    model = make_model(model_type, img_size, num_classes, **keywords)
    load_pretrained(model, path, model_type, head="keep")
    return {
        "model": model,
        "classes": classes,
        "img_size": img_size,
        "flags": {},
        "mean_std": described.flags.get("mean_std", "half"),
        "crops": described.crops,
        "knows_classes": bool(described.classes),
    }


def description_of(path, given):
    """The Described of an .npz file, which says nothing if there is no .json file. Raises UserError.

    What it says of the model is not used for another --model_type that is `given`.
    """
    if not description_file(path).is_file():
        return Described({}, None, None, False)
    try:
        described = read_description(description_file(path))
        model_type = canonical_model_type(described.flags["model_type"])
        wanted = canonical_model_type(given.get("model_type", model_type))
    except ValueError as error:
        raise UserError(str(error)) from error
    if wanted != model_type:
        return described._replace(flags={"mean_std": described.flags["mean_std"]}, img_size=None)
    return described


def description_file(path):
    return Path(path).with_suffix(".json")


def load_foreign(path, given, img_size, token_reduction):
    """{field of SavedModel: value} of a checkpoint of another library; prints how it was understood.

    Without a head there is a single class, whose logit is 0.
    """
    flags, note = flags_of_checkpoint(path, given)
    say_on_stderr(note)
    found = identified(path, given)
    img_size, num_classes = img_size or found.img_size, found.num_classes or 1
    model = make_model(flags["model_type"], img_size, num_classes, **fields_of_flags(flags), **token_reduction)
    load_pretrained(model, path, flags["model_type"], head="keep" if found.num_classes else "zero")
    return {
        "model": model,
        "classes": (found.classes or class_names(num_classes)) if found.num_classes else ["no head"],
        "img_size": img_size,
        "flags": {},
        "mean_std": flags["mean_std"],
        "has_head": found.num_classes is not None,
    }


def identified(path, given):
    """The models.formats.Found of the file without its weights; `given` as below. Raises UserError."""
    try:
        num_heads = parse_fields(given.get("model_fields") or ()).get("num_heads")
        return identify(read_checkpoint(path, shapes_only=True), num_heads)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def flags_of_checkpoint(path, given):
    """({flag: value}, a line on them): the flags of a model with this checkpoint's weights. Raises UserError.

    `given` are flags that win, {name: value}; their model_fields win one by one. With another --model_type than the
    checkpoint's only the fields are taken that its weights do not show.
    """
    found, fields = identified(path, given), {}
    model_type = canonical_model_type(given.get("model_type", found.model_type))
    if model_type == found.model_type:
        fields = found.fields
    else:
        config = config_of(model_type)
        target, source = family_of(config), family_of(found.config)
        if source != target and (source, target) != ("vit", "conformer"):
            raise UserError(f"{path} does not fit {model_type}: it holds {FAMILIES[source]}")
        names = NUMERIC if target == source else NUMERIC_OF_TOKENS
        fields = {name: found.config[name] for name in names if name in config and name in found.config}
        fields = {name: value for name, value in fields.items() if config[name] != value}
    given_fields = fields_of_flags(given)
    fields = {**fields, **given_fields}
    gelu = fields.pop("gelu", None)
    flags = {
        "model_type": model_type,
        "model_fields": format_fields(fields) or None,
        "gelu": gelu,
        "mean_std": given.get("mean_std") or mean_std(found.mean_std),
        "norm_type": found.keywords.get("norm_type", "LN"),
        **token_reduction_of(found.keywords, given),
    }
    shown = [
        f"--{name} {text_of(flags[name])}" for name in ("model_type", "model_fields", "gelu", "mean_std") if flags[name]
    ]
    note = f"{path}: weights of {found.format}, {' '.join(shown)}"
    assumed = sorted(found.assumed.difference(given_fields, given))
    return flags, f"{note}; the file does not say {', '.join(assumed)}, so the usual is assumed" if assumed else note


def text_of(value):
    """The value of a flag as it is given."""
    return " ".join(value) if isinstance(value, list) else value


def pretrained_img_size(arrays, model_type, fields):
    """The side in pixels of the square images that the checkpoint's position embeddings are for, or 224 without any.

    `fields` are those of the model's config that differ. Raises UserError for a wrong one.
    """
    key = "Transformer/posembed_input/pos_embedding"
    if key not in arrays:
        return 224
    try:
        return pixels_per_patch(model_type, **fields) * round((arrays[key].shape[1] - 1) ** 0.5)
    except ValueError as error:
        raise UserError(str(error)) from error


def make_model(*arguments, **keywords):
    """`build_model` whose ValueError is a UserError."""
    try:
        return build_model(*arguments, **keywords)
    except ValueError as error:
        raise UserError(str(error)) from error
