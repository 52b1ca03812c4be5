"""Images and labels: small sets as one uint8 tensor on the training device, folders of pictures by worker processes.

Both kinds have the same two methods: `train_batches`, the endless shuffled stream from a given step on, and
`eval_batches`, each image once. A dataset's name is written once, in DATASETS.
"""

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from utils.data.augmentation import (
    centre_crop,
    normalise,
    rand_augment_words,
    rand_augmented,
    random_crops,
    resized_crops,
    stretch,
    transforms,
)
from utils.data.images import Picture, is_picture, pictures_below, read_image
from utils.data.stream import DROPOUT, random_words, samples_at
from utils.errors import UserError
from utils.parallel.processes import first_on_each_machine

IN_MEMORY_BYTES = 2 * 2**30
IN_MEMORY_SIDE = 256  # pixels; a batch of larger pictures would be large itself before it is cropped
IGNORED_FOLDERS = {"__MACOSX"}
MOST_BROKEN = 100  # pictures in a row that may be skipped; where more can't be read, the disk is to blame
MAX_WORKERS = 16  # what decodes for the fastest GPU; each holds two batches ready
DIGITS_SPLIT_SEED = 0


class Source(NamedTuple):
    """Where a data set comes from; the first two raise UserError that names the folder or file at fault.

    `count_classes(data_dir)` is quick; `load(train, data_dir, processes, num_workers, examples_per_class=None,
    mean_std="half", skip_broken=False)` reads the training or the test set, or the first examples of each class;
    `prepare(image, img_size)` is what evaluation does to an image, uint8 (3, H, W) -> (3, *img_size).
    """

    count_classes: Callable
    load: Callable
    prepare: Callable = stretch


def load_digits(train, data_dir, processes, num_workers, examples_per_class=None, mean_std="half", skip_broken=False):
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels; a fixed stratified 80/20 split."""
    from sklearn.datasets import load_digits as sklearn_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = sklearn_digits(return_X_y=True)
    pixels = np.rint(pixels.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8).repeat(3, axis=1)
    splits = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=DIGITS_SPLIT_SEED)
    rows = splits[0 if train else 1]
    rows = rows[first_of_each_class(labels[rows], examples_per_class)]
    return TensorImages(pixels[rows], labels[rows], map(str, range(10)), processes.device, mean_std)


def load_cifar(
    name, train, data_dir, processes, num_workers, examples_per_class=None, mean_std="half", skip_broken=False
):
    """torchvision's CIFAR, downloaded into `data_dir` once, by one process of each machine."""
    from torchvision import datasets  # a slow import that other data need not pay

    dataset = getattr(datasets, name)
    try:
        with first_on_each_machine(processes):
            data = dataset(data_dir, train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"could not get {name} into {data_dir}: {error}; "
            f"download {dataset.url} there by hand, or give the folder that holds it with --data_dir"
        ) from error
    labels = np.asarray(data.targets)
    rows = first_of_each_class(labels, examples_per_class)
    images = np.ascontiguousarray(data.data[rows].transpose(0, 3, 1, 2))  # (n, 3, 32, 32)
    return TensorImages(images, labels[rows], data.classes, processes.device, mean_std)


def load_imagefolder(
    train, data_dir, processes, num_workers, examples_per_class=None, mean_std="half", skip_broken=False
):
    """`train/` and `val/` or `test/` below `data_dir`, one folder a class.

    In memory where all pictures are of one size and fit, otherwise read by workers.
    """
    paths, labels, classes = list_folder(train, data_dir, examples_per_class)
    images = read_images_of_one_size(paths, quiet=processes.rank > 0, skip_broken=skip_broken)
    if images is None:
        return FolderImages(paths, labels, classes, processes.device, num_workers, stretch, mean_std, skip_broken)
    return TensorImages(images, labels, classes, processes.device, mean_std)


def load_imagenet(train, data_dir, processes, num_workers, examples_per_class=None, mean_std="half", skip_broken=False):
    """ImageNet-1k, or another set of its size, in folders as for `load_imagefolder`; always read by workers."""
    paths, labels, classes = list_folder(train, data_dir, examples_per_class)
    return FolderImages(paths, labels, classes, processes.device, num_workers, centre_crop, mean_std, skip_broken)


def count_class_folders(data_dir):
    return len(class_folders(image_folders(data_dir)[0]))


DATASETS = {
    "cifar10": Source(lambda data_dir: 10, functools.partial(load_cifar, "CIFAR10")),
    "cifar100": Source(lambda data_dir: 100, functools.partial(load_cifar, "CIFAR100")),
    "digits": Source(lambda data_dir: 10, load_digits),
    "imagefolder": Source(count_class_folders, load_imagefolder),
    "imagenet": Source(count_class_folders, load_imagenet, centre_crop),
}
FOLDERS = ("imagefolder", "imagenet")  # those that --data_dir must hold already


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
    folders, files = [], []
    try:
        for entry in os.scandir(folder):
            (folders if entry.is_dir() else files).append(entry.name)
    except OSError as error:
        raise UserError(f"{folder} can't be read: {error.strerror}") from error
    names = sorted(name for name in folders if name not in IGNORED_FOLDERS and not name.startswith("."))
    if not names:
        raise UserError(f"{folder} has no folders; it needs one folder a class{way_to_folders(folder, files)}")
    return names


def way_to_folders(folder, files):
    """What to do where `files` lie in place of the classes: ImageNet's archives are unpacked in two steps."""
    if any(is_picture(file) for file in files):
        return (
            f", but its {len(files)} files lie side by side; valprep.sh of github.com/soumith/imagenetloader.torch, "
            "run in it, moves those of ImageNet's val/ into their classes' folders"
        )
    if any(file.endswith(".tar") for file in files):
        return f", but holds {len(files)} archives; unpack each into a folder of its name"
    return ""


def list_folder(train, data_dir, examples_per_class):
    """(paths of the pictures, their labels, names of the classes) of the training or the test folder.

    Only names are read, not the files, so that 1.3 million of them take seconds.
    """
    train_dir, test_dir = image_folders(data_dir)
    classes = class_folders(train_dir)
    unknown = sorted(set(class_folders(test_dir)) - set(classes))
    if unknown:
        raise UserError(f"{test_dir / unknown[0]} is a class that {train_dir} does not have")
    folder = train_dir if train else test_dir
    paths, labels = [], []
    for label, name in enumerate(classes):
        if not (folder / name).is_dir():
            continue  # a test set may lack a class
        files = pictures_below(folder / name)[:examples_per_class]
        paths += files
        labels += [label] * len(files)
    return paths, labels, classes


def read_images_of_one_size(paths, quiet, skip_broken):
    """uint8 (n, 3, h, w), or None where the sizes differ, are too large to be kept in memory, or one is to be skipped.

    Raises UserError for a broken picture unless `skip_broken`.
    """
    try:
        first = read_image(paths[0])
        if first.numel() * len(paths) > IN_MEMORY_BYTES or max(first.shape) > IN_MEMORY_SIDE:
            return None
        images = first.new_empty(len(paths), *first.shape)
        hidden = quiet or not sys.stderr.isatty()
        bar = tqdm(paths, desc="reading pictures", unit="img", delay=2, leave=False, disable=hidden)
        for i, path in enumerate(bar):
            image = read_image(path)
            if image.shape != first.shape:
                return None
            images[i] = image
        return images
    except UserError as error:
        if skip_broken:
            return None
        raise broken(error) from error


def broken(error):
    """The UserError that ends a run which has met a broken picture."""
    return UserError(f"{error}; --skip_broken leaves such pictures out")


class TensorImages:
    """Images of one size in memory, uint8 (n, 3, h, w) on the training device, augmented there as a batch."""

    broken = frozenset()  # paths of the pictures that were skipped, as in FolderImages

    def __init__(self, images, labels, classes, device, mean_std="half"):
        self.images = torch.as_tensor(images).to(device)
        self.labels = torch.as_tensor(np.asarray(labels, dtype=np.int64)).to(device)
        self.classes = list(classes)
        self.mean_std = mean_std

    def __len__(self):
        return len(self.images)

    def train_batches(self, batches, augmentation):
        """For each array of stream positions: images float32 (B, 3, *img_size), normalised, and labels int64 (B,)."""
        seed, img_size, min_crop_scale, flip, rand_augment = augmentation
        for positions in batches:
            epochs, indices = samples_at(seed, positions, len(self))
            height, width = self.images.shape[2:]
            boxes, flips = random_crops(seed, epochs, indices, len(self), height, width, min_crop_scale)
            rows = torch.from_numpy(indices).to(self.images.device, non_blocking=True)
            images = resized_crops(self.images[rows], boxes, img_size, flips if flip else None)
            if rand_augment:
                words = rand_augment_words(seed, epochs, indices, len(self))
                pairs = zip(images.round().to(torch.uint8), words, strict=True)
                images = torch.stack([rand_augmented(image, word, *rand_augment) for image, word in pairs])
            yield normalise(images, self.mean_std), self.labels[rows]

    def eval_batches(self, img_size, batch_size, processes):
        """This process's share of the images, resized: images float32 (B, 3, *img_size), labels int64 (B,)."""
        images, labels = self.images[processes.rank :: processes.size], self.labels[processes.rank :: processes.size]
        for some, their_labels in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            yield self.resized(some, img_size), their_labels

    def examples(self, count, img_size):
        """Up to `count` images, spread evenly over the set, and their labels, as a batch of `eval_batches`."""
        rows = spread_indices(len(self), count)
        return self.resized(self.images[rows], img_size), self.labels[rows]

    def resized(self, images, img_size):
        """A batch of whole images, uint8 (B, 3, h, w) -> float32 (B, 3, *img_size), normalised."""
        boxes = torch.tensor([[0, 0, *images.shape[2:]]]).expand(len(images), -1)
        return normalise(resized_crops(images, boxes, img_size), self.mean_std)


class FolderImages:
    """Pictures on disk, decoded, cropped and resized by worker processes.

    `num_workers` None is as many as suit this machine; `prepare` is that of the Source. `broken` holds the paths of the
    pictures that this process has met and, with `skip_broken`, skipped.
    """

    def __init__(
        self, paths, labels, classes, device, num_workers, prepare=stretch, mean_std="half", skip_broken=False
    ):
        transforms()  # imported before there are workers that would each do it

        # Arrays, since workers would copy a list of a million strings: they share it only until they count references.
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.labels = np.array(labels, dtype=np.int64)
        self.classes = list(classes)
        self.device = device
        self.num_workers = default_workers() if num_workers is None else num_workers
        self.prepare, self.mean_std = prepare, mean_std
        self.skip_broken, self.broken = skip_broken, set()

    def __len__(self):
        return len(self.paths)

    def train_batches(self, batches, augmentation):
        """As TensorImages.train_batches; a picture that is skipped gives its place to the next readable one."""
        return self.load(TrainCrops(self.paths, self.labels, augmentation, self.skip_broken), batches)

    def eval_batches(self, img_size, batch_size, processes):
        """As TensorImages.eval_batches; pictures that are skipped are missing."""
        share = range(processes.rank, len(self), processes.size)
        batches = (share[i : i + batch_size] for i in range(0, len(share), batch_size))
        return self.load(PreparedImages(self.paths, self.labels, self.prepare, img_size), batches)

    def examples(self, count, img_size):
        """As TensorImages.examples."""
        dataset = PreparedImages(self.paths, self.labels, self.prepare, img_size)
        images, labels, faults = collate(dataset.__getitems__(spread_indices(len(self), count)))
        self.report(faults)
        return normalise(images.to(self.device), self.mean_std), labels.to(self.device)

    def load(self, dataset, batches):
        """The batches of a Dataset whose `__getitems__` is that of TrainCrops, by workers that start now.

        Training asks once, for its endless stream; each worker has PyTorch's default of two batches ready.
        """
        loader = DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=self.device.type == "cuda",
        )
        for images, labels in on_device(self.readable(loader), self.device):
            yield normalise(images, self.mean_std), labels

    def readable(self, loader):
        """What could be read of each batch, where anything could."""
        for images, labels, faults in loader:
            self.report(faults)
            if len(labels):
                yield images, labels

    def report(self, faults):
        """Name each broken picture once, or raise UserError for the first."""
        for path, error in faults:
            if not self.skip_broken:
                raise broken(error)
            if path and path not in self.broken:
                self.broken.add(path)
                tqdm.write(f"skipped: {error}", file=sys.stderr)
        if len(self.broken) == len(self):
            raise UserError(f"none of the {len(self)} pictures can be read")
        if faults and faults[-1][0] is None:
            raise UserError(faults[-1][1])


def default_workers():
    """The cores that this process may use, shared with the other processes of this machine; at most MAX_WORKERS."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(MAX_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def on_device(batches, device):
    """Batches of CPU tensors as tensors of `device`; a GPU copies the next one while it works on this one."""
    if device.type != "cuda":
        yield from batches
        return
    copies = torch.cuda.Stream(device)
    ready = None
    for batch in batches:
        with torch.cuda.stream(copies):
            coming = [tensor.to(device, non_blocking=True) for tensor in batch]  # from pinned memory
        if ready is not None:
            yield ready
        work = torch.cuda.current_stream(device)
        work.wait_stream(copies)  # what is asked of the GPU from now on may use the copy
        for tensor in coming:
            tensor.record_stream(work)  # its memory is not given to a later copy before that work is done
        ready = coming
    if ready is not None:
        yield ready


def collate(batch):
    """(samples, faults) of one batch -> images uint8 (B, 3, H, W), labels int64 (B,), faults."""
    samples, faults = batch
    if not samples:
        return torch.empty(0, 3, 1, 1, dtype=torch.uint8), torch.empty(0, dtype=torch.int64), faults
    return *default_collate(samples), faults


class TrainCrops(Dataset):
    """The samples at some positions of the shuffled stream, augmented, by `__getitems__`.

    It returns [(image uint8 (3, H, W), label), ...] and [(path, why it can't be read), ...]. With `skip_broken` the
    next readable sample in the order of the files takes the place of a broken one, so every batch is whole; where
    there is none soon, the last fault has None for a path.
    """

    def __init__(self, paths, labels, augmentation, skip_broken):
        self.paths, self.labels, self.augmentation = paths, labels, augmentation
        self.attempts = min(len(paths), MOST_BROKEN) if skip_broken else 1

    def __getitems__(self, positions):
        epochs, indices = samples_at(self.augmentation.seed, positions, len(self.paths))
        samples, faults = [], []
        for i, index in enumerate(indices):
            for attempt in range(self.attempts):
                row = (index + attempt) % len(self.paths)
                path = os.fsdecode(self.paths[row])
                try:
                    samples.append((self.crop(path, epochs[i : i + 1], indices[i : i + 1]), self.labels[row]))
                    break
                except UserError as error:
                    faults.append((path, str(error)))
            else:
                if self.attempts > 1:
                    faults.append((None, f"{self.attempts} pictures in a row can't be read, the last one {path}"))
                break
        return samples, faults

    def crop(self, path, epoch, index):
        """The picture, augmented as the sample of this index (1,) is in this epoch (1,)."""
        seed, img_size, min_crop_scale, flip, rand_augment = self.augmentation
        sample = (seed, epoch, index)
        picture = Picture(path)
        boxes, flips = random_crops(*sample, len(self.paths), *picture.size, min_scale=min_crop_scale)
        image = picture.resized_crop(boxes[0].tolist(), img_size)
        if flip and flips[0]:
            image = image.flip(2)
        if rand_augment:
            image = rand_augmented(image, rand_augment_words(*sample, len(self.paths))[0], *rand_augment)
        return image


class PreparedImages(Dataset):
    """The pictures of some indices as evaluation sees them; what `__getitems__` returns is as in TrainCrops."""

    def __init__(self, paths, labels, prepare, img_size):
        self.paths, self.labels, self.prepare, self.img_size = paths, labels, prepare, img_size

    def __getitems__(self, indices):
        samples, faults = [], []
        for index in indices:
            path = os.fsdecode(self.paths[index])
            try:
                samples.append((self.prepare(read_image(path), self.img_size), self.labels[index]))
            except UserError as error:
                faults.append((path, str(error)))
        return samples, faults


def spread_indices(size, count):
    """`count` indices of a data set, or all, evenly spread: where classes follow one another, of different ones."""
    return np.unique(np.linspace(0, size - 1, count).round().astype(np.int64))


def stream_positions(batch_size, accumulation_steps, processes, first_step, num_steps):
    """For each step from `first_step` on and each of its accumulation steps, this process's stream positions.

    All processes together take the positions [step * batch_size, (step + 1) * batch_size), part after part: however
    many there are, each part holds the same samples, over which BN takes its statistics.
    """
    count = batch_size // accumulation_steps // processes.size
    for part in range(first_step * accumulation_steps, num_steps * accumulation_steps):
        start = (part * processes.size + processes.rank) * count
        yield np.arange(start, start + count)


def dropout_keys(seed, positions, num_layers, device):
    """Random words for the samples at these stream positions, int32 (layers, B, 2): what dropout masks derive from."""
    words = np.ascontiguousarray(random_words(seed, DROPOUT, positions, num_layers).T)
    keys = torch.from_numpy(words.view(np.int32))  # (layers, 2 B): one uint64 is two int32
    return keys.unflatten(1, (-1, 2)).to(device, non_blocking=True)
