"""Random resized crops and flips, for a whole batch at once on the training device, or for one image in a worker.

Which crop a sample gets is a function of (seed, epoch, sample index) alone.
"""

import math

import numpy as np
import torch

from utils.random import AUGMENTATION, random_uniform

ASPECT_RATIOS = (3 / 4, 4 / 3)
ATTEMPTS = 10


def random_crops(seed, epochs, indices, num_samples, heights, widths, min_scale, max_scale=1.0):
    """Boxes int64 (B, 4) of (top, left, height, width), and flips bool (B,) of probability one half.

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
    w = np.minimum(widths, np.rint(heights * ASPECT_RATIOS[1]))
    h = np.minimum(heights, np.rint(widths / ASPECT_RATIOS[0]))
    return np.stack([(heights - h) // 2, (widths - w) // 2, h, w], axis=1)


def resized_crops(images, boxes, out_size, flips=None):
    """uint8 images (B, C, h, w), boxes (B, 4) -> float32 (B, C, *out_size) in [0, 255].

    Bilinear with antialiasing, the same weights as torchvision's `resized_crop`, but every image has a box of
    its own. Both axes are matrix products, since resizing is linear and separable.
    """
    top, left, height, width = boxes.to(images.device, non_blocking=True).unbind(1)
    rows = resize_weights(top, height, images.shape[2], out_size[0])  # (B, H, h)
    columns = resize_weights(left, width, images.shape[3], out_size[1], flips)  # (B, W, w)
    x = torch.bmm(images.flatten(1, 2).float(), columns.transpose(1, 2))  # (B, C * h, W)
    return rows[:, None] @ x.view(*images.shape[:3], out_size[1])


def resize_weights(start, length, in_size, out_size, flips=None):
    """Row i holds what each input pixel of [start, start + length) gives to output pixel i: (B, out_size, in_size)."""
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


def normalise(images):
    """Bytes or floats in [0, 255] -> float32 with mean 0.5 and standard deviation 0.5 taken off: [-1, 1]."""
    return images.float() * (2 / 255) - 1


def denormalise(images):
    """The bytes, uint8, that `normalise` made these images of."""
    return ((images + 1) * (255 / 2)).round().clamp(0, 255).to(torch.uint8)
