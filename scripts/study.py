"""What the studies with results in results/ share: contenders with a learning rate of their own, several seeds each.

Each contender is trained shortly with each learning rate of one grid and judged by validation images. The final runs
use the rate with the best accuracy and all training images, and are tested once, after their last step. Each run leaves
one file in results/<study>/, and whatever has such a file is not run again. Tables and figures are drawn from these
files alone.
"""

import math
import shlex
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from experiment import TRAIN
from study_speed import measured_times

from command_line import model_maker
from utils.data.datasets import DATASETS, DataOptions
from utils.errors import DIVERGED, UserError
from utils.figures import save
from utils.flag_types import one_of, positive, positive_float, seed
from utils.profiling import count_flops, count_parameters, count_training_flops
from utils.recipes import training_images
from utils.records.files import replace_file
from utils.records.run_folder import is_finished, read_config
from utils.study_figures import plot_budgets
from utils.study_records import (
    FINAL,
    GRID,
    best_rate,
    check_comparable,
    complete_record,
    file_name,
    grid_of,
    group_name,
    grouped,
    portable,
    portable_flags,
    read_records,
    write_record,
)
from utils.study_tables import read_times, report_of
from utils.sweeps import Run, check_plan, data_name, plan_run, raise_failures, run_unfinished

ROOT = Path(__file__).resolve().parent.parent
WARMUP = 0.05  # share of the steps
INTERVALS = 20  # training metrics per final run
SAVES = 4  # checkpoints per short run
GRID_VALIDATION = 0.1  # share of the training images that judge the short runs
LEARNING_RATES = (3e-3, 1e-2, 3e-2)
DERIVED = ("num_steps", "warmup_steps", "eval_every", "save_every")  # flags that follow from the batch size
SCRATCH = {  # the recipe of small models from scratch at 32x32: as --recipe scratch, but with a rate per contender
    "horizontal_flip": True,
    "optimizer": "muon",
    "weight_decay": 0.5,
    "label_smoothing": 0.1,
    "bf16": True,
    "fp16_opt_level": "O2",
    "crop_padding": 4,
    "eval_batch_size": 250,
}


class Study(NamedTuple):
    """Contenders that are compared in one table."""

    name: str  # of the folder in results/
    contenders: dict  # {name: {flag of train.py: value}}
    reference: str  # the contender with which the others are compared
    recipe: dict = SCRATCH  # {flag of train.py: value} of all contenders
    labels: dict = {}  # what distinguishes this study's tables from others in the same folder, {"question": name}
    grid_flags: dict = {"val_split": GRID_VALIDATION}  # flags of train.py for the short runs alone
    recorded: dict = {}  # {flag of train.py: what results say in place of its value, as of a path}
    seed_flags: tuple = ()  # further flags of train.py whose value is the seed of a run
    final_flags: dict = {}  # flags of train.py for the final runs alone, which their table is labelled with
    budget: dict = {}  # {flag of the study: value}, such as epochs, in place of those given
    timed: Callable | None = None  # (model, batch size) -> {what: function} to be timed besides the step


class Planned(NamedTuple):
    """A run whose results are to be written to `path`."""

    path: Path
    entry: dict  # what is known of its record
    run: Run


def add_study_flags(parser, name, learning_rates=LEARNING_RATES, has_budget=False):
    """The flags of a study with results in results/<name>/; one that `has_budget` sets epochs and batch size itself."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset",
        type=one_of("dataset", DATASETS),
        default="cifar10",
        metavar="NAME",
        help="The data set, as for train.py.",
    )
    group.add_argument("--data_dir", default="data", metavar="DIR", help="Its folder, as for train.py.")
    group.add_argument("--data_note", metavar="TEXT", help="What the data is, for the results; default: its name.")
    group.add_argument("--img_size", type=positive, default=32, metavar="PIXELS", help="Side of the images in pixels.")
    group = parser.add_argument_group("budget")
    if not has_budget:
        group.add_argument("--epochs", type=positive_float, default=10, metavar="N", help="Passes of a final run.")
        group.add_argument("--grid_epochs", type=positive_float, default=3, metavar="N", help="Passes of a short run.")
        group.add_argument("--train_batch_size", type=positive, default=128, metavar="N", help="Images per step.")
    group.add_argument(
        "--learning_rates",
        type=positive_float,
        nargs="+",
        default=list(learning_rates),
        metavar="LR",
        help="The grid, from which short runs choose; a single one is used without them.",
    )
    group.add_argument(
        "--seeds", type=seed, nargs="+", default=[0, 1, 2], metavar="N", help="One final run per contender and seed."
    )
    if not has_budget:
        group.add_argument("--contenders", nargs="+", metavar="NAME", help="Run these contenders only; default: all.")
    group.add_argument(
        "--jobs",
        type=positive,
        default=1,
        metavar="N",
        help="Runs at a time, on each GPU or on the CPU.",
    )
    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", default=f"output/{name}", metavar="DIR", help="The folder of the runs.")
    group.add_argument(
        "--results", type=Path, default=f"results/{name}", metavar="DIR", help="The folder of their results."
    )
    group.add_argument("--draw", action="store_true", help="Start no run; draw tables and figures from the results.")
    group.add_argument("--dry_run", action="store_true", help="Print the commands of the missing runs; start nothing.")


def run_studies(studies, args):
    """Run what has no results yet of the Studies, or with --draw nothing, then draw. Raises UserError."""
    if not args.draw:
        for study in studies:
            of_study = Namespace(**{**vars(args), **study.budget})
            run_study(chosen_contenders(study, args.contenders), of_study)
    if not args.dry_run:
        draw(args.results, list(dict.fromkeys(name for study in studies for name in study.contenders)))


def chosen_contenders(study, names):
    """The study with the contenders of these names alone. Raises UserError for an unknown one."""
    for name in names or ():
        if name not in study.contenders:
            raise UserError(f"--contenders: there is no {name}; there are {', '.join(study.contenders)}")
    return study._replace(contenders={name: study.contenders[name] for name in names or study.contenders})


def run_study(study, args):
    """The short runs of a Study, then its final runs with the learning rates that those have chosen.

    Returns {contender: learning rate}, in a dry run without contenders whose short runs are missing. Raises UserError.
    """
    for number, count in Counter(args.seeds).items():
        if count > 1:
            raise UserError(f"--seeds: {number} is given {count} times")
    grid = []
    if len(args.learning_rates) > 1:
        grid = [plan_grid(study, args, name, rate) for name in study.contenders for rate in args.learning_rates]
        finish(grid, args)
    found = read_records(args.results).values()
    rates = dict.fromkeys(study.contenders, args.learning_rates[0])
    for name in study.contenders if grid else ():
        measured = grid_of(found, name, grid_labels(study, args))
        if args.dry_run and len(measured) < len(args.learning_rates):
            print(f"# {name}: {len(args.seeds)} final runs follow when the short runs have chosen a learning rate")
            del rates[name]
        else:
            rates[name] = best_rate(measured)
    finals = [plan_final(study, args, name, rates[name], number) for number in args.seeds for name in rates]
    finish(finals, args)
    time_steps(finals[: len(rates)], args, study.timed)
    return rates


def time_steps(planned, args, timed=None):
    """Time the contenders of these Planned final runs, one of each, unless that is done; `timed` as in Study."""
    if planned and not args.dry_run:
        measured_times(planned, args.jobs, timed)


def grid_labels(study, args):
    return {**study.labels, "epochs": text_of(args.grid_epochs)}


def text_of(number):
    """A number without a decimal point where it is whole."""
    return int(number) if number == int(number) else number


def plan_grid(study, args, name, rate):
    """The Planned short run of a contender."""
    division = {**study.grid_flags, "no_test": True}
    return plan(study, args, GRID, name, grid_labels(study, args), rate, 0, args.grid_epochs, division)


def plan_final(study, args, name, rate, number):
    """The Planned final run of a contender with a seed."""
    labels = {**study.labels, "epochs": text_of(args.epochs), **study.final_flags}
    return plan(study, args, FINAL, name, labels, rate, number, args.epochs, {"test_at_end": True}, study.final_flags)


def plan(study, args, kind, name, labels, rate, number, epochs, division, further=()):
    """A Planned run; its number of steps is that of `epochs` over all training images."""
    own = study.contenders[name]
    flags = {key: getattr(args, key) for key in ("dataset", "data_dir", "img_size", "train_batch_size")}
    flags |= {**study.recipe, **own, **division, "learning_rate": rate}
    flags |= dict.fromkeys(("seed", *study.seed_flags), number)
    options = DataOptions.from_flags(Namespace(**flags))
    steps = max(1, math.ceil(epochs * training_images(flags["dataset"], options).count / flags["train_batch_size"]))
    derived = {"num_steps": steps, "warmup_steps": max(1, round(WARMUP * steps))}
    derived["eval_every"] = max(1, math.ceil(steps / INTERVALS)) if kind == FINAL else steps
    derived["save_every"] = max(1, math.ceil(steps / SAVES))
    own = {key: portable(value, ROOT) for key, value in own.items()} | {
        key: derived[key] for key in DERIVED if "train_batch_size" in own
    }
    recorded = {key: value for key, value in study.recorded.items() if key in own}
    own |= recorded
    entry = {"study": study.name, "kind": kind, "contender": name, "contender_flags": own}
    entry |= {"reference": study.reference, "group": labels, "seed": number}
    entry |= {"data": args.data_note or data_name(args), "flags": {"learning_rate": rate}}
    file = file_name(entry)
    run_flags = {"name": file.removesuffix(".json"), "output_dir": args.output_dir, **derived, **flags, **dict(further)}
    run = plan_run(TRAIN, {key: value for key, value in run_flags.items() if value is not None})
    entry["flags"] = portable_flags(run.flags, ROOT) | recorded
    return Planned(args.results / file, entry, run)


def finish(planned, args):
    """Run what has no results yet. Raises UserError, before any run, if results could not share a table."""
    records = read_records(args.results)
    check_comparable({**{each.path: each.entry for each in planned}, **records})
    check_unchanged(planned, records)
    missing = [each for each in planned if each.path not in records]
    check_plan(TRAIN, [each.run for each in missing], files=not args.dry_run)
    if args.dry_run:
        for each in missing:
            print(shlex.join(each.run.command))
        return
    for each in missing:
        if is_finished(each.run.folder, each.run.flags):
            write_results(each, args.jobs)
    to_run = {each.run.folder: each for each in missing if not each.path.exists()}

    def ended(run, status):
        diverged = status == DIVERGED
        if diverged or is_finished(run.folder, run.flags):
            write_results(to_run[run.folder], args.jobs, diverged)

    print(f"{len(planned)} runs of {args.results}, {len(planned) - len(to_run)} of them have results", flush=True)
    failed = run_unfinished([each.run for each in to_run.values()], args.jobs, ended) if to_run else {}
    without = {each.run.flags.name for each in to_run.values() if not each.path.exists()}
    raise_failures({name: reason for name, reason in failed.items() if name in without}, len(planned))


def check_unchanged(planned, records):
    """Raise UserError if results were made with other flags, such as a learning rate that is not chosen any more."""
    for each in planned:
        found = records[each.path]["flags"] if each.path in records else {}
        for name, value in found.items():
            wanted = each.entry["flags"].get(name, value)
            if value != wanted:
                raise UserError(f"{each.path} has --{name} {value}, not {wanted}; remove it, or give another --results")


def write_results(planned, at_once, diverged=False):
    """Write the record of a run that has ended."""
    record = complete_record(planned.entry, planned.run.folder, at_once, diverged)
    model = costs_of(planned.run.flags, len(read_config(planned.run.folder)["classes"]))
    write_record(planned.path, {**planned.entry, "model": model, **record})


def costs_of(flags, classes):
    """{"parameters", "flops", "training_flops"}, the FLOPs for one image, of the model of a run's flags."""
    with torch.device("meta"):
        model = model_maker(flags)(classes)
    costs = {"parameters": count_parameters(model), "flops": count_flops(model.eval(), flags.img_size)}
    return costs | {"training_flops": count_training_flops(model.train(), flags.img_size)}


def draw(folder, order):
    """Draw tables and figures from the results in a folder, contenders in this order. Raises UserError."""
    groups = grouped(read_records(folder))
    if not groups:
        raise UserError(f"{folder} has no results; run the study without --draw first")
    times = {key: read_times(folder, next(iter(records.values()))) for key, records in groups.items()}
    report = report_of(groups, order, times)
    replace_file(folder / "table.md", lambda path: path.write_text(report))
    print(f"\n{report}\ntable: {folder / 'table.md'}")
    for (kind, text), records in groups.items():
        finished = [record for record in records.values() if kind == FINAL and not record["diverged"]]
        if finished:
            path = folder / f"{group_name(finished[0])}.png"
            save(plot_budgets(finished, f"{finished[0]['data']}, {text}", order, times[kind, text]), path)
            print(f"figure: {path}")
