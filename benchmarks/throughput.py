"""Images/s of the forward pass and the training step, compared with other packages, other norms or other models.

All contenders run in one process, interleaved, so that noise of the machine affects them alike; the median of the
rounds is reported with the slowest and the fastest. A training step is forward, loss, backward, clipping, optimizer.

--compare peers    timm, transformers and lucidrains' vit-pytorch, which first get our weights and must return our
                   logits (benchmarks/peers.py). FLOP/s are given as a share of those of a matrix product of the
                   size of the model's MLP.
--compare norms    a ViT with each of the norms.
--compare models   the models with one another: parameters, FLOPs, activation memory, images/s and, with --runs,
                   the best accuracy of finished runs; --figure draws the table.

    pip install -r benchmarks/requirements.txt
    python benchmarks/throughput.py --model_type ViT-B_16 --batch_size 1 16 64 max --fp16_opt_level O1 O2
    python benchmarks/throughput.py --compare norms --model_type ViT-B_16 --batch_size 8
    python benchmarks/throughput.py --compare models --model_type R50-ViT-B_16 ResNet50x3_Params --figure costs.png
"""

import copy
import functools
import json
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from peers import PACKAGES, PeerStep, peers, versions
from steps import (
    DTYPES,
    FORWARD,
    NUM_CLASSES,
    TRAINING,
    activations_per_image,
    add_clock_flag,
    add_round_flags,
    add_size_flag,
    check_precision,
    clock_of,
    forward_flops,
    free_memory,
    largest_batch,
    machine,
    matrix_product,
    memory_of,
    our_step,
    precision_text,
    random_batch,
)

from inference import make_model
from models import MODEL_TYPES, NORM_TYPES, canonical_model_type
from utils.checks import check_figure_path
from utils.data.splits import evaluated_split
from utils.errors import UserError, run_script
from utils.figures import OKABE_ITO, save
from utils.flag_types import Parser, argument, one_of, positive
from utils.parallel.precision import OPT_LEVELS
from utils.parallel.processes import choose_device
from utils.profiling import (
    count_parameters,
    markdown_table,
    speed_cells,
    speedup,
    time_interleaved,
)
from utils.records.run_folder import read_run

PEERS, NORMS, MODELS = "peers", "norms", "models"
OURS = "this project"
REFERENCES = ("timm", "LN")  # what the others are compared with
LARGEST = "max"  # a batch size
FORWARD_PASSES = {FORWARD: 1, TRAINING: 3}  # FLOPs in forward passes
COSTS = {  # key: (title of the column, format)
    "parameters": ("parameters (M)", "{:.4g}"),
    "gflops": ("FLOPs per image (G)", "{:.4g}"),
    "activations": ("activations of a training step (MiB/image)", "{:.4g}"),
    FORWARD: ("forward (images/s)", "{:.3g}"),
    TRAINING: ("training (images/s)", "{:.3g}"),
    "accuracy": ("best accuracy (%)", "{:.2f}"),
}


def main():
    args = parse_flags()
    device = choose_device()
    check(args, device)
    if args.compare == MODELS:
        compare_models(args, device)
        return
    results = []
    for model_type in args.model_types:
        torch.manual_seed(0)
        modules = modules_of(args, model_type)
        for precision in args.precisions:
            steps = steps_of(args, modules, precision, device)
            for batch_size in args.batch_sizes:
                results.append(measure(args, model_type, precision, batch_size, steps, device))
                print(report(results[-1]) + "\n", flush=True)
                if args.json:
                    Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
            del steps
            free_memory()


def parse_flags():
    parser = Parser(__doc__.split("\n\n")[0])
    group = parser.add_argument_group("benchmark")
    group.add_argument(
        "--compare",
        type=one_of("comparison", (PEERS, NORMS, MODELS)),
        default=PEERS,
        metavar="CASE",
        help="What is compared. peers: other packages; norms: a ViT with each norm; models: the given models.",
    )
    add_size_flag(group)
    group.add_argument(
        "--batch_size",
        dest="batch_sizes",
        type=batch_size,
        nargs="+",
        default=[16],
        metavar="N",
        help=f"Images per step; {LARGEST} is the largest batch that fits a GPU in the training step of all contenders.",
    )
    several = functools.partial(group.add_argument, nargs="+", metavar="NAME")
    model, precision, level = argument(canonical_model_type), one_of("precision", DTYPES), one_of("level", OPT_LEVELS)
    several("--model_type", dest="model_types", type=model, default=["ViT-B_16"], help=", ".join(MODEL_TYPES))
    several("--precision", dest="precisions", type=precision, default=["bf16"], help=", ".join(DTYPES))
    several("--fp16_opt_level", dest="levels", type=level, default=["O2"], help="Levels of this project in 16 bits.")
    add_round_flags(group, rounds=7)
    add_clock_flag(group)
    output = parser.add_argument_group("output")
    output.add_argument("--json", metavar="FILE", help="Write the results there, with the seconds of every round.")
    output.add_argument("--figure", metavar="PNG", help="With --compare models: draw the table as bars.")
    output.add_argument(
        "--runs",
        nargs="+",
        default=[],
        metavar="DIR",
        help="With --compare models: add each model's best accuracy in these finished runs; default: none.",
    )
    return parser.parse_args()


def batch_size(text):
    return text if text == LARGEST else positive(text)


def check(args, device):
    """Raises UserError, before any work, for what can't be measured or written."""
    for model_type in args.model_types:
        for norm_type in NORM_TYPES if args.compare == NORMS else ("LN",):
            forward_flops(model_type, args.img_size, norm_type=norm_type)
    for precision in args.precisions:
        check_precision(precision, device)
    clock_of(args, device)
    if args.compare == MODELS:
        if max(map(len, (args.precisions, args.batch_sizes, args.levels))) > 1 or LARGEST in args.batch_sizes:
            raise UserError(
                "--compare models needs one --precision, one --fp16_opt_level and one number as --batch_size"
            )
    elif args.runs or args.figure:
        raise UserError("--runs and --figure need --compare models")
    if LARGEST in args.batch_sizes and device.type != "cuda":
        args.batch_sizes = [size for size in args.batch_sizes if size != LARGEST]
        if not args.batch_sizes:
            raise UserError(f"--batch_size {LARGEST} needs an NVIDIA GPU; give a number")
        print(f"--batch_size {LARGEST} is skipped: it needs an NVIDIA GPU", file=sys.stderr)
    if args.figure:
        check_figure_path(args.figure, "--figure")
    if args.json and (Path(args.json).is_dir() or not Path(args.json).parent.is_dir()):
        raise UserError(f"--json {args.json} can't be written; give a file in a folder that exists")


def modules_of(args, model_type):
    """{name: module} of what is compared."""
    if args.compare == NORMS:
        return {norm: make_model(model_type, args.img_size, NUM_CLASSES, norm_type=norm) for norm in NORM_TYPES}
    model = make_model(model_type, args.img_size, NUM_CLASSES)
    return {OURS: model, **peers(model_type, model, args.img_size)}


def steps_of(args, modules, precision, device):
    """{name: TimedStep or PeerStep} of copies of the modules; ours at each opt level."""
    levels = ["O0"] if precision == "fp32" else args.levels
    steps = {}
    for name, module in modules.items():
        if name in PACKAGES:
            steps[name] = PeerStep(copy.deepcopy(module), precision, device, args.compile)
            continue
        for level in levels:
            full_name = name if len(levels) == 1 else f"{name}, {level}"
            steps[full_name] = our_step(copy.deepcopy(module), device, precision, level, args.compile)
    return steps


def measure(args, model_type, precision, batch_size, steps, device):
    """One table as a dictionary."""
    largest = {}
    if batch_size == LARGEST:
        largest = {name: largest_batch(step, args.img_size, device) for name, step in steps.items()}
        batch_size = min(largest.values())
        if not batch_size:
            raise UserError(f"{model_type} with one image does not fit this GPU alongside the other contenders")
    batch = random_batch(batch_size, args.img_size, device)
    memory = {name: memory_of(step, *batch) for name, step in steps.items()}
    functions = {}
    for name, passes in memory.items():
        if passes:
            functions[name, FORWARD] = lambda step=steps[name]: step.forward(batch[0])
            functions[name, TRAINING] = lambda step=steps[name]: step.train(*batch)
    product, flops_of_product, shape = matrix_product(model_type, precision, batch_size, args.img_size, device)
    functions["matrix product", ""] = product
    seconds = time_interleaved(functions, args.rounds, device, clock_of(args, device))
    peak = flops_of_product / statistics.median(seconds.pop(("matrix product", "")))
    flops = batch_size * forward_flops(model_type, args.img_size)
    reference = next((name for name in (*REFERENCES, *steps) if memory.get(name)), None)
    return {
        "model_type": model_type,
        "img_size": args.img_size,
        "batch_size": batch_size,
        "largest_batch": largest,
        "precision": precision,
        "opt_levels": args.levels,
        "compiled": args.compile,
        "rounds": f"{args.rounds} rounds{', by processor time' if args.processor_time else ''}",
        "machine": machine(),
        "versions": versions(),
        "matrix_product": {"shape": shape, "flops_per_second": peak},
        "out_of_memory": [name for name, passes in memory.items() if not passes],
        "reference": reference,
        "rows": [
            {
                "pass": task,
                "model": name,
                "x_reference": speedup(seconds[reference, task], times),
                "images_per_second": batch_size / statistics.median(times),
                "share_of_matrix_product": FORWARD_PASSES[task] * flops / statistics.median(times) / peak,
                "memory_bytes": memory[name][task],
                "seconds": times,
            }
            for (name, task), times in seconds.items()
        ],
    }


def report(result):
    """A Markdown table; ratios are medians over the rounds of the reference's time divided by a row's."""
    compared = ""
    if result["reference"] in PACKAGES:
        compared = f", {result['versions']}; equal logits; momentum SGD, fused in this project"
    product = result["matrix_product"]
    lines = [
        f"{result['model_type']} at {result['img_size']}x{result['img_size']}, batch {result['batch_size']}, "
        f"{precision_text(result['precision'], result['opt_levels'], result['compiled'])}",
        f"{result['machine']}{compared}; median of {result['rounds']}; a matrix product of "
        f"{' x '.join(map(str, product['shape']))} runs at {product['flops_per_second'] / 1e9:.0f} GFLOP/s",
    ]
    if result["largest_batch"]:
        sizes = ", ".join(f"{name} {size}" for name, size in result["largest_batch"].items())
        lines.append(f"largest batches whose training step fits, alongside the weights of the others: {sizes}")
    if result["out_of_memory"]:
        lines.append(f"out of memory: {', '.join(result['out_of_memory'])}")
    titles = ["pass", "model", f"relative to {result['reference']}", "images/s", "slowest to fastest round"]
    titles += ["share of the matrix product's FLOP/s", "memory (MiB)"]
    rows = [
        [
            row["pass"],
            row["model"],
            f"{row['x_reference']:.2f}",
            *speed_cells(result["batch_size"], row["seconds"]),
            f"{100 * row['share_of_matrix_product']:.0f} %",
            "-" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 2**20:,.0f}",
        ]
        for row in result["rows"]
    ]
    return "\n".join([*lines, "", markdown_table(titles, rows)])


def compare_models(args, device):
    """Print the costs of the models as a table, and draw it with --figure."""
    accuracies = best_accuracies(args.runs, args.model_types)
    images, labels = random_batch(args.batch_sizes[0], args.img_size, device)
    rows, functions = {}, {}
    for name in args.model_types:
        torch.manual_seed(0)
        model = make_model(name, args.img_size, NUM_CLASSES)
        rows[name] = {"parameters": count_parameters(model) / 1e6, "gflops": forward_flops(name, args.img_size) / 1e9}
        [step] = steps_of(args, {name: model}, args.precisions[0], device).values()
        rows[name]["activations"] = activations_per_image(step, args.img_size, device) / 2**20
        functions[name, FORWARD] = lambda step=step: step.forward(images)
        functions[name, TRAINING] = lambda step=step: step.train(images, labels)
    for (name, task), times in time_interleaved(functions, args.rounds, device, clock_of(args, device)).items():
        rows[name][task] = len(images) / statistics.median(times)
    for name, accuracy in accuracies.items():
        rows[name]["accuracy"] = 100 * accuracy
    setting = precision_text(args.precisions[0], args.levels, args.compile)
    title = f"{args.img_size}x{args.img_size}, batch {len(images)}, {setting}, {machine()}"
    costs = {key: cost for key, cost in COSTS.items() if any(key in row for row in rows.values())}
    cells = [[name, *(cost_text(row, key) for key in costs)] for name, row in rows.items()]
    table = markdown_table(["model", *(column for column, _ in costs.values())], cells)
    print(f"{title}, median of {args.rounds} rounds\n\n{table}")
    if args.figure:
        save(draw_costs(rows, costs, title), args.figure)


def best_accuracies(runs, model_types):
    """{model type: best accuracy over its runs, as fractions}. Raises UserError for a run of another model."""
    best = {}
    for run in runs:
        flags, metrics = read_run(run)
        name = flags["model_type"]
        if name not in model_types:
            raise UserError(f"{run} is a run of {name}, which is not among the models to compare")
        # With --test_at_end all accuracies but the last are NaN.
        best[name] = max(np.nanmax(metrics[f"{evaluated_split(metrics)}_accuracy"]), best.get(name, 0.0))
    return best


def cost_text(row, key, missing=""):
    return COSTS[key][1].format(row[key]) if key in row else missing


def draw_costs(rows, costs, title):
    """One panel of bars per column of the table, with one bar per model."""
    figure = Figure(figsize=(2.2 + 2.3 * len(costs), 1.2 + 0.4 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(costs), sharey=True)
    colours = [OKABE_ITO[i % len(OKABE_ITO)] for i in range(len(rows))]
    for axes, (key, (column, _)) in zip(panels, costs.items(), strict=True):
        values = [row.get(key, 0) for row in rows.values()]
        bars = axes.barh(list(rows), values, color=colours)
        axes.bar_label(bars, [cost_text(row, key, "no run") for row in rows.values()], padding=3, fontsize="small")
        axes.set_title(column.replace(" (", "\n("), fontsize="medium")
        axes.set_xlim(0, 1.3 * max(values))
        axes.set_xticks([])
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.suptitle(title, fontsize="medium")
    return figure


if __name__ == "__main__":
    run_script(main)
