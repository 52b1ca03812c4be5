"""Whether training by the fast path ends where float32 does: the same short runs, several seeds each, in turns.

The fast path is bfloat16 at level O2, on a GPU also compiled; beside it runs the plain float32 loop. A seed gives both
the same weights, pictures and crops. Ends in a table of test loss and accuracy and a figure. The same command goes on
where it broke off; finished runs are not run again.

    python scripts/fast_path.py --dataset imagefolder --data_dir PATH
"""

import statistics

import torch
from hybrid_vs_cnn import GIVEN, RECIPE, add_experiment_flags  # puts the repository on the path

import train
from models import MODEL_TYPES, canonical_model_type
from utils.arguments import Parser, argument, check_picture_path
from utils.errors import run_script
from utils.records.tracker import device_name, read_metrics
from utils.sweeps import check_plan, data_name, finish, plan_run, raise_failures
from utils.visualize import plot_runs, save

PLAIN, FAST = "float32", "the fast path"
COLUMNS = {"test_loss": ("test loss", 1, ".4f"), "test_accuracy": ("test accuracy (%)", 100, ".2f")}


def main():
    args = parse_flags()
    plan = [(path, plan_run(train, flags_of(path, number, args))) for number in args.seeds for path in (PLAIN, FAST)]
    runs = [run for _, run in plan]
    check_plan(train, runs)
    raise_failures(finish(runs), len(runs))
    metrics = {path: [read_metrics(run.folder) for of, run in plan if of == path] for path in (PLAIN, FAST)}
    title = (
        f"{args.model_type} on {args.examples_per_class} images a class of {data_name(runs[0].flags)}, "
        f"{args.num_steps} steps of {args.train_batch_size} at {args.img_size}x{args.img_size}, "
        f"seeds {', '.join(map(str, args.seeds))}"
    )
    compiled = ", compiled" if torch.cuda.is_available() else ""
    print(f"\n{title}; the fast path is bfloat16 at level O2{compiled}\n{device_name()}, torch {torch.__version__}\n")
    print(report(metrics))
    save(plot_runs(metrics, title), args.figure)
    print(f"\nfigure: {args.figure}")


def parse_flags():
    parser = Parser(__doc__)
    group = parser.add_argument_group("experiment")
    names = ", ".join(MODEL_TYPES)
    group.add_argument("--model_type", type=argument(canonical_model_type), default="ViT-Mini_4", help=names)
    add_experiment_flags(group, "fast_path")
    parser.set_defaults(num_steps=300, seeds=[0, 1, 2])
    args = parser.parse_args()
    check_picture_path(args.figure, "--figure")
    return args


def flags_of(path, number, args):
    """The flags of train.py for one run."""
    name = "float32" if path == PLAIN else "fast"
    sixth = max(1, args.num_steps // 6)
    own = {"name": f"{name}-seed{number}", "model_type": args.model_type, "seed": number}
    own |= {flag: getattr(args, flag) for flag in GIVEN}
    fast = {"bf16": True, "fp16_opt_level": "O2"} if path == FAST else {}
    if fast and torch.cuda.is_available():
        fast["compile"] = True
    return {**own, **RECIPE, "warmup_steps": sixth, "eval_every": sixth, **fast}


def report(metrics):
    """A Markdown table of the runs' last evaluation, and whether the two differ by more than seeds do."""
    titles = [title for title, _, _ in COLUMNS.values()]
    lines = [f"| | {' | '.join(titles)} | images/s |", "|---|---|---|---|"]
    for path, runs in metrics.items():
        cells = [text_of(values_of(runs, column), form) for column, (_, _, form) in COLUMNS.items()]
        speeds = [rows["images_per_second"][-1] for rows in runs]
        lines.append(f"| {path} | {' | '.join(cells)} | {text_of(speeds, '.0f')} |")
    lines.append("")
    for column, (title, _, form) in COLUMNS.items():
        plain, fast = (values_of(metrics[path], column) for path in (PLAIN, FAST))
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
