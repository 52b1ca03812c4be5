"""Folders of images: `train/`, `val/` and `test/`, or one of them, with one folder per class in each."""

import os
from collections import Counter
from pathlib import Path

from utils.data.images import count_text, find_images, is_image, is_system_file
from utils.data.splits import SPLITS
from utils.errors import UserError

IGNORED_FOLDERS = {"__MACOSX"}


def image_folders(data_dir):
    """{split: folder} of train/, val/ and test/ below `data_dir`, or {"train": data_dir} if it has none of them.

    Raises UserError if the training folder is missing.
    """
    root = Path(data_dir)
    if not root.is_dir():
        raise UserError(
            f"{root} is not a folder; give by --data_dir one with a folder per class, or with train/ and val/ or test/"
        )
    folders = {split: root / split for split in SPLITS if (root / split).is_dir()}
    if folders and "train" not in folders:
        raise UserError(f"{root} needs the folders train/ and val/ or test/, with one folder per class in each")
    return folders or {"train": root}


def class_folders(folder):
    """Sorted names of the classes. Raises UserError if there is none."""
    return classes_and_files(folder)[0]


def classes_and_files(folder):
    """(sorted names of the classes, names of the files that are in no class). Raises UserError if there is no class."""
    folders, files = [], []
    try:
        for entry in os.scandir(folder):
            (folders if entry.is_dir() else files).append(entry.name)
    except OSError as error:
        raise UserError(f"{folder} can't be read: {error.strerror}") from error
    names = sorted(name for name in folders if name not in IGNORED_FOLDERS and not name.startswith("."))
    if not names:
        raise UserError(f"{folder} has no folders; it needs one folder per class{how_to_make_folders(folder, files)}")
    return names, files


def how_to_make_folders(folder, files):
    """What to do if there are `files` in place of the classes: ImageNet's archives are unpacked in two steps."""
    if any(is_image(file) for file in files):
        is_imagenet = any(file.startswith("ILSVRC2012_val") for file in files)
        script = " (run valprep.sh of github.com/soumith/imagenetloader.torch in it)" if is_imagenet else ""
        return (
            f", but its {len(files)} files are not in folders; move those of each class into a folder with its name"
            f"{script}"
        )
    if any(file.endswith(".tar") for file in files):
        return f", but holds {len(files)} archives; unpack each into a folder of its name"
    return ""


def list_folder(data_dir, split):
    """(paths of the images, their labels, names of the classes, note) of one of `image_folders`.

    The note is a line about the files that are ignored, if there are any. Only names are read, not the files, so
    1.3 million of them take seconds. Raises UserError.
    """
    folders = image_folders(data_dir)
    classes, folder = class_folders(folders["train"]), folders[split]
    names, files = classes_and_files(folder)
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise UserError(f"{folder / unknown[0]} is a class that {folders['train']} does not have")
    present = set(names)
    ignored = Counter("outside the class folders" for file in files if not is_system_file(file))
    paths, labels = [], []
    for label, name in enumerate(classes):
        if name not in present:
            continue  # a validation or test set may lack a class
        files, others = find_images(folder / name)
        paths += files
        labels += [label] * len(files)
        ignored += others
    return paths, labels, classes, count_text(folder, len(paths), ignored) if ignored else ""
