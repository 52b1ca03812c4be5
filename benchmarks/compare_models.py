"""What models cost, side by side: parameters, FLOPs, activation memory, images/s, as a table and a picture.

The models run in one process in turns, so that a machine's moods hit them alike; medians are reported. With --runs
the test accuracy of finished runs stands beside.

    python benchmarks/compare_models.py R50-ViT-B_16 ResNet50x3_Params ResNet50x3_Flops ViT-B_16 --picture costs.png
"""

import statistics

import torch
from matplotlib.figure import Figure
from steps import (
    NUM_CLASSES,
    add_step_flags,
    compiled,
    forward_flops,
    ours,
    random_batch,
    take_turns,
)

from models import MODEL_TYPES, build_model, canonical_model_type
from utils.arguments import Parser, argument, check_picture_path
from utils.errors import UserError, run_script
from utils.parallel.processes import choose_device
from utils.profiling import activation_bytes, count_parameters
from utils.records.tracker import device_name, read_run
from utils.visualize import OKABE_ITO, save

DEFAULT = ["R50-ViT-B_16", "ResNet50x3_Params", "ResNet50x3_Flops", "ViT-B_16"]
COLUMNS = {  # key of a row: (title, format)
    "parameters": ("parameters (M)", "{:.4g}"),
    "gflops": ("FLOPs of an image (G)", "{:.4g}"),
    "activations": ("activations of a training step (MiB/image)", "{:.4g}"),
    "forward": ("forward (images/s)", "{:.3g}"),
    "training step": ("training (images/s)", "{:.3g}"),
    "accuracy": ("test accuracy (%)", "{:.2f}"),
}


def main():
    args = parse_flags()
    accuracies = best_accuracies(args.runs, args.model_types)
    rows = {name: {"gflops": forward_flops(name, args.img_size) / 1e9} for name in args.model_types}
    device = choose_device()
    images, labels = random_batch(args.batch_size, args.img_size, device)
    contenders = {}
    for name, row in rows.items():
        torch.manual_seed(0)
        model = build_model(name, args.img_size, NUM_CLASSES)
        row["parameters"] = count_parameters(model) / 1e6
        forward, train = ours(args, model, device, images, labels)
        row["activations"] = activations_of_an_image(args, model, train, device) / 2**20
        contenders[name, "forward"], contenders[name, "training step"] = forward, train
    for (name, task), times in take_turns(contenders, args.rounds, device).items():
        rows[name][task] = args.batch_size / statistics.median(times)
    for name, accuracy in accuracies.items():
        rows[name]["accuracy"] = 100 * accuracy
    level = "" if args.precision == "fp32" else f" at level {args.fp16_opt_level}"
    threads = f" ({torch.get_num_threads()} CPU threads)" if device.type == "cpu" else ""
    title = (
        f"{args.img_size}x{args.img_size}, batch {args.batch_size}, {args.precision}{level}{compiled(args)}, "
        f"{device_name()}{threads}, torch {torch.__version__}"
    )
    print(f"{title}, median of {args.rounds} rounds\n\n{table(rows)}")
    if args.picture:
        save(draw(rows, title), args.picture)


def parse_flags():
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument(
        "model_types", nargs="*", type=argument(canonical_model_type), metavar="MODEL", help=", ".join(MODEL_TYPES)
    )
    group = parser.add_argument_group("benchmark")
    add_step_flags(group, batch_size=8, rounds=5)
    group.add_argument(
        "--runs", nargs="+", default=[], metavar="DIR", help="folders of finished runs; a model's best one is taken"
    )
    group.add_argument("--picture", metavar="PNG", help="draw the table as bars")
    args = parser.parse_args()
    args.model_types = list(dict.fromkeys(args.model_types or DEFAULT))
    if args.picture:
        check_picture_path(args.picture, "--picture")
    return args


def best_accuracies(runs, model_types):
    """{model type: best test accuracy over its runs}. Raises UserError for what is no run of one of the models."""
    best = {}
    for run in runs:
        flags, metrics = read_run(run)
        name = flags["model_type"]
        if name not in model_types:
            raise UserError(f"{run} is a run of {name}, which is not among the models to compare")
        best[name] = max(*metrics["test_accuracy"], best.get(name, 0.0))
    return best


def activations_of_an_image(args, model, train, device):
    """Bytes kept for the backward pass; two batches are compared, since standardised kernels are kept once a batch."""
    images, labels = random_batch(2, args.img_size, device)
    two, one = (activation_bytes(model, lambda n=n: train(images[:n], labels[:n])) for n in (2, 1))
    return two - one


def table(rows):
    """Markdown; a column that no model has a value for is left out."""
    keys = [key for key in COLUMNS if any(key in row for row in rows.values())]
    lines = ["| model | " + " | ".join(COLUMNS[key][0] for key in keys) + " |", "|---" * (len(keys) + 1) + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(COLUMNS[k][1].format(row[k]) if k in row else "" for k in keys) + " |")
    return "\n".join(lines)


def draw(rows, title):
    """A panel of bars for each column of the table, models one below the other."""
    keys = [key for key in COLUMNS if any(key in row for row in rows.values())]
    size = (2.2 + 2.3 * len(keys), 1.2 + 0.4 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(keys), sharey=True)
    colours = [OKABE_ITO[i % len(OKABE_ITO)] for i in range(len(rows))]
    for axes, key in zip(panels, keys, strict=True):
        values = [row.get(key, 0) for row in rows.values()]
        bars = axes.barh(list(rows), values, color=colours)
        labels = [COLUMNS[key][1].format(row[key]) if key in row else "no run" for row in rows.values()]
        axes.bar_label(bars, labels, padding=3, fontsize="small")
        axes.set_title(COLUMNS[key][0].replace(" (", "\n("), fontsize="medium")
        axes.set_xlim(0, 1.3 * max(values))
        axes.set_xticks([])
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.suptitle(title, fontsize="medium")
    return figure


if __name__ == "__main__":
    run_script(main)
