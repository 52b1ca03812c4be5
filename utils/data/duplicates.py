"""Exact copies of images in two splits of a data set."""

import os

import numpy as np
import xxhash

from utils.records.files import file_checksum

MAX_FILES = 100_000  # of larger folders, such as ImageNet, even the sizes would take long to read


def count_copies(images, others):
    """How many of `others` are also in `images`: arrays uint8 (n, 3, h, w), whose pixels count, or lists of paths.

    Files count as copies if their bytes are equal. 0 for more than MAX_FILES files.
    """
    if not isinstance(images, list):
        known = set(map(pixel_checksum, images))
        return sum(pixel_checksum(image) in known for image in others)
    if len(images) + len(others) > MAX_FILES:
        return 0
    sizes, other_sizes = ({path: file_size(path) for path in paths} for paths in (images, others))
    common = set(sizes.values()) & set(other_sizes.values()) - {None}
    known = {checksum(path) for path, size in sizes.items() if size in common} - {None}
    return sum(checksum(path) in known for path, size in other_sizes.items() if size in common)


def pixel_checksum(image):
    return xxhash.xxh3_128_intdigest(np.ascontiguousarray(image))


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
