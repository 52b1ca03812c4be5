"""Image files: which files are images, how one is read, whole or a crop of it, and how evaluation resizes it."""

import contextlib
import glob
import io
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError

from utils.data.decoder_messages import decoder_messages_discarded, ignore_warnings_of_pillow
from utils.errors import UserError

IMAGE_SUFFIXES = {
    *(".apng", ".bmp", ".dib", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
}
# HEIC photographs, as most phones store them, which neither Pillow nor torchvision decodes.
HEIC_SUFFIXES = {".heic", ".heif", ".hif"}
HEIC_BRANDS = {b"heic", b"heim", b"heis", b"heix", b"hevc", b"hevx", b"mif1", b"msf1"}  # bytes 8 to 11 of the file
CONVERT_HEIC = "convert HEIC to JPEG, e.g. with `magick mogrify -format jpg *.heic`"
SYSTEM_FILES = {"desktop.ini", "thumbs.db"}  # of Windows; those of other systems are hidden files
MAX_KINDS = 5  # kinds of ignored files that are reported one by one
REDUCTIONS = (8, 4, 2)  # factors by which a JPEG can be decoded at a smaller size
VALIDATION_RESIZE = 256 / 224  # size of the shorter side relative to the centre crop of ImageNet's validation
# How an image of each EXIF orientation is turned upright: whether rows and columns are swapped, then the dimensions of
# (3, H, W) that are flipped.
ORIENTATIONS = {
    1: (False, []),
    2: (False, [2]),
    3: (False, [1, 2]),
    4: (False, [1]),
    5: (True, []),
    6: (True, [2]),
    7: (True, [1, 2]),
    8: (True, [1]),
}

ignore_warnings_of_pillow()


def images_of(given):
    """Paths of the images that files, folders and glob patterns name, in the order given.

    What a pattern matches is sorted, and a folder stands for all images below it, except that `**` matches the files
    below a folder itself. Raises UserError for a name without a file and for a folder without images.
    """
    paths = []
    for name in map(os.fspath, given):
        if os.path.isdir(name):
            paths += images_below(name)
        elif os.path.exists(name):
            paths.append(name)
        else:
            found = [match for match in sorted(glob.glob(name, recursive=True)) if os.path.exists(match)]
            found = [match for match in found if "**" not in name or os.path.isfile(match)]
            if not found:
                raise UserError(f"no file matches {name}" if glob.has_magic(name) else f"{name} does not exist")
            paths += images_of(found)
    return paths


def images_below(folder):
    """Sorted paths of the images in `folder` and its subfolders. Prints how many other files there are.

    Raises UserError if there is no image.
    """
    paths, ignored = find_images(folder)
    if ignored:
        print(count_text(folder, len(paths), ignored), file=sys.stderr)
    return paths


def unique_stems(paths):
    """A different start of file names for each path: its folder, which is often the class, its name, and a number."""
    stems = []
    for path in map(Path, paths):
        folder = path.resolve().parent.name
        stem = f"{folder}-{path.stem}" if folder else path.stem
        number = sum(other == stem or other.startswith(f"{stem}~") for other in stems)
        stems.append(f"{stem}~{number + 1}" if number else stem)
    return stems


def find_images(folder):
    """(sorted paths of the images in `folder` and its subfolders, Counter of the other files by suffix).

    Only names are read. Raises UserError if there is no image.
    """
    paths, ignored = [], Counter()
    for place, files in walk(folder):
        for file in files:
            if is_image(file):
                paths.append(os.path.join(place, file))
            elif not is_system_file(file):
                ignored[os.path.splitext(file)[1].lower() or "without suffix"] += 1
    if not paths:
        found = f"; it has {kinds_text(ignored)}{heic_hint(ignored)}" if ignored else ""
        raise UserError(f"{folder} has no images (supported: {', '.join(sorted(IMAGE_SUFFIXES))}){found}")
    return sorted(paths), ignored


def walk(folder):
    """(path, names of the files) of `folder` and of each folder below it, which may be a symbolic link.

    A folder to which several links lead, such as one that contains itself, is visited once. Raises UserError.
    """

    def unreadable(error):
        raise UserError(f"{error.filename} can't be read: {error.strerror}") from error

    top = Path(folder).resolve()
    seen = {str(top), *map(str, top.parents)}
    for place, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        yield place, files
        targets = {name: os.path.realpath(os.path.join(place, name)) for name in sorted(folders)}
        folders.clear()
        for name, target in targets.items():
            if target not in seen:
                seen.add(target)
                folders.append(name)


def is_image(file):
    """Whether a file of this name is read as an image."""
    return os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES and not file.startswith(".")


def is_system_file(file):
    """Whether a file of this name is hidden or written by the operating system, so that nobody misses it."""
    return file.startswith(".") or file.lower() in SYSTEM_FILES


def count_text(folder, num_images, ignored):
    """A line about the files of a folder, of which a Counter of the `ignored` ones is given."""
    kinds = f"{ignored.total()} ({kinds_text(ignored)}){heic_hint(ignored)}"
    return f"{folder}: {num_images} images; files ignored: {kinds}"


def kinds_text(counter):
    """'3 .heic, 2 .txt': HEIC photographs, which somebody misses, then the most common kinds."""
    shown = sorted(counter.most_common(), key=lambda item: item[0] not in HEIC_SUFFIXES)[:MAX_KINDS]
    others = counter.total() - sum(count for _, count in shown)
    return ", ".join([f"{count} {kind}" for kind, count in shown] + [f"{others} others"] * bool(others))


def heic_hint(counter):
    """What to do about the HEIC photographs among the ignored files, if there are any."""
    return f"; {CONVERT_HEIC}" if HEIC_SUFFIXES & counter.keys() else ""


def is_heic(path):
    """Whether a file that can't be decoded is a HEIC photograph, by its name or by its first bytes."""
    with open(path, "rb") as file:
        start = file.read(12)
    return os.path.splitext(path)[1].lower() in HEIC_SUFFIXES or (start[4:8] == b"ftyp" and start[8:] in HEIC_BRANDS)


@contextlib.contextmanager
def errors_name(path):
    """Turn every error inside into a UserError that names the image; the decoders print nothing themselves."""
    try:
        with decoder_messages_discarded():
            yield
    except Exception as error:  # Pillow raises nearly every type for one damaged file or another
        if isinstance(error, FileNotFoundError):
            raise UserError(f"{path} does not exist") from error
        why = " ".join(str(error).split())
        if isinstance(error, UnidentifiedImageError):
            why = f"it is HEIC; {CONVERT_HEIC}" if is_heic(path) else "its format is unknown"
        raise UserError(f"{path} is not a readable image: {why}") from error


def read_image(path):
    """The image as uint8 (3, H, W). Raises UserError."""
    return ImageFile(path).decode()


def check_image(path):
    """Raise UserError if the file is not an image, without decoding all of it."""
    with errors_name(path), Image.open(path) as image:
        image.verify()


def header_size(path):
    """(height, width) that an image file's header states, before its EXIF orientation. Raises UserError."""
    with errors_name(path), Image.open(path) as image:
        return image.size[::-1]


class ImageFile:
    """The bytes of an image file, read once, and its header. All methods raise UserError.

    `size` is (height, width) of the image after its EXIF orientation is applied, as by all methods. A colour JPEG is
    decoded by torchvision: the pixels are Pillow's, without a further copy. Pillow converts everything else, such as
    the grey, CMYK and misnamed PNG files of ImageNet.
    """

    def __init__(self, path):
        self.path = path
        with errors_name(path):
            self.data = np.fromfile(path, dtype=np.uint8)
            self.image = Image.open(io.BytesIO(self.data))
            self.is_colour_jpeg = self.image.format == "JPEG" and self.image.mode == "RGB"
            if not self.is_colour_jpeg:
                self.image.load()  # the EXIF data of a PNG may follow its pixels, and a TIFF's size may change
        self.swapped, self.flips = ORIENTATIONS[orientation(self.image)]
        self.size = self.image.size if self.swapped else self.image.size[::-1]

    def decode(self):
        """The whole image, uint8 (3, H, W)."""
        with errors_name(self.path):
            return self.upright(self.decode_colour_jpeg() if self.is_colour_jpeg else rgb_pixels(self.image))

    def decode_colour_jpeg(self):
        """The pixels as the file stores them, uint8 (3, h, w)."""
        # After an error Pillow tries, which supports more variants and has clearer messages. ImportError, because
        # torchvision 0.29 announces that decoding moves to torchcodec.
        with contextlib.suppress(RuntimeError, ImportError):
            from torchvision.io import decode_jpeg  # as slow an import as its transforms

            return decode_jpeg(torch.from_numpy(self.data), mode="RGB")
        return rgb_pixels(self.image)

    def resized_crop(self, box, out_size):
        """The box (top, left, height, width), resized: uint8 (3, *out_size).

        A colour JPEG is decoded at 1/8, 1/4 or 1/2 of its size if the box still has `out_size` pixels then, which is
        faster. The box then ends at whole pixels of the reduced image.
        """
        top, left, height, width = box
        fits = (n for n in REDUCTIONS if height >= n * out_size[0] and width >= n * out_size[1])
        n = next(fits, None) if self.is_colour_jpeg else None
        if n is None:
            return transforms().functional.resized_crop(self.decode(), *box, size=list(out_size), antialias=True)
        top, left, height, width = self.stored_box(box)
        with errors_name(self.path):
            self.image.draft("RGB", (self.image.width // n, self.image.height // n))
            crop = self.image.crop([round(edge / n) for edge in (left, top, left + width, top + height)])
            crop = torch.from_numpy(np.array(crop)).permute(2, 0, 1)
        return stretch(self.upright(crop), out_size)

    def upright(self, pixels):
        """Turn pixels (3, h, w) as the file stores them."""
        pixels = pixels.mT if self.swapped else pixels
        return pixels.flip(self.flips) if self.flips else pixels

    def stored_box(self, box):
        """Where the file stores a box (top, left, height, width) of the upright image."""
        top, left, height, width = box
        if 1 in self.flips:
            top = self.size[0] - top - height
        if 2 in self.flips:
            left = self.size[1] - left - width
        return (left, top, width, height) if self.swapped else (top, left, height, width)


def orientation(image):
    """The EXIF orientation of an image of Pillow, 1 to 8; damaged EXIF data is ignored."""
    if image.format == "TIFF":
        return 1  # Pillow has turned it
    number = 1
    with contextlib.suppress(Exception):  # of nearly every type
        number = image.getexif().get(ExifTags.Base.Orientation)
    return number if number in ORIENTATIONS else 1


def rgb_pixels(image):
    """The pixels of an image of Pillow as uint8 (3, H, W). Raises ValueError for values that do not fit."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    largest = 1 if image.mode == "F" else 65535  # of grey with more than 8 bits, which Pillow would clip at 255
    values = np.array(image, dtype=np.float64)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= largest):
        raise ValueError(f"its values are {low:g} to {high:g}, not 0 to {largest}; convert it to 8 bits per channel")
    values = np.rint(values * 255) if largest == 1 else values // 256
    return torch.from_numpy(values.astype(np.uint8)).expand(3, -1, -1)


def transforms():
    """torchvision.transforms.v2, a slow import that images in memory do not need."""
    from torchvision.transforms import v2

    return v2


def stretch(image, img_size):
    """Resize a whole image, uint8 (3, H, W), to (3, *img_size); the aspect ratio may change."""
    return transforms().functional.resize(image, list(img_size), antialias=True)


def centre_crop(image, img_size):
    """ImageNet's usual validation: resize the shorter side of uint8 (3, H, W) to 256/224 of `img_size`, then crop."""
    image = transforms().functional.resize(image, [round(max(img_size) * VALIDATION_RESIZE)], antialias=True)
    return transforms().functional.center_crop(image, list(img_size))


def centre_square(image):
    """The part of an image, (3, H, W), that `centre_crop` keeps."""
    return transforms().functional.center_crop(image, [round(min(image.shape[1:]) / VALIDATION_RESIZE)])
