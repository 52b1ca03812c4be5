"""Random changes of training images: torchvision's and timm's distribution, a function of seed, epoch and sample."""

import random

import numpy as np
import pytest
import torch
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from helpers import CPU, CROPS, folder_images, stream, write_jpegs
from utils.data.augmentation import (
    denormalise,
    erase_boxes,
    jitter_colors,
    normalise,
    random_crops,
    resized_crops,
)
from utils.data.images import read_image
from utils.data.loading import TensorImages
from utils.data.stream import COLOR_JITTER, POLICY, random_bits, random_uniform, samples_at

pytestmark = pytest.mark.filterwarnings("ignore:.*decoding and encoding capabilities:DeprecationWarning")


def crops(count, height=32, width=32, min_scale=0.05, seed=0):
    return random_crops(seed, np.zeros(count, int), np.arange(count), count, height, width, min_scale)


@pytest.mark.parametrize("out_size", [(224, 224), (32, 32), (7, 18)])
def test_pixels_equal_torchvisions_on_the_same_box(out_size):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (32, 3, 24, 40), dtype=np.uint8))
    boxes, flips = crops(32, 24, 40)
    ours = resized_crops(images, boxes, out_size, flips)
    for image, box, flip, mine in zip(images, boxes.tolist(), flips, ours, strict=True):
        exact = tv.resized_crop(image.float(), *box, size=out_size, antialias=True)
        whole_levels = tv.resized_crop(image, *box, size=out_size, antialias=True)
        if flip:
            exact, whole_levels = exact.flip(2), whole_levels.flip(2)
        torch.testing.assert_close(mine, exact, atol=2e-3, rtol=0)  # of 255
        assert (mine.round() - whole_levels).abs().max() <= 1


def test_boxes_lie_inside_and_follow_torchvisions_distribution():
    boxes, flips = crops(20000, 40, 30, min_scale=0.2)
    top, left, height, width = boxes.numpy().T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 40).all()
    assert (left + width <= 30).all()
    torch.manual_seed(0)
    image = torch.empty(3, 40, 30)
    theirs = np.array([v2.RandomResizedCrop.make_params(CROP, [image])[key] for _ in range(4000) for key in KEYS])
    theirs = theirs.reshape(-1, 4).T
    for mine, expected in zip((top, left, height, width), theirs, strict=True):
        assert np.quantile(mine, [0.1, 0.5, 0.9]) == pytest.approx(np.quantile(expected, [0.1, 0.5, 0.9]), abs=1.01)
        assert mine.mean() == pytest.approx(expected.mean(), abs=0.35)
    assert flips.double().mean() == pytest.approx(0.5, abs=0.015)


CROP = v2.RandomResizedCrop(224, scale=(0.2, 1.0))


KEYS = ("top", "left", "height", "width")


def test_images_that_no_ratio_fits_get_the_largest_centred_crop():
    boxes, _ = crops(50, 100, 10, min_scale=0.999)
    assert boxes.unique(dim=0).tolist() == [[43, 0, 13, 10]]


def test_the_crop_of_a_sample_does_not_depend_on_the_batch():
    boxes, flips = crops(10)
    for i in (3, 8):
        box, flip = random_crops(0, np.zeros(1, int), np.array([i]), 10, 32, 32, 0.05)
        assert torch.equal(box[0], boxes[i])
        assert flip[0] == flips[i]
    next_epoch, _ = random_crops(0, np.ones(10, int), np.arange(10), 10, 32, 32, 0.05)
    assert not torch.equal(next_epoch, boxes)


def test_normalised_values_are_between_minus_one_and_one():
    assert normalise(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


def test_mean_and_deviation_are_torchvisions():
    images = torch.arange(256, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    usual = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    torch.testing.assert_close(normalise(images, "imagenet"), usual(images / 255), rtol=1e-6, atol=1e-6)
    floats = images.float()
    torch.testing.assert_close(normalise(floats, "half"), v2.Normalize([0.5] * 3, [0.5] * 3)(floats / 255))
    assert torch.equal(floats, images.float())  # the input is not changed
    for name in ("half", "imagenet"):
        assert torch.equal(denormalise(normalise(images, name), name), images)


ALL_KINDS = [
    {"rand_augment": (2, 15)},
    {"auto_augment": "trivial"},
    {"auto_augment": "imagenet"},
    {"color_jitter": 0.4},
    {"random_erasing": 0.7},
    {"auto_augment": "cifar10", "color_jitter": 0.3, "random_erasing": 0.5, "repeats": 3},
]


@pytest.mark.parametrize("fields", ALL_KINDS, ids=lambda fields: " ".join(map(str, fields.items())))
@pytest.mark.parametrize("kind", ["files", "in memory"])
def test_augmentation_depends_on_seed_epoch_and_sample_alone(kind, fields, tmp_path):
    paths = write_jpegs(tmp_path, 6)
    augmentation = CROPS._replace(**fields)
    if kind == "files":
        sets = [folder_images(paths, workers) for workers in (0, 0, 2)]
    else:
        images = torch.stack([tv.resize(read_image(path), [20, 24], antialias=True) for path in paths])
        sets = [TensorImages(images, range(6), map(str, range(6)), CPU)] * 2
    whole, labels = stream(sets[0], [12], augmentation)  # two epochs
    for data, splits in zip(sets[1:], ([1, 5, 12], [4, 8, 12]), strict=False):
        torch.rand(3)  # other draws have no effect
        state = torch.get_rng_state()
        images, their_labels = stream(data, splits, augmentation)
        assert torch.equal(images, whole)
        assert torch.equal(labels, their_labels)
        if kind == "in memory":  # a DataLoader draws a seed for its workers
            assert torch.equal(torch.get_rng_state(), state)
    plain, _ = stream(sets[0], [12], CROPS._replace(repeats=augmentation.repeats))
    changed = (plain != whole).flatten(1).any(dim=1)
    assert changed.sum() >= 6  # some operations change nothing
    other, _ = stream(sets[0], [12], augmentation._replace(seed=6))
    assert not torch.equal(other, whole)


def test_policy_and_jitter_come_after_crop_and_flip_with_the_bits_of_the_sample(tmp_path):
    """In the workers. The seed of a sample's RandAugment must not change, or earlier runs could not be resumed."""
    data = folder_images(write_jpegs(tmp_path, 4))
    plain, labels = stream(data, [4], CROPS)
    found, _ = stream(data, [4], CROPS._replace(rand_augment=(3, 20)))
    jittered, _ = stream(data, [4], CROPS._replace(rand_augment=(3, 20), color_jitter=0.4))
    samples = labels.numpy()  # in the first epoch; here a label is the sample's index
    assert POLICY == 4
    bits = random_bits(5, POLICY, samples, 1)[:, 0]
    for i, image in enumerate(denormalise(plain)):
        torch.manual_seed(int(bits[i]))
        image = v2.RandAugment(3, 20)(image)
        assert torch.equal(normalise(image), found[i])
        draws = random_uniform(5, COLOR_JITTER, samples[i : i + 1], 4)
        assert torch.equal(normalise(jitter_colors(image[None], 0.4, draws))[0], jittered[i])


CHANGES = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)


@pytest.mark.parametrize("order", range(6))
def test_color_jitter_is_torchvisions_three_changes_in_every_order(order):
    """Up to rounding: each change truncates to whole levels, and a factor of 1.4 enlarges a difference of one."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (8, 3, 9, 13), dtype=np.uint8))
    images[0] = images[0, :1]
    draws = np.random.default_rng(order).random((8, 4))
    draws[:, 3] = (order + 0.5) / 6
    found = jitter_colors(images, 0.4, draws)
    permutation = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)][order]
    for image, factors, mine in zip(images, 0.6 + 0.8 * draws[:, :3], found, strict=True):
        for change in permutation:
            image = CHANGES[change](image, factors[change])
        assert (mine.int() - image.int()).abs().max() <= 3
        assert (mine.int() - image.int()).abs().float().mean() < 0.2
    assert torch.equal(jitter_colors(images, 0.0, draws), images)


def test_color_jitter_does_not_depend_on_the_batch():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (9, 3, 11, 7), dtype=np.uint8))
    draws = np.random.default_rng(1).random((9, 4))
    whole = jitter_colors(images, 0.5, draws)
    assert all(torch.equal(jitter_colors(images[i : i + 1], 0.5, draws[i : i + 1])[0], whole[i]) for i in range(9))


def erased(count, probability, side=32, seed=0):
    """Zeros after random erasing, float32 (count, 3, side, side)."""
    images = torch.zeros(count, 3, side, side)
    erase_boxes(images, seed, np.arange(count), probability)
    return images


def erased_boxes(images):
    """(height, width) of the box of each image that has one."""
    covered = (images != 0).any(dim=1)
    sizes = torch.stack([covered.any(dim=2).sum(dim=1), covered.any(dim=1).sum(dim=1)], dim=1)
    assert torch.equal(covered.sum(dim=(1, 2)), sizes.prod(dim=1))  # one rectangle, all of it erased
    return sizes[sizes[:, 0] > 0].double()


def test_random_erasing_has_the_boxes_of_timm_and_gaussian_noise():
    images = erased(4000, 0.25)
    mine = erased_boxes(images)
    assert len(mine) / 4000 == pytest.approx(0.25, abs=0.025)
    random.seed(0)
    torch.manual_seed(0)
    transform = RandomErasing(probability=1, mode="pixel", device="cpu")
    theirs = erased_boxes(torch.stack([transform(torch.zeros(3, 32, 32)) for _ in range(1000)]))
    mine = erased_boxes(erased(1000, 1.0))
    for function in (lambda sizes: sizes, lambda sizes: sizes.prod(dim=1) / 32, lambda sizes: sizes.log()):
        assert (function(mine).mean(dim=0) - function(theirs).mean(dim=0)).abs().max() < 0.6
        assert (function(mine).std(dim=0) / function(theirs).std(dim=0) - 1).abs().max() < 0.1
    noise = images[images != 0]
    assert noise.mean() == pytest.approx(0, abs=0.01)
    assert noise.std() == pytest.approx(1, abs=0.01)
    assert torch.equal(erased(50, 0.0), torch.zeros(50, 3, 32, 32))


def test_random_erasing_comes_last_and_is_a_function_of_the_sample():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 3, 16, 16), dtype=np.uint8)
    data = TensorImages(pixels, range(40), map(str, range(40)), CPU)
    plain, labels = stream(data, [40], CROPS)
    found, _ = stream(data, [40], CROPS._replace(random_erasing=0.5))
    expected = plain.clone()
    erase_boxes(expected, 5, labels.numpy(), 0.5)  # here a label is the sample's index
    assert torch.equal(found, expected)
    parts = plain.clone()
    for row in range(40):
        erase_boxes(parts[row : row + 1], 5, labels[row : row + 1].numpy(), 0.5)
    assert torch.equal(parts, expected)
    assert 10 <= (found != plain).flatten(1).any(dim=1).sum() <= 30


def test_repeated_samples_have_different_crops():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 3, 16, 16), dtype=np.uint8)
    data = TensorImages(pixels, range(8), map(str, range(8)), CPU)
    images, labels = stream(data, [16], CROPS._replace(repeats=3))  # two epochs
    assert labels[:6].tolist() == labels[:2].tolist() * 3
    assert len(images.unique(dim=0)) == 16
    _, indices = samples_at(5, np.arange(16), 8, 3)
    assert labels.tolist() == indices.tolist()
