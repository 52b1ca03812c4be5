"""Checkpoints at Hugging Face, by names such as hf:google/vit-base-patch16-224 and timm:vit_base_patch16_224.dino.

They are kept in huggingface_hub's own cache, an optional dependency.
"""

import functools
import re
from pathlib import Path

from utils.errors import UserError

NAME = re.compile(r"(hf|timm):([\w.-]+(?:/[\w.-]+)?)")
FILES = ["*.json", "model*.safetensors"]
PICKLES = ["*.json", "pytorch_model*.bin"]  # of repositories without .safetensors


def is_hub_name(path):
    """Whether a path is a name at Hugging Face."""
    return NAME.fullmatch(str(path)) is not None


def repository(name):
    """The repository of a name: timm:x is that of timm/x."""
    source, rest = NAME.fullmatch(str(name)).groups()
    return f"timm/{rest}" if source == "timm" and "/" not in rest else rest


@functools.cache
def local_folder(name, download=False):
    """The folder in the cache that holds the files of `name`; `download` fetches them first. Raises UserError."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise UserError(f"{name} needs huggingface_hub: pip install huggingface_hub") from error
    options = {"repo_id": repository(name), "local_files_only": not download}
    try:
        folder = Path(snapshot_download(**options, allow_patterns=FILES))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(**options, allow_patterns=PICKLES))
        return folder
    except LocalEntryNotFoundError as error:
        if not download:
            raise UserError(f"{name} is not downloaded yet; add --download") from error
        raise UserError(f"{name} could not be downloaded: {one_line(error)}") from error
    except (HFValidationError, OSError, ValueError) as error:
        raise UserError(f"{name} could not be downloaded: {one_line(error)}") from error


def one_line(error):
    return " ".join(str(error).split())
