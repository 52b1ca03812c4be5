"""Images/s of the input pipeline alone, compared with timm's: JPEG files are decoded, cropped, flipped, normalised.

Both read the same generated files of ImageNet's typical size. The file cache holds them, so the processors are
measured. Rounds alternate, and each starts its workers again and is timed from its first batch to its last. On a CPU
timm runs without its prefetcher, which needs a GPU.

    python benchmarks/data_loading.py --num_workers 1 2
"""

import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import timm
from PIL import Image
from steps import machine
from timm.data import create_dataset, create_loader

from utils.data.augmentation import Augmentation
from utils.data.datasets import DataOptions, load_dataset
from utils.errors import UserError, run_script
from utils.flag_types import Parser, natural, positive
from utils.parallel.processes import choose_device, one_process
from utils.profiling import markdown_table, rate_cells, synchronise

SIZES = ((375, 500), (500, 375), (333, 500), (500, 333), (500, 500), (400, 300))  # (height, width)
QUALITY = 95
NOISE = 6  # standard deviation, of 255; files then are as large as ImageNet's, 110 KB
CROP_SCALE = 0.08
CLASSES = 4


def main():
    args = parse_flags()
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # of torchvision's decoders, for torchcodec
    device = choose_device()
    with tempfile.TemporaryDirectory() as folder:
        kilobytes = make_images(Path(folder), args.images)
        loaders = {"this project": our_batches, "timm": timm_batches}
        speeds = {}
        for num_workers in args.num_workers:
            for number in range(args.rounds + 1):
                for name, loader in loaders.items():
                    speed = images_per_second(loader(folder, num_workers, args, device), device)
                    if number:  # the first round is the warm-up
                        speeds.setdefault((num_workers, name), []).append(speed)
    print(report(args, speeds, kilobytes))


def parse_flags():
    parser = Parser(__doc__)
    group = parser.add_argument_group("benchmark")
    group.add_argument(
        "--num_workers", type=natural, nargs="+", default=[1, 2], metavar="N", help="Worker processes; 0: none."
    )
    group.add_argument("--images", type=positive, default=1024, metavar="N", help="Files, each read once per round.")
    group.add_argument("--batch_size", type=positive, default=64, metavar="N", help="Images per batch.")
    group.add_argument("--img_size", type=positive, default=224, metavar="PIXELS", help="Side of the crops.")
    group.add_argument("--rounds", type=positive, default=5, metavar="N", help="Timed rounds, after a warm-up.")
    args = parser.parse_args()
    if args.images < 2 * args.batch_size:
        raise UserError(f"--images {args.images} is less than two batches, {2 * args.batch_size}")
    return args


def make_images(folder, count):
    """Write `count` JPEGs, parts of scikit-learn's two photographs, in class folders; returns their mean KB."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    random = np.random.default_rng(0)
    total = 0
    for i in range(count):
        height, width = SIZES[i % len(SIZES)]
        whole = photographs[random.integers(len(photographs))]
        factor = min(whole.width / width, whole.height / height) * random.uniform(0.6, 1)
        left = random.uniform(0, whole.width - width * factor)
        top = random.uniform(0, whole.height - height * factor)
        box = (left, top, left + width * factor, top + height * factor)
        pixels = np.asarray(whole.resize((width, height), Image.Resampling.BICUBIC, box=box))
        pixels = np.clip(pixels + random.normal(0, NOISE, (height, width, 1)), 0, 255).astype(np.uint8)
        path = folder / "train" / f"n{i % CLASSES:08d}" / f"{i}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=QUALITY)
        total += path.stat().st_size
    (folder / "val").symlink_to(folder / "train")
    return total / count / 1000


def our_batches(folder, num_workers, args, device):
    """Batches of this project, as train.py reads them."""
    options = DataOptions(data_dir=folder, num_workers=num_workers, mean_std="imagenet")
    data = load_dataset("imagenet", "train", options, one_process(device))
    batches = np.arange(args.images // args.batch_size * args.batch_size).reshape(-1, args.batch_size)
    return data.train_batches(batches, Augmentation(0, (args.img_size, args.img_size), CROP_SCALE, flip=True))


def timm_batches(folder, num_workers, args, device):
    """Batches of timm's loader with the same crops, flips, mean and deviation."""
    return create_loader(
        create_dataset("", root=f"{folder}/train", is_training=True),
        input_size=(3, args.img_size, args.img_size),
        batch_size=args.batch_size,
        is_training=True,
        scale=(CROP_SCALE, 1),
        hflip=0.5,
        color_jitter=None,
        interpolation="bilinear",
        num_workers=num_workers,
        use_prefetcher=device.type == "cuda",
        pin_memory=device.type == "cuda",
        device=device,
        persistent_workers=False,
    )


def images_per_second(batches, device):
    """The speed from the first batch to the last."""
    batches = iter(batches)
    next(batches)
    synchronise(device)
    start, count = time.perf_counter(), 0
    for images, _ in batches:
        count += len(images)
    synchronise(device)
    return count / (time.perf_counter() - start)


def report(args, speeds, kilobytes):
    """A Markdown table of the speeds, {(worker processes, loader): images/s of each round}."""
    rows = [
        [str(num_workers), name, *rate_cells(own, speeds[num_workers, "timm"])]
        for (num_workers, name), own in speeds.items()
    ]
    titles = ["worker processes", "loader", "relative to timm", "images/s", "slowest to fastest round"]
    return (
        f"Input pipeline: JPEGs of {SIZES[0][1]}x{SIZES[0][0]} and similar sizes, {kilobytes:.0f} KB each, to random "
        f"crops at {args.img_size}x{args.img_size}, batch {args.batch_size}\n{machine()}, timm {timm.__version__}, "
        f"{args.images} images per round, median of {args.rounds} rounds\n\n{markdown_table(titles, rows)}"
    )


if __name__ == "__main__":
    run_script(main)
