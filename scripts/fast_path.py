"""Whether training by the fast path ends where float32 does: the same short runs, several seeds each, in turns.

The fast path is bfloat16 at level O2, on a GPU also compiled; beside it runs the plain float32 loop. A seed gives both
the same weights, pictures and crops. Ends in a table of test loss and accuracy; the same command goes on where it broke
off.

    python benchmarks/fast_path.py --dataset imagefolder --data_dir PATH
"""

import statistics

import torch
from steps import machine

import train
from models import MODEL_TYPES, canonical_model_type
from utils.arguments import Parser, argument, positive, seed
from utils.errors import run_script
from utils.runs import check_plan, data_name, finish, plan_run, raise_failures
from utils.tracking import read_metrics

PLAIN, FAST = "float32", "the fast path"
COLUMNS = {"test_loss": ("test loss", 1, ".4f"), "test_accuracy": ("test accuracy (%)", 100, ".2f")}
GIVEN = ("dataset", "data_dir", "output_dir", "examples_per_class", "model_type", "img_size", "train_batch_size")
RECIPE = {
    "min_crop_scale": 0.5,
    "horizontal_flip": True,
    "optimizer": "adamw",
    "learning_rate": 1e-3,
    "weight_decay": 0.05,
    "eval_batch_size": 250,
}


def main():
    args = parse_flags()
    plan = [(path, plan_run(train, flags_of(path, number, args))) for number in args.seeds for path in (PLAIN, FAST)]
    runs = [run for _, run in plan]
    check_plan(train, runs)
    raise_failures(finish(runs), len(runs))
    ends = {path: [read_metrics(run.folder) for of, run in plan if of == path] for path in (PLAIN, FAST)}
    print(f"\n{report(args, data_name(runs[0].flags), ends)}")


def parse_flags():
    parser = Parser(__doc__.splitlines()[0])
    group = parser.add_argument_group("experiment")
    names = ", ".join(MODEL_TYPES)
    group.add_argument("--model_type", type=argument(canonical_model_type), default="ViT-Mini_4", help=names)
    group.add_argument("--dataset", default="cifar10", metavar="NAME", help="as for train.py")
    group.add_argument("--data_dir", default="data", metavar="DIR", help="as for train.py")
    group.add_argument("--output_dir", default="output/fast_path", metavar="DIR", help="where the runs are kept")
    group.add_argument("--examples_per_class", type=positive, default=1000, metavar="N", help="size of the slice")
    group.add_argument("--img_size", type=positive, default=32, metavar="PIXELS", help="side of the images in pixels")
    group.add_argument("--train_batch_size", type=positive, default=32, metavar="N", help="images a step")
    group.add_argument("--num_steps", type=positive, default=300, metavar="N", help="optimizer steps of a run")
    group.add_argument(
        "--seeds", type=seed, nargs="+", default=[0, 1, 2], metavar="N", help="a run of each path for each"
    )
    return parser.parse_args()


def flags_of(path, number, args):
    """The flags of train.py for one run."""
    name = "float32" if path == PLAIN else "fast"
    steps = {"num_steps": args.num_steps, "warmup_steps": args.num_steps // 6, "eval_every": args.num_steps}
    flags = {"name": f"{name}-seed{number}", "seed": number, **{flag: getattr(args, flag) for flag in GIVEN}}
    fast = {"bf16": True} if path == FAST else {}
    if fast and torch.cuda.is_available():
        fast["compile"] = True
    return {**flags, **steps, **RECIPE, **fast}


def report(args, data, ends):
    """A Markdown table of the runs' last evaluation, and whether the two differ by more than seeds do."""
    compiled = ", compiled" if torch.cuda.is_available() else ""
    lines = [
        f"{args.model_type} on {args.examples_per_class} images a class of {data}, {args.num_steps} steps of "
        f"{args.train_batch_size} at {args.img_size}x{args.img_size}, seeds {', '.join(map(str, args.seeds))}; the "
        f"fast path is bfloat16 at level O2{compiled}\n{machine()}",
        "",
        f"| | {' | '.join(title for title, _, _ in COLUMNS.values())} | images/s |",
        "|---|---|---|---|",
    ]
    for path, runs in ends.items():
        cells = [text_of(values_of(runs, column), form) for column, (_, _, form) in COLUMNS.items()]
        speeds = [metrics["images_per_second"][-1] for metrics in runs]
        lines.append(f"| {path} | {' | '.join(cells)} | {text_of(speeds, '.0f')} |")
    lines.append("")
    for column, (title, _, form) in COLUMNS.items():
        plain, fast = (values_of(ends[path], column) for path in (PLAIN, FAST))
        overlap = "overlap" if max(min(plain), min(fast)) <= min(max(plain), max(fast)) else "do not overlap"
        difference = statistics.mean(fast) - statistics.mean(plain)
        same_seed = ", ".join(f"{b - a:+{form}}" for a, b in zip(plain, fast, strict=True))
        lines.append(
            f"{title}: the ranges of the seeds {overlap}; the means differ by {difference:+{form}}, runs of the same "
            f"seed by {same_seed}"
        )
    return "\n".join(lines)


def values_of(runs, column):
    return [COLUMNS[column][1] * metrics[column][-1] for metrics in runs]


def text_of(values, form):
    """`1.234 (1.230 to 1.240)`: the mean and the range."""
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    run_script(main)
