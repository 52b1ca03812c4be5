"""The data sets that torchvision downloads: where they are published, and their images, labels and class names."""

import contextlib
import functools
import http.client
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.errors import UserError
from utils.locks import exclusive_lock, holder_of

LOCK = ".download.lock"


class Published(NamedTuple):
    """A data set of torchvision, which downloads its files to a folder below `data_dir` and unpacks them once."""

    name: str  # of torchvision's class
    num_classes: int
    url: str  # where the files are published
    files: list  # their names
    splits: dict  # {split: keywords of torchvision's class}
    read: Callable  # (function that makes the data set of torchvision) -> (images, labels, class names)
    folder: str = ""  # where the files are downloaded to, below `data_dir`
    unpacked: str = ""  # where they are unpacked, below `data_dir`
    num_images: int | None = None  # if torchvision lists whatever is unpacked, which may be incomplete


def read_published(source, data_dir, split):
    """(images, labels, class names) of one of the `splits` of a Published data set, which is downloaded if necessary.

    The images are paths, or uint8 (n, 3, h, w). Without names the classes are called by their numbers. Raises
    UserError.
    """
    from torchvision import datasets  # a slow import that other data sets do not need

    make = functools.partial(getattr(datasets, source.name), data_dir, **source.splits[split])
    try:
        images, labels, classes = read_or_download(source, make, data_dir)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise failure(source, data_dir, error) from error
    return images, labels, classes or [str(number) for number in range(source.num_classes)]


def read_or_download(source, make, data_dir):
    """What the source reads; without all files, or while another process downloads them, after a download."""
    lock = Path(data_dir) / LOCK
    if not holder_of(lock):  # else files may be there that are not whole
        with contextlib.suppress(OSError, RuntimeError):
            found = read_all_of(source, functools.partial(make, download=False))
            if not holder_of(lock):  # a download may have started since
                return found
    with one_at_a_time(data_dir):
        return read_all_of(source, functools.partial(make, download=True))


def read_all_of(source, make):
    """What the source reads. Raises FileNotFoundError if images are missing."""
    found = source.read(make)
    if source.num_images not in (None, len(found[0])):
        raise FileNotFoundError(f"it has {len(found[0])} images of {source.num_images}")
    return found


@contextlib.contextmanager
def one_at_a_time(data_dir):
    """The body runs in one process after the other, on all machines: they would download to the same files."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a folder that can't be written: the download reports what is wrong
            os.makedirs(data_dir, exist_ok=True)
            stack.enter_context(exclusive_lock(Path(data_dir) / LOCK, wait=True))
        yield


def failure(source, data_dir, error):
    """The UserError for a data set that can't be downloaded, or whose files are not all there."""
    why = " ".join(str(error).split())  # torchvision's have several lines
    if source.unpacked and isinstance(error, FileNotFoundError):
        folder = Path(data_dir, source.unpacked)
        return UserError(f"{folder} is incomplete, as after an interruption: {why}; delete it and try again")
    return UserError(
        f"could not get {source.name} into {data_dir}: {why}; try again, or put {' and '.join(source.files)} (from "
        f"{source.url} or a copy) into {Path(data_dir, source.folder)}, or give the folder that has them by --data_dir"
    )


def read_arrays(make):
    """What `read_published` returns of a data set that torchvision keeps in memory; grey images become RGB."""
    data = make()
    pixels = np.asarray(data.data)
    if pixels.ndim == 3:
        pixels = pixels[:, None].repeat(3, axis=1)
    elif pixels.shape[3] == 3:
        pixels = pixels.transpose(0, 3, 1, 2)
    labels = data.targets if hasattr(data, "targets") else data.labels
    return np.ascontiguousarray(pixels), np.asarray(labels), getattr(data, "classes", None)


def read_files(make):
    """What `read_published` returns of a data set whose images stay files: its `loader` returns their paths."""
    data = make(loader=os.fspath)
    return in_order_of_paths([data[i] for i in range(len(data))], data)


def read_pets(make):
    """The same of OxfordIIITPet, which has no `loader`."""
    data = make()
    return in_order_of_paths(zip(map(os.fspath, data._images), data._labels, strict=True), data)


def in_order_of_paths(samples, data):
    """(paths, labels, class names), sorted, because torchvision lists SUN397 in the order of the file system."""
    samples = sorted(samples)
    return [path for path, _ in samples], np.array([label for _, label in samples]), getattr(data, "classes", None)


BY_FLAG = {"train": {"train": True}, "test": {"train": False}}
TRAIN_TEST = {split: {"split": split} for split in ("train", "test")}
TRAIN_VAL_TEST = {split: {"split": split} for split in ("train", "val", "test")}
TRAINVAL_TEST = {"train": {"split": "trainval"}, "test": {"split": "test"}}
UNDIVIDED = {"train": {}}

OXFORD = "https://www.robots.ox.ac.uk/~vgg/data/"
EUROSAT = "https://huggingface.co/datasets/torchgeo/eurosat/resolve/c877bcd43f099cd0196738f714544e355477f3fd/"
MNIST_FILES = [
    f"{name}-ubyte.gz" for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
]

PUBLISHED = {
    "cifar10": Published(
        "CIFAR10",
        num_classes=10,
        url="https://www.cs.toronto.edu/~kriz/",
        files=["cifar-10-python.tar.gz"],
        splits=BY_FLAG,
        read=read_arrays,
    ),
    "cifar100": Published(
        "CIFAR100",
        num_classes=100,
        url="https://www.cs.toronto.edu/~kriz/",
        files=["cifar-100-python.tar.gz"],
        splits=BY_FLAG,
        read=read_arrays,
    ),
    "dtd": Published(
        "DTD",
        num_classes=47,
        url=f"{OXFORD}dtd/download/",
        files=["dtd-r1.0.1.tar.gz"],
        splits=TRAIN_VAL_TEST,
        read=read_files,
        folder="dtd",
        unpacked="dtd/dtd",
    ),
    "eurosat": Published(
        "EuroSAT",
        num_classes=10,
        url=EUROSAT,
        files=["EuroSAT.zip"],
        splits=UNDIVIDED,
        read=read_files,
        folder="eurosat",
        unpacked="eurosat/2750",
        num_images=27_000,
    ),
    "fashion_mnist": Published(
        "FashionMNIST",
        num_classes=10,
        url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        files=MNIST_FILES,
        splits=BY_FLAG,
        read=read_arrays,
        folder="FashionMNIST/raw",
    ),
    "flowers102": Published(
        "Flowers102",
        num_classes=102,
        url=f"{OXFORD}flowers/102/",
        files=["102flowers.tgz", "imagelabels.mat", "setid.mat"],
        splits=TRAIN_VAL_TEST,
        read=read_files,
        folder="flowers-102",
        unpacked="flowers-102/jpg",
    ),
    "food101": Published(
        "Food101",
        num_classes=101,
        url="http://data.vision.ee.ethz.ch/cvl/",
        files=["food-101.tar.gz"],
        splits=TRAIN_TEST,
        read=read_files,
        unpacked="food-101",
    ),
    "pets": Published(
        "OxfordIIITPet",
        num_classes=37,
        url=f"{OXFORD}pets/data/",
        files=["images.tar.gz", "annotations.tar.gz"],
        splits=TRAINVAL_TEST,
        read=read_pets,
        folder="oxford-iiit-pet",
        unpacked="oxford-iiit-pet/annotations",
    ),
    "stl10": Published(
        "STL10",
        num_classes=10,
        url="http://ai.stanford.edu/~acoates/stl10/",
        files=["stl10_binary.tar.gz"],
        splits=TRAIN_TEST,
        read=read_arrays,
    ),
    "sun397": Published(
        "SUN397",
        num_classes=397,
        url="http://vision.princeton.edu/projects/2010/SUN/",
        files=["SUN397.tar.gz"],
        splits=UNDIVIDED,
        read=read_files,
        unpacked="SUN397",
        num_images=108_754,
    ),
    "svhn": Published(
        "SVHN",
        num_classes=10,
        url="http://ufldl.stanford.edu/housenumbers/",
        files=["train_32x32.mat", "test_32x32.mat"],
        splits=TRAIN_TEST,
        read=read_arrays,
    ),
}
