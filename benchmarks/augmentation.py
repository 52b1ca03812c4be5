"""Images/s of the training batches of images in memory, with each kind of augmentation, compared with crops alone.

RandAugment, TrivialAugment and AutoAugment are also timed as torchvision applies them, image by image. Rounds are
interleaved.

    OMP_NUM_THREADS=1 python benchmarks/augmentation.py --processor_time
"""

import numpy as np
import torch
from steps import add_clock_flag, clock_of, machine
from torchvision.transforms import v2

from utils.data.augmentation import Augmentation, normalise
from utils.data.loading import TensorImages
from utils.errors import run_script
from utils.flag_types import Parser, positive
from utils.parallel.processes import choose_device
from utils.profiling import markdown_table, rate_cells, synchronise

NUM_IMAGES = 10000
KINDS = {  # fields of Augmentation
    "crops and flips": {},
    "--rand_augment 2 9": {"rand_augment": (2, 9)},
    "--auto_augment trivial": {"auto_augment": "trivial"},
    "--auto_augment cifar10": {"auto_augment": "cifar10"},
    "--color_jitter 0.4": {"color_jitter": 0.4},
    "--random_erasing 0.25": {"random_erasing": 0.25},
}
IMAGE_BY_IMAGE = {  # torchvision's transforms of the same kinds
    "--rand_augment 2 9": v2.RandAugment,
    "--auto_augment trivial": v2.TrivialAugmentWide,
    "--auto_augment cifar10": lambda: v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
}


def main():
    args = parse_flags()
    device = choose_device()
    clock = clock_of(args, device)
    pixels = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 3, 32, 32), dtype=np.uint8)
    data = TensorImages(pixels, np.zeros(NUM_IMAGES), ["noise"], device)
    cases = [(name, False) for name in KINDS] + [(name, True) for name in IMAGE_BY_IMAGE]
    speeds = {case: [] for case in cases}
    for number in range(args.rounds + 1):
        for case in cases:
            speed = images_per_second(data, *case, args, clock)
            if number:  # the first round is the warm-up
                speeds[case].append(speed)
    print(report(speeds, args))


def parse_flags():
    parser = Parser(__doc__)
    group = parser.add_argument_group("benchmark")
    group.add_argument("--img_size", type=positive, default=32, metavar="PIXELS", help="Side of the images in pixels.")
    group.add_argument("--batch_size", type=positive, default=128, metavar="N", help="Images per batch.")
    group.add_argument("--batches", type=positive, default=8, metavar="N", help="Batches per round.")
    group.add_argument("--rounds", type=positive, default=5, metavar="N", help="Timed rounds.")
    add_clock_flag(group)
    return parser.parse_args()


def images_per_second(data, name, image_by_image, args, clock):
    """The speed of one round; with `image_by_image` torchvision's transform is applied to single images."""
    fields = {} if image_by_image else KINDS[name]
    augmentation = Augmentation(0, (args.img_size, args.img_size), 0.3, True, **fields)
    positions = np.arange(args.batches * args.batch_size).reshape(args.batches, -1)
    transform = IMAGE_BY_IMAGE[name]() if image_by_image else None
    start = clock()
    for images, _ in data.train_batches(positions, augmentation):
        if transform:
            levels = ((images + 1) * (255 / 2)).round().to(torch.uint8)
            normalise(torch.stack([transform(image) for image in levels]))
    synchronise(data.images.device)
    return positions.size / (clock() - start)


def report(speeds, args):
    """A Markdown table of the speeds, {(kind, image by image): images/s of each round}."""
    base = speeds["crops and flips", False]
    applied_by = {False: "this project", True: "torchvision, image by image"}
    rows = []
    for (name, single), own in speeds.items():
        ratio, *rates = rate_cells(own, base)
        rows.append([name, applied_by[single], *rates, ratio])
    titles = ["augmentation", "applied by", "images/s", "slowest to fastest round", "relative to crops and flips"]
    return (
        f"Training batches of images in memory, {args.img_size}x{args.img_size}, batch {args.batch_size}\n"
        f"{machine()}, median of {args.rounds} rounds\n\n"
        f"{markdown_table(titles, rows)}"
    )


if __name__ == "__main__":
    run_script(main)
