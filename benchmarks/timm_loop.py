"""timm's training of a model on a folder of pictures, as plainly as its own train.py does it; prints images/s.

create_dataset, create_loader, create_model, create_optimizer_v2, create_scheduler_v2, autocast, cross entropy,
clipping by norm. Crops and normalisation are those of this project's train.py. benchmarks/end_to_end.py calls it.

    python benchmarks/timm_loop.py --data_dir pictures --model_type ViT-B_16 --batch_size 128
"""

import contextlib
import json
import time

import torch
from peers import TIMM, tanh_gelu
from steps import DTYPES, add_step_flags, check_precision, synchronise
from timm.data import create_dataset, create_loader
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import NativeScaler, dispatch_clip_grad
from torch import nn

from utils.arguments import Parser, natural, one_of, positive
from utils.data.datasets import class_folders, image_folders
from utils.errors import run_script
from utils.parallel.processes import choose_device

LOOK_EVERY = 50  # steps between two looks at the loss, timm's --log-interval


def main():
    args = parse_flags()
    device = choose_device()
    check_precision(args.precision, device)
    classes = class_folders(image_folders(args.data_dir)[0])
    loader = create_loader(
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
    model = create_model(
        TIMM[args.model_type], img_size=args.img_size, num_classes=len(classes), act_layer=tanh_gelu()
    ).to(device)
    optimizer = create_optimizer_v2(model, opt="momentum", lr=args.learning_rate, weight_decay=0.0, momentum=0.9)
    if args.compile:
        model = torch.compile(model)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=-(-args.num_steps // len(loader)), updates_per_epoch=len(loader)
    )
    loss_function = nn.CrossEntropyLoss()
    scaler = NativeScaler() if args.precision == "fp16" else None

    def autocast():
        return (
            contextlib.nullcontext()
            if args.precision == "fp32"
            else torch.autocast(device.type, DTYPES[args.precision])
        )

    model.train()
    step, began = 0, None
    while step < args.num_steps:
        for images, labels in loader:
            if step == args.first_steps:
                synchronise(device)
                began = time.perf_counter()
            if device.type == "cpu":  # else the prefetcher has done so
                images, labels = images.to(device), labels.to(device)
            with autocast():
                loss = loss_function(model(images), labels)
            optimizer.zero_grad()
            if scaler:
                scaler(loss, optimizer, clip_grad=args.max_grad_norm, parameters=model.parameters())
            else:
                loss.backward()
                dispatch_clip_grad(model.parameters(), args.max_grad_norm)
                optimizer.step()
            step += 1
            scheduler.step_update(num_updates=step)
            if step % LOOK_EVERY == 0 or step == args.num_steps:
                loss.item()
            if step == args.num_steps:
                break
    synchronise(device)
    seconds = time.perf_counter() - began
    print(json.dumps({"images_per_second": (args.num_steps - args.first_steps) * args.batch_size / seconds}))


def parse_flags():
    parser = Parser(__doc__.splitlines()[0])
    group = parser.add_argument_group("run")
    group.add_argument("--data_dir", required=True, metavar="DIR", help="with train/ and val/ or test/")
    group.add_argument("--model_type", type=one_of("model", TIMM), default="ViT-B_16", help=", ".join(TIMM))
    add_step_flags(group, batch_size=128, rounds=1)
    group.add_argument("--num_steps", type=positive, default=300, metavar="N", help="steps")
    group.add_argument("--first_steps", type=natural, default=50, metavar="N", help="of them, which are not timed")
    group.add_argument("--num_workers", type=natural, default=2, metavar="N", help="processes that read pictures")
    group.add_argument("--learning_rate", type=float, default=1e-3, metavar="LR", help="the highest")
    group.add_argument("--max_grad_norm", type=float, default=1.0, metavar="NORM", help="clip the gradients to this")
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
