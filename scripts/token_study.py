"""Accuracy against speed: a ViT without token reduction, with facility location, with ToMe, and its Conformer.

All are trained from scratch in the same way on a part of CIFAR-10 at 32x32, about five minutes per run on a CPU core.
Then their training steps are timed, interleaved. The results are one table and one figure of accuracy over images/s.
The same command resumes an interrupted experiment; finished runs are not repeated.

    python scripts/token_study.py --seeds 0 1
"""

import statistics

import numpy as np
import torch
from experiment import RECIPE, add_experiment_flags, finish_runs, plan_from_scratch
from matplotlib.figure import Figure

from benchmarks.steps import EVERY_BLOCK, TimedStep, choice_of_tokens, reduction_grid
from command_line import model_maker
from models.configs import VITS
from models.token_reduction import REDUCTION_METHODS
from utils.checks import check_figure_path
from utils.data.splits import NAMES
from utils.errors import run_script
from utils.figures import OKABE_ITO, save, style_axes, wrap_text
from utils.flag_groups import add_token_reduction_grid_flags
from utils.flag_types import Parser, one_of
from utils.parallel.processes import choose_device, device_name
from utils.profiling import markdown_table, time_interleaved, token_reduction_cells
from utils.records.run_folder import last_accuracy, read_config
from utils.sweeps import mean_and_range

ROUNDS = 5
NO_REDUCTION = ("none", "all")
LABELS = {
    "none": "ViT, all patches",
    "facility": "facility location",
    "tome": "ToMe",
    EVERY_BLOCK: "ToMe in every block",
}


def main():
    args = parse_flags()
    grid = reduction_grid(args.model_type, args.keep_tokens, args.reduction_layer, args.tome_r)
    plan = {(name, number): plan_model(args, number, *grid[name]) for number in args.seeds for name in grid}
    finish_runs(list(plan.values()))
    seconds = time_steps({name: plan[name, args.seeds[0]] for name in grid})
    last = {name: [last_accuracy(plan[name, number].folder) for number in args.seeds] for name in grid}
    accuracies = {name: [accuracy for _, accuracy in found] for name, found in last.items()}
    label = f"{NAMES[last[NO_REDUCTION][0][0]]} accuracy"
    title = (
        f"{args.model_type} at {args.img_size}x{args.img_size}, tokens reduced after block {args.reduction_layer} of "
        f"{VITS[args.model_type].num_layers}, training step, batch {args.train_batch_size}, bf16 at level "
        f"{RECIPE['fp16_opt_level']}\n{device_name()}, {torch.get_num_threads()} CPU threads, torch "
        f"{torch.__version__}, median of {ROUNDS} rounds"
    )
    titles, cells = token_reduction_cells(grid, seconds, args.train_batch_size)
    rows = [[*cells[name], mean_and_range(accuracies[name])] for name in grid]
    print(f"\n{title}\n\n{markdown_table([*titles, label], rows)}")
    speeds = {name: args.train_batch_size / statistics.median(seconds[name, "step"]) for name in grid}
    save(draw(speeds, accuracies, title, label), args.figure)


def parse_flags():
    parser = Parser(__doc__)
    group = parser.add_argument_group("experiment")
    group.add_argument("--model_type", type=one_of("ViT", VITS), default="ViT-Mini_4", metavar="NAME", help="The ViT.")
    add_token_reduction_grid_flags(group, reduction_layer=2, tome_r=[8, 11])  # about as fast as 50 and 25 % kept
    add_experiment_flags(group, "token_reduction")
    args = parser.parse_args()
    check_figure_path(args.figure, "--figure")
    return args


def plan_model(args, number, model_type, keywords):
    """The Run of one model with one seed."""
    parts = [str(keywords[key]) for key in ("token_reduction", "keep_tokens") if key in keywords]
    parts += [f"r{keywords['tome_r']}"] if "tome_r" in keywords else []
    return plan_from_scratch(args, "-".join([model_type, *parts]), number, model_type=model_type, **keywords)


def time_steps(runs):
    """Seconds per round: {(name, "step"): of the training step of a run, (name, "choice"): of its choice of tokens}."""
    device = choose_device()
    functions = {}
    for name, run in runs.items():
        torch.manual_seed(0)
        classes = len(read_config(run.folder)["classes"])
        model = model_maker(run.flags)(classes)
        step = TimedStep(model, run.flags, classes, device)
        size = (run.flags.train_batch_size, 3, run.flags.img_size, run.flags.img_size)
        batch = torch.randn(size, device=device), torch.randint(classes, size[:1], device=device)
        functions[name, "step"] = lambda step=step, batch=batch: step.train(*batch)
        if model.reduction:
            functions[name, "choice"] = choice_of_tokens(model, run.flags.train_batch_size)
    return time_interleaved(functions, ROUNDS, device)


def draw(speeds, accuracies, title, label):
    """Accuracy, called `label`, over images/s: one line per method, from all patches to the fewest."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    colours = (OKABE_ITO[-1], *OKABE_ITO)  # the ViT without reduction is black
    for number, method in enumerate(dict.fromkeys(method for method, _ in accuracies)):
        names = [name for name in accuracies if name[0] == method]
        colour = colours[number % len(colours)]
        x = [speeds[name] for name in names]
        values = [[100 * value for value in accuracies[name]] for name in names]
        low, y, high = (np.array(list(map(summary, values))) for summary in (min, statistics.mean, max))
        if method in (*REDUCTION_METHODS, EVERY_BLOCK):
            start = 100 * statistics.mean(accuracies[NO_REDUCTION])
            axes.plot([speeds[NO_REDUCTION], x[0]], [start, y[0]], ":", color=colour, lw=1)
        axes.errorbar(x, y, (y - low, high - y), marker="o", color=colour, capsize=3, label=LABELS.get(method, method))
        offset = {"xytext": (5, -13 if number % 2 else 6), "textcoords": "offset points"}
        for (_, kept), *place in zip(names, x, y, strict=True):
            axes.annotate(str(kept), place, fontsize="small", color=colour, **offset)
    axes.set(xlabel="training step (images/s)", ylabel=f"{label} (%)")
    axes.margins(0.12)
    axes.legend(frameon=False, title="numbers: patches kept")
    style_axes(axes)
    figure.suptitle(wrap_text(title, 90), fontsize="small")
    return figure


if __name__ == "__main__":
    run_script(main)
