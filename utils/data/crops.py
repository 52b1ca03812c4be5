"""The random crop and flip of training images, for a batch in memory or for one image file.

The crop is torchvision's RandomResizedCrop, or a part of a larger image: with `resize_size` of the image resized to a
square, as BiT does, with `crop_padding` of the resized image with a mirrored border, as torchvision's RandomCrop does.
"""

import numpy as np
import torch

from utils.data.augmentation import random_crops, resample, resize_weights, resized_crops
from utils.data.stream import AUGMENTATION, random_uniform
from utils.parallel.devices import to_device


def crop_batch(images, augmentation, epochs, indices, num_samples):
    """uint8 (B, C, h, w) -> float32 (B, C, *img_size) in [0, 255], cropped as the samples of these epochs and indices.

    `num_samples` is the number of training images.
    """
    seed, img_size, min_crop_scale, flip = augmentation[:4]
    if crops_a_larger_image(augmentation):
        resized, border = larger_image(augmentation)
        corners, flips = random_corners(seed, epochs, indices, num_samples, sides(resized, border), img_size)
        return crops_of_resized(images, resized, corners, img_size, flips if flip else None, border)
    boxes, flips = random_crops(seed, epochs, indices, num_samples, *images.shape[2:], min_crop_scale)
    return resized_crops(images, boxes, img_size, flips if flip else None)


def crop_file(file, augmentation, epoch, index, num_samples):
    """An ImageFile as uint8 (3, *img_size), cropped as the sample of this index (1,) in this epoch (1,)."""
    seed, img_size, min_crop_scale, flip = augmentation[:4]
    if crops_a_larger_image(augmentation):
        resized, border = larger_image(augmentation)
        corners, flips = random_corners(seed, epoch, index, num_samples, sides(resized, border), img_size)
        image = file.resized_crop((0, 0, *file.size), resized)
        for axis, start in enumerate(corners[0].tolist()):
            rows = bordered(resized[axis], border)[start : start + img_size[axis]]
            image = image.index_select(axis + 1, rows)
    else:
        boxes, flips = random_crops(seed, epoch, index, num_samples, *file.size, min_scale=min_crop_scale)
        image = file.resized_crop(boxes[0].tolist(), img_size)
    return image.flip(2) if flip and flips[0] else image


def crops_a_larger_image(augmentation):
    return augmentation.resize_size or augmentation.crop_padding


def larger_image(augmentation):
    """((height, width) to which an image is resized, width of the mirrored border), in pixels."""
    if augmentation.crop_padding:
        return augmentation.img_size, augmentation.crop_padding
    return (augmentation.resize_size, augmentation.resize_size), 0


def sides(resized, border):
    """(height, width) of the resized image with its border."""
    return tuple(side + 2 * border for side in resized)


def bordered(size, border, device=None):
    """The row of an image of `size` rows in each row with its mirrored border: int64 (size + 2 * border,)."""
    rows = torch.arange(-border, size + border, device=device).abs()
    return size - 1 - (size - 1 - rows).abs()


def random_corners(seed, epochs, indices, num_samples, larger, img_size):
    """Corners int64 (B, 2) of (top, left), and flips bool (B,) with probability 1/2.

    The rule is torchvision's RandomCrop: all positions of `img_size` in the `larger` size are equally likely.
    """
    draws = random_uniform(seed, AUGMENTATION, epochs * num_samples + indices, 3)
    positions = np.array(larger) - np.array(img_size) + 1
    corners = np.floor(draws[:, :2] * positions).astype(np.int64)
    return torch.from_numpy(corners), torch.from_numpy(draws[:, 2] < 0.5)


def crops_of_resized(images, resized, corners, out_size, flips=None, border=0):
    """uint8 (B, C, h, w) -> parts of the images resized to `resized`, with a border, float32 (B, C, *out_size).

    `corners` (B, 2) are the first row and column of each part. Only the pixels of the part are computed.
    """
    device, weights = images.device, []
    for axis, in_size in enumerate(images.shape[2:]):
        start, length = torch.tensor([[0], [in_size]], device=device)
        whole = resize_weights(start, length, in_size, resized[axis])[0]  # (resized[axis], in_size)
        whole = whole[bordered(resized[axis], border, device)]
        pixels = torch.arange(out_size[axis], device=device).expand(len(images), -1)
        if axis == 1 and flips is not None:
            pixels = torch.where(to_device(flips, device)[:, None], pixels.flip(1), pixels)
        weights.append(whole[to_device(corners[:, axis, None], device) + pixels])
    return resample(images, *weights)
