"""Weights as .safetensors files, which carry their step and a checksum. Earlier versions wrote no checksum."""

import contextlib
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from utils.errors import UserError
from utils.records.files import replace_file

FORMAT = "vision-transformers"  # in the metadata, by which models/formats recognises these files
LAST, BEST = "last.safetensors", "best.safetensors"  # in the folder of a run
AVERAGED = "averaged.safetensors"  # the moving average after the last step, with --ema_decay


def save_weights(path, weights, step, is_first=True, model_type=""):
    """Write {name: tensor}, whole or sharded, as one file by the first process; all processes call it."""
    tensors = {}
    for name, tensor in weights.items():
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        if is_first:
            tensors[name] = tensor.cpu().contiguous()
    if is_first:
        metadata = {"format": FORMAT, "model_type": model_type, "step": str(step)}
        metadata["checksum"] = weights_checksum(tensors, step)
        replace_file(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def weights_checksum(tensors, step):
    """The XXH3 of a step and of the names, types, shapes and bytes of {name: tensor}."""
    hashed = xxhash.xxh3_128(str(step).encode())
    for name, tensor in sorted(tensors.items()):
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hashed.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return hashed.hexdigest()


def load_weights(path):
    """({name: tensor}, step) of a .safetensors file. Raises UserError."""
    weights, metadata = read_weights(path)
    return weights, int(metadata.get("step", 0))


def read_weights(path):
    """({name: tensor}, metadata) of a .safetensors file. Raises UserError."""
    with opened_weights(path) as (file, metadata):
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    step, checksum = metadata.get("step", 0), metadata.get("checksum")
    if checksum is not None and checksum != weights_checksum(weights, int(step)):
        raise UserError(f"{path} is damaged: its checksum does not match")
    return weights, metadata


def read_shapes(path):
    """({name: tensor without memory}, metadata) of a .safetensors file. Raises UserError."""
    with opened_weights(path) as (file, metadata):
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        shapes = {name: (each.get_shape(), each.get_dtype()) for name, each in slices.items()}
    is_float = {name: "F" in dtype for name, (_, dtype) in shapes.items()}
    return {
        name: torch.empty(shape, dtype=torch.float32 if is_float[name] else torch.int64, device="meta")
        for name, (shape, _) in shapes.items()
    }, metadata


def saved_step(path):
    """The step at which a .safetensors file was saved, without reading its weights. Raises UserError."""
    with opened_weights(path) as (_, metadata):
        return int(metadata.get("step", 0))


@contextlib.contextmanager
def opened_weights(path):
    """(file, metadata) of a .safetensors file. Raises UserError, also for errors while it is read."""
    if not Path(path).is_file():
        what = f"is a folder; give its {BEST}" if Path(path).is_dir() else "does not exist"
        raise UserError(f"{path} {what}")
    try:
        with safe_open(path, framework="pt") as file:
            yield file, file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} has no readable weights ({error}); give a .safetensors, .pth, .bin or .npz file"
        ) from error


def load_into(model, weights, path):
    """Load a run's weights into the model. Raises UserError that names the first weight that does not fit."""
    expected = model.state_dict()
    for name in sorted(set(expected) | set(weights)):
        found = tuple(weights[name].shape) if name in weights else "nothing"
        wanted = tuple(expected[name].shape) if name in expected else "nothing"
        if found != wanted:
            raise UserError(f"{path} does not fit the model: {name} has {found}, expected {wanted}")
    model.load_state_dict(weights)
