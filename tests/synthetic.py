"""Weights and images that a reference fixture was made with, drawn again from each key's own seed.

A fixture (tests/fixtures/*.json) keeps only the keys, the shapes and the logits of the official code.
`numpy.random.RandomState` is frozen, so the same arrays come out on every machine and version.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch

FIXTURES = Path(__file__).parent / "fixtures"


def load_fixture(name):
    return json.loads((FIXTURES / f"{name}.json").read_text())


def make_checkpoint(shapes):
    """{key: float32 array} for {key: shape}: every weight random, so that none can be mixed up or left out."""
    return {key: make_array(key, tuple(shape)) for key, shape in shapes.items()}


def make_array(key, shape):
    normal = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
    leaf = key.rpartition("/")[2]
    if leaf in ("scale", "gamma", "var", "multiplier"):
        return 1 + 0.2 * normal
    if leaf == "kernel":
        projects_heads = any(f"/{part}/" in key for part in ("query", "key", "value"))
        fan_in = shape[0] if projects_heads else np.prod(shape[:-1], dtype=int)
        return (normal / np.sqrt(fan_in)).astype(np.float32)
    return {"bias": 0.2, "beta": 0.2, "mean": 0.2, "cls": 0.5, "pos_embedding": 0.2}[leaf] * normal


def randomised(model):
    """The model in evaluation mode, loaded with `make_checkpoint` of its keys: all weights random, the head's too."""
    model.load_from(make_checkpoint(shapes_of(model)), head="keep")
    return model.eval()


def shapes_of(model):
    """{key: shape} of the model's checkpoint."""
    return {key: array.shape for key, array in model.export_npz().items()}


def with_random_state(model):
    """The model with each entry of its state dict random, whether or not its checkpoint has a key for it."""
    generator = torch.Generator().manual_seed(2)
    for tensor in model.state_dict().values():
        tensor.uniform_(0.5, 1.5, generator=generator)  # valid for variances too
    return model


def make_images(img_size, batch=2):
    """(batch, 3, img_size, img_size) float32 in [-1, 1)"""
    return np.random.RandomState(1).uniform(-1, 1, (batch, 3, img_size, img_size)).astype(np.float32)
