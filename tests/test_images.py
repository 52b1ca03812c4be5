"""Image files: which are found, how each kind is read, JPEGs decoded at reduced size, how evaluation resizes."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from helpers import photograph, truncate, write_images
from utils.data.images import (
    IMAGE_SUFFIXES,
    ImageFile,
    centre_crop,
    centre_square,
    check_image,
    images_below,
    read_image,
)
from utils.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*decoding and encoding capabilities:DeprecationWarning")


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_each_supported_suffix_is_found_and_read(suffix, tmp_path):
    """Also in capitals; lossless formats give the same pixels."""
    path = tmp_path / f"image{suffix.upper()}"
    pixels = np.array(photograph(20, 30))
    Image.fromarray(pixels).save(path, format=Image.registered_extensions()[suffix])
    assert images_below(tmp_path) == [str(path)]
    found = read_image(path).permute(1, 2, 0).numpy()
    assert found.shape == pixels.shape
    difference = np.abs(found.astype(int) - pixels)
    assert difference.mean() < 10
    if suffix in (".bmp", ".png", ".ppm", ".tif", ".tiff"):
        assert difference.max() == 0


def test_images_are_found_in_subfolders_sorted_and_without_hidden_files(tmp_path):
    for name in ("b/2.png", "a.JPG", "b/1.gif", "b/._1.gif", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [os.path.relpath(path, tmp_path) for path in images_below(tmp_path)] == ["a.JPG", "b/1.gif", "b/2.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty has no images .supported: .bmp, .gif, .jpeg, "):
        images_below(tmp_path / "empty")


def test_checking_an_image_needs_only_a_valid_file(tmp_path):
    [path] = write_images(tmp_path, [(8, 8)])
    check_image(path)
    path.write_text("hello")
    with pytest.raises(UserError, match="000.png is not a readable image: its format is unknown"):
        check_image(path)


def write_unusual_jpeg(kind, path):
    image = photograph(40, 50)
    if kind == "cmyk":
        image.convert("CMYK").save(path, format="JPEG")
    if kind == "grey":
        image.convert("L").save(path, format="JPEG")
    if kind == "png":
        image.save(path, format="PNG")
    if kind == "palette png":
        image.convert("P").save(path, format="PNG")
    if kind == "progressive":
        image.save(path, format="JPEG", progressive=True)
    if kind == "rotated by EXIF":
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(path, format="JPEG", exif=exif)


@pytest.mark.parametrize("kind", ["cmyk", "grey", "png", "palette png", "progressive", "rotated by EXIF"])
def test_unusual_files_named_jpeg_are_read_as_pillow_reads_them(kind, tmp_path):
    path = tmp_path / "1.JPEG"
    write_unusual_jpeg(kind, path)
    with Image.open(path) as image:
        expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    assert expected.shape == (3, 40, 50)
    assert (read_image(path).int() - expected.int()).abs().max() <= 1
    assert ImageFile(path).resized_crop((0, 0, 40, 50), (16, 16)).shape == (3, 16, 16)


def test_images_of_every_mode_become_rgb(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    for mode in ("L", "RGB", "RGBA", "P", "LA", "CMYK", "1"):
        Image.fromarray(grey).convert(mode).save(tmp_path / f"{mode}.tif")
        assert read_image(tmp_path / f"{mode}.tif").shape == (3, 8, 8)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    assert np.array_equal(read_image(tmp_path / "grey16.png"), np.stack([grey] * 3))


def test_a_jpeg_is_decoded_at_reduced_size_where_the_crop_allows(tmp_path):
    path = tmp_path / "1.jpg"
    photograph(427, 640).save(path, quality=95)
    whole = read_image(path)
    for box, out_size, reduction in [
        ((40, 64, 320, 480), (160, 240), 2),
        ((40, 64, 320, 480), (161, 240), 1),
        ((40, 64, 320, 480), (160, 241), 1),
        ((8, 16, 400, 600), (100, 120), 4),
        ((8, 16, 400, 600), (50, 70), 8),
        ((3, 5, 421, 633), (50, 70), 8),
        ((0, 0, 427, 640), (24, 24), 8),
    ]:
        file = ImageFile(path)
        found = file.resized_crop(box, out_size).float()
        assert file.image.width == -(-640 // reduction)  # of Pillow, which stays whole if torchvision decodes
        expected = tv.resized_crop(whole, *box, size=list(out_size), antialias=True).float()
        assert found.shape == (3, *out_size)
        difference = (found - expected).abs().mean().item()
        assert difference == 0 if reduction == 1 else difference < 4.5  # of 255
        shifted = tv.resized_crop(whole, *(np.array(box) + (reduction, reduction, 0, 0)).tolist(), size=list(out_size))
        assert reduction == 1 or difference < (found - shifted.float()).abs().mean()


def test_decoding_at_reduced_size_keeps_edges_and_colours(tmp_path):
    """Of an image without detail, on which no filter has an effect: they are where full decoding has them."""
    ramp = np.linspace(20, 230, 512).astype(np.uint8)
    pixels = np.stack([np.tile(ramp, (512, 1)), np.tile(ramp[:, None], (1, 512)), np.full((512, 512), 99, np.uint8)], 2)
    path = tmp_path / "1.jpg"
    Image.fromarray(pixels).save(path, quality=95, subsampling=0)
    for n in (2, 4, 8):
        box, out_size = (16, 32, 384, 256), (384 // n, 256 // n)
        found = ImageFile(path).resized_crop(box, out_size).float()
        expected = tv.resized_crop(read_image(path), *box, size=list(out_size), antialias=True).float()
        assert (found - expected).abs().max() <= 4
        assert (found - expected).abs().mean() < 0.6


@pytest.mark.parametrize("share", [0.2, 0.6, 0.99])
@pytest.mark.parametrize("out_size", [(16, 16), (100, 100)], ids=["reduced", "whole"])
def test_a_truncated_jpeg_is_an_error_however_it_is_decoded(share, out_size, tmp_path):
    path = tmp_path / "1.jpg"
    photograph(120, 160).save(path, quality=95)
    truncate(path, share)
    with pytest.raises(UserError, match="1.jpg is not a readable image"):
        ImageFile(path).resized_crop((0, 0, 120, 160), out_size)
    with pytest.raises(UserError, match="1.jpg is not a readable image"):
        read_image(path)


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("shape", [(60, 90), (301, 257)])
def test_imagenets_validation_is_torchvisions_resize_and_centre_crop(shape, size):
    image = torch.from_numpy(np.array(photograph(*shape))).permute(2, 0, 1)
    usual = v2.Compose([v2.Resize({32: 37, 224: 256}[size], antialias=True), v2.CenterCrop(size)])
    assert torch.equal(centre_crop(image, (size, size)), usual(image))
    rows, columns = torch.meshgrid(torch.arange(shape[0]), torch.arange(shape[1]), indexing="ij")
    places = torch.stack([rows, columns, rows]).mul(0.8).to(torch.uint8)
    visible = tv.resize(centre_square(places), [size, size], antialias=True)  # drawn by visualize.py
    assert (visible.float() - usual(places).float()).abs().mean() < 0.03 * max(shape)
