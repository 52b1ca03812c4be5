"""Make a small folder like ImageNet's to try the whole path: CIFAR-10's classes as enlarged JPEGs of mixed sizes.

train/ and val/ have one folder per class, named by ImageNet's id (wnid) of that thing. ImageNet has no deer; its
hartebeest, an antelope, is used instead. Sizes depend only on the seed, the split, the class and the image's number.

    python scripts/make_imagenet_like.py --output_dir data/imagenet-like
    python train.py --name try --dataset imagenet --data_dir data/imagenet-like
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from utils.data.datasets import DataOptions, read_split, training_splits
from utils.data.images import read_image
from utils.data.splits import draw_per_class
from utils.errors import UserError, run_script
from utils.flag_types import Parser, positive, seed
from utils.parallel.processes import one_process

WNIDS = {
    "airplane": "n02690373",  # airliner
    "automobile": "n04285008",  # sports car
    "bird": "n01531178",  # goldfinch
    "cat": "n02123045",  # tabby
    "deer": "n02422106",  # hartebeest
    "dog": "n02099601",  # golden retriever
    "frog": "n01644373",  # tree frog
    "horse": "n02389026",  # sorrel
    "ship": "n03095699",  # container ship
    "truck": "n04467665",  # trailer truck
}
SIDES = (200, 500)  # pixels, of both height and width
QUALITY = 95


def main():
    args = parse_flags()
    output = Path(args.output_dir)
    for split, folder, count in (("train", "train", args.per_class), ("test", "val", args.val_per_class)):
        images, labels, classes = load_images(args, split, count)
        written = dict.fromkeys(range(len(classes)), 0)
        bar = tqdm(images, desc=folder, unit="img", total=len(labels), disable=not sys.stderr.isatty())
        for image, label in zip(bar, labels, strict=True):
            wnid, number = WNIDS.get(classes[label], classes[label]), written[label]
            write(
                image,
                output / folder / wnid / f"{wnid}_{number}.JPEG",
                (args.seed, int(split == "train"), label, number),
            )
            written[label] += 1
        print(f"{output / folder}: {len(labels)} images of {len(classes)} classes")


def parse_flags():
    parser = Parser(__doc__)
    group = parser.add_argument_group("images")
    group.add_argument(
        "--output_dir",
        default="data/imagenet-like",
        metavar="DIR",
        help="The folder in which train/ and val/ are made.",
    )
    group.add_argument(
        "--source",
        metavar="DIR",
        help="An image folder to use instead of CIFAR-10, which is downloaded to data.",
    )
    group.add_argument("--per_class", type=positive, default=500, metavar="N", help="Training images per class.")
    group.add_argument("--val_per_class", type=positive, default=50, metavar="N", help="Validation images per class.")
    group.add_argument(
        "--seed", type=seed, default=0, metavar="N", help="The seed of the choice of images and of their sizes."
    )
    args = parser.parse_args()
    if any((Path(args.output_dir) / split).exists() for split in ("train", "val")):
        raise UserError(f"{args.output_dir} already has train/ or val/; delete them or give another --output_dir")
    if args.source and not Path(args.source).is_dir():
        raise UserError(f"--source {args.source} is not a folder; give one with train/ and val/ or test/")
    try:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {args.output_dir} can't be written: {error.strerror}") from error
    return args


def load_images(args, split, count):
    """(images uint8 (3, h, w), their labels, names of the classes): `count` images of each class."""
    name, data_dir = ("imagefolder", args.source) if args.source else ("cifar10", "data")
    options = DataOptions(data_dir)
    split = split if split == "train" else training_splits(name, options)[-1]
    found = read_split(name, split, options, one_process())
    found = found.subset(np.sort(draw_per_class(found.labels, count, args.seed)))
    return map(read_image if args.source else torch.from_numpy, found.images), found.labels.tolist(), found.classes


def write(image, path, key):
    """Enlarge an image, uint8 (3, h, w), to a size drawn from the key, and save it as a JPEG."""
    height, width = np.random.default_rng(key).integers(*SIDES, size=2, endpoint=True).tolist()
    path.parent.mkdir(parents=True, exist_ok=True)
    enlarged = Image.fromarray(image.permute(1, 2, 0).numpy())
    enlarged.resize((width, height), Image.Resampling.BICUBIC).save(path, format="JPEG", quality=QUALITY)


if __name__ == "__main__":
    run_script(main)
