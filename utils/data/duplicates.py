"""Exact copies of images in two splits of a data set."""

import os

import numpy as np
import xxhash

from utils.data.loading import TensorImages
from utils.records.files import file_checksum

MAX_FILES = 100_000  # of larger folders, such as ImageNet, even the sizes would take long to read


def count_copies(images, others):
    """How many of `others` are also in `images`; both TensorImages, whose pixels count, or FolderImages.

    Files count as copies if their bytes are equal. 0 for sets of different kinds and for more than MAX_FILES files.
    """
    if isinstance(images, TensorImages) != isinstance(others, TensorImages):
        return 0
    if isinstance(images, TensorImages):
        known = set(pixel_checksums(images))
        return sum(checksum in known for checksum in pixel_checksums(others))
    if len(images) + len(others) > MAX_FILES:
        return 0
    sizes = [np.array([file_size(path) for path in each.paths]) for each in (images, others)]
    known = {file_checksum(path) for path in images.paths[np.isin(sizes[0], sizes[1])]}
    return sum(file_checksum(path) in known for path in others.paths[np.isin(sizes[1], sizes[0])])


def pixel_checksums(images):
    """The XXH3 of each of the TensorImages."""
    return [xxhash.xxh3_128_intdigest(image) for image in images.images.cpu().numpy()]


def file_size(path):
    """In bytes; -1 for a missing file, which training will report."""
    try:
        return os.path.getsize(path)
    except OSError:
        return -1
