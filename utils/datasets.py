"""Images and labels: small sets as one uint8 tensor on the training device, folders of pictures by worker processes.

Both kinds have the same two methods: `train_batches`, the endless shuffled stream from a given step on, and
`eval_batches`, each image once. A dataset's name is written once, in DATASETS.
"""

import contextlib
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from utils.augmentation import normalise, random_crops, resized_crops
from utils.distributed import first_on_each_machine
from utils.errors import UserError
from utils.random import DROPOUT, random_words, samples_at

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
IN_MEMORY_BYTES = 2 * 2**30
IN_MEMORY_SIDE = 256  # pixels; a batch of larger pictures would be large itself before it is cropped
IGNORED_FOLDERS = {"__MACOSX"}
DIGITS_SPLIT_SEED = 0


class Source(NamedTuple):
    """Where a data set comes from; both raise UserError that names the folder or file at fault.

    `count_classes(data_dir)` is quick; `load(train, data_dir, world, num_workers, examples_per_class=None)` reads the
    training or the test set, or the first examples of each class.
    """

    count_classes: Callable
    load: Callable


def load_digits(train, data_dir, world, num_workers, examples_per_class=None):
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels; a fixed stratified 80/20 split."""
    from sklearn.datasets import load_digits as sklearn_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = sklearn_digits(return_X_y=True)
    pixels = np.rint(pixels.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8).repeat(3, axis=1)
    splits = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=DIGITS_SPLIT_SEED)
    rows = splits[0 if train else 1]
    rows = rows[first_of_each_class(labels[rows], examples_per_class)]
    return TensorImages(pixels[rows], labels[rows], map(str, range(10)), world.device)


def load_cifar(name, train, data_dir, world, num_workers, examples_per_class=None):
    """torchvision's CIFAR, downloaded into `data_dir` once, by one process of each machine."""
    from torchvision import datasets  # a slow import that other data need not pay

    dataset = getattr(datasets, name)
    try:
        with first_on_each_machine(world):
            data = dataset(data_dir, train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"could not get {name} into {data_dir}: {error}; "
            f"download {dataset.url} there by hand, or give the folder that holds it with --data_dir"
        ) from error
    labels = np.asarray(data.targets)
    rows = first_of_each_class(labels, examples_per_class)
    images = np.ascontiguousarray(data.data[rows].transpose(0, 3, 1, 2))  # (n, 3, 32, 32)
    return TensorImages(images, labels[rows], data.classes, world.device)


def load_imagefolder(train, data_dir, world, num_workers, examples_per_class=None):
    """`train/` and `val/` or `test/` below `data_dir`, one folder a class."""
    train_dir, test_dir = image_folders(data_dir)
    classes = class_folders(train_dir)
    unknown = sorted(set(class_folders(test_dir)) - set(classes))
    if unknown:
        raise UserError(f"{test_dir / unknown[0]} is a class that {train_dir} does not have")
    return read_folder(train_dir if train else test_dir, classes, world, num_workers, examples_per_class)


DATASETS = {
    "cifar10": Source(lambda data_dir: 10, functools.partial(load_cifar, "CIFAR10")),
    "cifar100": Source(lambda data_dir: 100, functools.partial(load_cifar, "CIFAR100")),
    "digits": Source(lambda data_dir: 10, load_digits),
    "imagefolder": Source(lambda data_dir: len(class_folders(image_folders(data_dir)[0])), load_imagefolder),
}


def first_of_each_class(labels, count):
    """Indices of the first `count` samples of each class, in the data set's order; of all where it is None."""
    rows = [np.flatnonzero(labels == label)[:count] for label in np.unique(labels)]
    return np.sort(np.concatenate(rows))


def image_folders(data_dir):
    """The training folder and the test folder of an image folder, checked for existence."""
    root = Path(data_dir)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; give one with train/ and val/ or test/ by --data_dir")
    tests = [root / name for name in ("val", "test") if (root / name).is_dir()]
    if not (root / "train").is_dir() or not tests:
        raise UserError(f"{root} needs the folders train/ and val/ or test/, with one folder a class in each")
    return root / "train", tests[0]


def class_folders(folder):
    """Sorted names of the classes. Raises UserError where there is none."""
    try:
        folders = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    except OSError as error:
        raise UserError(f"{folder} can't be read: {error.strerror}") from error
    names = sorted(name for name in folders if name not in IGNORED_FOLDERS and not name.startswith("."))
    if not names:
        raise UserError(f"{folder} has no folders; it needs one folder a class")
    return names


def read_folder(folder, classes, world, num_workers, examples_per_class):
    """TensorImages where all pictures are of one size and fit into memory, otherwise FolderImages."""
    paths, labels = [], []
    for label, name in enumerate(classes):
        if not (folder / name).is_dir():
            continue  # a test set may lack a class
        files = pictures_below(folder / name)[:examples_per_class]
        paths += files
        labels += [label] * len(files)
    images = read_images_of_one_size(paths, quiet=world.rank > 0)
    if images is None:
        return FolderImages(paths, labels, classes, world.device, num_workers)
    return TensorImages(images, labels, classes, world.device)


def pictures_below(folder):
    """Sorted paths of the pictures in `folder` and its folders. Raises UserError where there is none."""

    def unreadable(error):
        raise UserError(f"{error.filename} can't be read: {error.strerror}") from error

    paths = sorted(
        os.path.join(place, file)
        for place, _, files in os.walk(folder, onerror=unreadable)
        for file in files
        if os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES and not file.startswith(".")
    )
    if not paths:
        raise UserError(f"{folder} has no pictures (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
    return paths


def read_images_of_one_size(paths, quiet):
    """uint8 (n, 3, h, w), or None where the sizes differ, or are too large to be kept in memory."""
    first = read_image(paths[0])
    if first.numel() * len(paths) > IN_MEMORY_BYTES or max(first.shape) > IN_MEMORY_SIDE:
        return None
    images = first.new_empty(len(paths), *first.shape)
    hidden = quiet or not sys.stderr.isatty()
    for i, path in enumerate(tqdm(paths, desc="reading pictures", unit="img", delay=2, leave=False, disable=hidden)):
        image = read_image(path)
        if image.shape != first.shape:
            return None
        images[i] = image
    return images


@contextlib.contextmanager
def opened_image(path):
    """A Pillow image. Raises UserError that names a file which is no readable picture, then or while it is read."""
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:  # Pillow raises nearly every type for one or the other broken file
        raise UserError(f"{path} is not a readable picture: {error}") from error


def read_image(path):
    """uint8 (3, H, W). Raises UserError."""
    with opened_image(path) as image:
        if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
            return torch.from_numpy((np.array(image, dtype=np.int64) >> 8).astype(np.uint8)).expand(3, -1, -1)
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def check_image(path):
    """Raises UserError where the file is no picture, without decoding all of it."""
    with opened_image(path) as image:
        image.verify()


class TensorImages:
    """Images of one size in memory, uint8 (n, 3, h, w) on the training device, augmented there as a batch."""

    def __init__(self, images, labels, classes, device):
        self.images = torch.as_tensor(images).to(device)
        self.labels = torch.as_tensor(np.asarray(labels, dtype=np.int64)).to(device)
        self.classes = list(classes)

    def __len__(self):
        return len(self.images)

    def train_batches(self, batches, seed, img_size, min_crop_scale, flip):
        """For each array of stream positions: images float32 (B, 3, *img_size) in [-1, 1], labels int64 (B,)."""
        for positions in batches:
            epochs, indices = samples_at(seed, positions, len(self))
            height, width = self.images.shape[2:]
            boxes, flips = random_crops(seed, epochs, indices, len(self), height, width, min_crop_scale)
            rows = torch.from_numpy(indices).to(self.images.device, non_blocking=True)
            images = resized_crops(self.images[rows], boxes, img_size, flips if flip else None)
            yield normalise(images), self.labels[rows]

    def eval_batches(self, img_size, batch_size, world):
        """This process's share of the images, resized: images float32 (B, 3, *img_size), labels int64 (B,)."""
        images, labels = self.images[world.rank :: world.size], self.labels[world.rank :: world.size]
        for some, their_labels in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            yield resized(some, img_size), their_labels

    def examples(self, count, img_size):
        """Up to `count` images, spread evenly over the set, and their labels, as a batch of `eval_batches`."""
        rows = spread_indices(len(self), count)
        return resized(self.images[rows], img_size), self.labels[rows]


class FolderImages:
    """Pictures on disk, decoded, cropped and resized by worker processes."""

    def __init__(self, paths, labels, classes, device, num_workers):
        import torchvision.transforms.v2  # noqa: F401  a slow import, before there are workers that would each pay it

        self.paths, self.labels, self.classes = paths, labels, list(classes)
        self.device = device
        self.num_workers = num_workers

    def __len__(self):
        return len(self.paths)

    def train_batches(self, batches, seed, img_size, min_crop_scale, flip):
        """As TensorImages.train_batches."""
        crops = TrainCrops(self.paths, self.labels, seed, img_size, min_crop_scale, flip)
        return self.load(crops, batches)

    def eval_batches(self, img_size, batch_size, world):
        """As TensorImages.eval_batches."""
        share = range(world.rank, len(self), world.size)
        batches = (share[i : i + batch_size] for i in range(0, len(share), batch_size))
        return self.load(ResizedImages(self.paths, self.labels, img_size), batches)

    def examples(self, count, img_size):
        """As TensorImages.examples."""
        dataset = ResizedImages(self.paths, self.labels, img_size)
        images, labels = zip(*(dataset[row] for row in spread_indices(len(self), count)), strict=True)
        return normalise(torch.stack(images).to(self.device)), torch.tensor(labels, device=self.device)

    def load(self, dataset, batches):
        loader = DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=self.num_workers,
            pin_memory=self.device.type == "cuda",
        )
        try:
            for images, labels in loader:
                yield normalise(images.to(self.device, non_blocking=True)), labels.to(self.device, non_blocking=True)
        except UserError as error:  # from a worker it comes with that process's traceback in front
            raise UserError(str(error).strip().splitlines()[-1].removeprefix("utils.errors.UserError: ")) from error


class TrainCrops(Dataset):
    """Item p is the sample at position p of the shuffled stream, cropped: uint8 (3, H, W) and its label."""

    def __init__(self, paths, labels, seed, img_size, min_crop_scale, flip):
        self.paths, self.labels, self.seed = paths, labels, seed
        self.img_size, self.min_crop_scale, self.flip = img_size, min_crop_scale, flip

    def __getitem__(self, position):
        from torchvision.transforms.v2 import functional as tv

        epochs, indices = samples_at(self.seed, [position], len(self.paths))
        image = read_image(self.paths[indices[0]])
        boxes, flips = random_crops(
            self.seed, epochs, indices, len(self.paths), *image.shape[1:], min_scale=self.min_crop_scale
        )
        image = tv.resized_crop(image, *boxes[0].tolist(), size=list(self.img_size), antialias=True)
        return image.flip(2) if self.flip and flips[0] else image, self.labels[indices[0]]


class ResizedImages(Dataset):
    """Item i is picture i, resized: uint8 (3, H, W) and its label."""

    def __init__(self, paths, labels, img_size):
        self.paths, self.labels, self.img_size = paths, labels, img_size

    def __getitem__(self, index):
        from torchvision.transforms.v2 import functional as tv

        image = tv.resize(read_image(self.paths[index]), list(self.img_size), antialias=True)
        return image, self.labels[index]


def resized(images, img_size):
    """A batch of whole images, uint8 (B, 3, h, w) -> float32 (B, 3, *img_size) in [-1, 1]."""
    boxes = torch.tensor([[0, 0, *images.shape[2:]]]).expand(len(images), -1)
    return normalise(resized_crops(images, boxes, img_size))


def spread_indices(size, count):
    """`count` indices of a data set, or all, evenly spread: where classes follow one another, of different ones."""
    return np.unique(np.linspace(0, size - 1, count).round().astype(np.int64))


def stream_positions(batch_size, accumulation_steps, world, first_step, num_steps):
    """For each step from `first_step` on and each of its accumulation steps, this process's stream positions.

    All processes together take the positions [step * batch_size, (step + 1) * batch_size).
    """
    share = batch_size // world.size
    part = share // accumulation_steps
    for step in range(first_step, num_steps):
        start = step * batch_size + world.rank * share
        for i in range(accumulation_steps):
            yield np.arange(start + i * part, start + (i + 1) * part)


def dropout_keys(seed, positions, num_layers, device):
    """Random words for the samples at these stream positions, int32 (layers, B, 2): what dropout masks derive from."""
    words = np.ascontiguousarray(random_words(seed, DROPOUT, positions, num_layers).T)
    keys = torch.from_numpy(words.view(np.int32))  # (layers, 2 B): one uint64 is two int32
    return keys.unflatten(1, (-1, 2)).to(device, non_blocking=True)
