"""Folders of images: `train/` and `val/` or `test/`, with one folder per class in each."""

import os
from collections import Counter
from pathlib import Path

from utils.data.images import count_text, find_images, is_image, is_system_file
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
        return (
            f", but its {len(files)} files are not in folders; valprep.sh of github.com/soumith/imagenetloader.torch, "
            "run in it, moves the files of ImageNet's val/ into folders of their classes"
        )
    if any(file.endswith(".tar") for file in files):
        return f", but holds {len(files)} archives; unpack each into a folder of its name"
    return ""


def list_folder(data_dir, split):
    """(paths of the images, their labels, names of the classes, note) of the split "train" or "test".

    The note is a line about the files that are ignored, if there are any. Only names are read, not the files, so
    1.3 million of them take seconds. Raises UserError.
    """
    train_dir, test_dir = image_folders(data_dir)
    classes = class_folders(train_dir)
    unknown = sorted(set(class_folders(test_dir)) - set(classes))
    if unknown:
        raise UserError(f"{test_dir / unknown[0]} is a class that {train_dir} does not have")
    folder = {"train": train_dir, "test": test_dir}[split]
    names, files = classes_and_files(folder)
    present = set(names)
    ignored = Counter("outside the class folders" for file in files if not is_system_file(file))
    paths, labels = [], []
    for label, name in enumerate(classes):
        if name not in present:
            continue  # a test set may lack a class
        files, others = find_images(folder / name)
        paths += files
        labels += [label] * len(files)
        ignored += others
    return paths, labels, classes, count_text(folder, len(paths), ignored) if ignored else ""
