"""A ViT's training step and forward pass with each norm, relative to LayerNorm; in turns in one process, medians.

python benchmarks/norms.py --model_type ViT-B_16 --batch_size 8
"""

import statistics

import torch
from steps import (
    NUM_CLASSES,
    add_step_flags,
    compiled,
    make_model,
    ours,
    random_batch,
    ratio,
    take_turns,
)

from models import NORM_TYPES
from models.configs import VITS
from utils.arguments import Parser, one_of
from utils.errors import run_script
from utils.parallel.processes import choose_device
from utils.records.tracker import device_name


def main():
    parser = Parser(__doc__.splitlines()[0])
    group = parser.add_argument_group("benchmark")
    group.add_argument("--model_type", type=one_of("ViT", VITS), default="ViT-B_16", help=", ".join(VITS))
    add_step_flags(group, batch_size=8, rounds=7)
    args = parser.parse_args()
    device = choose_device()
    images, labels = random_batch(args.batch_size, args.img_size, device)
    contenders = {}
    for norm_type in NORM_TYPES:
        model = make_model(args.model_type, args.img_size, NUM_CLASSES, norm_type=norm_type)
        contenders[norm_type, "forward"], contenders[norm_type, "training"] = ours(args, model, device, images, labels)
    seconds = take_turns(contenders, args.rounds, device)
    print(
        f"{args.model_type} at {args.img_size}x{args.img_size}, batch {args.batch_size}, {args.precision}"
        f"{compiled(args)}, {device_name()}, torch {torch.__version__}, median of {args.rounds} rounds\n\n"
        "| norm | training / LN | training (images/s) | forward / LN | forward (images/s) |\n|---|---|---|---|---|"
    )
    for norm_type in NORM_TYPES:
        cells = []
        for task in ("training", "forward"):
            cells.append(f"{ratio(seconds['LN', task], seconds[norm_type, task]):.2f}")
            cells.append(f"{args.batch_size / statistics.median(seconds[norm_type, task]):.1f}")
        print(f"| {norm_type} | {' | '.join(cells)} |")


if __name__ == "__main__":
    run_script(main)
