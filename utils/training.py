"""The training loop of every script.

A step is a pure function of the weights, the optimizer's state, the seed and the step's number. So resuming is exact,
and any number of processes computes the same global batch.
"""

import math

import torch

from utils.checks import check_best_metric, check_length
from utils.data.augmentation import Augmentation
from utils.data.datasets import DataOptions, count_classes, load_splits
from utils.data.splits import DIVISION, NAMES
from utils.data.stream import MicroBatch, stream_positions
from utils.errors import UserError
from utils.evaluation import check_classes, run_evaluation
from utils.losses import class_weights, cross_entropy
from utils.parallel.cpu import restore_threads
from utils.parallel.devices import widest_float
from utils.parallel.processes import StopSignal, barrier, gradients_summed, join_processes, union_over_processes
from utils.pretrained import load_pretrained_flag
from utils.records.checkpoint import load_checkpoint
from utils.records.metrics_file import read_rows
from utils.records.result import read_result, result_of_rows, summary
from utils.records.run_folder import (
    EARLIER_FLAGS,
    METRICS,
    check_shared,
    is_finished,
    is_restart,
    not_shared,
    open_run_folder,
    prepare_run_folder,
    read_config,
    report_changed_flags,
    resumes,
    started_with,
)
from utils.records.tracker import Tracker
from utils.records.weights import load_into
from utils.records.weights_and_biases import WeightsAndBiases
from utils.train_state import TrainState, is_due, is_sharded


def run_mode(args, make_model):
    """Do what --mode says once the flags are checked; `make_model(num_classes)` makes the model."""
    {"train": run_training, "eval": run_evaluation}[args.mode](args, make_model)


def run_training(args, make_model):
    """Load the data, make or resume the model, and train it."""
    if is_restart(args):
        args.resume, args.overwrite = True, False
    with open_run_folder(args) as run_dir, join_processes(args.local_rank) as processes:
        if agree(args.resume and is_finished(run_dir, args), run_dir):
            if processes.is_first:
                report_finished(run_dir)
            return
        options = DataOptions.from_flags(args)
        torch.manual_seed(args.seed)
        model = make_model(count_classes(args.dataset, options))
        saved = load_run(model, args, processes, run_dir)
        train(model, load_splits(args.dataset, options, processes, args.no_test), args, processes, run_dir, saved)


def agree(answer, run_dir):
    """The answer of all processes to a question about the run's folder. Raises UserError if they see another one."""
    answers = union_over_processes({answer})
    if len(answers) > 1:
        raise not_shared(run_dir)
    return answers.pop()


def load_run(model, args, processes, run_dir):
    """Load the weights with which the training begins; returns the saved state of the run that resumes, or None."""
    if agree(resumes(args), run_dir):
        checkpoint, problems = load_checkpoint(run_dir, processes.is_first)
        load_into(model, checkpoint.weights, checkpoint.path)
        saved = {**checkpoint.state, **started_with(checkpoint.state, run_dir)}
        if processes.is_first:
            for problem in problems:
                print(f"warning: {problem}; using {checkpoint.path} of step {checkpoint.step}")
            report_changed_flags(saved["flags"] or {}, args)
        if processes.device.type == "cpu" and (changed := restore_threads(saved.get("threads"))) and processes.is_first:
            print(changed)
        return saved
    if args.pretrained_dir:
        load_pretrained_flag(model, args, processes)
    return None


def train(model, splits, args, processes, run_dir, saved=None):
    """Train `model`, any module from images (B, 3, H, W) to logits (B, num_classes), by the flags in `args`.

    `splits` are LoadedSplits, `saved` is the state of the checkpoint whose weights the model holds if the run resumes.
    Leaves the run's records in `run_dir`. Raises RunStoppedError when it receives a stop signal or its numbers are not
    finite.
    """
    train_set, eval_set = splits.train, splits.evaluation
    num_steps = args.num_steps or math.ceil(args.epochs * len(train_set) / args.train_batch_size)
    check_length(args, num_steps, len(train_set))
    if saved:
        check_resumption(saved, args, num_steps, run_dir, train_set.classes, splits.counts())
    check_best_metric(args, len(set(eval_set.labels.tolist())), f"the {NAMES[splits.evaluated_on]} set")
    weights = class_weights(args.class_weights, train_set.labels, train_set.classes, processes.device)
    run = TrainState(model, args, processes, num_steps, train_set.classes, run_dir, weights, splits.counts())
    if saved:
        run.restore(saved)
    barrier()  # every process has seen whether there is a run to resume
    if processes.is_first:
        prepare_run_folder(run_dir, args, train_set.classes, num_steps, splits.counts(), run.compiled)
    check_shared(run_dir)
    batches = training_batches(train_set, args, processes, run.step, num_steps)
    with open_tracker(run) as tracker, StopSignal().listening() as stop:
        tracker.say(description(run, splits))
        if run.is_evaluation_due():  # the run was stopped before or in the evaluation of its last step
            run.evaluate(eval_set, tracker, stop)
        run.meter.start_clock()
        while run.step < num_steps:
            run.meter.add(train_step(run, batches))  # values that stay on the device
            evaluates, stops = run.is_evaluation_due(), stop.agreed()
            saves = evaluates or stops or is_due(run.step, args.save_every)
            if saves or run.meter.is_full:
                run.read_metrics(tracker)  # the only wait for the device
            if saves:
                run.save(tracker.seconds())  # before anything that can fail
            if stops:
                raise run.stopped_by(stops)
            if evaluates:
                run.evaluate(eval_set, tracker, stop)
            if is_due(run.step, args.log_attention_every):
                run.log_attention(eval_set, tracker)
        result = run.finish(splits.test, stop)
        report_unreadable(splits, tracker)
        tracker.summarise(result)


def train_step(run, batches):
    """One optimizer step on the next micro-batches: {metric: 0-dim tensor on the device}, means of this process.

    A new key is a new metric: it appears in the progress bar, TensorBoard, W&B and metrics.csv without further code.
    """
    args, precision = run.args, run.precision
    run.set_learning_rate()
    loss = accuracy = 0.0
    for number in range(args.gradient_accumulation_steps):
        images, targets, labels = run.prepare(next(batches))
        is_last = number == args.gradient_accumulation_steps - 1
        with gradients_summed(run.network, is_last):
            with precision.autocast():
                logits = run.network(precision.inputs(images)).float()
            batch_loss = cross_entropy(logits, targets, args.label_smoothing, run.class_weights)
            batch_loss = batch_loss / args.gradient_accumulation_steps
            precision.backward(batch_loss)
        loss += batch_loss.detach()
        correct = (logits.argmax(dim=1) == labels).to(widest_float(labels.device))
        accuracy += correct.mean() / args.gradient_accumulation_steps
    grad_norm = precision.step(run.optimizer, args.max_grad_norm)  # before clipping
    run.step += 1
    if run.average:
        run.average.update(run.step)
    return {"loss": loss, "accuracy": accuracy, "grad_norm": grad_norm}


def training_batches(train_set, args, processes, first_step, num_steps):
    """Yield the MicroBatches of each step from `first_step` on."""
    steps = (args.train_batch_size, args.gradient_accumulation_steps, processes, first_step, num_steps)
    size = (args.img_size, args.img_size)
    augmentation = Augmentation(
        args.seed,
        size,
        args.min_crop_scale,
        args.horizontal_flip,
        args.rand_augment,
        args.auto_augment,
        args.color_jitter,
        args.random_erasing,
        args.repeated_augmentation,
        args.resize_size,
        args.crop_padding,
    )
    images_and_labels = train_set.train_batches(stream_positions(*steps), augmentation)
    for positions, (images, labels) in zip(stream_positions(*steps), images_and_labels, strict=True):
        yield MicroBatch(positions, images, labels)


def report_finished(run_dir):
    """Print the results of a run whose last step has been evaluated."""
    config = read_config(run_dir)
    metric = {**EARLIER_FLAGS, **config["flags"]}["best_metric"]
    result = read_result(run_dir) or result_of_rows(read_rows(run_dir / METRICS), metric)
    print(f"{run_dir} has finished all of its {result['last']['step']} steps")
    print(summary(run_dir, result, len(config["classes"])))


def check_resumption(saved, args, num_steps, run_dir, classes, counts):
    """Raise UserError if the saved state can't be continued with these flags, classes and {split: number of images}."""
    before = {**EARLIER_FLAGS, **(saved["flags"] or {}), "optimizer": saved["optimizer"]}
    for flag in ("optimizer", "train", "best_metric", "test_at_end", "no_test", *DIVISION):
        if before[flag] != getattr(args, flag):
            raise UserError(
                f"the run was started with --{flag} {before[flag]}, so it can't be resumed with {getattr(args, flag)}"
            )
    if args.examples_per_class and "split_seed" not in (saved["flags"] or vars(args)):
        raise UserError(
            f"{run_dir} was started by an earlier version, in which --examples_per_class took the first images of each "
            "class; start it again with another --name"
        )
    step = saved["progress"]["step"]
    if step > num_steps:
        raise UserError(f"{run_dir} is at step {step} already, beyond the {num_steps} of the flags")
    if saved["classes"]:
        check_classes(run_dir, saved["classes"], args.dataset, classes)
    if saved.get("images", counts) != counts:  # it is missing in runs of earlier versions
        raise UserError(
            f"{run_dir} was started with {counts_text(saved['images'])}, now there are {counts_text(counts)}; restore "
            "the files, or start again with another --name"
        )


def open_tracker(run):
    """The records of a run, in its first process also at W&B."""
    is_first = run.processes.is_first
    wandb = WeightsAndBiases(run.run_dir, run.args) if run.args.wandb and is_first else None
    seconds = run.progress.total_seconds
    return Tracker(
        run.run_dir, run.step, run.schedule.num_steps, seconds, len(run.classes), is_first, wandb, run.evaluated_on
    )


def description(run, splits):
    """What is trained, on what and how, in two lines, and warnings of what is probably a mistake."""
    args, num_steps, train_set = run.args, run.schedule.num_steps, splits.train
    millions = sum(p.numel() for p in run.model.parameters()) / 1e6
    trained = sum(p.numel() for p in run.precision.named.values()) / 1e6
    part = "" if args.train == "all" else f" ({trained:.2f} M trained)"
    steps = f"resuming at step {run.step} of {num_steps}, steps" if run.step else f"{num_steps} steps"
    shards = ", each with its shard of the weights" if is_sharded(args, run.processes) else ""
    lines = [
        f"{args.model_type}, {millions:.2f} M parameters{part}, on {args.dataset}: {counts_text(splits.counts())}, "
        f"{len(train_set.classes)} classes",
        f"{steps} of {args.train_batch_size} images at {args.img_size}x{args.img_size}, {run.processes}{shards}",
    ]
    if args.compile and not run.compiled:
        lines.append(why_eager(run.processes.device))
    warnings = {
        f"the run ends within the warm-up of {args.warmup_steps} steps; see --warmup_steps": (
            args.warmup_steps >= num_steps
        ),
        f"a batch of {args.train_batch_size} images contains some of the {len(train_set)} training images repeatedly": (
            args.train_batch_size > len(train_set)
        ),
        f"--train {args.train} freezes weights that no --pretrained_dir provides": (
            args.train != "all" and not args.pretrained_dir
        ),
        f"there is a single class, {train_set.classes[0]!r}, so every prediction is correct": (
            len(train_set.classes) == 1
        ),
    }
    lines += [f"warning: {text}" for text, applies in warnings.items() if applies]
    return "\n".join([*lines, *overlaps(splits)])


def why_eager(device):
    """A line on a --compile that compiles nothing on the device."""
    if device.type == "mps":
        return "--compile does nothing on Apple's GPUs; this run is eager"
    return "--compile: on a CPU only transformer blocks in bfloat16 are faster compiled; this run is eager"


def counts_text(counts):
    """{split: number of images} as text."""
    numbers = [f"{count} {NAMES[split]}" for split, count in counts.items()]
    return f"{', '.join(numbers[:-1])} and {numbers[-1]} images"


def overlaps(splits):
    """A line for each two splits with the same images or, with --group_by, the same subjects."""
    for (split, other), count in splits.copies.items():
        if count:
            copies = f"are exact copies of {NAMES[split]} images"
            copies = f"is an exact copy of a {NAMES[split]} image" if count == 1 else copies
            yield f"warning: {count} of the {NAMES[other]} images {copies}"
    for (split, other), count in splits.shared_subjects.items():
        if count:
            are = "subjects have" if count > 1 else "subject has"
            yield f"warning: {count} {are} both {NAMES[split]} and {NAMES[other]} images"


def report_unreadable(splits, tracker):
    """Print how many images were skipped in all processes, if any."""
    sets = [images for images in (splits.train, splits.evaluation, splits.test) if images]
    skipped = len(union_over_processes(frozenset().union(*(images.unreadable for images in sets))))
    if skipped:
        tracker.say(f"skipped {skipped} unreadable image{'s' if skipped > 1 else ''}, named above")
