"""Random resized crops, flips and RandAugment, for a batch on the training device or for one image in a worker.

The augmentation of a sample is a function of (seed, epoch, sample index) alone.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
import torch

from utils.data.images import transforms
from utils.data.stream import AUGMENTATION, RAND_AUGMENT, random_bits, random_uniform

ASPECT_RATIOS = (3 / 4, 4 / 3)
ATTEMPTS = 10
MAX_MAGNITUDE = 30  # of RandAugment, on the paper's scale
MEAN_STD = {  # of the three channels, as fractions of 255
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # what Google's checkpoints were trained with
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ImageNet's own, as in torchvision
}


class Augmentation(NamedTuple):
    """How training images are augmented: crop, flip and RandAugment, in this order."""

    seed: int
    img_size: tuple  # (height, width) in pixels
    min_crop_scale: float  # smallest crop, as a fraction of the image's area
    flip: bool  # whether half of the images are mirrored
    rand_augment: tuple | None = None  # (operations per image, their magnitude from 0 to 30)


def random_crops(seed, epochs, indices, num_samples, heights, widths, min_scale, max_scale=1.0):
    """Boxes int64 (B, 4) of (top, left, height, width), and flips bool (B,) with probability 1/2.

    The rule is torchvision's RandomResizedCrop: area uniform in [min_scale, max_scale] of the image's, aspect
    ratio log-uniform in [3/4, 4/3], ten attempts, then the largest centred crop of an admissible ratio.
    """
    draws = random_uniform(seed, AUGMENTATION, epochs * num_samples + indices, 2 * ATTEMPTS + 3)
    heights, widths = np.broadcast_to(heights, indices.shape), np.broadcast_to(widths, indices.shape)
    area = (heights * widths)[:, None] * (min_scale + (max_scale - min_scale) * draws[:, :ATTEMPTS])
    low, high = map(math.log, ASPECT_RATIOS)
    ratio = np.exp(low + (high - low) * draws[:, ATTEMPTS : 2 * ATTEMPTS])
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w > 0) & (h > 0) & (w <= widths[:, None]) & (h <= heights[:, None])
    rows, first = np.arange(len(indices)), fits.argmax(axis=1)
    w, h = w[rows, first], h[rows, first]
    top = np.floor(draws[:, -3] * (heights - h + 1))
    left = np.floor(draws[:, -2] * (widths - w + 1))
    boxes = np.stack([top, left, h, w], axis=1)
    none = ~fits.any(axis=1)
    boxes[none] = largest_centred_crops(heights[none], widths[none])
    return torch.from_numpy(boxes.astype(np.int64)), torch.from_numpy(draws[:, -1] < 0.5)


def largest_centred_crops(heights, widths):
    """Boxes (B, 4) of the largest centred crops whose aspect ratio is admissible."""
    w = np.minimum(widths, np.rint(heights * ASPECT_RATIOS[1]))
    h = np.minimum(heights, np.rint(widths / ASPECT_RATIOS[0]))
    return np.stack([(heights - h) // 2, (widths - w) // 2, h, w], axis=1)


def resized_crops(images, boxes, out_size, flips=None):
    """uint8 images (B, C, h, w), boxes (B, 4) -> float32 (B, C, *out_size) in [0, 255].

    Bilinear with antialiasing, with the weights of torchvision's `resized_crop`, but each image has its own box. Both
    axes are matrix products, since resizing is linear and separable.
    """
    top, left, height, width = boxes.to(images.device, non_blocking=True).unbind(1)
    rows = resize_weights(top, height, images.shape[2], out_size[0])  # (B, H, h)
    columns = resize_weights(left, width, images.shape[3], out_size[1], flips)  # (B, W, w)
    x = torch.bmm(images.flatten(1, 2).float(), columns.transpose(1, 2))  # (B, C * h, W)
    return rows[:, None] @ x.view(*images.shape[:3], out_size[1])


def resize_weights(start, length, in_size, out_size, flips=None):
    """The weight of each input pixel of [start, start + length) in each output pixel: (B, out_size, in_size)."""
    device = start.device
    scale = (length.float() / out_size)[:, None, None]
    pixels = torch.arange(out_size, device=device).expand(len(start), -1)
    if flips is not None:
        pixels = torch.where(flips.to(device, non_blocking=True)[:, None], out_size - 1 - pixels, pixels)
    centres = scale * (pixels[:, :, None] + 0.5)
    inputs = torch.arange(in_size, device=device) - start[:, None]  # counted from the box's first pixel
    weights = (1 - (inputs[:, None] + 0.5 - centres).abs() / scale.clamp(min=1)).clamp(min=0)
    inside = (inputs >= 0) & (inputs < length[:, None])
    weights = weights * inside[:, None]
    return weights / weights.sum(dim=2, keepdim=True)


def rand_augmented(image, bits, operations, magnitude):
    """torchvision's RandAugment of an image, uint8 (3, H, W), seeded by the random bits."""
    with torch.random.fork_rng(devices=[]):  # it draws on the CPU also for an image on a GPU
        torch.default_generator.manual_seed(int(bits))
        return rand_augment(operations, magnitude)(image)


@functools.cache
def rand_augment(operations, magnitude):
    """torchvision's transform."""
    return transforms().RandAugment(operations, magnitude, num_magnitude_bins=MAX_MAGNITUDE + 1)


def rand_augment_bits(seed, epochs, indices, num_samples):
    """The seed of each sample's RandAugment, uint64 (B,)."""
    return random_bits(seed, RAND_AUGMENT, epochs * num_samples + indices, 1)[:, 0]


def normalise(images, mean_std="half"):
    """(images - mean) / std of images (..., 3, H, W) in [0, 255], as float32; with "half" the result is in [-1, 1].

    `mean_std` is a name in MEAN_STD.
    """
    result = images.to(torch.float32, copy=True)  # computed in place: allocating memory would take longer
    if mean_std == "half":
        return result.mul_(2 / 255).sub_(1)
    mean, std = channels(mean_std, images.device)
    return result.mul_(1 / (255 * std)).sub_(mean / std)


def denormalise(images, mean_std="half"):
    """The inverse of `normalise`, as uint8."""
    if mean_std == "half":
        return ((images + 1) * (255 / 2)).round().clamp(0, 255).to(torch.uint8)
    mean, std = channels(mean_std, images.device)
    return ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


@functools.cache  # one copy to a GPU per run, not per step
def channels(mean_std, device):
    """(mean, standard deviation), each (3, 1, 1)."""
    return tuple(torch.tensor(values, device=device)[:, None, None] for values in MEAN_STD[mean_std])
