"""The augmentation of training images, for a batch on the training device or for one image in a worker.

The order is: crop, flip, policy (`utils/data/policies.py`), colour jitter, normalisation, random erasing. The
augmentation of a sample is a function of (seed, epoch, sample index) alone.
"""

import functools
import itertools
import math
from typing import NamedTuple

import numpy as np
import torch

from utils.data.images import transforms
from utils.data.policies import apply_policy
from utils.data.stream import AUGMENTATION, COLOR_JITTER, ERASING, POLICY, random_bits, random_uniform, samples_at
from utils.parallel.devices import to_device, widest_float

ASPECT_RATIOS = (3 / 4, 4 / 3)  # of a crop
ATTEMPTS = 10  # to find a box
ERASED_SHARE = (0.02, 1 / 3)  # of the image's area, as in timm
ERASED_ASPECT_RATIOS = (0.3, 1 / 0.3)
MEAN_STD = {  # of the three channels, as fractions of 255
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # what Google's checkpoints were trained with
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ImageNet's own, as in torchvision
}


class Augmentation(NamedTuple):
    """How training images are augmented."""

    seed: int
    img_size: tuple  # (height, width) in pixels
    min_crop_scale: float  # smallest crop, as a fraction of the image's area
    flip: bool  # whether half of the images are mirrored
    rand_augment: tuple | None = None  # (operations per image, their magnitude from 0 to 30)
    auto_augment: str | None = None  # a name in AUTO_AUGMENT
    color_jitter: float = 0.0  # largest relative change of brightness, contrast and saturation
    random_erasing: float = 0.0  # probability
    repeats: int = 1  # of a sample in an epoch
    resize_size: int | None = None  # side of the square of which a crop is a part, in place of `min_crop_scale`
    crop_padding: int | None = None  # mirrored pixels around the image of which a crop is a part, in place of both

    @property
    def changes_pixels(self):
        """Whether it changes pixel values before normalisation."""
        return bool(self.rand_augment or self.auto_augment or self.color_jitter)


def random_crops(seed, epochs, indices, num_samples, heights, widths, min_scale, max_scale=1.0):
    """Boxes int64 (B, 4) of (top, left, height, width), and flips bool (B,) with probability 1/2.

    The rule is torchvision's RandomResizedCrop: area uniform in [min_scale, max_scale] of the image's, aspect
    ratio log-uniform in [3/4, 4/3], ten attempts, then the largest centred crop of an admissible ratio.
    """
    draws = random_uniform(seed, AUGMENTATION, epochs * num_samples + indices, 2 * ATTEMPTS + 3)
    heights, widths = np.broadcast_to(heights, indices.shape), np.broadcast_to(widths, indices.shape)
    boxes, found = random_boxes(draws[:, :-1], heights, widths, (min_scale, max_scale), ASPECT_RATIOS)
    boxes[~found] = largest_centred_crops(heights[~found], widths[~found])
    return torch.from_numpy(boxes.astype(np.int64)), torch.from_numpy(draws[:, -1] < 0.5)


def random_boxes(draws, heights, widths, area_shares, aspect_ratios, margin=0):
    """For each image the first of ATTEMPTS boxes that fits: float64 (B, 4), and whether there is one, bool (B,).

    `draws` are uniform, (B, 2 * ATTEMPTS + 2). A box is smaller than the image by at least `margin` pixels.
    """
    smallest, largest = area_shares
    area = (heights * widths)[:, None] * (smallest + (largest - smallest) * draws[:, :ATTEMPTS])
    low, high = map(math.log, aspect_ratios)
    ratio = np.exp(low + (high - low) * draws[:, ATTEMPTS : 2 * ATTEMPTS])
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w > 0) & (h > 0) & (w <= widths[:, None] - margin) & (h <= heights[:, None] - margin)
    rows, first = np.arange(len(draws)), fits.argmax(axis=1)
    w, h = w[rows, first], h[rows, first]
    top = np.floor(draws[:, -2] * (heights - h + 1))
    left = np.floor(draws[:, -1] * (widths - w + 1))
    return np.stack([top, left, h, w], axis=1), fits.any(axis=1)


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
    top, left, height, width = to_device(boxes, images.device).unbind(1)
    rows = resize_weights(top, height, images.shape[2], out_size[0])  # (B, H, h)
    columns = resize_weights(left, width, images.shape[3], out_size[1], flips)  # (B, W, w)
    return resample(images, rows, columns)


def resample(images, rows, columns):
    """uint8 (B, C, h, w), weights (B, H, h) and (B, W, w) of the input pixels -> float32 (B, C, H, W)."""
    x = torch.bmm(images.flatten(1, 2).float(), columns.transpose(1, 2))  # (B, C * h, W)
    return rows[:, None] @ x.view(*images.shape[:3], columns.shape[1])


def resize_weights(start, length, in_size, out_size, flips=None):
    """The weight of each input pixel of [start, start + length) in each output pixel: (B, out_size, in_size)."""
    device = start.device
    scale = (length.float() / out_size)[:, None, None]
    pixels = torch.arange(out_size, device=device).expand(len(start), -1)
    if flips is not None:
        pixels = torch.where(to_device(flips, device)[:, None], out_size - 1 - pixels, pixels)
    centres = scale * (pixels[:, :, None] + 0.5)
    inputs = torch.arange(in_size, device=device) - start[:, None]  # counted from the box's first pixel
    weights = (1 - (inputs[:, None] + 0.5 - centres).abs() / scale.clamp(min=1)).clamp(min=0)
    inside = (inputs >= 0) & (inputs < length[:, None])
    weights = weights * inside[:, None]
    return weights / weights.sum(dim=2, keepdim=True)


def augment_pixels(images, augmentation, samples):
    """The policy and the colour jitter of `augmentation`, for uint8 images (B, 3, H, W).

    `samples`, int64 (B,), number the samples over all epochs: epoch * samples per epoch + index.
    """
    seed, policy = augmentation.seed, (augmentation.rand_augment, augmentation.auto_augment)
    if any(policy):
        images = apply_policy(images, random_bits(seed, POLICY, samples, 1)[:, 0], *policy)
    if augmentation.color_jitter:
        images = jitter_colors(images, augmentation.color_jitter, random_uniform(seed, COLOR_JITTER, samples, 4))
    return images


def jitter_colors(images, strength, draws):
    """torchvision's ColorJitter of brightness, contrast and saturation, for uint8 images (B, 3, H, W).

    The three changes have a random order and factors uniform in [1 - strength, 1 + strength], which depend on `draws`,
    uniform (B, 4).
    """
    images = images.clone()
    factors = 1 + strength * (2 * draws[:, :3] - 1)
    orders = np.array(list(itertools.permutations(range(3))))[(6 * draws[:, 3]).astype(int)]
    for changes in orders.T:  # the first, second and third change of each image
        for change, base in enumerate((black, mean_grey, grey)):
            rows = torch.from_numpy(np.flatnonzero(changes == change)).to(images.device)
            if len(rows):
                factor = torch.from_numpy(factors[changes == change, change]).float().to(images.device)
                images[rows] = blend(images[rows], base(images[rows]), factor[:, None, None, None])
    return images


def blend(images, base, factor):
    """base + factor * (images - base), limited to [0, 255], as uint8."""
    base = base.float()
    return images.sub(base).mul_(factor).add_(base).clamp_(0, 255).to(torch.uint8)


def black(images):
    """What brightness is relative to."""
    return images.new_zeros(())


def mean_grey(images):
    """What contrast is relative to, (B, 1, 1, 1) in float64; a sum of integers does not depend on its order."""
    levels = grey(images)
    return levels.sum(dim=(1, 2, 3), keepdim=True).to(widest_float(images.device)) / levels[0].numel()


def grey(images):
    """What saturation is relative to, uint8 (B, 1, H, W)."""
    return transforms().functional.rgb_to_grayscale(images)


def finish(images, mean_std, augmentation, positions, num_samples):
    """Normalise images (B, 3, H, W) in [0, 255] at these positions of the stream, and erase boxes of some."""
    images = normalise(images, mean_std)
    if augmentation.random_erasing:
        epochs, indices = samples_at(augmentation.seed, positions, num_samples, augmentation.repeats)
        erase_boxes(images, augmentation.seed, epochs * num_samples + indices, augmentation.random_erasing)
    return images


def erase_boxes(images, seed, samples, probability):
    """Replace a random box in some of the normalised images (B, 3, H, W) by Gaussian noise, in place.

    As timm's RandomErasing in mode "pixel". `samples` as in `augment_pixels`.
    """
    draws = random_uniform(seed, ERASING, samples, 2 * ATTEMPTS + 3)
    sides = (np.full(len(samples), side) for side in images.shape[2:])
    boxes, found = random_boxes(draws[:, :-1], *sides, ERASED_SHARE, ERASED_ASPECT_RATIOS, margin=1)
    seeds = random_bits(seed, ERASING, samples, 2 * ATTEMPTS + 4)[:, -1]
    for row in np.flatnonzero(found & (draws[:, -1] < probability)):
        top, left, height, width = boxes[row].astype(int)
        noise = torch.randn(3, height, width, generator=torch.Generator().manual_seed(int(seeds[row])))
        images[row, :, top : top + height, left : left + width] = to_device(noise, images.device)


def normalise(images, mean_std="half"):
    """(images - mean) / std of images (..., 3, H, W) in [0, 255], as float32; with "half" the result is in [-1, 1].

    `mean_std` is a name in MEAN_STD, or six numbers as in `mean_and_std`.
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
    return tuple(torch.tensor(values, device=device)[:, None, None] for values in mean_and_std(mean_std))


def mean_and_std(mean_std):
    """(means, standard deviations) of the three channels for a name in MEAN_STD or a text of six numbers.

    Raises ValueError for another text.
    """
    if mean_std in MEAN_STD:
        return MEAN_STD[mean_std]
    values = [float(text) for text in mean_std.split(",")]
    if len(values) != 6 or not all(math.isfinite(value) for value in values) or min(values[3:]) <= 0:
        raise ValueError(f"{mean_std} is not three means and three standard deviations above 0")
    return tuple(values[:3]), tuple(values[3:])


def mean_std_text(mean, std):
    """The name in MEAN_STD of means and standard deviations of the three channels, or a text of the six numbers."""
    given = tuple(map(float, mean)), tuple(map(float, std))
    return next(
        (name for name, known in MEAN_STD.items() if known == given), ",".join(map(repr, [*given[0], *given[1]]))
    )
