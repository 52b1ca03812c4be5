"""The most probable classes of image files, which worker processes read: as a list, as text and as CSV."""

import csv
import sys
from pathlib import Path

import numpy as np
import torch

from utils.data.datasets import DataOptions
from utils.data.loading import FolderImages
from utils.errors import UserError
from utils.evaluation import progress_bar
from utils.parallel.precision import make_precision
from utils.parallel.processes import sum_over_processes, union_over_processes

TOP = 5  # classes per image


@torch.no_grad()
def predict(saved, paths, batch_size, num_workers, precision, processes):
    """[{"image": path, "classes": [{"class": name, "probability": p}, ...]}, ...], the TOP most probable classes first.

    `saved` is a SavedModel on the device of the `processes`, which share the images; `precision` has cast it. An image
    that can't be read is printed; it has no classes and an "error". Raises UserError if none can be read.
    """
    data = image_files(saved, paths, range(len(paths)), saved.classes, batch_size, num_workers, processes)
    count = min(TOP, len(saved.classes))
    classes, probabilities = torch.zeros(len(paths), count, dtype=torch.int64), torch.zeros(len(paths), count)
    with progress_bar(data, processes, "predictions") as bar:
        for images, rows in data.eval_batches((saved.img_size, saved.img_size), batch_size, processes):
            with precision.autocast():
                logits = saved.model(precision.inputs(images))
            best = logits.float().softmax(dim=1).topk(count)
            classes[rows.cpu()], probabilities[rows.cpu()] = best.indices.cpu(), best.values.cpu()
            bar.update(len(rows))
    classes, probabilities = sum_over_processes(classes), sum_over_processes(probabilities)
    errors = dict(union_over_processes(data.skipped.items()))
    if paths and errors.keys() >= set(paths):
        raise UserError(f"none of the {len(paths)} images can be read")
    report = []
    for path, numbers, values in zip(paths, classes.tolist(), probabilities.tolist(), strict=True):
        pairs = zip(numbers, values, strict=True)
        found = {"classes": [{"class": saved.classes[number], "probability": value} for number, value in pairs]}
        report.append({"image": path, **({"classes": [], "error": errors[path]} if path in errors else found)})
    return report


def classify(saved, args, processes):
    """The report of `predict` for the image files, also written to --csv; prints how many could not be read."""
    precision = make_precision(args, processes.device)
    precision.cast(saved.model)
    report = predict(saved, args.images, args.eval_batch_size, args.num_workers, precision, processes)
    if processes.is_first:
        if args.csv:
            write_csv(report, args.csv)
        if unreadable := sum("error" in item for item in report):
            print(f"{unreadable} of the {len(report)} images could not be read, named above", file=sys.stderr)
    return report


def image_files(saved, paths, labels, classes, batch_size, num_workers, processes):
    """Image files as FolderImages that prepares them for a SavedModel and skips those that can't be read.

    A single batch is read by this process, since starting others would take longer.
    """
    options = DataOptions(
        num_workers=0 if len(paths) <= batch_size else num_workers, mean_std=saved.mean_std, skip_broken=True
    )
    return FolderImages(paths, labels, classes, processes.device, saved.resize, options)


def labelled_by_folder(paths):
    """(labels int64 (n,), classes): the class of an image is the name of its folder; classes are sorted."""
    classes, labels = np.unique([Path(path).resolve().parent.name for path in paths], return_inverse=True)
    return labels, classes.tolist()


def classification_text(report, args):
    """The report of `classify` for a terminal, or with --csv where it is."""
    if args.csv:
        return f"{args.csv}: the classes of {len(report)} images"
    lines = []
    for item in report:
        lines.append(item.get("error", item["image"]))
        lines += [f"  {100 * best['probability']:6.2f} %  {best['class']}" for best in item["classes"]]
    return "\n".join(lines)


def write_csv(report, path):
    """Write one row per image: its path, classes and probabilities, and why it can't be read, or nothing."""
    count = max(len(item["classes"]) for item in report)
    columns = [name for rank in range(1, count + 1) for name in (f"class_{rank}", f"probability_{rank}")]
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["image", *columns, "error"])
        for item in report:
            cells = [cell for best in item["classes"] for cell in best.values()] or [""] * len(columns)
            writer.writerow([item["image"], *cells, item.get("error", "")])
