"""Few-shot accuracy of a saved model: its features of a few images per class, classified by simple classifiers.

The images are drawn at random from the training set, once per seed. The classifiers are ridge regression, a linear
probe and nearest neighbours. They are evaluated on all test images, or on all validation images if there is no test
set. The results are a table (table.md, table.csv) and a figure of the accuracy over the shots (accuracy.png).

    python scripts/few_shot.py --checkpoint checkpoint/ViT-Nano_4-digits.npz --dataset digits --seeds 0 1 2
"""

import csv
from pathlib import Path

import numpy as np
import torch
from experiment import seeds_text

from inference import SavedModel
from models import canonical_model_type
from utils.checks import make_output_folder
from utils.data.datasets import DataOptions, make_data_set, read_splits, training_splits
from utils.data.splits import NAMES, draw_per_class
from utils.errors import UserError, run_script
from utils.features import extract_features
from utils.few_shot import CLASSIFIERS, check_shots
from utils.few_shot_figure import plot_over_images
from utils.figures import save
from utils.flag_groups import add_checkpoint_flags, add_data_flags, add_division_flags, add_precision_flags
from utils.flag_types import Parser, positive, seed
from utils.parallel.processes import device_name, join_processes
from utils.profiling import markdown_table
from utils.sweeps import data_name, mean_and_range


def main():
    args = parse_flags()
    make_output_folder(args.output_dir, "--output_dir")
    with join_processes() as processes:
        saved = SavedModel.load(args.checkpoint, args.model_type, args.img_size, args.download, given=vars(args))
        options = DataOptions.from_flags(args)._replace(mean_std=saved.mean_std)
        evaluated_on = training_splits(args.dataset, options)[-1]
        splits = read_splits(args.dataset, ["train", evaluated_on], options, processes)
        split = splits["train"]
        check_shots(split.labels, split.classes, max(args.shots))
        drawn = {(shots, n): draw_per_class(split.labels, shots, n) for shots in args.shots for n in args.seeds}
        rows = np.unique(np.concatenate(list(drawn.values())))
        images = make_data_set(args.dataset, split.subset(rows), options, processes)
        train = extract_features(saved, images, args, processes)
        if len(train[1]) < len(rows):
            count = len(rows) - len(train[1])
            raise UserError(
                f"{count} of the training images that were drawn can't be read; remove them from the folder"
            )
        eval_set = make_data_set(args.dataset, splits[evaluated_on], options, processes)
        test = extract_features(saved, eval_set, args, processes)
        if processes.is_first:
            drawn = {key: np.searchsorted(rows, chosen) for key, chosen in drawn.items()}
            title = f"{saved.title} on {data_name(args)}"
            report(few_shot_accuracies(train, test, drawn), title, evaluated_on, len(test[1]), args)


def parse_flags():
    parser = Parser(__doc__)
    add_checkpoint_flags(parser.add_argument_group("model"), canonical_model_type, required=True)
    data = parser.add_argument_group("data")
    add_data_flags(data, default="cifar10")
    add_division_flags(data)
    data.add_argument("--eval_batch_size", type=positive, default=64, metavar="N", help="Images per batch.")
    add_precision_flags(parser.add_argument_group("precision"))
    group = parser.add_argument_group("experiment")
    group.add_argument(
        "--shots", type=positive, nargs="+", default=[1, 5, 10, 25], metavar="N", help="Training images per class."
    )
    group.add_argument(
        "--seeds", type=seed, nargs="+", default=[0, 1, 2], metavar="N", help="One random draw of images per seed."
    )
    group.add_argument(
        "--output_dir",
        type=Path,
        default=Path("output/few_shot"),
        metavar="DIR",
        help="The folder of the table and the figure.",
    )
    args = parser.parse_args()
    args.shots = sorted(set(args.shots))
    return args


def few_shot_accuracies(train, test, drawn):
    """{classifier: {shots: {seed: accuracy}}}, without the shots that are too few for a classifier.

    `train` and `test` are pairs of features and labels, `drawn` is {(shots, seed): rows of `train`}.
    """
    accuracies = {name: {} for name in CLASSIFIERS}
    for (shots, number), rows in drawn.items():
        examples, labels = train[0][rows], train[1][rows]
        for name, classifier in CLASSIFIERS.items():
            if shots >= classifier.min_shots:
                correct = classifier.predict(examples, labels, test[0]) == test[1]
                accuracies[name].setdefault(shots, {})[number] = correct.mean().item()
    return {name: of_shots for name, of_shots in accuracies.items() if of_shots}


def report(accuracies, title, split, count, args):
    """Write table.csv, table.md and accuracy.png, and print the table; `count` images of `split` were evaluated."""
    with open(args.output_dir / "table.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["classifier", "shots", "seed", f"{split}_accuracy"])
        for name, of_shots in accuracies.items():
            writer.writerows([name, shots, *pair] for shots, of_seeds in of_shots.items() for pair in of_seeds.items())
    titles = ["classifier", *(f"{shots} shot{'s' if shots > 1 else ''}" for shots in args.shots)]
    rows = [
        [name, *(mean_and_range(of_shots[shots].values()) if shots in of_shots else "" for shots in args.shots)]
        for name, of_shots in accuracies.items()
    ]
    conditions = f"{count} {NAMES[split]} images, {seeds_text(args.seeds)}; {device_name()}, torch {torch.__version__}"
    text = f"{title}: {conditions}\n\n{markdown_table(titles, rows)}\n"
    (args.output_dir / "table.md").write_text(text)
    heading = f"few-shot accuracy of {title}, {seeds_text(args.seeds)}"
    save(plot_over_images(accuracies, heading, NAMES[split]), args.output_dir / "accuracy.png")
    print(f"{text}\nin {args.output_dir}: table.md, table.csv, accuracy.png")


if __name__ == "__main__":
    run_script(main)
