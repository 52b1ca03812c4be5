"""Folders of images: `train/` and `val/` or `test/`, with one folder per class in each."""

import os
from pathlib import Path

from utils.data.images import images_below, is_image
from utils.errors import UserError

IGNORED_FOLDERS = {"__MACOSX"}


def image_folders(data_dir):
    """(training folder, test folder) below `data_dir`. Raises UserError if one is missing."""
    root = Path(data_dir)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; give one with train/ and val/ or test/ by --data_dir")
    tests = [root / name for name in ("val", "test") if (root / name).is_dir()]
    if not (root / "train").is_dir() or not tests:
        raise UserError(f"{root} needs the folders train/ and val/ or test/, with one folder per class in each")
    return root / "train", tests[0]


def class_folders(folder):
    """Sorted names of the classes. Raises UserError if there is none."""
    folders, files = [], []
    try:
        for entry in os.scandir(folder):
            (folders if entry.is_dir() else files).append(entry.name)
    except OSError as error:
        raise UserError(f"{folder} can't be read: {error.strerror}") from error
    names = sorted(name for name in folders if name not in IGNORED_FOLDERS and not name.startswith("."))
    if not names:
        raise UserError(f"{folder} has no folders; it needs one folder per class{how_to_make_folders(folder, files)}")
    return names


def how_to_make_folders(folder, files):
    """What to do if there are `files` in place of the classes: ImageNet's archives are unpacked in two steps."""
    if any(is_image(file) for file in files):
        return (
            f", but its {len(files)} files are not in folders; valprep.sh of github.com/soumith/imagenetloader.torch, "
            "run in it, moves the files of ImageNet's val/ into folders of their classes"
        )
    if any(file.endswith(".tar") for file in files):
        return f", but holds {len(files)} archives; unpack each into a folder of its name"
    return ""


def list_folder(data_dir, split):
    """(paths of the images, their labels, names of the classes) of the split "train" or "test".

    Only names are read, not the files, so 1.3 million of them take seconds. Raises UserError.
    """
    train_dir, test_dir = image_folders(data_dir)
    classes = class_folders(train_dir)
    unknown = sorted(set(class_folders(test_dir)) - set(classes))
    if unknown:
        raise UserError(f"{test_dir / unknown[0]} is a class that {train_dir} does not have")
    folder = {"train": train_dir, "test": test_dir}[split]
    paths, labels = [], []
    for label, name in enumerate(classes):
        if not (folder / name).is_dir():
            continue  # a test set may lack a class
        files = images_below(folder / name)
        paths += files
        labels += [label] * len(files)
    return paths, labels, classes
