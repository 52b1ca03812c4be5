"""Mixup and CutMix by torchvision as a function of (seed, step): an image is mixed with its neighbour in the stream.

All images of a step share one proportion, or one box. The partner of the sample at stream position p is the one at
p ^ 1, which is in the same micro-batch for any number of processes and accumulation steps.
"""

import torch
import torch.nn.functional as F

from utils.data.images import transforms
from utils.data.stream import MIXING, random_bits


def make_mixing(mixup, cutmix):
    """torchvision's transform for these alphas of the Beta distribution (0: off), or None if both are 0.

    Mixup is by Zhang et al. (2018), CutMix by Yun et al. (2019). With both, each step applies one of them at random.
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
    # torchvision mixes a batch with itself rolled by one. In a batch of two that is a swap. So the first neighbours of
    # all pairs become one image of many channels, the second ones the other, and likewise their one-hot labels.
    image_halves = split_pairs(images)  # (2, B/2, C, H, W)
    target_halves = split_pairs(F.one_hot(labels, num_classes).float())  # (2, B/2, num_classes)
    with torch.random.fork_rng(devices=[]):  # torchvision draws on the CPU
        torch.default_generator.manual_seed(int(random_bits(seed, MIXING, [step], 1)[0, 0]))
        mixed_images, mixed_targets = mixing(image_halves.flatten(1, 2), target_halves.flatten(1))
    return join_pairs(mixed_images.view(image_halves.shape)), join_pairs(mixed_targets.view(target_halves.shape))


def split_pairs(batch):
    """(B, ...) -> (2, B/2, ...): the first of each two neighbours, then the second."""
    return batch.unflatten(0, (-1, 2)).transpose(0, 1)


def join_pairs(halves):
    """The inverse of `split_pairs`."""
    return halves.transpose(0, 1).flatten(0, 1)
