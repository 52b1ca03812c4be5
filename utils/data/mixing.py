"""Mixup and CutMix by torchvision, as a function of (seed, step): a picture is mixed with its neighbour in the stream.

All pictures of a step share one proportion, or one box. The sample at stream position p has the one at p ^ 1 as its
partner, which is in the same part of the batch however many processes and accumulation steps divide it.
"""

import torch
import torch.nn.functional as F

from utils.data.augmentation import transforms
from utils.data.stream import MIXING, random_words


def make_mixing(mixup, cutmix):
    """torchvision's transform for these alphas of the Beta distribution, where 0 is none; None without either.

    Mixup is by Zhang et al. (2018), CutMix by Yun et al. (2019); with both, each step takes one of them at random.
    """
    if not (mixup or cutmix):
        return None
    v2 = transforms()
    alphas = ((v2.MixUp, mixup), (v2.CutMix, cutmix))
    return v2.RandomChoice([transform(alpha=alpha) for transform, alpha in alphas if alpha])


def mix_pairs(mixing, images, labels, num_classes, seed, step):
    """Images float32 (B, C, H, W) and labels int64 (B,) -> mixed images and targets float32 (B, num_classes).

    They are a part of the step's batch that begins at an even position of the stream; B is even.
    """
    # torchvision mixes a batch with itself rolled by one. In a batch of two that is a swap; so all first neighbours
    # become one picture of many channels, all second ones the other, and their one-hot labels go along.
    image_sides = sides_of_pairs(images)  # (2, B/2, C, H, W)
    target_sides = sides_of_pairs(F.one_hot(labels, num_classes).float())  # (2, B/2, num_classes)
    with torch.random.fork_rng(devices=[]):  # torchvision draws on the CPU
        torch.default_generator.manual_seed(int(random_words(seed, MIXING, [step], 1)[0, 0]))
        mixed_images, mixed_targets = mixing(image_sides.flatten(1, 2), target_sides.flatten(1))
    return pairs_of_sides(mixed_images.view(image_sides.shape)), pairs_of_sides(mixed_targets.view(target_sides.shape))


def sides_of_pairs(batch):
    """(B, ...) -> (2, B/2, ...): the first of each two neighbours, then the second."""
    return batch.unflatten(0, (-1, 2)).transpose(0, 1)


def pairs_of_sides(sides):
    """The inverse of `sides_of_pairs`."""
    return sides.transpose(0, 1).flatten(0, 1)
