"""Evaluate a run's checkpoint or an .npz file on a data set, or classify single images."""

import json
from pathlib import Path

import torch

from inference import SavedModel, readable_names
from models import TOKEN_REDUCTIONS, canonical_model_type
from utils.checks import check_figure_path
from utils.data.datasets import DATASETS, DataOptions, load_dataset
from utils.data.images import read_image
from utils.errors import UserError, run_script
from utils.evaluation import check_classes, evaluate_model
from utils.flag_groups import (
    add_checkpoint_flags,
    add_data_flags,
    add_precision_flags,
    add_token_reduction_flags,
    token_reduction_of,
)
from utils.flag_types import Parser, positive
from utils.parallel.precision import make_precision
from utils.parallel.processes import join_processes


def main():
    args = parse_flags()
    with join_processes() as processes, torch.no_grad():
        reduction = token_reduction_of({}, vars(args))
        saved = SavedModel.load(args.checkpoint, args.model_type, args.img_size, args.download, reduction)
        if args.images:
            report = classify(saved.to(processes.device), args)
            text = classification_text(report)
        else:
            report = evaluate_on_dataset(saved, args, processes)
            text = evaluation_text(report)
        if processes.is_first:
            print(json.dumps(report, indent=2) if args.json else text)


def parse_flags():
    parser = Parser(__doc__)
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="Image files to classify, instead of a data set.")
    group = parser.add_argument_group("model")
    add_checkpoint_flags(group, canonical_model_type, required=True)
    add_token_reduction_flags(group, TOKEN_REDUCTIONS, default="that of the run")
    data = parser.add_argument_group("data")
    add_data_flags(data, default=None)
    data.add_argument("--eval_batch_size", type=positive, default=64, metavar="N", help="Images per batch.")
    add_precision_flags(parser.add_argument_group("precision"))
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="Print the results as JSON, for scripts.")
    output.add_argument(
        "--confusion_matrix",
        metavar="PNG",
        help="The file for the confusion matrix; default: confusion_matrix.png in the folder of the checkpoint.",
    )
    return parser.parse_args()


def evaluate_on_dataset(saved, args, processes):
    """Evaluate on the test set, by default that of the run; draw the confusion matrix and return the report."""
    path = Path(args.confusion_matrix or Path(args.checkpoint).parent / "confusion_matrix.png")
    check_figure_path(path, "--confusion_matrix")
    dataset, test_set = load_test_set(saved, args, processes)
    result = evaluate_model(saved.model, test_set, saved.img_size, args, processes, per_class=True)
    names = readable_names(test_set.classes)
    if processes.is_first:
        draw_confusion_matrix(result["confusion"], names, f"{saved.title} on {dataset}", path)
    counts = result["confusion"].sum(dim=1)
    accuracies = result["confusion"].diagonal() / counts
    per_class = zip(names, accuracies.tolist(), counts.tolist(), strict=True)
    return {
        "checkpoint": str(args.checkpoint),
        "dataset": dataset,
        "images": result["images"],
        "skipped": result["skipped"],
        "loss": result["loss"],
        "top1_accuracy": result["accuracy"],
        "top5_accuracy": result["top5_accuracy"],
        "per_class_accuracy": {name: accuracy for name, accuracy, count in per_class if count},
        "images_per_second": result["images_per_second"],
        "confusion_matrix": str(path),
    }


def load_test_set(saved, args, processes):
    """(name of the data set, its test set), normalised as in the model's run. Raises UserError for other classes."""
    dataset, data_dir = args.dataset, args.data_dir
    if dataset is None and saved.flags:
        dataset, data_dir = saved.flags["dataset"], data_dir or saved.flags["data_dir"]
    dataset, data_dir = dataset or "cifar10", data_dir or "data"
    count = DATASETS[dataset].count_classes(data_dir)
    if count != len(saved.classes):
        raise UserError(f"{args.checkpoint} has {len(saved.classes)} classes, {dataset} has {count}")
    options = DataOptions(data_dir, args.num_workers, saved.mean_std, args.skip_broken)
    test_set = load_dataset(dataset, "test", options, processes)
    if saved.flags:  # an .npz file has no names of its own classes
        check_classes(args.checkpoint, saved.classes, dataset, readable_names(test_set.classes))
    return dataset, test_set


def draw_confusion_matrix(confusion, names, title, path):
    from utils.curves import plot_confusion_matrix  # matplotlib is a slow import, which single images do not need
    from utils.figures import save

    save(plot_confusion_matrix(confusion, names, title), path)


def evaluation_text(report):
    per_class = sorted(report["per_class_accuracy"].items(), key=lambda item: item[1])
    shown = per_class if len(per_class) <= 20 else per_class[:10]
    width = max(len(name) for name, _ in shown)
    skipped = f", {report['skipped']} more could not be read" if report["skipped"] else ""
    lines = [
        f"{report['checkpoint']} on {report['dataset']}: {report['images']} test images{skipped}",
        f"top-1 {100 * report['top1_accuracy']:.2f} %   top-5 {100 * report['top5_accuracy']:.2f} %   "
        f"loss {report['loss']:.4f}   {report['images_per_second']:.1f} images/s",
        f"accuracy of {'each class' if shown is per_class else 'the ten hardest classes'}, lowest first:",
        *(f"  {name:<{width}}  {100 * accuracy:6.2f} %" for name, accuracy in shown),
        f"confusion matrix: {report['confusion_matrix']}",
    ]
    return "\n".join(lines)


def classify(saved, args):
    """[{"image": path, "classes": [{"class": name, "probability": p}, ...]}, ...], the five best classes first."""
    precision = make_precision(args, next(saved.model.parameters()).device)
    precision.cast(saved.model)
    report = []
    for path in args.images:
        images = saved.prepare(read_image(path))
        with precision.autocast():
            logits = saved.model(precision.inputs(images))
        best = logits.float().softmax(dim=1)[0].topk(min(5, len(saved.classes)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        report.append({"image": path, "classes": [{"class": saved.classes[i], "probability": p} for i, p in pairs]})
    return report


def classification_text(report):
    lines = []
    for item in report:
        lines.append(item["image"])
        lines += [f"  {100 * best['probability']:6.2f} %  {best['class']}" for best in item["classes"]]
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
