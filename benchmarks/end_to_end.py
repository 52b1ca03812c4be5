"""Images/s of train.py itself, data included, against its model's step alone, and against timm's loop.

A round is the model's step alone on one batch that stays where it is, a run of train.py on a folder of pictures, and a
run of timm's loop (benchmarks/timm_loop.py) on the same folder, one after the other on the same machine. What starts a
run is not in it: of train.py's run the steps behind its first evaluation count, of timm's the same number.

    python benchmarks/end_to_end.py                                                              # on two CPU cores
    python benchmarks/end_to_end.py --model_type ViT-B_16 --img_size 224 --batch_size 512 --compile      # on a GPU
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from peers import TIMM, versions
from PIL import Image
from steps import (
    LEARNING_RATE,
    ROOT,
    OurStep,
    add_step_flags,
    check_precision,
    compiled,
    forward_flops,
    machine,
    make_model,
    random_batch,
    time_of,
)

from models import MODEL_TYPES, canonical_model_type
from models.configs import RESNETS
from utils.arguments import Parser, argument, natural, positive
from utils.data.datasets import class_folders, image_folders
from utils.errors import RunStoppedError, run_script
from utils.parallel.processes import choose_device
from utils.records.tracker import read_metrics

CLASSES, TEST_PICTURES = 10, 10  # of the pictures that are made; test pictures a class
MODEL, OURS, TIMMS = "the model's step alone", "train.py", "timm's loop"


def main():
    args = parse_flags()
    device = choose_device()
    check_precision(args.precision, device)
    forward_flops(args.model_type, args.img_size)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        made = args.data_dir is None
        if made:
            args.data_dir = folder / "pictures"
            make_pictures(args.data_dir, args.pictures, args.picture_side)
        classes = len(class_folders(image_folders(args.data_dir)[0]))
        speeds = {MODEL: [], OURS: []} | ({TIMMS: []} if args.model_type in TIMM else {})
        for number in range(args.rounds):
            speeds[MODEL].append(speed_of_the_model(args, classes, device))
            if device.type == "cuda":
                torch.cuda.empty_cache()  # the runs that follow need the memory
            speeds[OURS].append(speed_of_train_py(args, folder / f"round{number}"))
            if TIMMS in speeds:
                speeds[TIMMS].append(speed_of_timms_loop(args))
            print(f"round {number + 1} of {args.rounds}: {texts(speeds)}", file=sys.stderr, flush=True)
    print(report(args, speeds, made))


def parse_flags():
    parser = Parser(__doc__.splitlines()[0])
    group = parser.add_argument_group("benchmark")
    names = ", ".join(MODEL_TYPES)
    group.add_argument("--model_type", type=argument(canonical_model_type), default="ViT-Ti_16", help=names)
    add_step_flags(group, batch_size=64, rounds=3)
    group.set_defaults(img_size=64)
    group.add_argument("--num_steps", type=positive, default=200, metavar="N", help="timed steps of a run")
    group.add_argument("--first_steps", type=positive, default=50, metavar="N", help="steps before them, not timed")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data_dir", metavar="DIR", help="a folder with train/ and val/ or test/; default: pictures of noise are made"
    )
    data.add_argument("--pictures", type=positive, default=5000, metavar="N", help="training pictures to make")
    data.add_argument(
        "--picture_side",
        type=positive,
        default=32,
        metavar="PIXELS",
        help="of the pictures to make; above 256 train.py reads them by worker processes, else it keeps them in memory",
    )
    data.add_argument(
        "--num_workers",
        type=natural,
        default=min(8, os.cpu_count()),
        metavar="N",
        help="processes that read pictures, of each of the two",
    )
    return parser.parse_args()


def make_pictures(folder, count, side):
    """JPEG files of smooth noise in `CLASSES` folders."""
    random = np.random.default_rng(0)
    for split, of_a_class in (("train", -(-count // CLASSES)), ("val", TEST_PICTURES)):
        for number in range(CLASSES):
            place = folder / split / f"class{number}"
            place.mkdir(parents=True)
            for i in range(of_a_class):
                noise = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
                noise.resize((side, side), Image.Resampling.BICUBIC).save(place / f"{i:05d}.jpg", quality=90)


def speed_of_the_model(args, classes, device):
    """Images/s of as many training steps as a run's, on one batch."""
    model = make_model(args.model_type, args.img_size, classes)
    step = OurStep(model, args.precision, args.fp16_opt_level, device, args.compile)
    images, labels = random_batch(args.batch_size, args.img_size, device)
    labels %= classes
    time_of(lambda: step.train(images, labels), min(5, args.first_steps), device)
    return args.num_steps * args.batch_size / time_of(lambda: step.train(images, labels), args.num_steps, device)


def speed_of_train_py(args, output_dir):
    """Of the steps behind the first evaluation; the second one ends the run."""
    # the first evaluation is at --first_steps and at each multiple of it, so the last window is the timed one
    flags = {
        "name": "run",
        "output_dir": output_dir,
        "dataset": "imagefolder",
        "data_dir": args.data_dir,
        "num_workers": args.num_workers,
        "model_type": args.model_type,
        "img_size": args.img_size,
        "train_batch_size": args.batch_size,
        "num_steps": args.first_steps + args.num_steps,
        "eval_every": args.first_steps,
        "learning_rate": LEARNING_RATE,
        "warmup_steps": 1,
    }
    if args.model_type not in RESNETS:
        flags["dropout_rate"] = 0
    if args.precision != "fp32":
        flags["fp16_opt_level"] = args.fp16_opt_level
    command = [
        sys.executable,
        "train.py",
        *(str(word) for name, value in flags.items() for word in (f"--{name}", value)),
    ]
    command += [f"--{args.precision}"] * (args.precision != "fp32") + ["--compile"] * args.compile
    call(command)
    metrics = read_metrics(Path(output_dir) / "run")
    steps = np.diff([0, *metrics["step"]])
    seconds = steps[1:] * args.batch_size / np.array(metrics["images_per_second"][1:])
    return args.batch_size * steps[1:].sum() / seconds.sum()


def speed_of_timms_loop(args):
    flags = {
        "data_dir": args.data_dir,
        "num_workers": args.num_workers,
        "model_type": args.model_type,
        "img_size": args.img_size,
        "batch_size": args.batch_size,
        "precision": args.precision,
        "num_steps": args.first_steps + args.num_steps,
        "first_steps": args.first_steps,
    }
    words = (str(word) for name, value in flags.items() for word in (f"--{name}", value))
    command = [sys.executable, "benchmarks/timm_loop.py", *words, *["--compile"] * args.compile]
    return json.loads(call(command).splitlines()[-1])["images_per_second"]


def call(command):
    """What the command prints. Raises RunStoppedError with the last line of its complaint."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        complaint = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        raise RunStoppedError(f"{' '.join(command[1:])} failed: {complaint}", status=1)
    return done.stdout


def texts(speeds):
    return ", ".join(f"{name} {values[-1]:.1f}" for name, values in speeds.items())


def report(args, speeds, made):
    """A Markdown table; the ratios are medians over the rounds, with their range."""
    pictures = f"{args.pictures} made pictures of {args.picture_side}x{args.picture_side}"
    level = "" if args.precision == "fp32" else f" ({OURS} at {args.fp16_opt_level}, timm by autocast)"
    lines = [
        f"{args.model_type} at {args.img_size}x{args.img_size}, batch {args.batch_size}, {args.precision}{level}"
        f"{compiled(args)}, {pictures if made else 'a folder of pictures'}",
        f"{machine()}, {versions()}; {args.num_steps} steps behind the first {args.first_steps}, median of "
        f"{args.rounds} rounds",
        "",
        f"| | images/s | slowest to fastest round | of {MODEL} | x {TIMMS} |",
        "|---|---|---|---|---|",
    ]
    for name, values in speeds.items():
        cells = [name, f"{statistics.median(values):.1f}", f"{min(values):.1f} to {max(values):.1f}"]
        cells.append(range_of(values, speeds[MODEL], ".1%") if name != MODEL else "")
        cells.append(range_of(values, speeds[TIMMS], ".2f") if TIMMS in speeds and name != TIMMS else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def range_of(values, reference, form):
    """The values over those of the same rounds: `97.1% (96.0% to 98.2%)`."""
    ratios = [value / other for value, other in zip(values, reference, strict=True)]
    return f"{statistics.median(ratios):{form}} ({min(ratios):{form}} to {max(ratios):{form}})"


if __name__ == "__main__":
    run_script(main)
