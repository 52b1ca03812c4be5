"""Loss and accuracy on a test set, each image counted exactly once over all processes."""

import math
import sys
import time

import torch
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from utils.data.datasets import DATASETS
from utils.errors import UserError
from utils.parallel.precision import make_precision
from utils.parallel.processes import join_processes, sum_over_processes
from utils.pretrained import take_pretrained
from utils.records.checkpoint import load_into, load_weights
from utils.records.tracker import best_weights, read_config


def run_evaluation(args, make_model):
    """What a training script does with --mode eval: test the run's best weights, or the pretrained ones without a run.

    Writes no file. Nothing is compiled: one pass over a test set would not win back the time. Raises UserError.
    """
    with join_processes(args.local_rank) as processes:
        source = DATASETS[args.dataset]
        model = make_model(source.count_classes(args.data_dir))
        path, classes = best_weights(args), None
        if path.exists():
            weights, step = load_weights(path)
            load_into(model, weights, path)
            classes = (read_config(path.parent) or {}).get("classes")
            origin = f"{path}, of step {step}"
        else:
            take_pretrained(model, args, processes, head="keep")
            origin = args.pretrained_dir
        how = {"mean_std": args.mean_std, "skip_broken": args.skip_broken}
        test_set = source.load(False, args.data_dir, processes, args.num_workers, **how)
        if classes:
            check_classes(path, classes, args.dataset, test_set.classes)
        model.to(processes.device)
        precision = make_precision(args, processes.device)
        precision.cast(model)
        start = time.perf_counter()
        result = evaluate(model, test_set, (args.img_size, args.img_size), args.eval_batch_size, precision, processes)
        seconds = time.perf_counter() - start
        if processes.rank == 0:
            missing = len(test_set) - result["images"]
            skipped = f" ({missing} more could not be read)" if missing else ""
            print(
                f"{args.model_type} on {args.dataset}: {result['images']} test images{skipped}, "
                f"{len(test_set.classes)} classes, at {args.img_size}x{args.img_size}, {processes}\n"
                f"  weights  {origin}\n"
                f"  top-1    {100 * result['accuracy']:.2f} %\n"
                f"  top-5    {100 * result['top5_accuracy']:.2f} %\n"
                f"  loss     {result['loss']:.4f}\n"
                f"  speed    {result['images'] / seconds:.1f} images/s"
            )


def check_classes(path, classes, dataset, theirs):
    """Raises UserError where the weights in `path` were trained to tell other `classes` apart than the data set's."""
    if len(classes) != len(theirs):
        raise UserError(f"{path} tells {len(classes)} classes apart, {dataset} has {len(theirs)}")
    for mine, other in zip(classes, theirs, strict=True):
        if mine != other:
            raise UserError(f"{path} was trained on other classes: {mine!r} stands where {dataset} has {other!r}")


@torch.no_grad()
def evaluate(model, test_set, img_size, batch_size, precision, processes, per_class=False):
    """{"images", "loss", "accuracy", "top5_accuracy"}, fractions, and with `per_class` the "confusion" counts.

    `confusion` is an int64 tensor (classes, classes): rows are the true class, columns the prediction. Raises UserError
    where all pictures are broken.
    """
    was_training = model.training
    model.eval()
    num_classes = len(test_set.classes)
    count = 0
    totals = torch.zeros(3, dtype=torch.float64, device=processes.device)  # loss, top-1 hits, top-5 hits
    confusion = torch.zeros(num_classes**2 if per_class else 0, dtype=torch.int64, device=processes.device)
    share = len(range(processes.rank, len(test_set), processes.size))
    batches = 0
    rounds = math.ceil(len(range(0, len(test_set), processes.size)) / batch_size)  # of the process with the most images
    bar = tqdm(total=share, desc="test", unit="img", leave=False, disable=processes.rank > 0 or not sys.stderr.isatty())
    with bar:
        for images, labels in test_set.eval_batches(img_size, batch_size, processes):
            with precision.autocast():
                logits = model(precision.inputs(images)).float()
            hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            totals += torch.stack([loss, hits[:, 0].sum(), hits.sum()])
            count += len(labels)
            batches += 1
            if per_class:
                cells = labels * num_classes + logits.argmax(1)
                confusion += torch.bincount(cells, minlength=num_classes**2)
            bar.update(len(labels))
        if isinstance(model, FSDPModule):  # its weights are gathered only where all processes take part
            for _ in range(rounds - batches):
                model(precision.inputs(torch.zeros(1, 3, *img_size, device=processes.device)))
    model.train(was_training)
    totals = torch.cat([totals, totals.new_tensor([count])])
    loss, top1, top5, count = sum_over_processes(totals).tolist()
    if not count:
        raise UserError(f"none of the {len(test_set)} test pictures can be read")
    result = {"images": int(count), "loss": loss / count, "accuracy": top1 / count, "top5_accuracy": top5 / count}
    if per_class:
        result["confusion"] = sum_over_processes(confusion).view(num_classes, num_classes).cpu()
    return result
