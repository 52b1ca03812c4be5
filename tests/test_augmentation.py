"""Crops and RandAugment: torchvision's distribution and pixels, as a function of seed, epoch and sample."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from helpers import CPU, CROPS, folder_images, stream, write_jpegs
from utils.data.augmentation import (
    denormalise,
    normalise,
    rand_augment_bits,
    rand_augmented,
    random_crops,
    resized_crops,
)
from utils.data.images import read_image
from utils.data.loading import TensorImages

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


@pytest.mark.parametrize("kind", ["files", "in memory"])
def test_rand_augment_depends_on_seed_epoch_and_sample_alone(kind, tmp_path):
    paths = write_jpegs(tmp_path, 6)
    augmentation = CROPS._replace(rand_augment=(2, 15))
    if kind == "files":
        sets = [folder_images(paths, workers) for workers in (0, 0, 2)]
    else:
        images = torch.stack([tv.resize(read_image(path), [20, 24], antialias=True) for path in paths])
        sets = [TensorImages(images, range(6), map(str, range(6)), CPU)] * 2
    whole, labels = stream(sets[0], [12], augmentation)  # two epochs
    for data, splits in zip(sets[1:], ([1, 5, 12], [4, 8, 12]), strict=False):
        torch.rand(3)  # other draws have no effect
        images, their_labels = stream(data, splits, augmentation)
        assert torch.equal(images, whole)
        assert torch.equal(labels, their_labels)
    plain, _ = stream(sets[0], [12], CROPS)
    changed = (plain != whole).flatten(1).any(dim=1)
    assert changed.sum() >= 8  # some operations are none
    other, _ = stream(sets[0], [12], augmentation._replace(seed=6))
    assert not torch.equal(other, whole)


def test_rand_augment_is_torchvisions_after_crop_and_flip_and_does_not_change_the_global_generator(tmp_path):
    data = folder_images(write_jpegs(tmp_path, 4))
    plain, labels = stream(data, [4], CROPS)
    found, _ = stream(data, [4], CROPS._replace(rand_augment=(3, 20)))
    bits = rand_augment_bits(5, np.zeros(4, int), labels.numpy(), 4)  # here a label is the sample's index
    for image, own_bits, mine in zip(denormalise(plain), bits, found, strict=True):
        torch.manual_seed(int(own_bits))
        assert torch.equal(normalise(v2.RandAugment(3, 20)(image)), mine)
        state = torch.get_rng_state()
        rand_augmented(image, own_bits, 3, 20)
        assert torch.equal(torch.get_rng_state(), state)
