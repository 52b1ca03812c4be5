"""RandAugment, TrivialAugment and AutoAugment of a batch: the bits of torchvision's transforms, image by image."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import AutoAugmentPolicy

from utils.data.policies import AUTO_AUGMENT, apply_operations, apply_policy, functions, rand_augment_space

RAND_AUGMENTS = [(1, 0), (2, 9), (3, 30)]


def random_images(count, height, width, seed=0):
    """Noise, grey images, few levels and constant images, uint8 (count, 3, height, width)."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (count, 3, height, width), dtype=np.uint8)
    images[1::4] = images[1::4, :1]
    images[2::4] = images[2::4] // 64 * 50
    images[3::8] = images[3::8, :, :1, :1]
    return torch.from_numpy(images)


def torchvisions(transform, images, seeds):
    """The transform of each image, with torch's global generator seeded for it."""
    results = []
    for image, seed in zip(images, seeds, strict=True):
        torch.manual_seed(int(seed))
        results.append(transform(image))
    return torch.stack(results)


@pytest.mark.parametrize("height, width", [(16, 16), (9, 21)])
@pytest.mark.parametrize("policy", [*AUTO_AUGMENT, *RAND_AUGMENTS], ids=str)
def test_a_batch_has_the_bits_of_torchvisions_transform(policy, height, width):
    """With more images than a policy has pairs of operations, magnitudes and signs, except for TrivialAugment."""
    images = random_images(250, height, width)
    seeds = np.random.default_rng(1).integers(0, 2**64, len(images), dtype=np.uint64)
    if isinstance(policy, tuple):
        transform, flags = v2.RandAugment(*policy), {"rand_augment": policy}
    else:
        trivial = policy == "trivial"
        transform = v2.TrivialAugmentWide() if trivial else v2.AutoAugment(AutoAugmentPolicy(policy))
        flags = {"auto_augment": policy}
    before = images.clone()
    found = apply_policy(images, seeds, **flags)
    assert torch.equal(found, torchvisions(transform, images, seeds))
    assert torch.equal(images, before)
    assert (found != images).flatten(1).any(dim=1).sum() > 15  # at magnitude 0 few operations change anything


@pytest.mark.parametrize("height, width", [(32, 20), (60, 70)])  # below and above SMALL
@pytest.mark.parametrize("name", functions())
def test_an_operation_has_the_bits_of_torchvisions_on_each_image(name, height, width):
    """`_apply_image_or_video_transform` applies the drawn operations in torchvision's transforms."""
    images = random_images(24, height, width, seed=2)
    reference = v2.AutoAugment()
    levels = {**rand_augment_space(height, width, 31), "Invert": None}[name]
    for magnitude in (levels[3], levels[17], levels[30]) if levels else (0.0,):
        found = apply_operations(images, [(name, magnitude)] * len(images))
        arguments = (name, magnitude, reference.interpolation, reference._fill)
        expected = [reference._apply_image_or_video_transform(image, *arguments) for image in images]
        assert torch.equal(found, torch.stack(expected))


def test_an_images_result_does_not_depend_on_its_batch_or_the_global_generator():
    images, seeds = random_images(12, 16, 16), np.arange(12, dtype=np.uint64)
    whole = apply_policy(images, seeds, rand_augment=(2, 9))
    state = torch.get_rng_state()
    parts = [apply_policy(images[rows], seeds[rows], rand_augment=(2, 9)) for rows in (slice(0, 5), slice(5, 12))]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(torch.get_rng_state(), state)
