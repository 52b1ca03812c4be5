"""--resize_size and --crop_padding: torchvision's Resize and RandomCrop, a function of seed, epoch and sample."""

import json

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as tv

import train
from helpers import CPU, CROPS, folder_images, load_data, photograph, run_dir, stream, write_images
from utils.data.augmentation import Augmentation, denormalise
from utils.data.crops import bordered, crops_of_resized, random_corners
from utils.data.images import read_image
from utils.data.loading import TensorImages
from utils.data.stream import samples_at
from utils.training import train_step

pytestmark = pytest.mark.filterwarnings("ignore:.*decoding and encoding capabilities:DeprecationWarning")
BIT = CROPS._replace(resize_size=20)  # for the 16x16 pixels of CROPS
PADDED = CROPS._replace(crop_padding=3)


def reference(image, sample, num_samples, augmentation=BIT):
    """The crop of one image by torchvision, at the corner and with the flip of the sample (epoch, index)."""
    size = augmentation.img_size
    if augmentation.crop_padding:
        larger = torch.nn.functional.pad(tv.resize(image, size, antialias=True), [3] * 4, mode="reflect")
    else:
        larger = tv.resize(image, [augmentation.resize_size] * 2, antialias=True)
    epochs, indices = (np.array([number]) for number in sample)
    corners, flips = random_corners(augmentation.seed, epochs, indices, num_samples, larger.shape[1:], size)
    cropped = tv.crop(larger, *corners[0].tolist(), *size)
    return cropped.flip(2) if flips[0] else cropped


@pytest.mark.parametrize("side, out_size", [(20, (16, 16)), (64, (50, 64)), (9, (9, 5))])
def test_pixels_equal_torchvisions_resize_and_crop(side, out_size):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (32, 3, 24, 40), dtype=np.uint8))
    corners, flips = random_corners(3, np.zeros(32, int), np.arange(32), 32, (side, side), out_size)
    ours = crops_of_resized(images, (side, side), corners, out_size, flips)
    assert ours.shape == (32, 3, *out_size)
    assert 0 < flips.sum() < 32
    for image, corner, flip, mine in zip(images, corners.tolist(), flips, ours, strict=True):
        theirs = tv.crop(tv.resize(image.float(), [side, side], antialias=True), *corner, *out_size)
        torch.testing.assert_close(mine, theirs.flip(2) if flip else theirs, atol=2e-3, rtol=0)  # of 255
    unflipped = crops_of_resized(images, (side, side), corners, out_size)
    torch.testing.assert_close(unflipped[flips], ours[flips].flip(3))


def test_all_positions_are_equally_likely():
    corners, flips = random_corners(0, np.zeros(30000, int), np.arange(30000), 30000, (12, 12), (10, 8))
    counts = np.zeros((3, 5))
    np.add.at(counts, tuple(corners.numpy().T), 1)
    assert counts == pytest.approx(np.full((3, 5), 2000), abs=200)  # 4.6 standard deviations
    assert flips.double().mean() == pytest.approx(0.5, abs=0.015)
    assert abs(np.corrcoef(corners[:, 1], flips)[0, 1]) < 0.03


def test_a_square_of_the_input_size_is_not_cropped():
    corners, _ = random_corners(0, np.zeros(50, int), np.arange(50), 50, (16, 16), (16, 16))
    assert not corners.any()


@pytest.mark.parametrize("size, border", [(5, 1), (5, 4), (32, 4)])
def test_a_border_mirrors_the_image_as_torchs_padding_does(size, border):
    rows = torch.arange(size, dtype=torch.float32)
    padded = torch.nn.functional.pad(rows.view(1, 1, size), (border, border), mode="reflect")
    assert bordered(size, border).tolist() == padded.flatten().tolist()


@pytest.mark.parametrize("augmentation", [BIT, PADDED])
def test_a_sample_in_memory_depends_on_seed_epoch_and_index_only(augmentation):
    pixels = np.random.default_rng(1).integers(0, 256, (10, 3, 24, 40), dtype=np.uint8)
    data = TensorImages(pixels, np.arange(10), map(str, range(10)), CPU)
    images, labels = stream(data, [25], augmentation)
    again, _ = stream(data, [3, 17, 25], augmentation)
    assert torch.equal(images, again)
    epochs, indices = samples_at(augmentation.seed, np.arange(25), 10)
    assert labels.tolist() == indices.tolist()
    for image, *sample in zip(denormalise(images), epochs, indices, strict=True):
        theirs = reference(torch.from_numpy(pixels[sample[1]]), sample, 10, augmentation)
        assert (image.int() - theirs.int()).abs().max() <= 1  # rounded once instead of twice
    assert not torch.equal(images, stream(data, [25], augmentation._replace(seed=6))[0])


@pytest.mark.parametrize("augmentation", [BIT, PADDED])
@pytest.mark.parametrize("workers", [0, 2])
def test_image_files_equal_torchvisions_pixels(workers, augmentation, tmp_path):
    paths = write_images(tmp_path, [(20 + 5 * i, 60 - 6 * i) for i in range(7)])
    images, labels = stream(folder_images(paths, workers), [5, 14], augmentation)
    epochs, _ = samples_at(augmentation.seed, np.arange(14), 7)
    for image, epoch, label in zip(denormalise(images), epochs, labels.tolist(), strict=True):
        assert torch.equal(image, reference(read_image(paths[label]), (epoch, label), 7, augmentation))


def test_a_large_jpeg_that_is_decoded_at_reduced_size_is_nearly_the_same(tmp_path):
    paths = [tmp_path / f"{i}.jpg" for i in range(2)]
    for path in paths:
        photograph(200, 300).save(path, quality=95)
    large = BIT._replace(resize_size=40, img_size=(32, 32))
    images, labels = stream(folder_images(paths), [4], large)
    epochs, _ = samples_at(BIT.seed, np.arange(4), 2)
    for image, epoch, label in zip(denormalise(images), epochs, labels.tolist(), strict=True):
        theirs = reference(read_image(paths[label]), (epoch, label), 2, large)
        assert (image.int() - theirs.int()).abs().float().mean() < 3  # of 255


@pytest.mark.parametrize("flag, value", [("resize_size", 10), ("crop_padding", 2)])
def test_the_flag_reaches_the_training(flag, value, tiny_flags, run_main, monkeypatch):
    seen = []
    monkeypatch.setattr("utils.training.train_step", record_augmentation(seen, flag, value))
    run_main(train, *tiny_flags(f"--{flag}", value, "--num_steps", 1, "--horizontal_flip", "false"))
    assert seen == [value]
    flags = json.loads((run_dir(tiny_flags()) / "config.json").read_text())["flags"]
    assert (flags[flag], flags["horizontal_flip"]) == (value, False)


def record_augmentation(seen, flag, value):
    """A `train_step` that compares its images with those of the flag, whose value it then appends."""
    expected, _ = stream(load_data("digits", "train"), [16], Augmentation(42, (8, 8), 0.05, False, **{flag: value}))

    def step(run, batches):
        batch = next(batches)
        assert torch.equal(batch.images, expected)
        seen.append(getattr(run.args, flag))
        return train_step(run, iter([batch]))

    return step


def test_a_square_smaller_than_the_input_is_an_error(tiny_flags, main_fails):
    message = main_fails(train, *tiny_flags("--resize_size", 7))
    assert "--resize_size 7 is smaller than --img_size 8, the part that is taken of it" in message


def test_a_border_of_the_images_size_or_a_second_rule_is_an_error(tiny_flags, main_fails):
    message = main_fails(train, *tiny_flags("--crop_padding", 8))
    assert "--crop_padding 8 is not smaller than --img_size 8: more pixels than the image has" in message
    message = main_fails(train, *tiny_flags("--crop_padding", 2, "--resize_size", 10))
    assert "--resize_size and --crop_padding exclude each other" in message
