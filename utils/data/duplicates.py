"""Exact copies of images in two splits of a data set."""

import itertools
import os
from collections import Counter

import numpy as np
import xxhash

from utils.records.files import file_checksum

MAX_FILES = 100_000  # of larger folders, such as ImageNet, even the sizes would take long to read


def count_copies(splits):
    """{(split, other): number of images of `other` that are also in `split`} for each two of {split: images}.

    The images are arrays uint8 (n, 3, h, w), whose pixels count, or lists of paths, whose files count as copies if
    their bytes are equal. 0 for more than MAX_FILES files.
    """
    if any(isinstance(images, list) for images in splits.values()):
        checksums = checksums_of_files(splits)
    else:
        checksums = {split: list(map(pixel_checksum, images)) for split, images in splits.items()}
    known = {split: set(found) - {None} for split, found in checksums.items()}
    pairs = itertools.combinations(splits, 2)
    return {(split, other): sum(checksum in known[split] for checksum in checksums[other]) for split, other in pairs}


def pixel_checksum(image):
    return xxhash.xxh3_128_intdigest(np.ascontiguousarray(image))


def checksums_of_files(splits):
    """{split: [checksum of each file, or None]} of {split: paths}; only files of equal size in two splits are read."""
    if sum(map(len, splits.values())) > MAX_FILES:
        return {split: [] for split in splits}
    sizes = {split: list(map(file_size, paths)) for split, paths in splits.items()}
    in_splits = Counter(itertools.chain.from_iterable(map(set, sizes.values())))
    return {
        split: [checksum(path) if in_splits[size] > 1 else None for path, size in zip(paths, sizes[split], strict=True)]
        for split, paths in splits.items()
    }


def file_size(path):
    """In bytes; None for a file that can't be read, which training reports."""
    try:
        return os.path.getsize(path)
    except OSError:
        return None


def checksum(path):
    """The XXH3 of a file, or None."""
    try:
        return file_checksum(path)
    except OSError:
        return None
