"""Image files: which are found, how each kind is read, JPEGs decoded at reduced size, how evaluation resizes."""

import json
import os
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.io import decode_jpeg
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

import evaluate
import visualize
from helpers import damage_jpeg, folder_images, photograph, script, truncate, write_images, write_jpegs, write_run
from utils.data.augmentation import Augmentation
from utils.data.decoder_messages import decoder_messages_discarded
from utils.data.images import (
    IMAGE_SUFFIXES,
    ImageFile,
    centre_crop,
    centre_square,
    check_image,
    find_images,
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
    if suffix not in (".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".webp"):
        assert difference.max() == 0


def test_images_are_found_in_subfolders_sorted_and_without_hidden_files(tmp_path):
    for name in ("b/2.png", "a.JPG", "b/1.gif", "b/._1.gif", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [os.path.relpath(path, tmp_path) for path in images_below(tmp_path)] == ["a.JPG", "b/1.gif", "b/2.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty has no images .supported: .apng, .bmp, .dib, .gif, .*, .webp.$"):
        images_below(tmp_path / "empty")
    (tmp_path / "empty" / "1.HEIC").touch()
    with pytest.raises(
        UserError, match="empty has no images .*; it has 1 .heic; convert HEIC to JPEG, e.g. with .magick"
    ):
        images_below(tmp_path / "empty")


def test_ignored_files_are_counted_but_not_those_of_the_system(tmp_path, capsys):
    names = ["1.jpg", "2.heic", "3.HEIC", "sub/4.heic", "a.txt", "b.TXT", "README", "x.avif", "y.mp4", "z.svg", "w.csv"]
    for name in [*names, ".DS_Store", "Thumbs.db", "desktop.ini", "._1.jpg", ".hidden"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert len(images_below(tmp_path)) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"{tmp_path}: 1 images; files ignored: 10 (3 .heic, 2 .txt, 1 ")
    assert printed.err.count(", 1 ") == 3
    assert ", 2 others); convert HEIC to JPEG, e.g. with `magick mogrify -format jpg *.heic`\n" in printed.err
    write_images(tmp_path / "clean", [(8, 8)])
    images_below(tmp_path / "clean")
    assert capsys.readouterr().err == ""


def test_heic_photographs_are_named_even_if_other_kinds_are_more_common(tmp_path, capsys):
    write_images(tmp_path, [(8, 8)])
    for suffix in "abcdef":
        for number in range(2):
            (tmp_path / f"{number}.{suffix}").touch()
    images_below(tmp_path)
    assert "HEIC" not in capsys.readouterr().err
    (tmp_path / "1.HEIF").touch()
    images_below(tmp_path)
    assert "files ignored: 13 (1 .heif, 2 ." in (printed := capsys.readouterr().err)
    assert printed.endswith(", 4 others); convert HEIC to JPEG, e.g. with `magick mogrify -format jpg *.heic`\n")


HEIC_START = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"  # the first bytes of an iPhone's photographs


@pytest.mark.parametrize("name, content", [("1.HEIC", b""), ("1.jpg", HEIC_START), ("1.heif", HEIC_START)])
def test_a_heic_photograph_is_named_as_such_by_its_suffix_or_its_content(name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(content + bytes(40 if content else 0))
    message = f"{name} is not a readable image: it is HEIC; convert HEIC to JPEG, e.g. with .magick mogrify"
    for read in (read_image, check_image):
        with pytest.raises(UserError, match=message):
            read(path)


def test_a_jpeg_with_the_suffix_of_heic_is_read(tmp_path):
    photograph(20, 30).save(tmp_path / "1.heic", format="JPEG")
    assert read_image(tmp_path / "1.heic").shape == (3, 20, 30)


def test_scripts_that_are_given_a_heic_photograph_end_with_one_line(tmp_path, main_fails):
    _, weights = write_run(tmp_path / "run")
    path = tmp_path / "cat.heic"
    path.write_bytes(HEIC_START)
    assert "it is HEIC; convert HEIC" in main_fails(evaluate, "--checkpoint", weights, path)
    assert "it is HEIC; convert HEIC" in main_fails(visualize, "--checkpoint", weights, "--image", path)


def test_linked_folders_are_followed_once(tmp_path):
    """Links to a folder elsewhere, to one that is found anyway, to the folder itself and to one above it."""
    [image] = write_images(tmp_path / "elsewhere" / "deep", [(8, 8)])
    [own] = write_images(tmp_path / "class" / "own", [(8, 8)])
    (tmp_path / "class" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "class" / "linked too").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "class" / "own" / "loop").symlink_to(tmp_path / "class")
    (tmp_path / "class" / "own" / "up").symlink_to(tmp_path)
    (tmp_path / "elsewhere" / "deep" / "loop").symlink_to(tmp_path / "elsewhere")
    paths, ignored = find_images(tmp_path / "class")
    assert [os.path.realpath(path) for path in paths] == [str(image), str(own)]
    assert not ignored
    (tmp_path / "class itself").symlink_to(tmp_path / "class")
    assert len(images_below(tmp_path / "class itself")) == 2


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


@pytest.mark.parametrize("kind", ["cmyk", "grey", "png", "palette png", "progressive"])
def test_unusual_files_named_jpeg_are_read_as_pillow_reads_them(kind, tmp_path):
    path = tmp_path / "1.JPEG"
    write_unusual_jpeg(kind, path)
    with Image.open(path) as image:
        expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    assert expected.shape == (3, 40, 50)
    assert (read_image(path).int() - expected.int()).abs().max() <= 1
    assert ImageFile(path).resized_crop((0, 0, 40, 50), (16, 16)).shape == (3, 16, 16)


GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
COLOURS = np.stack([GREY, GREY[::-1], 255 - GREY], axis=2)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "LA", "PA", "CMYK", "YCbCr", "LAB", "1"])
def test_images_of_every_mode_become_rgb_as_pillow_converts_them(mode, tmp_path):
    path = tmp_path / "1.tif"
    Image.fromarray(COLOURS).convert("RGBA" if mode == "PA" else "RGB").convert(mode).save(path)
    with Image.open(path) as image:
        assert image.mode == mode
        expected = np.array(image.convert("RGB"))
    assert expected.std() > 0
    assert np.array_equal(read_image(path).permute(1, 2, 0), expected)


@pytest.mark.parametrize("transparency", [3, bytes(range(200))], ids=["one colour", "each colour"])
def test_transparent_colours_of_a_palette_are_opaque(transparency, tmp_path):
    image = Image.fromarray(COLOURS).convert("P")
    image.save(tmp_path / "1.png", transparency=transparency)
    assert np.array_equal(read_image(tmp_path / "1.png").permute(1, 2, 0), image.convert("RGB"))


def write_deep(kind, path):
    """GREY, or COLOURS, as a file with more than 8 bits per channel."""
    grey, big_endian = GREY.astype(np.uint16) * 257, ">u2"
    if kind == "float":
        Image.fromarray((GREY / np.float32(255)).astype(np.float32)).save(path, format="TIFF")
    elif kind == "I;16B":
        Image.frombytes("I;16B", (8, 8), grey.astype(big_endian).tobytes()).save(path, format="TIFF")
    elif kind == "32 bits":
        Image.fromarray(grey.astype(np.int32)).save(path, format="TIFF")
    elif kind == "pgm":
        path.write_bytes(b"P5 8 8 65535\n" + grey.astype(big_endian).tobytes())
    elif kind == "rgb png":
        rows = (COLOURS.astype(np.uint16) * 257).astype(big_endian)
        header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
        pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
        chunks = [
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
            for name, body in ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
        ]
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    else:
        Image.fromarray(grey).save(path, format=kind)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "I;16B", "pgm", "32 bits", "float", "rgb png"])
def test_files_of_more_than_8_bits_keep_their_brightness(kind, tmp_path):
    write_deep(kind, tmp_path / "1.png")
    expected = COLOURS if kind == "rgb png" else np.stack([GREY] * 3, axis=2)
    assert np.array_equal(read_image(tmp_path / "1.png").permute(1, 2, 0), expected)


@pytest.mark.parametrize(
    "values, message",
    [
        (GREY.astype(np.float32), "its values are 0 to 252, not 0 to 1; convert it to 8 bits per channel"),
        (GREY.astype(np.float32) / 252 - 0.5, "its values are -0.5 to 0.5, not 0 to 1; convert"),
        (np.full((8, 8), np.nan, np.float32), "its values are nan to nan, not 0 to 1; convert"),
        (GREY.astype(np.int32) * 1000, "its values are 0 to 252000, not 0 to 65535; convert"),
        (-GREY.astype(np.int32), "its values are -252 to 0, not 0 to 65535; convert"),
    ],
    ids=["0 to 252", "negative", "NaN", "32 bits", "negative integers"],
)
def test_values_in_an_unknown_range_are_an_error(values, message, tmp_path):
    Image.fromarray(values).save(tmp_path / "1.tif")
    with pytest.raises(UserError, match=f"1.tif is not a readable image: {message}"):
        read_image(tmp_path / "1.tif")


STORED_AS = {  # how an upright image is stored for each EXIF orientation: the inverse of what a viewer does
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def write_oriented(image, orientation, path, **options):
    """Store an upright image of Pillow so that viewers turn it back by its EXIF orientation, 1 to 8."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = image.transpose(STORED_AS[orientation]) if orientation in STORED_AS else image
    stored.save(path, exif=exif, **options)


ORIENTED = {
    "JPEG": {"format": "JPEG", "quality": 95},
    "grey JPEG": {"format": "JPEG", "quality": 95},
    "MPO": {"format": "MPO", "quality": 95, "save_all": True, "append_images": [Image.new("RGB", (8, 8))]},
    "PNG": {"format": "PNG"},
    "WebP": {"format": "WEBP", "lossless": True},
    "TIFF": {"format": "TIFF"},
    "compressed TIFF": {"format": "TIFF", "compression": "tiff_lzw"},
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ORIENTED)
def test_exif_orientation_is_applied_once(kind, orientation, tmp_path):
    """By `decode` and by `resized_crop`, compared with Pillow and with the upright image."""
    path, upright = tmp_path / "1.jpg", photograph(48, 64).convert("L" if kind == "grey JPEG" else "RGB")
    write_oriented(upright, orientation, path, **ORIENTED[kind])
    found = read_image(path)
    with Image.open(path) as image:
        assert image.format == ORIENTED[kind]["format"]
        expected = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    assert ImageFile(path).size == found.shape[1:] == (48, 64)
    assert np.array_equal(found.permute(1, 2, 0), expected)
    difference = np.abs(expected.astype(int) - np.array(upright.convert("RGB")))
    assert difference.mean() < 8 if "JPEG" in kind or kind == "MPO" else difference.max() == 0
    box = (4, 8, 30, 40)
    crop = tv.resized_crop(found.contiguous(), *box, size=[25, 20], antialias=True)
    assert torch.equal(ImageFile(path).resized_crop(box, (25, 20)), crop)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("n", [2, 4, 8])
def test_exif_orientation_is_applied_to_a_jpeg_of_reduced_size(n, orientation, tmp_path):
    path, size, box = tmp_path / "1.jpg", (128, 192), (16, 48, 64, 128)
    write_oriented(photograph(*size), orientation, path, quality=95)
    found = ImageFile(path).resized_crop(box, (64 // n, 128 // n))
    with Image.open(path) as image:
        image.draft("RGB", (image.width // n, image.height // n))
        reduced = torch.from_numpy(np.array(ImageOps.exif_transpose(image))).permute(2, 0, 1)
    assert reduced.shape[1:] == (size[0] // n, size[1] // n)
    top, left, height, width = (edge // n for edge in box)
    assert torch.equal(found, reduced[:, top : top + height, left : left + width])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_crop_of_reduced_size_is_where_it_is_in_the_upright_image(orientation, tmp_path):
    """Of an image whose sides are no multiples of 8."""
    path, box = tmp_path / "1.jpg", (13, 42, 321, 483)
    write_oriented(photograph(427, 637), orientation, path, quality=95)
    found, whole = ImageFile(path).resized_crop(box, (150, 220)).float(), read_image(path)
    distances = {
        shift: (found - tv.resized_crop(whole, *np.add(box, (*shift, 0, 0)).tolist(), size=[150, 220])).abs().mean()
        for shift in ((0, 0), (3, 0), (-3, 0), (0, 3), (0, -3))
    }
    assert min(distances, key=distances.get) == (0, 0)


@pytest.mark.parametrize("exif", [b"Exif\0\0damaged", b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01", b""])
def test_damaged_exif_data_is_ignored(exif, tmp_path):
    photograph(20, 30).save(tmp_path / "1.jpg", exif=exif)
    photograph(20, 30).save(tmp_path / "plain.jpg")
    assert torch.equal(read_image(tmp_path / "1.jpg"), read_image(tmp_path / "plain.jpg"))


@pytest.mark.parametrize("orientation", [0, 9, 400])
def test_an_unknown_exif_orientation_is_ignored(orientation, tmp_path):
    write_oriented(photograph(20, 30), orientation, tmp_path / "1.jpg")
    assert read_image(tmp_path / "1.jpg").shape == (3, 20, 30)


def test_evaluate_turns_single_images_upright(tmp_path, run_main):
    _, weights = write_run(tmp_path / "run")
    upright = photograph(40, 60)
    upright.save(tmp_path / "upright.png")
    paths = [tmp_path / name for name in ("upright.png", "turned.png", "lying.png")]
    write_oriented(upright, 6, paths[1])
    upright.rotate(90, expand=True).save(paths[2])
    same, turned, lying = json.loads(run_main(evaluate, "--checkpoint", weights, *paths, "--json"))
    assert turned["classes"] == same["classes"] != lying["classes"]


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


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="only on Linux")
def test_a_damaged_jpeg_prints_nothing_of_the_decoder(tmp_path, capfd):
    """Neither one that is decoded nevertheless nor one that is an error; read here or by a worker."""
    paths = write_jpegs(tmp_path, 2)
    damage_jpeg(paths[0], surplus=True)
    damage_jpeg(paths[1])
    with pytest.raises(RuntimeError):
        decode_jpeg(torch.from_numpy(np.fromfile(paths[1], dtype=np.uint8)))
    decode_jpeg(torch.from_numpy(np.fromfile(paths[0], dtype=np.uint8)))
    assert capfd.readouterr().err.count("Corrupt JPEG data") == 2  # what is to be discarded
    read_image(paths[0])
    with pytest.raises(UserError, match="001.JPEG is not a readable image: broken data stream"):
        read_image(paths[1])
    assert capfd.readouterr().err == ""
    data = folder_images(paths, workers=1, skip_broken=True)
    next(data.train_batches([np.arange(2)], Augmentation(0, (40, 40), 0.9, False)))
    error = capfd.readouterr().err
    assert error.startswith(f"skipped: {paths[1]} is not a readable image")
    assert error.count("\n") == 1


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="only on Linux")
def test_other_output_is_passed_on_while_decoder_messages_are_discarded(capfd):
    with pytest.raises(ValueError, match="^error$"), decoder_messages_discarded():
        os.write(2, b"Corrupt JPEG data: 3 extraneous bytes before marker 0xd9\nsomething else\n")
        print("a signal", file=sys.__stderr__, flush=True)
        os.write(2, b"LZWDecode: Not enough data at scanline 0 (short 5 bytes).\n")
        raise ValueError("error")
    with decoder_messages_discarded():
        os.write(2, b"again\n")
    os.write(2, b"after it\n")
    assert capfd.readouterr().err == "something else\na signal\nagain\nafter it\n"


@pytest.mark.slow
def test_warnings_of_pillow_are_not_printed(tmp_path):
    """In a new process, because pytest sets its own filters."""
    photograph(20, 30).save(tmp_path / "1.tif", compression="tiff_lzw")
    truncate(tmp_path / "1.tif")
    Image.fromarray(COLOURS).convert("P").save(tmp_path / "2.png", transparency=bytes(range(200)))
    names = [str(tmp_path / name) for name in ("2.png", "1.tif")]
    code = "from utils.data.images import read_image\nfor path in {}: read_image(path)"
    error = script("-c", code.format(names)).stderr
    assert "1.tif is not a readable image" in error
    assert "Warning" not in error


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
