"""Images and labels as batches, from one uint8 tensor on the training device or from image files by worker processes.

Both kinds have the same methods: `train_batches`, the endless shuffled stream from a given step on; `eval_batches`,
each image once; `examples`, a few images; `whole_image`, one as its file shows it; and `path_of`, where that file is.
"""

import contextlib
import itertools
import os
import signal
import sys
import threading

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from utils.data.augmentation import augment_pixels, finish, normalise, resized_crops
from utils.data.crops import crop_batch, crop_file
from utils.data.images import ImageFile, read_image, transforms
from utils.data.stream import samples_at
from utils.errors import UserError
from utils.parallel.devices import to_device

IN_MEMORY_BYTES = 2 * 2**30
IN_MEMORY_SIDE = 256  # pixels; a batch of larger images would be large itself before it is cropped
MAX_UNREADABLE = 100  # images in a row that may be skipped; if more can't be read, the disk is at fault
MAX_WORKERS = 16  # enough to decode for the fastest GPU; each worker holds two batches ready


def read_images_of_one_size(paths, quiet, skip_broken):
    """The images as uint8 (n, 3, h, w), or None if they differ in size, do not fit into memory, or one must be skipped.

    Raises UserError for an unreadable image unless `skip_broken`.
    """
    try:
        first = read_image(paths[0])
        if first.numel() * len(paths) > IN_MEMORY_BYTES or max(first.shape) > IN_MEMORY_SIDE:
            return None
        images = first.new_empty(len(paths), *first.shape)
        hidden = quiet or not sys.stderr.isatty()
        bar = tqdm(paths, desc="reading images", unit="img", delay=2, leave=False, disable=hidden)
        for i, path in enumerate(bar):
            image = read_image(path)
            if image.shape != first.shape:
                return None
            images[i] = image
        return images
    except UserError as error:
        if skip_broken:
            return None
        raise unreadable_image(error) from error


def unreadable_image(error):
    """The UserError that ends a run at an unreadable image."""
    return UserError(f"{error}; --skip_broken skips such images")


class TensorImages:
    """Images of one size in memory, uint8 (n, 3, h, w) on the training device, augmented there as a batch."""

    unreadable = frozenset()  # paths of the images that were skipped, as in FolderImages

    def __init__(self, images, labels, classes, device, mean_std="half", paths=None):
        self.images = torch.as_tensor(images).to(device)
        self.labels = torch.as_tensor(np.asarray(labels, dtype=np.int64)).to(device)
        self.classes = list(classes)
        self.mean_std = mean_std
        self.paths = paths  # of the files, in the same order, or None for images that are not files

    def __len__(self):
        return len(self.images)

    def train_batches(self, batches, augmentation):
        """For each array of stream positions: images float32 (B, 3, *img_size), normalised, and labels int64 (B,)."""
        for positions in batches:
            epochs, indices = samples_at(augmentation.seed, positions, len(self), augmentation.repeats)
            rows = to_device(torch.from_numpy(indices), self.images.device)
            images = crop_batch(self.images[rows], augmentation, epochs, indices, len(self))
            if augmentation.changes_pixels:
                samples = epochs * len(self) + indices
                images = augment_pixels(images.round().to(torch.uint8), augmentation, samples)
            yield finish(images, self.mean_std, augmentation, positions, len(self)), self.labels[rows]

    def eval_batches(self, img_size, batch_size, processes):
        """This process's share of the images, resized: images float32 (B, 3, *img_size), labels int64 (B,)."""
        images, labels = self.images[processes.rank :: processes.size], self.labels[processes.rank :: processes.size]
        for batch, batch_labels in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            yield self.resized(batch, img_size), batch_labels

    def examples(self, count, img_size):
        """Up to `count` images, evenly spread over the set, and their labels, as a batch of `eval_batches`."""
        rows = spread_indices(len(self), count)
        return self.resized(self.images[rows], img_size), self.labels[rows]

    def whole_image(self, index):
        """An image in its own size, uint8 (3, h, w) on the CPU, neither cropped nor normalised."""
        return self.images[index].cpu()

    def path_of(self, index):
        """The path of an image file, or None for an image that is not a file."""
        return self.paths and self.paths[index]

    def resized(self, images, img_size):
        """A batch of whole images, uint8 (B, 3, h, w) -> float32 (B, 3, *img_size), normalised."""
        boxes = torch.tensor([[0, 0, *images.shape[2:]]]).expand(len(images), -1)
        return normalise(resized_crops(images, boxes, img_size), self.mean_std)


class FolderImages:
    """Image files, decoded, cropped and resized by worker processes.

    `prepare` is that of the DataSource, `options` are DataOptions. `skipped` is {path: why it can't be read} of the
    images that this process has skipped because of `skip_broken`.
    """

    def __init__(self, paths, labels, classes, device, prepare, options):
        transforms()  # imported once here instead of in each worker

        # Arrays, because workers would copy a list of a million strings: counting references writes to its memory.
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.labels = np.array(labels, dtype=np.int64)
        self.classes = list(classes)
        self.device = device
        self.num_workers = default_workers() if options.num_workers is None else options.num_workers
        self.prepare, self.mean_std = prepare, options.mean_std
        self.skip_broken, self.skipped = options.skip_broken, {}

    def __len__(self):
        return len(self.paths)

    @property
    def unreadable(self):
        """The paths of the images in `skipped`, as a set."""
        return self.skipped.keys()

    def train_batches(self, batches, augmentation):
        """As TensorImages.train_batches; the next readable image takes the place of one that is skipped."""
        batches, own_batches = itertools.tee(batches)
        loaded = self.load(TrainCrops(self.paths, self.labels, augmentation, self.skip_broken), own_batches)
        for positions, (images, labels) in zip(batches, loaded, strict=True):  # images that are skipped are replaced
            yield finish(images, self.mean_std, augmentation, positions, len(self)), labels

    def eval_batches(self, img_size, batch_size, processes):
        """As TensorImages.eval_batches, without the images that are skipped."""
        share = range(processes.rank, len(self), processes.size)
        batches = (share[i : i + batch_size] for i in range(0, len(share), batch_size))
        for images, labels in self.load(PreparedImages(self.paths, self.labels, self.prepare, img_size), batches):
            yield normalise(images, self.mean_std), labels

    def examples(self, count, img_size):
        """As TensorImages.examples."""
        dataset = PreparedImages(self.paths, self.labels, self.prepare, img_size)
        images, labels, errors = collate(dataset.__getitems__(spread_indices(len(self), count)))
        self.report(errors)
        return normalise(images.to(self.device), self.mean_std), labels.to(self.device)

    def whole_image(self, index):
        """As TensorImages.whole_image; the file is read. Raises UserError."""
        return read_image(self.path_of(index))

    def path_of(self, index):
        """The path of an image file."""
        return os.fsdecode(self.paths[index])

    def load(self, dataset, batches):
        """The batches of a Dataset with the `__getitems__` of TrainCrops, uint8, by workers that start now.

        Training calls it once, for its endless stream. Each worker holds PyTorch's default of two batches ready.
        """
        loader = DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=obey_training_process,
        )
        with stop_signals_blocked():
            decoded = iter(loader)  # starts the workers
        yield from on_device(self.readable(decoded), self.device)

    def readable(self, batches):
        """The readable images of each batch; a batch without any is omitted."""
        for images, labels, errors in batches:
            self.report(errors)
            if len(labels):
                yield images, labels

    def report(self, errors):
        """Print each unreadable image once, or raise UserError for the first."""
        for path, error in errors:
            if not self.skip_broken:
                raise unreadable_image(error)
            if path and path not in self.skipped:
                self.skipped[path] = error
                if len(self) > 1:
                    tqdm.write(f"skipped: {error}", file=sys.stderr)
        if len(self.skipped) == len(self):
            raise UserError(f"none of the {len(self)} images can be read" if len(self) > 1 else error)
        if errors and errors[-1][0] is None:
            raise UserError(errors[-1][1])


@contextlib.contextmanager
def stop_signals_blocked():
    """SIGTERM and SIGINT do not end processes that start inside; this process receives them afterwards.

    So workers outlive a signal to the whole process group: their training process saves, then ends them.
    """
    if not hasattr(signal, "sigwaitinfo"):  # on Windows and macOS
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_training_process(worker):
    """Let a worker that blocks SIGTERM end when its training process sends it, as Python does at exit, then waiting."""

    def wait():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=wait, daemon=True).start()


def default_workers():
    """This process's share of the cores of its machine, at most MAX_WORKERS."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(MAX_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def on_device(batches, device):
    """Batches of CPU tensors as tensors on `device`; a GPU copies the next batch while it computes on this one."""
    if device.type == "cpu":
        yield from batches
        return
    if device.type != "cuda":
        for batch in batches:
            yield [to_device(tensor, device) for tensor in batch]
        return
    copies = torch.cuda.Stream(device)
    ready = None
    for batch in batches:
        with torch.cuda.stream(copies):
            coming = [tensor.to(device, non_blocking=True) for tensor in batch]  # from pinned memory
        if ready is not None:
            yield ready
        computation = torch.cuda.current_stream(device)
        computation.wait_stream(copies)  # kernels launched from now on may use the copy
        for tensor in coming:
            tensor.record_stream(computation)  # its memory is not reused by a later copy before they are done
        ready = coming
    if ready is not None:
        yield ready


def collate(batch):
    """(samples, errors) of one batch -> images uint8 (B, 3, H, W), labels int64 (B,), errors."""
    samples, errors = batch
    if not samples:
        return torch.empty(0, 3, 1, 1, dtype=torch.uint8), torch.empty(0, dtype=torch.int64), errors
    return *default_collate(samples), errors


class TrainCrops(Dataset):
    """The samples at given positions of the shuffled stream, augmented, by `__getitems__`.

    It returns [(image uint8 (3, H, W), label), ...] and [(path, why it can't be read), ...]. With `skip_broken` the
    next readable sample in the order of the files replaces an unreadable one, so every batch is complete. If none of
    the next MAX_UNREADABLE can be read, the path of the last error is None.
    """

    def __init__(self, paths, labels, augmentation, skip_broken):
        self.paths, self.labels, self.augmentation = paths, labels, augmentation
        self.attempts = min(len(paths), MAX_UNREADABLE) if skip_broken else 1

    def __getitems__(self, positions):
        seed, repeats = self.augmentation.seed, self.augmentation.repeats
        epochs, indices = samples_at(seed, positions, len(self.paths), repeats)
        samples, errors = [], []
        for i, index in enumerate(indices):
            for attempt in range(self.attempts):
                row = (index + attempt) % len(self.paths)
                path = os.fsdecode(self.paths[row])
                try:
                    samples.append((self.crop(path, epochs[i : i + 1], indices[i : i + 1]), self.labels[row]))
                    break
                except UserError as error:
                    errors.append((path, str(error)))
            else:
                if self.attempts > 1:
                    errors.append((None, f"{self.attempts} images in a row can't be read, the last one {path}"))
                break
        return samples, errors

    def crop(self, path, epoch, index):
        """The image, augmented as the sample of this index (1,) in this epoch (1,)."""
        image = crop_file(ImageFile(path), self.augmentation, epoch, index, len(self.paths))
        if self.augmentation.changes_pixels:
            image = augment_pixels(image[None], self.augmentation, epoch * len(self.paths) + index)[0]
        return image


class PreparedImages(Dataset):
    """The images of given indices, resized for evaluation; `__getitems__` returns the same as that of TrainCrops."""

    def __init__(self, paths, labels, prepare, img_size):
        self.paths, self.labels, self.prepare, self.img_size = paths, labels, prepare, img_size

    def __getitems__(self, indices):
        samples, errors = [], []
        for index in indices:
            path = os.fsdecode(self.paths[index])
            try:
                samples.append((self.prepare(read_image(path), self.img_size), self.labels[index]))
            except UserError as error:
                errors.append((path, str(error)))
        return samples, errors


def spread_indices(size, count):
    """`count` indices of a data set, or all, evenly spread, so that sorted classes are all represented."""
    return np.unique(np.linspace(0, size - 1, count).round().astype(np.int64))
