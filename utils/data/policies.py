"""RandAugment, TrivialAugment and AutoAugment for a batch, with the draws and the pixels of torchvision's transforms.

torchvision draws and applies the operations image by image. Here a sample's draws are those of torchvision's transform
with the sample's own seed. Each operation is then applied at once to all images that drew it with the same magnitude.
The operations that move the pixels of small images are all applied at once.
"""

import functools
import itertools
import math

import torch
import torch.nn.functional as F

from utils.data.images import transforms
from utils.parallel.devices import to_device

MAX_MAGNITUDE = 30  # of RandAugment and TrivialAugment, on RandAugment's scale
AUTO_AUGMENT = ("trivial", "imagenet", "cifar10", "svhn")
MOVES = frozenset({"ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"})
SIGNED = MOVES | {"Brightness", "Color", "Contrast", "Sharpness"}
SMALL = 64 * 64  # pixels of an image up to which the calls cost more time than the pixels


def apply_policy(images, seeds, rand_augment=None, auto_augment=None):
    """uint8 images (B, 3, H, W) -> the same, augmented by torchvision's RandAugment or the policy of this name.

    `seeds`, uint64 (B,), seed the draws of each image; `rand_augment` is (operations per image, magnitude) or None,
    `auto_augment` a name in AUTO_AUGMENT.
    """
    height, width = images.shape[2:]
    if rand_augment:
        draw = functools.partial(draw_rand_augment, height, width, *rand_augment)
    elif auto_augment == "trivial":
        draw = functools.partial(draw_trivial_augment, height, width)
    else:
        draw = functools.partial(draw_auto_augment, height, width, auto_augment)
    drawn = [list(draw(Draws(seed))) for seed in seeds]
    for operations in itertools.zip_longest(*drawn, fillvalue=("Identity", 0.0)):
        images = apply_operations(images, operations)
    return images


class Draws:
    """The random numbers of torchvision's transforms, from a generator with this seed."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(int(seed))

    def below(self, count):
        """A whole number from 0 to count - 1."""
        return int(torch.randint(count, (), generator=self.generator))

    def chance(self, probability):
        """True with this probability."""
        return bool(torch.rand((), generator=self.generator) <= probability)

    def magnitude(self, name, magnitudes, index):
        """The magnitude at this index, with a random sign if the operation has one."""
        return -magnitudes[index] if name in SIGNED and self.chance(0.5) else magnitudes[index]


def draw_rand_augment(height, width, count, magnitude, draws):
    """Yield `count` pairs (operation, magnitude)."""
    space = rand_augment_space(height, width, MAX_MAGNITUDE + 1)
    for _ in range(count):
        name = list(space)[draws.below(len(space))]
        yield name, draws.magnitude(name, space[name], magnitude) if space[name] else 0.0


def draw_trivial_augment(_height, _width, draws):
    """Yield one pair (operation, magnitude)."""
    space = wide_space()
    name = list(space)[draws.below(len(space))]
    yield name, draws.magnitude(name, space[name], draws.below(MAX_MAGNITUDE + 1)) if space[name] else 0.0


def draw_auto_augment(height, width, policy, draws):
    """Yield up to two pairs (operation, magnitude)."""
    space = rand_augment_space(height, width, bins=10)
    pairs = auto_augment_pairs(policy)
    for name, probability, index in pairs[draws.below(len(pairs))]:
        if draws.chance(probability):
            yield name, 0.0 if index is None else draws.magnitude(name, space[name], index)


@functools.cache
def auto_augment_pairs(policy):
    """torchvision's pairs of (operation, probability, index of its magnitude or None)."""
    from torchvision.transforms import AutoAugment, AutoAugmentPolicy

    return AutoAugment(AutoAugmentPolicy(policy)).policies


@functools.cache
def rand_augment_space(height, width, bins):
    """The operations of RandAugment and AutoAugment; the images' height and width are in pixels."""
    return augmentation_space(bins, 0.3, 150 / 331 * width, 150 / 331 * height, 30.0, 0.9, 4)


@functools.cache
def wide_space():
    """The operations of TrivialAugment (the paper's "wide" space)."""
    return augmentation_space(MAX_MAGNITUDE + 1, 0.99, 32.0, 32.0, 135.0, 0.99, 6)


def augmentation_space(bins, shear, shift_x, shift_y, degrees, enhance, posterize):
    """{operation: its magnitudes, or None if it has none}, in torchvision's order; the arguments are the largest ones.

    Shifts are in pixels, `posterize` is a number of bits, the others are torchvision's units.
    """

    def up_to(largest):
        return torch.linspace(0.0, largest, bins).tolist()

    return {
        "Identity": None,
        "ShearX": up_to(shear),
        "ShearY": up_to(shear),
        "TranslateX": up_to(shift_x),
        "TranslateY": up_to(shift_y),
        "Rotate": up_to(degrees),
        "Brightness": up_to(enhance),
        "Color": up_to(enhance),
        "Contrast": up_to(enhance),
        "Sharpness": up_to(enhance),
        "Posterize": (8 - torch.arange(bins) / ((bins - 1) / posterize)).round().int().tolist(),
        "Solarize": torch.linspace(1.0, 0.0, bins).tolist(),
        "AutoContrast": None,
        "Equalize": None,
    }


def apply_operations(images, operations):
    """Apply to image i of a batch uint8 (B, 3, H, W) the operations[i], a pair of name and magnitude."""
    groups = {}
    for row, operation in enumerate(operations):
        together = operation[0] in MOVES and images[0, 0].numel() <= SMALL
        groups.setdefault(MOVES if together else operation, []).append(row)
    order = to_device(torch.tensor(list(itertools.chain(*groups.values()))), images.device)
    changed = []
    for group, part in zip(groups, images[order].split([len(rows) for rows in groups.values()]), strict=True):
        if group is MOVES:
            changed.append(move_pixels(part, [operations[row] for row in groups[MOVES]]))
        else:
            name, magnitude = group
            changed.append(functions()[name](part, magnitude))
    result = torch.empty_like(images)
    result[order] = torch.cat(changed)
    return result


def move_pixels(images, operations):
    """`apply_operations` for those in MOVES. They copy pixels, so a map of the sources replaces a call for each one."""
    sources = torch.stack([source_pixels(*operation, *images.shape[2:], images.device) for operation in operations])
    padded = F.pad(images.flatten(2), (1, 0))
    return padded.gather(2, sources[:, None].expand(-1, images.shape[1], -1)).view_as(images)


@functools.lru_cache(maxsize=512)  # more than TrivialAugment has; 16 MB
def source_pixels(name, magnitude, height, width, device):
    """The number of the pixel, from 1, that torchvision's operation copies to each pixel, or 0 for black: (H * W,)."""
    numbers = torch.arange(1.0, height * width + 1, device=device).view(1, 1, height, width)
    return functions()[name](numbers, magnitude).flatten().long()


@functools.cache
def functions():
    """{operation: function of a batch and a magnitude}, as in torchvision's transforms."""
    tv = transforms().functional

    def shear(images, x, y):
        degrees = [math.degrees(math.atan(slope)) for slope in (x, y)]
        return tv.affine(images, angle=0.0, translate=[0, 0], scale=1.0, shear=degrees, center=[0, 0])

    def shift(images, x, y):
        return tv.affine(images, angle=0.0, translate=[int(x), int(y)], scale=1.0, shear=[0.0, 0.0])

    return {
        "Identity": lambda images, _: images,
        "ShearX": lambda images, magnitude: shear(images, magnitude, 0.0),
        "ShearY": lambda images, magnitude: shear(images, 0.0, magnitude),
        "TranslateX": lambda images, magnitude: shift(images, magnitude, 0),
        "TranslateY": lambda images, magnitude: shift(images, 0, magnitude),
        "Rotate": tv.rotate,
        "Brightness": lambda images, magnitude: tv.adjust_brightness(images, 1.0 + magnitude),
        "Color": lambda images, magnitude: tv.adjust_saturation(images, 1.0 + magnitude),
        "Contrast": lambda images, magnitude: tv.adjust_contrast(images, 1.0 + magnitude),
        "Sharpness": lambda images, magnitude: tv.adjust_sharpness(images, 1.0 + magnitude),
        "Posterize": tv.posterize,
        "Solarize": lambda images, magnitude: tv.solarize(images, 255 * magnitude),
        "AutoContrast": lambda images, _: tv.autocontrast(images),
        "Equalize": lambda images, _: tv.equalize(images),
        "Invert": lambda images, _: tv.invert(images),
    }
