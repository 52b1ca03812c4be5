"""Google's .npz files: where they are published, downloading one, and opening one without unpickling."""

import os
import re
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils.errors import UserError
from utils.parallel.processes import first_on_each_machine

STORAGE = "https://storage.googleapis.com"
CHUNK = 2**20

# The first pattern that matches a file's name gives the folder where it is published.
VIT = r"(ViT-(B_16|B_32|L_16|L_32)|R50\+ViT-B_16)"
PUBLISHED = (
    (re.compile(rf"({VIT}|ViT-H_14)\.npz"), "vit_models/imagenet21k"),
    (re.compile(rf"{VIT}-224\.npz"), "vit_models/imagenet21k+imagenet2012"),
    (re.compile(r"(R\d*_)?(Ti|S|B|L)_\d+-i.*\.npz"), "vit_models/augreg"),
    (re.compile(r"BiT-[SM]-R\d+x\d.*\.npz"), "bit_models"),
)
PUBLISHED_FOLDERS = ("imagenet21k", "imagenet21k+imagenet2012", "augreg")  # the name of the parent folder decides


def published_url(path, storage=STORAGE):
    """The URL of the published file of the same name as `path`, or None."""
    path = Path(path)
    name = path.name.replace("R50-ViT", "R50+ViT")
    folder = next((folder for pattern, folder in PUBLISHED if pattern.fullmatch(name)), None)
    if folder is None:
        return None
    if path.parent.name in PUBLISHED_FOLDERS and folder != "bit_models":
        folder = f"vit_models/{path.parent.name}"
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
        return f"Google publishes no file of that name; see {STORAGE}/vit_models and {STORAGE}/bit_models"
    return f"get it with --download, or: curl --create-dirs -o '{path}' '{url}'"


def check_exists(path):
    """Raise UserError with the download command if the file is missing."""
    if not Path(path).is_file():
        what = "is not a file" if Path(path).exists() else "does not exist"
        raise UserError(f"{path} {what}; {download_command(path)}")


def open_npz(path):
    """The file's arrays as a mapping that reads each array on access; nothing is ever unpickled.

    Raises UserError for a file that is missing, truncated or of another format.
    """
    check_exists(path)
    again = f"delete it and {download_command(path)}"
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
    """Call `model.load_from` on the file and return its result. Raises UserError if the file does not fit."""
    try:
        return model.load_from(open_npz(path), head=head)
    except ValueError as error:
        raise UserError(f"{path} does not fit {model_type}: {error}") from error


def load_pretrained_flag(model, args, processes, head="zero"):
    """Load --pretrained_dir, after its download if --download is given. Raises UserError if it does not fit."""
    with first_on_each_machine(processes):
        if args.download and not os.path.exists(args.pretrained_dir):
            download(args.pretrained_dir)
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


def download(path, url=None):
    """Download the published file to `path`, with a progress bar; an interrupted download is continued.

    The bytes go to `<path>.part`, which is renamed once it is complete. Raises UserError.
    """
    path = Path(path)
    url = url or published_url(path)
    if url is None:
        raise UserError(f"{path} can't be downloaded: {download_command(path)}")
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fetch(url, part)
    except (OSError, urllib.error.URLError) as error:
        raise UserError(
            f"{url} could not be downloaded: {error}; the same command continues where it stopped"
        ) from error
    if not zipfile.is_zipfile(part):
        part.unlink()
        raise UserError(f"{url} did not send an .npz file; nothing is kept")
    os.replace(part, path)


def fetch(url, part):
    """Append the missing bytes of `url` to the file `part`, or start again if the server can't continue."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:  # 416: the part is as long as the file, or longer
            raise
        part.unlink()
        fetch(url, part)
        return
    with response:
        continues = response.status == 206
        have = have if continues else 0
        length = response.headers["Content-Length"]  # None if the server does not know
        total = length and have + int(length)
        bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, unit_divisor=1024, desc=part.stem)
        with open(part, "ab" if continues else "wb") as file, bar:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    size = part.stat().st_size
    if total and size != total:
        raise OSError(f"the connection broke after {size} of {total} bytes")
