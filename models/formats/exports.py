"""Our models -> files of other libraries: one line of TARGETS per format.

A target writes a model and its Card, and loads the result again by its own library, for a comparison of the logits.
"""

import copy
import json
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file

from models.convolution import StdConv2d
from models.formats import onnx, timm, transformers
from models.formats.cards import INPUT, description, write_description

WEIGHTS, CONFIG, PREPROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"


class Loaded(NamedTuple):
    """An exported model, loaded by its own library."""

    run: Callable
    """Images (B, 3, img_size, img_size) -> (logits, and what a token reduction chose, as models.formats.onnx.Plain)."""
    prepare: Callable | None = None
    """A Pillow image -> (3, img_size, img_size), as the library prepares it. None: it does not."""


class Target(NamedTuple):
    """A format to export to."""

    files: tuple
    """Names in the folder that is written; for a single file the suffixes of that file and of those next to it."""
    packages: tuple
    """What is needed, as in `pip install`; the last one loads it."""
    write: Callable
    """(model, card, path); raises CheckpointError for a model that the format can't express."""
    load: Callable
    """(path, model) -> Loaded; raises ImportError without the library."""
    bound: Callable
    """model -> the largest relative difference of the logits."""
    usage: str
    """How to load it, a text with the `path`."""

    @property
    def is_folder(self):
        return not self.files[0].startswith(".")

    @staticmethod
    def reference(model):
        """What the `run` of Loaded is compared with."""
        return onnx.Plain(model)


def write_folder(path, tensors, contents):
    """Write {name: tensor} and {file: dictionary} into the folder `path`."""
    path.mkdir()
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    for file, content in contents.items():
        (path / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_timm(model, card, path):
    tensors, config = timm.exported(model, card)
    write_folder(path, tensors, {CONFIG: config})


def write_transformers(model, card, path):
    tensors, config, preprocessor = transformers.exported(model, card)
    write_folder(path, tensors, {CONFIG: config, PREPROCESSOR: preprocessor})


def write_npz(model, card, path, dtype=np.float32):
    np.savez(path, **{key: array.astype(dtype, copy=False) for key, array in model.export_npz().items()})
    write_description(path.with_suffix(".json"), description(model, card))


def write_onnx(model, card, path):
    write_description(path.with_suffix(".json"), onnx.write(model, card, path))


def load_npz(path, model):
    loaded = copy.deepcopy(model)
    for tensor in loaded.state_dict().values():
        tensor.fill_(torch.nan)
    with np.load(path) as arrays:
        loaded.load_from(arrays, head="keep")
    return Loaded(onnx.Plain(loaded))


def load_timm(path, model):
    from timm import create_model
    from timm.data import create_transform, resolve_model_data_config

    theirs = create_model(f"local-dir:{path}", pretrained=True).eval()
    return Loaded(lambda images: (theirs(images),), create_transform(**resolve_model_data_config(theirs)))


def load_transformers(path, model):
    from transformers import AutoImageProcessor, AutoModelForImageClassification
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    theirs = AutoModelForImageClassification.from_pretrained(path).eval()
    processor = AutoImageProcessor.from_pretrained(path)
    return Loaded(
        lambda images: (theirs(images).logits,), lambda image: processor(image, return_tensors="pt").pixel_values[0]
    )


def load_onnx(path, model):
    from onnxruntime import InferenceSession

    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    return Loaded(lambda images: [torch.from_numpy(a) for a in session.run(None, {INPUT: images.numpy()})])


def write_float16_npz(model, card, path):
    write_npz(model, card, path, np.float16)


def float32_bound(model):
    """Convolutions amplify differences in rounding."""
    return 5e-5 if any(isinstance(module, StdConv2d) for module in model.modules()) else 5e-6


NPZ = Target((".npz", ".json"), ("numpy",), write_npz, load_npz, float32_bound, "evaluate.py --checkpoint {path}")
TARGETS = {
    "npz": NPZ,
    "npz-float16": NPZ._replace(write=write_float16_npz, bound=lambda model: 1e-2),
    "timm": Target(
        (WEIGHTS, CONFIG),
        ("timm",),
        write_timm,
        load_timm,
        float32_bound,
        'timm.create_model("local-dir:{path}", pretrained=True)',
    ),
    "hf": Target(
        (WEIGHTS, CONFIG, PREPROCESSOR),
        ("transformers",),
        write_transformers,
        load_transformers,
        float32_bound,
        "transformers.AutoModelForImageClassification.from_pretrained({path!r})",
    ),
    "onnx": Target(
        (".onnx", ".json", ".onnx.data"),
        ("onnx", "onnxscript", "onnxruntime"),
        write_onnx,
        load_onnx,
        lambda model: 1e-4,
        "onnxruntime.InferenceSession({path!r})",
    ),
}
