"""Images/s of train.py itself, data included, compared with its model's step alone and with timm's loop.

A round runs three things one after another: the model's step alone on a fixed batch, train.py on a folder of images,
and timm's training loop on the same folder. Start-up is excluded: for train.py the steps after its first evaluation
are timed, for timm the same number of steps.

    python benchmarks/end_to_end.py                                                              # on two CPU cores
    python benchmarks/end_to_end.py --model_type ViT-B_16 --img_size 224 --batch_size 512 --compile      # on a GPU
"""

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from peers import timm_transformer, versions
from PIL import Image
from steps import (
    DTYPES,
    LEARNING_RATE,
    NUM_CLASSES,
    ROOT,
    add_model_flag,
    add_step_flags,
    check_precision,
    forward_flops,
    free_memory,
    machine,
    random_batch,
    setting,
    step_of,
)
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import NativeScaler, dispatch_clip_grad
from torch import nn

from inference import make_model
from models.configs import RESNETS, VITS
from utils.data.folders import class_folders, image_folders
from utils.errors import RunStoppedError, run_script
from utils.flag_types import Parser, natural, positive
from utils.parallel.processes import choose_device
from utils.profiling import markdown_table, synchronise, time_calls
from utils.records.run_folder import read_metrics

EVAL_IMAGES = 10  # per class, of the images that are made
MODEL, OURS, TIMM_LOOP = "the model's step alone", "train.py", "timm's loop"
LOG_INTERVAL = 50  # steps after which timm's loop reads the loss, the default of its --log-interval


def main():
    args = parse_flags()
    device = choose_device()
    check_precision(args.precision, device)
    forward_flops(args.model_type, args.img_size)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        images = "a folder of images"
        if args.data_dir is None:
            args.data_dir = folder / "images"
            images = f"{args.images} generated images of {args.image_side}x{args.image_side}"
            make_images(args.data_dir, args.images, args.image_side)
        speeds = {MODEL: [], OURS: []} | ({TIMM_LOOP: []} if args.model_type in VITS else {})
        for number in range(args.rounds):
            speeds[MODEL].append(model_speed(args, device))
            free_memory()
            speeds[OURS].append(train_py_speed(args, folder / f"round{number}"))
            if TIMM_LOOP in speeds:
                speeds[TIMM_LOOP].append(timm_speed(args, device))
                free_memory()
            texts = ", ".join(f"{name} {values[-1]:.1f}" for name, values in speeds.items())
            print(f"round {number + 1} of {args.rounds}: {texts}", file=sys.stderr, flush=True)
    print(report(args, speeds, images))


def parse_flags():
    parser = Parser(__doc__.splitlines()[0])
    group = parser.add_argument_group("benchmark")
    add_model_flag(group, default="ViT-Ti_16")
    add_step_flags(group, batch_size=64, rounds=3)
    group.set_defaults(img_size=64)
    group.add_argument("--num_steps", type=positive, default=200, metavar="N", help="Timed steps of a run.")
    group.add_argument("--first_steps", type=positive, default=50, metavar="N", help="Steps before the timed ones.")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data_dir", metavar="DIR", help="A folder with train/ and val/ or test/; default: images of noise are made."
    )
    data.add_argument("--images", type=positive, default=5000, metavar="N", help="Training images to make.")
    data.add_argument(
        "--image_side",
        type=positive,
        default=32,
        metavar="PIXELS",
        help="Side of the images to make; above 256 train.py reads them by worker processes, not from memory.",
    )
    data.add_argument(
        "--num_workers",
        type=natural,
        default=min(8, os.cpu_count()),
        metavar="N",
        help="Processes that read images, in train.py and in timm's loop.",
    )
    return parser.parse_args()


def make_images(folder, count, side):
    """JPEG files of smooth noise in `NUM_CLASSES` folders."""
    random = np.random.default_rng(0)
    for split, per_class in (("train", -(-count // NUM_CLASSES)), ("val", EVAL_IMAGES)):
        for number in range(NUM_CLASSES):
            class_folder = folder / split / f"class{number}"
            class_folder.mkdir(parents=True)
            for i in range(per_class):
                noise = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
                noise.resize((side, side), Image.Resampling.BICUBIC).save(class_folder / f"{i:05d}.jpg", quality=90)


def model_speed(args, device):
    """Images/s of as many training steps as a run has, on one batch."""
    step = step_of(args, make_model(args.model_type, args.img_size, NUM_CLASSES), device)
    batch = random_batch(args.batch_size, args.img_size, device)
    time_calls(lambda: step.train(*batch), min(5, args.first_steps), device)
    return args.num_steps * args.batch_size / time_calls(lambda: step.train(*batch), args.num_steps, device)


def train_py_speed(args, output_dir):
    """Images/s of train.py after its first evaluation. Raises RunStoppedError if train.py fails."""
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
    command = [sys.executable, "train.py"]
    command += [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    command += [f"--{args.precision}"] * (args.precision != "fp32") + ["--compile"] * args.compile
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        message = (done.stderr.strip() or "it printed nothing").splitlines()[-1]
        raise RunStoppedError(f"{' '.join(command[1:])} failed: {message}", status=1)
    metrics = read_metrics(Path(output_dir) / "run")
    steps = np.diff([0, *metrics["step"]])[1:]
    seconds = steps * args.batch_size / np.array(metrics["images_per_second"][1:])
    return args.batch_size * steps.sum() / seconds.sum()


def timm_speed(args, device):
    """Images/s of a training loop written with timm's functions as its own train.py does."""
    loader = timm_loader(args, device)
    num_classes = len(class_folders(image_folders(args.data_dir)["train"]))
    model = timm_transformer(args.model_type, VITS[args.model_type], args.img_size, num_classes)
    model = model.to(device).train()
    optimizer = create_optimizer_v2(model, opt="momentum", lr=LEARNING_RATE, weight_decay=0.0, momentum=0.9)
    compiled = torch.compile(model) if args.compile else model
    last_step = args.first_steps + args.num_steps
    epochs = -(-last_step // len(loader))
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=epochs, updates_per_epoch=len(loader))
    loss_function = nn.CrossEntropyLoss()
    scaler = NativeScaler() if args.precision == "fp16" else None
    sixteen_bits = args.precision != "fp32"
    autocast = torch.autocast(device.type, DTYPES[args.precision]) if sixteen_bits else contextlib.nullcontext()

    for step, (images, labels) in enumerate(batch for _ in range(epochs) for batch in loader):
        if step == args.first_steps:
            synchronise(device)
            start = time.perf_counter()
        with autocast:
            loss = loss_function(compiled(images), labels)
        optimizer.zero_grad()
        if scaler:
            scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
        else:
            loss.backward()
            dispatch_clip_grad(model.parameters(), 1.0)
            optimizer.step()
        scheduler.step_update(num_updates=step + 1)
        if (step + 1) % LOG_INTERVAL == 0:
            loss.item()
        if step + 1 == last_step:
            break
    synchronise(device)
    return args.num_steps * args.batch_size / (time.perf_counter() - start)


def timm_loader(args, device):
    """timm's loader with the crops and the normalisation of train.py; its prefetcher needs a GPU."""
    return create_loader(
        create_dataset("", root=args.data_dir, split="train"),
        input_size=(3, args.img_size, args.img_size),
        batch_size=args.batch_size,
        is_training=True,
        scale=(0.05, 1.0),
        hflip=0.0,
        color_jitter=None,
        interpolation="bilinear",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        num_workers=args.num_workers,
        pin_memory=device.type == "cuda",
        use_prefetcher=device.type == "cuda",
        device=device,
    )


def report(args, speeds, images):
    """A Markdown table; the ratios are medians over the rounds, with their range."""
    rows = []
    for name, values in speeds.items():
        rows.append([name, f"{statistics.median(values):.1f}", f"{min(values):.1f} to {max(values):.1f}"])
        rows[-1].append(ratio_range(values, speeds[MODEL], ".1%") if name != MODEL else "")
        compared = TIMM_LOOP in speeds and name != TIMM_LOOP
        rows[-1].append(ratio_range(values, speeds[TIMM_LOOP], ".2f") if compared else "")
    titles = ["", "images/s", "slowest to fastest round", f"relative to {MODEL}", f"relative to {TIMM_LOOP}"]
    return (
        f"{args.model_type} at {args.img_size}x{args.img_size}, {setting(args)}, timm by autocast, {images}\n"
        f"{machine()}, {versions()}; {args.num_steps} steps after the first {args.first_steps}, median of "
        f"{args.rounds} rounds\n\n{markdown_table(titles, rows)}"
    )


def ratio_range(values, reference, form):
    """Ratios to the reference in the same round: `97.1% (96.0% to 98.2%)`."""
    ratios = [value / other for value, other in zip(values, reference, strict=True)]
    return f"{statistics.median(ratios):{form}} ({min(ratios):{form}} to {max(ratios):{form}})"


if __name__ == "__main__":
    run_script(main)
