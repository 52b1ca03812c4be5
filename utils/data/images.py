"""Image files: which files are images, how one is read, whole or a crop of it, and how evaluation resizes it."""

import contextlib
import io
import os

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from utils.errors import UserError

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
REDUCTIONS = (8, 4, 2)  # factors by which a JPEG can be decoded at a smaller size
VALIDATION_RESIZE = 256 / 224  # size of the shorter side relative to the centre crop of ImageNet's validation


def images_below(folder):
    """Sorted paths of the images in `folder` and its subfolders. Raises UserError if there is none."""

    def unreadable(error):
        raise UserError(f"{error.filename} can't be read: {error.strerror}") from error

    paths = sorted(
        os.path.join(place, file)
        for place, _, files in os.walk(folder, onerror=unreadable)
        for file in files
        if is_image(file)
    )
    if not paths:
        raise UserError(f"{folder} has no images (supported: {', '.join(sorted(IMAGE_SUFFIXES))})")
    return paths


def is_image(file):
    """Whether a file of this name is read as an image."""
    return os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES and not file.startswith(".")


@contextlib.contextmanager
def errors_name(path):
    """Turn every error inside into a UserError that names the image."""
    try:
        yield
    except Exception as error:  # Pillow raises nearly every type for one damaged file or another
        if isinstance(error, FileNotFoundError):
            raise UserError(f"{path} does not exist") from error
        why = "its format is unknown" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())
        raise UserError(f"{path} is not a readable image: {why}") from error


def read_image(path):
    """The image as uint8 (3, H, W). Raises UserError."""
    return ImageFile(path).decode()


def check_image(path):
    """Raise UserError if the file is not an image, without decoding all of it."""
    with errors_name(path), Image.open(path) as image:
        image.verify()


class ImageFile:
    """The bytes of an image file, read once, and its header. All methods raise UserError.

    A colour JPEG is decoded by torchvision: the pixels are Pillow's, without a further copy. Pillow converts everything
    else, such as the grey, CMYK and misnamed PNG files of ImageNet.
    """

    def __init__(self, path):
        self.path = path
        with errors_name(path):
            self.data = np.fromfile(path, dtype=np.uint8)
            self.image = Image.open(io.BytesIO(self.data))
        self.size = self.image.height, self.image.width
        self.is_colour_jpeg = self.image.format == "JPEG" and self.image.mode == "RGB"

    def decode(self):
        """The whole image, uint8 (3, H, W)."""
        if self.is_colour_jpeg:
            # After an error Pillow tries, which supports more variants and has clearer messages. ImportError, because
            # torchvision 0.29 announces that decoding moves to torchcodec.
            with contextlib.suppress(RuntimeError, ImportError):
                from torchvision.io import decode_jpeg  # as slow an import as its transforms

                return decode_jpeg(torch.from_numpy(self.data), mode="RGB")
        with errors_name(self.path):
            if self.image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
                return torch.from_numpy((np.array(self.image, dtype=np.int64) >> 8).astype(np.uint8)).expand(3, -1, -1)
            return torch.from_numpy(np.array(self.image.convert("RGB"))).permute(2, 0, 1)

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
        with errors_name(self.path):
            self.image.draft("RGB", (self.image.width // n, self.image.height // n))
            crop = self.image.crop([round(edge / n) for edge in (left, top, left + width, top + height)])
            crop = torch.from_numpy(np.array(crop)).permute(2, 0, 1)
        return stretch(crop, out_size)


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
