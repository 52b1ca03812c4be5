"""Evaluate a checkpoint of a run, of Google or of another library on a data set, or classify images."""

import json
from pathlib import Path

import torch

from inference import SavedModel
from models import TOKEN_REDUCTIONS, canonical_model_type
from utils.checkpoint_files import folder_of
from utils.checks import check_figure_path, check_output_path
from utils.class_names import readable_names
from utils.data.datasets import DATASETS, DataOptions, count_classes, find_splits, load_dataset
from utils.data.images import images_of
from utils.data.splits import DIVISION, NAMES, SPLITS, shares_that_apply
from utils.errors import UserError, run_script
from utils.evaluation import check_classes, evaluate_model
from utils.features import features_text, save_features
from utils.flag_groups import (
    add_checkpoint_flags,
    add_data_flags,
    add_precision_flags,
    add_token_reduction_flags,
    token_reduction_of,
)
from utils.flag_types import Parser, one_of, positive
from utils.metrics import (
    class_metrics,
    expected_calibration_error,
    frequent_confusions,
    percent,
    wilson_interval,
)
from utils.mistakes import count_mistakes, draw_mistakes, find_mistakes
from utils.parallel.processes import join_processes
from utils.predictions import classification_text, classify, image_files, labelled_by_folder

MANY_CLASSES = 20  # of more classes the text has the hardest only
FREQUENT = 10  # errors that the report names
MAX_MISTAKES = 120  # images in a figure
FIGURES = {
    "confusion_matrix": "confusion_matrix.png",
    "reliability_diagram": "reliability_diagram.png",
    "mistakes_figure": "mistakes.png",
}
FILES = {"csv": ".csv", "features": ".npz"}
MEAN_METRICS = ("balanced_accuracy", "macro_precision", "macro_recall", "macro_f1")


def main():
    args = parse_flags()
    args.images = images_of(args.images)
    with join_processes() as processes, torch.no_grad():
        reduction = token_reduction_of({}, vars(args))
        given = (args.checkpoint, args.model_type, args.img_size, args.download, reduction, vars(args))
        saved = SavedModel.load(*given, needs_head=not args.features)
        if args.features:
            report = extract(saved, args, processes)
            text = features_text(report)
        elif args.images:
            report = classify(saved.to(processes.device), args, processes)
            text = classification_text(report, args)
        else:
            report = evaluate_on_dataset(saved, args, processes)
            text = evaluation_text(report)
        if processes.is_first:
            print(json.dumps(report, indent=2) if args.json else text)


def parse_flags():
    parser = Parser(__doc__)
    parser.add_argument(
        "images",
        nargs="*",
        metavar="IMAGE",
        help="Image files, folders of them or glob patterns in quotes to classify, instead of a data set.",
    )
    group = parser.add_argument_group("model")
    add_checkpoint_flags(group, canonical_model_type, required=True)
    add_token_reduction_flags(group, TOKEN_REDUCTIONS, default="that of the run")
    data = parser.add_argument_group("data")
    add_data_flags(data, default=None)
    data.add_argument(
        "--split",
        type=one_of("split", SPLITS),
        metavar="NAME",
        help="The images to evaluate: train, val or test; default: test, or val without test images.",
    )
    data.add_argument("--eval_batch_size", type=positive, default=64, metavar="N", help="Images per batch.")
    add_precision_flags(parser.add_argument_group("precision"))
    add_output_flags(parser.add_argument_group("output"))
    args = parser.parse_args()
    check_flags(args)
    return args


def add_output_flags(output):
    """What is printed and written."""
    output.add_argument("--json", action="store_true", help="Print the results as JSON, for scripts.")
    output.add_argument(
        "--csv", metavar="CSV", help="Write the classes of the image files to this file, one row per image."
    )
    output.add_argument(
        "--features",
        metavar="NPZ",
        help="Write the features before the head, the labels and the file names to this file, in place of the "
        "evaluation or the classes.",
    )
    output.add_argument(
        "--confusion_matrix",
        metavar="PNG",
        help="The file for the confusion matrix; default: confusion_matrix.png in the folder of the checkpoint.",
    )
    output.add_argument(
        "--reliability_diagram",
        metavar="PNG",
        help="The file for the accuracy at each confidence; default: reliability_diagram.png in the same folder.",
    )
    output.add_argument(
        "--mistakes",
        type=positive,
        metavar="N",
        help=f"Report and draw the N most confident wrong predictions, at most {MAX_MISTAKES}; default: none.",
    )
    output.add_argument(
        "--mistakes_figure",
        metavar="PNG",
        help="The file for the images of --mistakes; default: mistakes.png in the same folder.",
    )


def check_flags(args):
    """Whether the flags of the output suit the others."""
    if args.csv and args.features:
        raise UserError("--csv and --features exclude each other")
    if args.csv and not args.images:
        raise UserError("--csv is for the classes of image files; name them, or use --json for a data set")
    for flag, path in {"csv": args.csv, "features": args.features}.items():
        if path:
            check_output_path(path, f"--{flag}", FILES[flag])
    if args.mistakes and args.features:
        raise UserError("--mistakes needs the evaluation, which --features replaces; omit one of them")
    if args.mistakes_figure and not args.mistakes:
        raise UserError("--mistakes_figure needs --mistakes, the number of images; for example --mistakes 24")
    if args.mistakes and args.images:
        raise UserError("--mistakes is for a data set, whose classes are known; omit the image files")
    if args.mistakes and args.mistakes > MAX_MISTAKES:
        raise UserError(f"--mistakes {args.mistakes} is more than the {MAX_MISTAKES} images that fit in a figure")


def evaluate_on_dataset(saved, args, processes):
    """Evaluate on a split, by default of the run's data set; draw the figures and return the report."""
    paths = figure_paths(args)
    dataset, split, images = load_split(saved, args, processes)
    result = evaluate_model(saved.model, images, saved.img_size, args, processes, per_class=True)
    names, title = readable_names(images.classes), f"{saved.title} on the {NAMES[split]} images of {dataset}"
    if processes.is_first:
        draw_confusion_matrix(result["confusion"], names, title, paths["confusion_matrix"])
        draw_reliability(result["calibration"], title, paths["reliability_diagram"])
    mistakes = {}
    if args.mistakes:
        found = find_mistakes(result, images, names, processes, args.mistakes)
        mistakes["mistakes"] = [mistake._asdict() for mistake in found]
        if processes.is_first:
            heading = f"{title}: {count_mistakes(len(found), result['accuracy'], result['images'])}"
            draw_mistakes(found, images, heading, paths["mistakes_figure"])
    per_class = metrics_by_name(result["confusion"], names)
    return {
        "checkpoint": str(args.checkpoint),
        "dataset": dataset,
        "split": split,
        "images": result["images"],
        "skipped": result["skipped"],
        "loss": result["loss"],
        "top1_accuracy": result["accuracy"],
        "top1_accuracy_interval": wilson_interval(result["accuracy"], result["images"]),
        "top5_accuracy": result["top5_accuracy"],
        "top5_accuracy_interval": wilson_interval(result["top5_accuracy"], result["images"]),
        **{name: result[name] for name in MEAN_METRICS},
        "per_class_accuracy": {name: row["recall"] for name, row in per_class.items() if row["support"]},
        "per_class": per_class,
        "frequent_confusions": [
            {"true_class": names[true], "predicted_class": names[predicted], "images": images}
            for true, predicted, images in frequent_confusions(result["confusion"], FREQUENT)
        ],
        "expected_calibration_error": expected_calibration_error(result["calibration"]),
        "calibration_bins": calibration_bins(result["calibration"]),
        "images_per_second": result["images_per_second"],
        **mistakes,
        **{name: str(path) for name, path in paths.items()},
    }


def figure_paths(args):
    """{flag: path of its figure}, by default next to the checkpoint. Raises UserError."""
    paths = {}
    for flag, file in FIGURES.items():
        if flag != "mistakes_figure" or args.mistakes:
            paths[flag] = Path(getattr(args, flag) or folder_of(args.checkpoint) / file)
            check_figure_path(paths[flag], f"--{flag}")
    return paths


def metrics_by_name(confusion, names):
    """{class: {"precision", "recall", "f1", "support", "recall_interval"}}; the interval is None without images."""
    columns = {name: values.tolist() for name, values in class_metrics(confusion).items()}
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    for row in rows:
        row["recall_interval"] = wilson_interval(row["recall"], row["support"]) if row["support"] else None
    return dict(zip(names, rows, strict=True))


def calibration_bins(calibration):
    """[{"count", "correct", "mean_confidence"}, ...] of `calibration_sums`; the mean is None in an empty bin."""
    return [
        {"count": int(count), "correct": int(correct), "mean_confidence": confidence / count if count else None}
        for count, correct, confidence in calibration.tolist()
    ]


def load_split(saved, args, processes):
    """(name of the data set, of the split, its images), normalised as in the model's run.

    The data set of the run is divided as it was there, another folder only into splits that it lacks, and has the
    --classes of the run unless others are given. Raises UserError for other classes than the model's.
    """
    dataset, data_dir = args.dataset, args.data_dir
    if dataset is None and saved.flags:
        dataset, data_dir = saved.flags["dataset"], data_dir or saved.flags["data_dir"]
    dataset, data_dir = dataset or "cifar10", data_dir or "data"
    divided = {
        name: saved.flags[name] for name in DIVISION if dataset == saved.flags.get("dataset") and name in saved.flags
    }
    if args.classes:
        divided["classes"] = args.classes
    options = DataOptions(data_dir, args.num_workers, saved.mean_std, args.skip_broken, **divided)
    count = count_classes(dataset, options)
    if count != len(saved.classes) and not args.features:
        names = ", ".join(saved.classes[:10]) + (", ..." if len(saved.classes) > 10 else "")
        known = f" ({names})" if saved.knows_classes else ""
        raise UserError(f"{args.checkpoint} has {len(saved.classes)} classes{known}, {dataset} has {count}")
    if data_dir != saved.flags.get("data_dir"):
        options = shares_that_apply(DATASETS[dataset].splits(data_dir), options)
    found = find_splits(dataset, options)
    if args.split and args.split not in found:
        raise UserError(f"--split {args.split}: {dataset} has {', '.join(found)} only")
    split = args.split or found[-1]
    images = load_dataset(dataset, split, options, processes)
    if saved.knows_classes and not args.features:
        check_classes(args.checkpoint, saved.classes, dataset, readable_names(images.classes))
    return dataset, split, images


def draw_confusion_matrix(confusion, names, title, path):
    from utils.curves import plot_confusion_matrix  # matplotlib is a slow import, which single images do not need
    from utils.figures import save

    save(plot_confusion_matrix(confusion, names, title), path)


def draw_reliability(calibration, title, path):
    from utils.curves import plot_reliability
    from utils.figures import save

    save(plot_reliability(calibration, title), path)


def evaluation_text(report):
    skipped = f", {report['skipped']} more could not be read" if report["skipped"] else ""
    accuracies = (percent(report[f"top{count}_accuracy"], report["images"]) for count in (1, 5))
    means = (f"{name.replace('_', ' ').replace('f1', 'F1')} {percent(report[name])}" for name in MEAN_METRICS)
    lines = [
        f"{report['checkpoint']} on {report['dataset']}: {report['images']} {NAMES[report['split']]} images{skipped}",
        "top-1 {}   top-5 {}".format(*accuracies)
        + f"   loss {report['loss']:.4f}   {report['images_per_second']:.1f} images/s",
        "   ".join(means),
        f"expected calibration error {percent(report['expected_calibration_error'])}",
        *class_lines(report["per_class"], NAMES[report["split"]]),
        *confusion_lines(report["frequent_confusions"], report["per_class"]),
        *mistake_lines(report),
        "[low, high]: the 95 % interval of an accuracy (Wilson)",
        f"confusion matrix: {report['confusion_matrix']}",
        f"reliability diagram: {report['reliability_diagram']}",
        *([f"mistakes: {report['mistakes_figure']}"] if "mistakes" in report else []),
    ]
    return "\n".join(lines)


def class_lines(per_class, split):
    """A table of the classes, or of the ten hardest of many; `per_class` is that of the report on a `split`."""
    present = {name: row for name, row in per_class.items() if row["support"]}
    hardest = sorted(present, key=lambda name: present[name]["recall"])
    shown = hardest if len(hardest) <= MANY_CLASSES else hardest[:10]
    width = max(len(name) for name in shown)
    lines = [f"accuracy (recall) of {'each class' if shown is hardest else 'the ten hardest classes'}, lowest first:"]
    for name in shown:
        row = present[name]
        precision, f1 = (f"{percent(row[metric]):>8}" for metric in ("precision", "f1"))
        recall = percent(row["recall"], row["support"])
        lines.append(f"  {name:<{width}}  {recall:<24}  precision {precision}  F1 {f1}")
    if absent := len(per_class) - len(present):
        lines.append(
            f"no {split} images of {absent} of the {len(per_class)} classes: their precision, recall and F1 count as 0 "
            "in the macro means, as in scikit-learn, and not in the balanced accuracy"
        )
    return lines


def confusion_lines(confusions, per_class):
    """A table of the most frequent errors."""
    if not confusions:
        return []
    pairs = [f"{row['true_class']} -> {row['predicted_class']}" for row in confusions]
    width = max(map(len, pairs))
    lines = ["most frequent confusions, true class -> prediction:"]
    for pair, row in zip(pairs, confusions, strict=True):
        lines.append(f"  {pair:<{width}}  {row['images']} of {per_class[row['true_class']]['support']} images")
    return lines


def mistake_lines(report):
    """A table of the most confident wrong predictions, if they are asked for."""
    if "mistakes" not in report:
        return []
    mistakes = report["mistakes"]
    pairs = [f"{row['true_class']} -> {row['predicted_class']}" for row in mistakes]
    width = max(map(len, pairs), default=0)
    count = count_mistakes(len(mistakes), report["top1_accuracy"], report["images"])
    lines = [f"{count}, true class -> prediction, confidence:" if mistakes else count]
    for pair, row in zip(pairs, mistakes, strict=True):
        lines.append(
            f"  {pair:<{width}}  {percent(row['confidence']):>8}  {row['path'] or 'image ' + str(row['index'])}"
        )
    return lines


def extract(saved, args, processes):
    """Write the features of the image files or of a split, and return the report."""
    if args.images:
        labels, classes = labelled_by_folder(args.images)
        options = (args.eval_batch_size, args.num_workers, processes)
        what, images = "the image files", image_files(saved, args.images, labels, classes, *options)
    else:
        dataset, split, images = load_split(saved, args, processes)
        what = f"the {NAMES[split]} images of {dataset}"
    return save_features(args.features, saved, images, what, args, processes)


if __name__ == "__main__":
    run_script(main)
