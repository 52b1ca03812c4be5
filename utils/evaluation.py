"""Loss and accuracy on a split, each image counted exactly once over all processes."""

import math
import sys
import time

import torch
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from utils.data.datasets import DataOptions, count_classes, find_splits, load_dataset
from utils.data.splits import NAMES
from utils.errors import UserError
from utils.metrics import BINS, calibration_sums, mean_metrics, percent
from utils.parallel.devices import device_of_sums
from utils.parallel.precision import make_precision
from utils.parallel.processes import join_processes, sum_over_processes
from utils.pretrained import load_pretrained_flag
from utils.records.run_folder import best_weights, read_config
from utils.records.weights import load_into, load_weights


def run_evaluation(args, make_model):
    """The --mode eval of a training script: test the run's best weights, or without a run the pretrained ones.

    Writes no file. Nothing is compiled, which would take longer than it saves in one pass. Raises UserError.
    """
    with join_processes(args.local_rank) as processes:
        options = DataOptions.from_flags(args)
        model = make_model(count_classes(args.dataset, options))
        path, classes = best_weights(args), None
        if path.exists():
            weights, step = load_weights(path)
            load_into(model, weights, path)
            classes = (read_config(path.parent) or {}).get("classes")
            origin = f"{path}, of step {step}"
        else:
            load_pretrained_flag(model, args, processes, head="keep")
            origin = args.pretrained_dir
        splits = find_splits(args.dataset, options)  # the last one: the test images, or the validation images
        split = splits[-1] if not args.no_test else "val"
        eval_set = load_dataset(args.dataset, split, options, processes)
        if classes:
            check_classes(path, classes, args.dataset, eval_set.classes)
        result = evaluate_model(model, eval_set, args.img_size, args, processes)
        if processes.is_first:
            skipped = f" ({result['skipped']} more could not be read)" if result["skipped"] else ""
            print(
                f"{args.model_type} on {args.dataset}: {result['images']} {NAMES[split]} images{skipped}, "
                f"{len(eval_set.classes)} classes, at {args.img_size}x{args.img_size}, {processes}\n"
                f"  weights  {origin}\n"
                f"  top-1    {percent(result['accuracy'], result['images'])} (95 % interval)\n"
                f"  top-5    {percent(result['top5_accuracy'], result['images'])}\n"
                f"  loss     {result['loss']:.4f}\n"
                f"  speed    {result['images_per_second']:.1f} images/s"
            )


def check_classes(path, classes, dataset, dataset_classes):
    """Raise UserError if the weights in `path` were trained on other `classes` than those of the data set."""
    if len(classes) != len(dataset_classes):
        raise UserError(f"{path} has {len(classes)} classes, {dataset} has {len(dataset_classes)}")
    for own, other in zip(classes, dataset_classes, strict=True):
        if own != other:
            raise UserError(f"{path} was trained on other classes: it has {own!r} where {dataset} has {other!r}")


def evaluate_model(model, eval_set, img_size, args, processes, per_class=False):
    """`evaluate` of a model that is not being trained, at `img_size` in pixels, by the flags in `args`.

    Moves the model to the device and casts it. The result also has "skipped", the number of unreadable images, and
    "images_per_second".
    """
    model.to(processes.device)
    precision = make_precision(args, processes.device)
    precision.cast(model)
    start = time.perf_counter()
    size = (img_size, img_size)
    result = evaluate(model, eval_set, size, args.eval_batch_size, precision, processes, per_class)
    seconds = time.perf_counter() - start
    skipped = len(eval_set) - result["images"]
    return {**result, "skipped": skipped, "images_per_second": result["images"] / seconds}


@torch.no_grad()
def evaluate(model, eval_set, img_size, batch_size, precision, processes, per_class=False, after_batch=lambda: None):
    """{"images", "loss", "accuracy", "top5_accuracy"}: a count, a mean and fractions over all processes.

    With `per_class` also "confusion", counts int64 (classes, classes): rows are true classes, columns predictions;
    "calibration", the `calibration_sums`; the `mean_metrics`; and of this process's images alone, in their order,
    "predictions" int64 (n,) and "confidences" float32 (n,), the probabilities of the predictions. Each process calls
    `after_batch()` equally often. Raises UserError if no image can be read.
    """
    was_training = model.training
    model.eval()
    num_classes = len(eval_set.classes)
    device = device_of_sums(processes.device)
    totals = torch.zeros(3, dtype=torch.float64, device=device)  # loss, top-1 correct, top-5 correct
    confusion = torch.zeros(num_classes**2 if per_class else 0, dtype=torch.int64, device=device)
    calibration = totals.new_zeros(BINS, 3)
    predicted, confidences = [confusion[:0]], [totals[:0].float()]
    count = 0
    batches = iter(eval_set.eval_batches(img_size, batch_size, processes))
    most = math.ceil(len(range(0, len(eval_set), processes.size)) / batch_size)  # batches of the first process
    with progress_bar(eval_set, processes) as bar:
        for _ in range(most):
            images, labels = next(batches, (None, ()))  # a process may have less images than the first one
            if len(labels):
                with precision.autocast():
                    logits = model(precision.inputs(images)).float().to(device)
                labels = labels.to(device)
                predictions = logits.topk(min(5, logits.shape[1])).indices  # (B, 5), the most probable class first
                correct = predictions == labels[:, None]
                loss = F.cross_entropy(logits, labels, reduction="sum")
                totals += torch.stack([loss, correct[:, 0].sum(), correct.sum()])
                if per_class:
                    cells = labels * num_classes + predictions[:, 0]
                    confusion.scatter_add_(0, cells, torch.ones_like(cells))  # bincount would wait for the device
                    confidences.append(logits.softmax(dim=1).amax(dim=1))
                    predicted.append(predictions[:, 0])
                    calibration += calibration_sums(confidences[-1], correct[:, 0])
                count += len(labels)  # on the host, so that no batch waits for the device
                bar.update(len(labels))
            elif isinstance(model, FSDPModule):  # which gathers weights with all processes
                model(precision.inputs(torch.zeros(1, 3, *img_size, device=processes.device)))
            after_batch()
    model.train(was_training)
    totals = torch.cat([totals, totals.new_tensor([count])])
    loss, top1, top5, count = sum_over_processes(totals).tolist()
    if not count:
        raise UserError(f"none of the {len(eval_set)} images to evaluate can be read")
    result = {"images": int(count), "loss": loss / count, "accuracy": top1 / count, "top5_accuracy": top5 / count}
    if per_class:
        result["confusion"] = sum_over_processes(confusion).view(num_classes, num_classes).cpu()
        result["calibration"] = sum_over_processes(calibration).cpu()
        result |= mean_metrics(result["confusion"])
        result |= {"predictions": torch.cat(predicted).cpu(), "confidences": torch.cat(confidences).cpu()}
    return result


def progress_bar(eval_set, processes, description="evaluation"):
    """A bar over this process's share of the images, in the first process only."""
    share = len(range(processes.rank, len(eval_set), processes.size))
    hidden = not processes.is_first or not sys.stderr.isatty()
    return tqdm(total=share, desc=description, unit="img", leave=False, disable=hidden)
