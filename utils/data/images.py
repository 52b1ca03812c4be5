"""Picture files: which they are, and how one is read, whole or a crop of it."""

import contextlib
import io
import os

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from utils.data.augmentation import stretch, transforms
from utils.errors import UserError

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
REDUCTIONS = (8, 4, 2)  # at which a JPEG is decoded straight from its frequencies


def pictures_below(folder):
    """Sorted paths of the pictures in `folder` and its folders. Raises UserError where there is none."""

    def unreadable(error):
        raise UserError(f"{error.filename} can't be read: {error.strerror}") from error

    paths = sorted(
        os.path.join(place, file)
        for place, _, files in os.walk(folder, onerror=unreadable)
        for file in files
        if is_picture(file)
    )
    if not paths:
        raise UserError(f"{folder} has no pictures (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
    return paths


def is_picture(file):
    """Whether a file of this name is taken for a picture."""
    return os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES and not file.startswith(".")


@contextlib.contextmanager
def named(path):
    """Whatever goes wrong inside is a UserError that names the picture."""
    try:
        yield
    except Exception as error:  # Pillow raises nearly every type for one or the other broken file
        why = "its format is unknown" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())
        raise UserError(f"{path} is not a readable picture: {why}") from error


def read_image(path):
    """uint8 (3, H, W). Raises UserError."""
    return Picture(path).decode()


def check_image(path):
    """Raises UserError where the file is no picture, without decoding all of it."""
    with named(path), Image.open(path) as image:
        image.verify()


class Picture:
    """The bytes of a picture file, read once, and what its header says. All methods raise UserError.

    A JPEG in colour is decoded by torchvision: the same pixels as Pillow's, as a tensor without a further copy. Pillow
    converts whatever else there is, in ImageNet too: grey, CMYK, PNG under another name.
    """

    def __init__(self, path):
        self.path = path
        with named(path):
            self.data = np.fromfile(path, dtype=np.uint8)
            self.image = Image.open(io.BytesIO(self.data))
        self.size = self.image.height, self.image.width
        self.is_colour_jpeg = self.image.format == "JPEG" and self.image.mode == "RGB"

    def decode(self):
        """The whole picture, uint8 (3, H, W)."""
        if self.is_colour_jpeg:
            # After an error Pillow tries, which knows more kinds and tells better what is wrong. ImportError, since
            # torchvision 0.29 announces that decoding goes to torchcodec.
            with contextlib.suppress(RuntimeError, ImportError):
                from torchvision.io import decode_jpeg  # as slow an import as its transforms

                return decode_jpeg(torch.from_numpy(self.data), mode="RGB")
        with named(self.path):
            if self.image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
                return torch.from_numpy((np.array(self.image, dtype=np.int64) >> 8).astype(np.uint8)).expand(3, -1, -1)
            return torch.from_numpy(np.array(self.image.convert("RGB"))).permute(2, 0, 1)

    def resized_crop(self, box, out_size):
        """The box (top, left, height, width) in the size asked for: uint8 (3, *out_size).

        A colour JPEG is decoded at 1/8, 1/4 or 1/2 of its size where the box still has `out_size` pixels then: the
        fewer are made, the faster. The box then ends at whole pixels of the reduced picture.
        """
        top, left, height, width = box
        fits = (n for n in REDUCTIONS if height >= n * out_size[0] and width >= n * out_size[1])
        n = next(fits, None) if self.is_colour_jpeg else None
        if n is None:
            return transforms().functional.resized_crop(self.decode(), *box, size=list(out_size), antialias=True)
        with named(self.path):
            self.image.draft("RGB", (self.image.width // n, self.image.height // n))
            part = self.image.crop([round(edge / n) for edge in (left, top, left + width, top + height)])
            part = torch.from_numpy(np.array(part)).permute(2, 0, 1)
        return stretch(part, out_size)
