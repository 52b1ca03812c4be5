"""The training step with each --train: its speed, and its memory.

The choices are timed interleaved in one process, on copies of one model.

    python benchmarks/freezing.py --model_type ViT-B_16 --batch_size 8 --precision fp32
"""

import copy

import torch
from steps import (
    NUM_CLASSES,
    add_clock_flag,
    add_model_flag,
    add_step_flags,
    check_precision,
    clock_of,
    fits,
    machine,
    our_step,
    random_batch,
    setting,
    training_memory,
)

from inference import make_model
from utils.errors import UserError, run_script
from utils.flag_types import Parser, trained_part
from utils.freezing import freeze
from utils.parallel.processes import choose_device
from utils.profiling import markdown_table, speed_cells, speedup, time_interleaved


def main():
    args = parse_flags()
    device = choose_device()
    check_precision(args.precision, device)
    clock = clock_of(args, device)
    torch.manual_seed(0)
    check_choices(args)
    model = make_model(args.model_type, args.img_size, NUM_CLASSES)
    images, labels = random_batch(args.batch_size, args.img_size, device)
    steps, cells = {}, {}
    for choice in args.choices:
        options = (device, args.precision, args.fp16_opt_level, args.compile)
        steps[choice] = our_step(copy.deepcopy(model), *options, train=choice)
        if not fits(steps[choice], images, labels):
            raise UserError(f"--train {choice} does not fit in memory; give a smaller --batch_size")
        memory = training_memory(steps[choice], images, labels) / 2**20
        trained = sum(p.numel() for p in steps[choice].run.precision.named.values()) / 1e6
        cells[choice] = [f"`{choice}`", f"{trained:.4g}", f"{memory:.4g}"]
    functions = {choice: lambda step=step: step.train(images, labels) for choice, step in steps.items()}
    seconds = time_interleaved(functions, args.rounds, device, clock)
    first = seconds[args.choices[0]]
    for choice, own in seconds.items():
        cells[choice] += [f"{speedup(first, own):.2f}", *speed_cells(args.batch_size, own)]
    titles = ["`--train`", "trained weights (M)", "memory (MiB)", f"speed relative to {args.choices[0]}", "images/s"]
    print(
        f"{args.model_type} at {args.img_size}x{args.img_size}, training step, {setting(args)}\n"
        f"{machine()}, median of {args.rounds} rounds\n\n"
        f"{markdown_table([*titles, 'slowest to fastest round'], cells.values())}"
    )


def parse_flags():
    parser = Parser(__doc__.split("\n\n")[0])
    group = parser.add_argument_group("benchmark")
    add_model_flag(group, default="ViT-B_16")
    group.add_argument(
        "--train",
        dest="choices",
        type=trained_part,
        nargs="+",
        default=["all", "norms", "last:2", "head"],
        metavar="PART",
        help="The values of --train; the others are compared with the first one.",
    )
    add_step_flags(group, batch_size=8, rounds=5)
    add_clock_flag(group)
    return parser.parse_args()


def check_choices(args):
    """Raise UserError, before any work, for a part that the model does not have."""
    for choice in args.choices:
        try:
            with torch.device("meta"):
                freeze(make_model(args.model_type, args.img_size, NUM_CLASSES), choice)
        except ValueError as error:
            raise UserError(str(error)) from error


if __name__ == "__main__":
    run_script(main)
