"""Train with all combinations of some flags' values, several seeds each, and choose the best by the validation set.

The results are a table (table.md, table.csv) and a figure (sweep.png) of the metric after the last step, its mean and
range over the seeds. Test results are reported for the chosen combination alone. Several GPUs share the runs; otherwise
they run one after another. The same command resumes an interrupted sweep and tries failed runs again; finished runs are
not repeated.

    python scripts/sweep.py --grid learning_rate=0.003,0.01,0.03 --seeds 0 1 2 -- --dataset digits --val_split 0.2
"""

import csv
import shlex
import statistics
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from experiment import OWN_FLAGS, TRAIN, flags_in, own_and_further, print_unfinished, refuse_flags, seeds_text

from utils.checks import make_output_folder
from utils.curves import plot_grid
from utils.data.datasets import DATASETS, DataOptions, read_split, training_splits
from utils.data.splits import NAMES
from utils.errors import UserError, run_script
from utils.figures import save
from utils.flag_types import Parser, seed
from utils.grids import (
    best_point,
    check_grid,
    folder_name,
    grid_points,
    parse_grid,
    point_arguments,
    point_text,
    value_text,
)
from utils.metrics import BEST_METRICS, wilson_interval
from utils.parallel.processes import device_name, one_process
from utils.profiling import markdown_table
from utils.records.result import read_result
from utils.records.run_folder import CONFIG, is_finished
from utils.sweeps import check_plan, data_name, mean_and_range, plan_run, raise_failures, run_unfinished

SWEEP_FLAGS = {
    **OWN_FLAGS,
    "--seed": "give --seeds before --",
    "--output_dir": "give it before --",
    "--mode": "a sweep trains",
}


def main():
    args, further = parse_flags()
    grid = parse_grid(args.grid, TRAIN.parser)
    for name in grid:
        if f"--{name}" in flags_in(further):
            raise UserError(f"--{name} is in --grid and after --; give it once")
    runs = plan(args, grid, further)
    check_plan(TRAIN, runs.values(), files=not args.dry_run)
    check_grid(grid, runs)
    if args.dry_run:
        print_unfinished(runs.values())
        return
    make_output_folder(args.output_dir, "--output_dir")
    check_splits(next(iter(runs.values())).flags)
    failed = run_unfinished(runs.values())
    finished = {key: read_result(run.folder) for key, run in runs.items() if is_finished(run.folder, run.flags)}
    if finished:
        metric = next(iter(runs.values())).flags.best_metric
        report(outcome_of(grid, args.seeds, metric, finished), runs, args.output_dir)
    raise_failures(failed, len(runs))


def parse_flags():
    """The parsed flags of the sweep, and those after `--`, which are for train.py."""
    parser = Parser(__doc__)
    parser.epilog = "The flags of train.py follow after --; they are the same for all runs."
    group = parser.add_argument_group("sweep")
    group.add_argument(
        "--grid",
        nargs="+",
        required=True,
        metavar="FLAG=VALUES",
        help="Flags of train.py with their values, separated by commas: learning_rate=0.01,0.03 horizontal_flip=true,"
        "false rand_augment='2 9,2 15'.",
    )
    group.add_argument(
        "--seeds", type=seed, nargs="+", default=[0], metavar="N", help="One run of each combination per seed."
    )
    group.add_argument(
        "--output_dir",
        type=Path,
        default="output/sweep",
        metavar="DIR",
        help="The folder of the runs, the table and the figure.",
    )
    group.add_argument(
        "--dry_run", action="store_true", help="Print the commands of the unfinished runs and start nothing."
    )
    own, further = own_and_further()
    args, unknown = parser.parse_known_args(own)
    if unknown:
        raise UserError(f"unrecognized arguments: {' '.join(unknown)}; the flags of train.py follow after --")
    for number, count in Counter(args.seeds).items():
        if count > 1:
            raise UserError(f"--seeds: {number} is given {count} times")
    refuse_flags(further, SWEEP_FLAGS)
    return args, further


def plan(args, grid, further):
    """{(point of the grid, seed): Run}"""
    runs = {}
    for point in grid_points(grid):
        arguments = [*point_arguments(grid, point, TRAIN.parser), *further]
        for number in args.seeds:
            flags = {"name": f"{folder_name(grid, point)}-seed{number}", "seed": number, "output_dir": args.output_dir}
            runs[point, number] = plan_run(TRAIN, flags, arguments)
    return runs


def check_splits(flags):
    """Raise UserError, before each run fails, if a folder of images can't be divided by the flags of all runs.

    Prints a warning if there are no validation images to choose by.
    """
    options = DataOptions.from_flags(flags)
    if DATASETS[flags.dataset].in_folders:
        read_split(flags.dataset, "train", options, one_process()._replace(rank=1))  # quiet, as each run prints a note
    if "val" not in training_splits(flags.dataset, options):
        print("warning: there are no validation images, so the best is chosen on the test set; see --val_split")


class Outcome(NamedTuple):
    """What a sweep has found."""

    grid: dict
    seeds: list
    split: str  # "val" or "test", whose `metric` after the last step chooses
    metric: str
    values: dict  # {point: {seed: value of the metric}} of the finished runs
    chosen: tuple | None  # the best point of which all runs are finished
    tests: (
        dict  # {"last" or "best" step: [test metrics of each seed]} of the chosen point, if it was chosen without them
    )

    @property
    def what(self):
        return f"{NAMES[self.split]} {BEST_METRICS[self.metric].title}"

    def complete(self):
        """{point: values} of the points of which all runs are finished."""
        return {point: list(found.values()) for point, found in self.values.items() if len(found) == len(self.seeds)}


def outcome_of(grid, seeds, metric, finished):
    """The Outcome of the finished runs, {(point, seed): result.json}."""
    split = "val" if "val" in next(iter(finished.values()))["last"] else "test"
    values = {
        point: {
            number: finished[point, number]["last"][split][metric] for number in seeds if (point, number) in finished
        }
        for point in grid_points(grid)
    }
    outcome = Outcome(grid, seeds, split, metric, values, None, {})
    if not outcome.complete():
        return outcome
    chosen = best_point(outcome.complete(), metric)
    results = [finished[chosen, number] for number in seeds]
    has_tests = split == "val" and "test" in results[0]["last"]
    tests = {step: [result[step]["test"] for result in results] for step in ("last", "best")} if has_tests else {}
    return outcome._replace(chosen=chosen, tests=tests)


def report(outcome, runs, output_dir):
    """Write table.csv, table.md and sweep.png of the Outcome of {(point, seed): Run}, and print the table."""
    flags = next(iter(runs.values())).flags
    model = "" if "model_type" in outcome.grid else f"{flags.model_type} on "
    title = f"{model}{data_name(flags)}: {outcome.what} after the last step, {seeds_text(outcome.seeds)}"
    lines = [f"{title}; {device_name()}, torch {torch.__version__}", ""]
    lines += [markdown_table([*outcome.grid, outcome.what, ""], table_rows(outcome)), "", *conclusion(outcome)]
    files = ["table.md", "table.csv"]
    if outcome.chosen:
        config = runs[outcome.chosen, outcome.seeds[0]].folder / CONFIG
        lines += ["", f"To repeat it: `python train.py --config {shlex.quote(str(config))} --name NAME`"]
        figure = plot_grid(outcome.grid, outcome.complete(), outcome.chosen, outcome.metric, outcome.what, title)
        save(figure, output_dir / "sweep.png")
        files.append("sweep.png")
    text = "\n".join(lines)
    (output_dir / "table.md").write_text(f"{text}\n")
    with open(output_dir / "table.csv", "w", newline="") as file:
        csv.writer(file).writerows(csv_rows(outcome))
    print(f"\n{text}\n\nin {output_dir}: {', '.join(files)}", flush=True)


def table_rows(outcome):
    """The cells of table.md: a row per point, in the order of the grid."""
    for point, found in outcome.values.items():
        cell = mean_and_range(found.values(), outcome.metric) if found else "failed"
        if 0 < len(found) < len(outcome.seeds):
            cell += f", {len(found)} of {len(outcome.seeds)} seeds"
        yield [*map(value_text, point), cell, "chosen" if point == outcome.chosen else ""]


def csv_rows(outcome):
    """The rows of table.csv, which begin with its titles; loss in nats, other metrics as fractions."""
    name = f"{outcome.split}_{outcome.metric}"
    parts = ("mean", "min", "max")
    tests = [test[outcome.metric] for test in outcome.tests.get("last", ())]
    titles = [f"{name}_{part}" for part in parts] + [f"{name}_seed{number}" for number in outcome.seeds] + ["chosen"]
    yield [*outcome.grid, *titles, *(f"test_{outcome.metric}_{part}" for part in parts if tests)]
    for point, found in outcome.values.items():
        row = [*map(value_text, point), *summary(found.values()), *(found.get(number) for number in outcome.seeds)]
        is_chosen = point == outcome.chosen
        yield [*row, int(is_chosen), *(summary(tests if is_chosen else ()) if tests else ())]


def summary(values):
    """(mean, lowest, highest) of the values, or empty cells without any."""
    return (statistics.mean(values), min(values), max(values)) if values else (None, None, None)


def conclusion(outcome):
    """Lines that say which point is chosen, on which split, and what it reaches on the test set."""
    if not outcome.chosen:
        return ["Nothing is chosen: no combination has finished with all seeds."]
    lines = [f"Chosen by the mean {outcome.what}: {point_text(outcome.grid, outcome.chosen)}."]
    if not outcome.tests:
        lines.append(f"It is chosen on the {NAMES[outcome.split]} set: optimistic.")
    for step, tests in outcome.tests.items():
        where = "after the last step" if step == "last" else f"with each run's weights of the best {outcome.what}"
        accuracies = [test["accuracy"] for test in tests]
        low, high = wilson_interval(statistics.mean(accuracies), tests[0]["images"])
        text = f"Test accuracy {where}: {mean_and_range(accuracies)}"
        text += f" on {tests[0]['images']} images (95 % interval {100 * low:.1f} to {100 * high:.1f})"
        if outcome.metric != "accuracy":
            text += f"; {BEST_METRICS[outcome.metric].title} "
            text += mean_and_range([test[outcome.metric] for test in tests], outcome.metric)
        lines.append(f"{text}.")
    return lines


if __name__ == "__main__":
    run_script(main)
