"""Pretrained weights: where Google publishes .npz files, downloading and opening one, and loading any checkpoint."""

import os
import re
import urllib.parse
import zipfile
from pathlib import Path

import numpy as np

from utils.checkpoint_files import holds_npz, read_checkpoint
from utils.download import download_npz
from utils.errors import UserError
from utils.hub import is_hub_name, local_folder
from utils.parallel.processes import first_on_each_machine

STORAGE = "https://storage.googleapis.com"

# {published folder: names of its files}. A file in a local folder with the name of a published one is fetched from that
# one, any other file from the first folder that has its name.
VIT = r"(ViT-(B_16|B_32|L_16|L_32)|R50\+ViT-B_16)"
PUBLISHED = {
    "vit_models/imagenet21k": rf"({VIT}|ViT-H_14)\.npz",
    "vit_models/imagenet21k+imagenet2012": rf"({VIT}(-224)?|ViT-H_14)\.npz",
    "vit_models/augreg": r"(R\d*_)?(Ti|S|B|L)_\d+-i.*\.npz",
    "vit_models/sam": r"ViT-(S|B|L)_(16|32)\.npz",
    "vit_models/gsam": r"ViT-(S|B|L)_(16|32)\.npz",
    "bit_models": r"BiT-[SM]-R\d+x\d.*\.npz",
    "vit_models/lit": None,  # for text and images
    "mixer_models/imagenet1k": None,  # MLP-Mixers
}


def published_folder(path):
    """(the folder in which Google publishes the file that `path` names, its name there); None if there is none."""
    path = Path(path)
    name = path.name.replace("R50-ViT", "R50+ViT")
    folders = [folder for folder in PUBLISHED if folder.rpartition("/")[2] == path.parent.name]
    if not folders or name.startswith("BiT-"):  # there is one BiT of each name
        folders = PUBLISHED
    return next(((folder, name) for folder in folders if re.fullmatch(PUBLISHED[folder] or "", name)), None)


def published_url(path, storage=STORAGE):
    """The URL of the published file that `path` names by its file name and its parent folder, or None."""
    found = published_folder(path)
    if found is None:
        return None
    folder, name = found
    return f"{storage}/{urllib.parse.quote(folder, safe='/+')}/{urllib.parse.quote(name, safe='+')}"


def model_type_of(path, model_types):
    """The one of `model_types` that the name of a published file contains, or None."""
    name = Path(path).name.replace("+", "-")
    name = re.sub(
        r"^(?:(R\d*)_)?((?:Ti|S|B|L)_\d+-i)", lambda m: f"{m[1] + '-' if m[1] else ''}ViT-{m[2]}", name
    )  # AugReg
    return next((model_type for model_type in model_types if re.match(rf"{model_type}[-.]", name)), None)


def download_command(path):
    """How to get the file, in one line, or a hint if Google publishes no file of that name."""
    url = published_url(path)
    if url is None:
        where = f" in {Path(path).parent.name}/" if published_url(Path(path).name) else ""
        return f"Google publishes no file of that name{where}; see {STORAGE}/vit_models and {STORAGE}/bit_models"
    return f"get it with --download, or: curl --create-dirs -o '{path}' '{url}'"


def check_exists(path):
    """Raise UserError with the download command if the file is missing."""
    if not holds_npz(path) and (is_hub_name(path) or Path(path).is_dir()):
        return
    if not Path(path).is_file():
        what = "is not a file" if Path(path).exists() else "does not exist"
        raise UserError(f"{path} {what}; {download_command(path)}")


def open_npz(path):
    """The file's arrays as a mapping that reads each array on access; nothing is ever unpickled.

    Raises UserError for a file that is missing, truncated or of another format.
    """
    check_exists(path)
    published, advice = published_url(path), download_command(path)
    again = f"delete it and {advice}" if published else advice
    with open(path, "rb") as file:
        start = file.read(512).lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"{path} is a web page saved as .npz (an error page of the server?); {again}")
    if not start.startswith(b"pk"):
        raise UserError(f"{path} is not an .npz file; {again}")
    try:
        return Arrays(np.load(path, allow_pickle=False), path, again)
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise UserError(f"{path} is truncated or damaged ({error}); {again}") from error


def load_pretrained(model, path, model_type, head="zero"):
    """Load the file into the model; returns the result of `model.load_from`. Raises UserError if it does not fit."""
    try:
        if holds_npz(path):
            return model.load_from(open_npz(path), head=head)
        return model.load_checkpoint(read_checkpoint(path), head=head)
    except ValueError as error:
        raise UserError(f"{path} does not fit {model_type}: {error}") from error


def load_pretrained_flag(model, args, processes, head="zero"):
    """Load --pretrained_dir, after its download if --download is given. Raises UserError if it does not fit."""
    with first_on_each_machine(processes):
        if args.download:
            download_missing(args.pretrained_dir)
    loaded = load_pretrained(model, args.pretrained_dir, args.model_type, head)
    if (loaded.initialised or loaded.left_out) and processes.is_first:
        print(f"{args.pretrained_dir}: {loaded}")


class Arrays:
    """A mapping over an open .npz file whose errors name the file."""

    def __init__(self, npz, path, way_out):
        self.npz, self.path, self.way_out = npz, path, way_out

    def __iter__(self):
        return iter(self.npz.files)

    def __len__(self):
        return len(self.npz.files)

    def __contains__(self, key):
        return key in self.npz.files

    def __getitem__(self, key):
        try:
            return self.npz[key]
        except (zipfile.BadZipFile, OSError, EOFError) as error:
            raise UserError(f"{self.path} is damaged at {key} ({error}); {self.way_out}") from error
        except ValueError as error:
            raise UserError(f"{self.path} holds Python objects at {key}, which are never loaded: {error}") from error


def download_missing(path):
    """Download a file of Google or a name at Hugging Face, if it is not there yet. Raises UserError."""
    if is_hub_name(path):
        local_folder(path, download=True)
    elif not os.path.exists(path):
        download(path)


def download(path, url=None):
    """Download the published file to `path`, with a progress bar; see `download_npz`. Raises UserError."""
    url = url or published_url(path)
    if url is None:
        raise UserError(f"{path} can't be downloaded: {download_command(path)}")
    download_npz(url, path)
