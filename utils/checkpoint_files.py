"""Reading a checkpoint of any format but .npz: .safetensors, a pickle of PyTorch, or a folder of Hugging Face.

What a file holds follows from its bytes, never from its name. Pickles are read with `weights_only=True` only.
"""

import argparse
import json
import pickle
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch

from utils.errors import UserError
from utils.hub import is_hub_name, local_folder
from utils.records.weights import BEST, read_shapes, read_weights

WHOLE = ("model.safetensors", "pytorch_model.bin")  # in a folder of Hugging Face
INDICES = tuple(f"{name}.index.json" for name in WHOLE)  # of several files
ZIP, PICKLE = b"PK\x03\x04", b"\x80\x02\x8a\n"  # the first bytes of what torch.save writes, now and earlier
ENTRIES = ("model", "teacher", "state_dict", "model_state_dict")  # of a pickle that holds more than weights


class CheckpointFile(NamedTuple):
    """What `models.formats.identify` expects."""

    tensors: dict
    metadata: dict
    config: dict | None
    preprocessor: dict | None
    entry: str | None


def holds_npz(path):
    """Whether the file at `path` is an .npz file, or would be one by its name if there is no readable file."""
    path = Path(path)
    if is_hub_name(path) or path.is_dir():
        return False
    if path.is_file() and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            return any(name.endswith(".npy") for name in file.namelist())
    return path.suffix == ".npz" and not (path.is_file() and (starts_with(path, PICKLE) or is_safetensors(path)))


def read_checkpoint(path, shapes_only=False):
    """The CheckpointFile at `path`, a file, a folder or a name such as hf:owner/name that is downloaded already.

    With `shapes_only` the tensors have no memory. Raises UserError.
    """
    path = local_folder(path) if is_hub_name(path) else Path(path)
    if path.is_dir():
        folder, files = path, files_in(path)
    else:
        folder, files = path.parent, [path]
    tensors, metadata, entry = {}, {}, None
    for file in files:
        found, its_metadata, entry = read_file(file, shapes_only)
        tensors |= found
        metadata |= its_metadata
    config, preprocessor = (read_json(folder / f"{name}.json") for name in ("config", "preprocessor_config"))
    return CheckpointFile(tensors, metadata, config, preprocessor, entry)


def folder_of(path):
    """The folder for what belongs to a checkpoint: that of its file, or the current one for a name at Hugging Face."""
    if is_hub_name(path):
        return Path()
    return Path(path) if Path(path).is_dir() else Path(path).parent


def files_in(folder):
    """The files of weights in a folder of Hugging Face. Raises UserError."""
    for whole, index in zip(WHOLE, INDICES, strict=True):
        if (folder / whole).is_file():
            return [folder / whole]
        if (folder / index).is_file():
            names = set((read_json(folder / index).get("weight_map") or {}).values())
            return [folder / name for name in sorted(names)]
    if (folder / BEST).is_file():
        raise UserError(f"{folder} is a folder; give its {BEST}")
    raise UserError(f"{folder} has neither {' nor '.join(WHOLE)}; give a file of weights in it")


def read_file(path, shapes_only):
    """({name: tensor}, metadata, entry of a pickle or None). Raises UserError."""
    if path.is_file() and is_pickle(path):
        return (*read_pickle(path, "meta" if shapes_only else "cpu"),)
    tensors, metadata = (read_shapes if shapes_only else read_weights)(path)
    return tensors, metadata, None


def is_pickle(path):
    """Whether the file is what torch.save writes: a zip file, or a pickle in its earlier format."""
    return starts_with(path, ZIP, PICKLE)


def starts_with(path, *signatures):
    """Whether the file at `path` begins with one of the `signatures` of four bytes."""
    with open(path, "rb") as file:
        return file.read(4) in signatures


def is_safetensors(path):
    """Whether the file begins as a .safetensors file: with the length of a header, and the header."""
    with open(path, "rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size


def read_pickle(path, device):
    """({name: tensor}, no metadata, the entry that holds them) of a file by torch.save. Raises UserError."""
    try:
        # as an open file, because by the path torch would take the format from the name
        with open(path, "rb") as file, torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds Python objects other than tensors, which are never loaded; where it was made, write its "
            f"weights alone by torch.save(model.state_dict(), 'weights.pth') ({reason(error)})"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{path} is not a readable file of PyTorch: {reason(error)}") from error
    entry = None
    if isinstance(content, dict):
        entry = next((name for name in ENTRIES if isinstance(content.get(name), dict)), None)
        content = content[entry] if entry else content
    if not isinstance(content, dict) or not all(torch.is_tensor(tensor) for tensor in content.values()) or not content:
        raise UserError(f"{path} does not hold a model's weights, a dictionary of tensors")
    return content, {}, entry


def reason(error):
    """The first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next(
        (line for line in lines if "Unsupported" in line or "GLOBAL" in line), lines[0] if lines else "no reason"
    )


def read_json(path):
    """The dictionary in a JSON file, or None without the file. Raises UserError."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    return content if isinstance(content, dict) else None
