"""What does pretraining change? Pretrain on five classes of CIFAR-10, then learn the other five from few images.

The other classes are learned from scratch, by fine-tuning, and by simple classifiers of the frozen features, from 10,
100 and 1,000 images per class. Each run leaves one file in results/pretraining_study/, from which the tables and
figures are drawn. The same command resumes; what has a file is not run again.

    python scripts/pretraining_study.py --models ViT-Mini_4
"""

from argparse import Namespace
from typing import NamedTuple

import numpy as np
import torch
from study import SCRATCH, Study, add_study_flags, costs_of, draw, plan_final, run_study, text_of
from study_pretraining import Pretraining, add_pretraining_flags, check_classes

from inference import SavedModel
from utils.data.datasets import DataOptions, load_dataset
from utils.errors import UserError, run_script
from utils.features import extract_features
from utils.few_shot import CLASSIFIERS
from utils.few_shot_figure import plot_over_images
from utils.figures import save
from utils.flag_types import Parser, one_of, positive, share
from utils.parallel.processes import choose_device, device_name, one_process
from utils.profiling import markdown_table
from utils.recipes import training_images
from utils.records.files import replace_file
from utils.records.run_folder import commit_of_code
from utils.study_records import FINAL, read_records, write_record
from utils.study_tables import accuracies_of, by_contender, difference_text, summary_table

NAME = "pretraining_study"
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
GRID_SHARE = 0.5  # passes of a short run, relative to a final one
SCRATCH_RUN, FINE_TUNED = "scratch", "fine-tuned"
PROBES = {f"frozen, {name}": name for name in CLASSIFIERS}
ORDER = (SCRATCH_RUN, FINE_TUNED, *PROBES)


class Size(NamedTuple):
    """How the runs with one number of training images per class are trained and their learning rates chosen."""

    epochs: int
    train_batch_size: int
    grid_images: int  # training images per class of a short run
    validation: int  # images per class that judge it


# With 10 and 100 images per class 100 further ones judge the short runs: a fifth of so few could not rank learning
# rates. With 1,000 a fifth of them judges.
SIZES = {
    10: Size(epochs=300, train_batch_size=50, grid_images=10, validation=100),
    100: Size(epochs=100, train_batch_size=100, grid_images=100, validation=100),
    1000: Size(epochs=20, train_batch_size=100, grid_images=800, validation=200),
}
MODELS = {"ViT-Mini_4": tuple(SIZES), "R26-ViT-Mini_4": (100,), "ResNet-Mini_Params": (100,)}  # {model: its sizes}


def main():
    args = parse_flags()
    if not args.draw:
        check_earlier_budgets(args)
        for model in args.models:
            run_model(model, args)
    if not args.dry_run:
        draw(args.results, ORDER)
        summarise(args.results)


def parse_flags():
    parser = Parser(__doc__)
    add_study_flags(parser, NAME, LEARNING_RATES, has_budget=True)
    group = parser.add_argument_group("question")
    group.add_argument(
        "--models",
        type=one_of("model", MODELS),
        nargs="+",
        default=list(MODELS)[:1],
        metavar="NAME",
        help=f"The models: {', '.join(MODELS)}; default: the first.",
    )
    group.add_argument(
        "--sizes",
        type=positive,
        nargs="+",
        metavar="N",
        help=f"Training images per class: {', '.join(map(str, SIZES))}; default: all for the first model, else 100.",
    )
    add_pretraining_flags(group)
    group.add_argument(
        "--budget", type=share, default=1.0, metavar="SHARE", help="The share of all passes, to try the script."
    )
    args = parser.parse_args()
    check_classes(args)
    for size in args.sizes or ():
        if size not in SIZES:
            raise UserError(f"--sizes {size}: there is no number of steps for it; give {', '.join(map(str, SIZES))}")
    return args


def run_model(model, args):
    """All runs of a model that have no results: its pretraining, then each size."""
    pretraining = Pretraining(NAME, model, args, args.pretraining_epochs * args.budget)
    weights = pretraining.weights
    studies = {size: transfer_study(model, size, str(weights), args) for size in args.sizes or MODELS[model]}
    with pretraining.trained():
        for size, study in studies.items():
            study = study._replace(recorded=pretraining.recorded())
            of_size = with_budget(args, SIZES[size].epochs, train_batch_size=SIZES[size].train_batch_size)
            run_study(study, of_size)
            run_probes(study, weights, of_size)


def with_budget(args, epochs, **values):
    """The args with these values, and with numbers of passes scaled by --budget."""
    epochs *= args.budget
    return Namespace(**{**vars(args), **values, "epochs": epochs, "grid_epochs": GRID_SHARE * epochs})


def transfer_study(model, size, weights, args):
    """The Study of the target classes with this number of training images per class, drawn by the seed of a run."""
    found = training_images(args.dataset, DataOptions(args.data_dir, classes=tuple(args.target))).count
    needed = max(size, SIZES[size].grid_images + SIZES[size].validation)
    if found < needed * len(args.target):
        raise UserError(f"--sizes {size}: it needs {needed} training images per class, {args.dataset} has fewer")
    validation = SIZES[size].validation * len(args.target) / found
    return Study(
        NAME,
        {SCRATCH_RUN: {}, FINE_TUNED: {"pretrained_dir": weights}},
        reference=SCRATCH_RUN,
        recipe={**SCRATCH, "model_type": model, "classes": args.target, "examples_per_class": size},
        labels={"model": model, "images per class": size},
        grid_flags={"val_split": round(validation, 6), "examples_per_class": SIZES[size].grid_images},
        seed_flags=("split_seed",),
    )


def run_probes(study, weights, args):
    """Classify by the frozen features of the pretrained model: a result per classifier and seed, if it is missing."""
    planned = [plan_probe(study, args, name, number) for number in args.seeds for name in PROBES]
    missing = [each for each in planned if not each.path.exists()]
    if args.dry_run:
        print(f"# {len(missing)} of {len(planned)} probes of frozen features follow")
    if not missing or args.dry_run:
        return
    saved, processes = SavedModel.load(weights), one_process(choose_device())
    features = {}
    for each in missing:
        options = DataOptions.from_flags(each.run.flags)._replace(mean_std=saved.mean_std)
        for split, key in (("test", "test"), ("train", each.entry["seed"])):
            if key not in features:
                images = load_dataset(args.dataset, split, options, processes)
                flags = Namespace(eval_batch_size=250, fp16=False, bf16=False)
                features[key] = extract_features(saved, images, flags, processes)
        record = probe_record(each, features[each.entry["seed"]], features["test"])
        write_record(each.path, record)
    print(f"{len(missing)} probes of the frozen features of {weights}", flush=True)


def plan_probe(study, args, name, number):
    """The Planned result of a probe: that of fine-tuning, without training."""
    own = study.contenders[FINE_TUNED]
    planned = plan_final(study._replace(contenders={name: own}), args, name, args.learning_rates[0], number)
    entry = planned.entry
    probe = {"classifier": PROBES[name]}
    flags = {**entry["flags"], "learning_rate": 0.0, **probe}
    return planned._replace(entry={**entry, "contender_flags": entry["contender_flags"] | probe, "flags": flags})


def probe_record(planned, train, test):
    """The record of a probe, from pairs of features and labels."""
    entry = planned.entry
    predictions = CLASSIFIERS[PROBES[entry["contender"]]].predict(*train, test[0])
    count = len(np.unique(test[1]))
    accuracy = (predictions == test[1]).mean().item()
    return {
        **entry,
        "model": costs_of(planned.run.flags, count),
        "num_steps": 0,
        "images": {"train": len(train[1]), "test": len(test[1])},
        "classes": count,
        "diverged": False,
        "result": {"last": {"step": 0, "test": {"accuracy": accuracy, "images": len(test[1])}}},
        "hardware": {
            "device": device_name(),
            "threads": None if torch.cuda.is_available() else torch.get_num_threads(),
            "runs_at_once": 1,
        },
        "torch": torch.__version__,
        "commit": commit_of_code(),
        "metrics": {"step": [], "train_accuracy": []},
    }


def summarise(folder):
    """Write summary.md and a figure per model: accuracy over the number of training images, from the results."""
    records, parts = read_records(folder).values(), []
    for model in MODELS:
        of_model = finals_of(records, model)
        check_one_budget(of_model, folder)
        if not of_model:
            continue
        sizes = sorted({record["group"]["images per class"] for record in of_model})
        of_size = {
            size: by_contender([each for each in of_model if each["group"]["images per class"] == size], ORDER)
            for size in sizes
        }
        title = f"{model} on {of_model[0]['data']}"
        columns = {f"{size:,} images per class": found for size, found in of_size.items()}
        parts.append(f"## {title}\n\n{summary_table(columns, SCRATCH_RUN, ORDER)}\n")
        accuracies = {name: {} for name in ORDER}
        for size, found in of_size.items():
            for name, records in found.items():
                if of_seeds := accuracies_of(records):
                    accuracies[name][size] = of_seeds
        parts.append(f"{over_frozen(accuracies, sizes)}\n")
        path = folder / f"images-{model}.png"
        save(plot_over_images(accuracies, f"{title}: classes that the pretraining did not see", "test"), path)
        print(f"figure: {path}")
    text = "\n".join(parts)
    replace_file(folder / "summary.md", lambda path: path.write_text(text))
    print(f"\n{text}\nsummary: {folder / 'summary.md'}")


def over_frozen(accuracies, sizes):
    """Markdown: paired differences of fine-tuning from each classifier of {contender: {size: {seed: accuracy}}}."""
    rows = []
    for name in PROBES:
        pairs = [(accuracies[FINE_TUNED].get(size, {}), accuracies[name].get(size, {})) for size in sizes]
        rows.append([name, *(difference_text(*pair) for pair in pairs)])
    columns = [f"{size:,} images per class" for size in sizes]
    return markdown_table([f"points of {FINE_TUNED} over (95 % interval)", *columns], rows)


def finals_of(records, model):
    """The records of final runs and probes of a model."""
    finals = [record for record in records if record["kind"] == FINAL and record["contender"] in ORDER]
    return [record for record in finals if record["group"].get("model") == model]


def check_earlier_budgets(args):
    """`check_one_budget` of the results that are there and those to come."""
    planned = []
    for model in args.models:
        for size in args.sizes or MODELS[model]:
            epochs = text_of(with_budget(args, SIZES[size].epochs).epochs)
            planned.append({"group": {"model": model, "images per class": size, "epochs": epochs}})
        check_one_budget([*planned, *finals_of(read_records(args.results).values(), model)], args.results)


def check_one_budget(records, folder):
    """Raise UserError if records of one number of images have different numbers of passes."""
    budgets = {}
    for record in records:
        size, epochs = (record["group"][name] for name in ("images per class", "epochs"))
        if budgets.setdefault(size, epochs) != epochs:
            raise UserError(
                f"{folder} has runs of {budgets[size]} and {epochs} epochs with {size} images per class; "
                "remove those of one budget, or give another --results"
            )


if __name__ == "__main__":
    run_script(main)
