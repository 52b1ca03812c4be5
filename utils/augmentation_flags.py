"""Flags of the augmentation: crop and flip, and what changes the pixels after them."""

from utils.data.policies import AUTO_AUGMENT, MAX_MAGNITUDE
from utils.flag_types import natural, one_of, positive, probability, share, switch


def add_crop_flags(group):
    """The random crop and flip of training images."""
    group.add_argument(
        "--min_crop_scale",
        type=share,
        default=0.05,
        metavar="SHARE",
        help="The smallest random crop as a fraction of the image's area. With 1 a crop only changes the aspect ratio.",
    )
    group.add_argument(
        "--resize_size",
        type=positive,
        metavar="PIXELS",
        help="In place of the crops of --min_crop_scale, resize training images to a square of this side and take a "
        "random part of --img_size, as BiT does, for example 512 for 480; default: none.",
    )
    group.add_argument(
        "--crop_padding",
        type=positive,
        metavar="PIXELS",
        help="In place of the crops of --min_crop_scale, resize training images to --img_size, mirror this many pixels "
        "at each border, and take a random part of --img_size, for example 4 for 32; default: none.",
    )
    group.add_argument(
        "--horizontal_flip",
        type=switch,
        nargs="?",
        const=True,
        default=False,
        metavar="true|false",
        help="Mirror half of the training images; false is for a --recipe that would mirror digits or text.",
    )


def add_augmentation_flags(group):
    """What changes training images after crop and flip, and how often an epoch repeats them."""
    group.add_argument(
        "--rand_augment",
        type=natural,
        nargs=2,
        metavar=("N", "M"),
        help=f"torchvision's RandAugment after crop and flip: N operations of magnitude M, at most {MAX_MAGNITUDE}, "
        "for example 2 9; default: none.",
    )
    group.add_argument(
        "--auto_augment",
        type=one_of("policy", AUTO_AUGMENT),
        metavar="NAME",
        help="In place of --rand_augment: trivial, which is torchvision's TrivialAugmentWide, or AutoAugment's policy "
        "for imagenet, cifar10 or svhn; default: none.",
    )
    group.add_argument(
        "--color_jitter",
        type=probability,
        default=0.0,
        metavar="X",
        help="Multiply brightness, contrast and saturation by random factors from 1 - X to 1 + X.",
    )
    group.add_argument(
        "--random_erasing",
        type=probability,
        default=0.0,
        metavar="P",
        help="The probability that a random box of a normalised training image is replaced by Gaussian noise.",
    )
    group.add_argument(
        "--repeated_augmentation",
        type=positive,
        default=1,
        metavar="N",
        help="Take each sample of an epoch N times, with different augmentation. The number of images of an epoch "
        "stays the same, so an epoch contains 1/N of the training set.",
    )
