"""The data sets, one entry of DATASETS each, and `load_dataset`, which loads any of them by its name."""

import contextlib
import difflib
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from utils.data.duplicates import count_copies
from utils.data.folders import class_folders, image_folders, list_folder
from utils.data.images import centre_crop, stretch
from utils.data.loading import FolderImages, TensorImages, read_images_of_one_size
from utils.data.splits import NAMES, available_splits, check_shares, divided_rows, draw_per_class, shared_subjects
from utils.data.torchvision_datasets import PUBLISHED, read_published
from utils.errors import UserError
from utils.parallel.processes import first_on_each_machine

DIGITS_SPLIT_SEED = 0


class Split(NamedTuple):
    """The images of one split with their labels, as a data set's `read` returns them."""

    images: object  # uint8 array (n, 3, h, w), or a list of paths
    labels: object  # n integers
    classes: list  # the class names
    note: str = ""  # a line about files that are ignored

    def subset(self, rows):
        """The images of the given indices, in increasing order."""
        if len(rows) == len(self.labels):
            return self
        images = [self.images[row] for row in rows] if isinstance(self.images, list) else self.images[rows]
        return self._replace(images=images, labels=np.asarray(self.labels)[rows])

    def of_classes(self, names):
        """The images of these classes alone, which are numbered from 0 in the data set's order of the classes."""
        kept = [number for number, name in enumerate(self.classes) if name in names]
        found = self.subset(np.flatnonzero(np.isin(self.labels, kept)))
        classes = [self.classes[number] for number in kept]
        return found._replace(labels=np.searchsorted(kept, found.labels), classes=classes)


class DataSource(NamedTuple):
    """A data set. The functions of `data_dir` raise UserError that names the folder or file at fault."""

    count_classes: Callable  # (data_dir) -> number of classes, without reading an image
    read: Callable  # (data_dir, split) -> Split, for each of its own splits; may download into `data_dir`
    splits: Callable = lambda data_dir: ("train", "test")  # its own splits, of SPLITS
    prepare: Callable = stretch  # how evaluation resizes an image: uint8 (3, H, W), img_size -> uint8 (3, *img_size)
    in_folders: bool = False  # whether `data_dir` must already hold the images
    in_memory: bool = True  # whether image files of one size are decoded once and kept in memory, if they fit


class DataOptions(NamedTuple):
    """How a data set is loaded; the flags of the same names."""

    data_dir: str = "data"
    num_workers: int | None = None
    mean_std: str = "half"
    skip_broken: bool = False
    classes: tuple | None = None  # names; None: all
    examples_per_class: int | None = None
    val_split: float | None = None
    test_split: float | None = None
    split_seed: int = 0
    group_by: str | None = None

    @classmethod
    def from_flags(cls, flags):
        """The options among parsed flags; a flag that is missing has its default here."""
        options = {name: getattr(flags, name) for name in cls._fields if hasattr(flags, name)}
        if options.get("classes"):
            options["classes"] = tuple(options["classes"])  # hashable, as caches of the options need it
        return cls(**options)


def count_classes(name, options):
    """The number of classes that the options keep of a data set, without reading an image. Raises UserError."""
    count = DATASETS[name].count_classes(options.data_dir)
    return len(options.classes) if options.classes else count


def check_class_names(names, classes, where):
    """Raise UserError if one of the `names` in --classes is given twice or is not one of the `classes`.

    `where` names the data set in the error.
    """
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--classes: {name!r} is given {names.count(name)} times")
        if name not in classes:
            lower = {known.lower(): known for known in reversed(classes)}
            nearest = [lower[known] for known in difflib.get_close_matches(name.lower(), lower, n=3)]
            hint = f"did you mean {', '.join(nearest)}?" if nearest else f"it has {', '.join(classes[:10])}"
            more = ", ..." if not nearest and len(classes) > 10 else ""
            raise UserError(f"--classes: {where} has no class {name!r}; {hint}{more}")


def find_splits(name, options):
    """The splits of a data set in the order of SPLITS: its own ones and those that the options divide.

    Raises UserError.
    """
    own = DATASETS[name].splits(options.data_dir)
    check_shares(own, options, options.data_dir if DATASETS[name].in_folders else name)
    return available_splits(own, options)


def training_splits(name, options):
    """`find_splits`. Raises UserError too if there is nothing but training images."""
    found = find_splits(name, options)
    if found == ["train"]:
        divide = "divide its images by --val_split 0.1 or --test_split 0.2"
        if not DATASETS[name].in_folders:
            raise UserError(f"{name} has no validation or test images of its own; {divide}")
        needed = "the folders train/ and val/ or test/, with one folder per class in each"
        raise UserError(f"{options.data_dir} needs {needed}; or {divide}")
    return found


class LoadedSplits(NamedTuple):
    """The splits that a training needs."""

    train: object  # TensorImages or FolderImages, as the others
    evaluation: object  # the validation images, or the test images if there are none
    test: object  # the test images, or None without any apart from `evaluation`
    evaluated_on: str  # "val" or "test"
    copies: dict  # {(split, other): number of images of `other` that are exact copies of images of `split`}
    shared_subjects: dict  # {(split, other): number of subjects with images in both}, with --group_by

    def counts(self):
        """{split: number of images}"""
        counts = {"train": len(self.train), self.evaluated_on: len(self.evaluation)}
        return counts | ({"test": len(self.test)} if self.test else {})


def load_splits(name, options, processes, no_test=False):
    """The LoadedSplits of a data set, with `no_test` without its test images. Raises UserError."""
    wanted = [split for split in training_splits(name, options) if not (no_test and split == "test")]
    splits = read_splits(name, wanted, options, processes)
    images = {split: found.images for split, found in splits.items()}
    copies = count_copies(images) if processes.is_first else {}  # the first process reports both
    shared = shared_subjects(images, options.group_by) if options.group_by and processes.is_first else {}
    loaded = {split: make_data_set(name, found, options, processes) for split, found in splits.items()}
    evaluated_on = "val" if "val" in loaded else "test"
    return LoadedSplits(loaded.pop("train"), loaded.pop(evaluated_on), loaded.get("test"), evaluated_on, copies, shared)


def load_dataset(name, split, options, processes):
    """One of `find_splits` as TensorImages or, read by worker processes, FolderImages.

    `examples_per_class` of the options limits the training split only. Raises UserError.
    """
    return make_data_set(name, read_split(name, split, options, processes), options, processes)


def make_data_set(name, split, options, processes):
    """A Split of the data set, or a subset of it, as `load_dataset` returns it. Raises UserError."""
    source = DATASETS[name]
    images, labels, classes, _ = split
    pixels = images
    if isinstance(images, list):
        quiet = processes.rank > 0
        pixels = read_images_of_one_size(images, quiet, options.skip_broken) if source.in_memory else None
    if pixels is None:
        return FolderImages(images, labels, classes, processes.device, source.prepare, options)
    paths = images if isinstance(images, list) else None
    return TensorImages(pixels, labels, classes, processes.device, options.mean_std, paths)


def read_split(name, split, options, processes):
    """One Split of a data set; see `read_splits`."""
    return read_splits(name, [split], options, processes)[split]


def read_splits(name, splits, options, processes):
    """{split: Split} of some of `find_splits`, of training images perhaps `examples_per_class` of each class only.

    With `classes` in the options these alone are read, as if the data set had no others.

    Splits that are taken from the training images are read with them, once. The first process prints the notes about
    ignored files to stderr. Raises UserError.
    """
    own = DATASETS[name].splits(options.data_dir)
    for split in set(splits).difference(find_splits(name, options)):
        raise UserError(f"{name} has no {NAMES[split]} images in {options.data_dir}")
    sources = dict.fromkeys(split if split in own else "train" for split in splits)
    found = {split: read_own_split(name, split, options, processes) for split in sources}
    if "train" in found:
        whole = found["train"]
        rows = divided_rows(own, whole.labels, whole.images, whole.classes, options)
        if options.examples_per_class:
            drawn = draw_per_class(whole.labels[rows["train"]], options.examples_per_class, options.split_seed)
            rows["train"] = rows["train"][np.sort(drawn)]
        found |= {split: whole.subset(rows[split]) for split in splits if split in rows}
    return {split: found[split] for split in splits}


def read_own_split(name, split, options, processes):
    """A split that the data set itself has, perhaps after a download, of the `classes` in the options."""
    source = DATASETS[name]
    with contextlib.nullcontext() if source.in_folders else first_on_each_machine(processes):
        images, labels, classes, note = source.read(options.data_dir, split)
    if note and processes.is_first:
        print(note, file=sys.stderr)
    found = Split(images, np.asarray(labels, dtype=np.int64), list(classes), note)
    if not options.classes:
        return found
    check_class_names(options.classes, found.classes, options.data_dir if source.in_folders else name)
    found = found.of_classes(options.classes)
    if not len(found.labels):
        raise UserError(f"--classes: there is no {NAMES[split]} image of {', '.join(options.classes)}")
    return found


def read_digits(data_dir, split):
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels; a fixed stratified 80/20 split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    pixels = np.rint(pixels.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8).repeat(3, axis=1)
    rows = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=DIGITS_SPLIT_SEED)
    rows = rows[("train", "test").index(split)]
    return Split(pixels[rows], labels[rows], [str(digit) for digit in range(10)])


def downloaded(source):
    """The DataSource of a Published data set of torchvision. Its photographs are stretched, as for BiT and the ViT."""

    def read(data_dir, split):
        return Split(*read_published(source, data_dir, split))

    return DataSource(lambda data_dir: source.num_classes, read, lambda data_dir: tuple(source.splits))


def count_class_folders(data_dir):
    """The number of folders in the training folder."""
    return len(class_folders(image_folders(data_dir)["train"]))


def read_folder(data_dir, split):
    """One of the folders `train/`, `val/` and `test/` below `data_dir`, with one folder per class in each."""
    return Split(*list_folder(data_dir, split))


IMAGE_FOLDER = DataSource(count_class_folders, read_folder, image_folders, in_folders=True)

DATASETS = {
    **{name: downloaded(source) for name, source in PUBLISHED.items()},
    "digits": DataSource(lambda data_dir: 10, read_digits),
    "imagefolder": IMAGE_FOLDER,
    "imagenet": IMAGE_FOLDER._replace(prepare=centre_crop, in_memory=False),
}
