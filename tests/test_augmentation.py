"""Crops: their distribution against torchvision's rule, their pixels against torchvision's result."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from utils.data.augmentation import normalise, random_crops, resized_crops


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
    for mine, his in zip((top, left, height, width), theirs, strict=True):
        assert np.quantile(mine, [0.1, 0.5, 0.9]) == pytest.approx(np.quantile(his, [0.1, 0.5, 0.9]), abs=1.01)
        assert mine.mean() == pytest.approx(his.mean(), abs=0.35)
    assert flips.double().mean() == pytest.approx(0.5, abs=0.015)


CROP = v2.RandomResizedCrop(224, scale=(0.2, 1.0))
KEYS = ("top", "left", "height", "width")


def test_images_that_no_ratio_fits_get_the_largest_centred_crop():
    boxes, _ = crops(50, 100, 10, min_scale=0.999)
    assert boxes.unique(dim=0).tolist() == [[43, 0, 13, 10]]


def test_a_sample_keeps_its_crop_whatever_the_batch():
    boxes, flips = crops(10)
    for i in (3, 8):
        box, flip = random_crops(0, np.zeros(1, int), np.array([i]), 10, 32, 32, 0.05)
        assert torch.equal(box[0], boxes[i])
        assert flip[0] == flips[i]
    next_epoch, _ = random_crops(0, np.ones(10, int), np.arange(10), 10, 32, 32, 0.05)
    assert not torch.equal(next_epoch, boxes)


def test_normalisation():
    assert normalise(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]
