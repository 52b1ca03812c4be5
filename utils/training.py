"""The training loop of every script.

A step is a pure function of the weights, the optimizer's state, the seed and the step's number. So resuming is exact,
and any number of processes computes the same global batch.
"""

import math
import signal

import torch
import torch.nn.functional as F

from utils.data.augmentation import Augmentation
from utils.data.datasets import DATASETS, DataOptions, load_dataset
from utils.data.stream import MicroBatch, stream_positions
from utils.errors import RunStoppedError, UserError
from utils.evaluation import run_evaluation
from utils.parallel.processes import StopSignal, barrier, gradients_summed, join_processes, union_over_processes
from utils.pretrained import load_pretrained_flag
from utils.records.checkpoint import LAST, load_checkpoint, load_into
from utils.records.run_folder import (
    check_shared,
    is_restart,
    not_shared,
    open_run_folder,
    prepare_run_folder,
    read_config,
    report_changed_flags,
    resumes,
)
from utils.records.tracker import Tracker
from utils.records.weights_and_biases import WeightsAndBiases
from utils.train_state import TrainState, is_sharded


def run_mode(args, make_model):
    """Do what --mode says once the flags are checked; `make_model(num_classes)` makes the model."""
    {"train": run_training, "eval": run_evaluation}[args.mode](args, make_model)


def run_training(args, make_model):
    """Load the data, make or resume the model, and train it."""
    if is_restart(args):
        args.resume, args.overwrite = True, False
    run_dir = open_run_folder(args)
    with join_processes(args.local_rank) as processes:
        torch.manual_seed(args.seed)
        model = make_model(DATASETS[args.dataset].count_classes(args.data_dir))
        saved = load_run(model, args, processes, run_dir)
        options = DataOptions.from_flags(args)
        train_set, test_set = (load_dataset(args.dataset, split, options, processes) for split in ("train", "test"))
        train(model, train_set, test_set, args, processes, run_dir, saved)


def load_run(model, args, processes, run_dir):
    """Load the weights with which the training begins; returns the saved state of the run that resumes, or None."""
    resuming = union_over_processes({resumes(args)})
    if len(resuming) > 1:
        raise not_shared(run_dir)
    if True in resuming:
        if processes.is_first:
            report_changed_flags(read_config(run_dir), args)
        weights, saved = load_checkpoint(run_dir)
        load_into(model, weights, run_dir / LAST)
        return saved
    if args.pretrained_dir:
        load_pretrained_flag(model, args, processes)
    return None


def train(model, train_set, test_set, args, processes, run_dir, saved=None):
    """Train `model`, any module from images (B, 3, H, W) to logits (B, num_classes), by the flags in `args`.

    `saved` is the state of the checkpoint whose weights the model holds if the run resumes. Leaves the run's records in
    `run_dir`. Raises RunStoppedError when it receives a stop signal or its numbers are not finite.
    """
    num_steps = args.num_steps or math.ceil(args.epochs * len(train_set) / args.train_batch_size)
    if saved:
        check_resumption(saved, args, num_steps, run_dir)
    run = TrainState(model, args, processes, num_steps, len(train_set.classes), run_dir)
    if saved:
        run.restore(saved)
    barrier()  # every process has seen whether there is a run to resume
    if processes.is_first:
        prepare_run_folder(run_dir, args, train_set.classes, num_steps)
    check_shared(run_dir)
    batches = training_batches(train_set, args, processes, run.step, num_steps)
    with open_tracker(run) as tracker, StopSignal().listening() as stop:
        tracker.say(description(run, train_set, test_set))
        run.meter.start_clock()
        while run.step < num_steps:
            run.meter.add(train_step(run, batches))  # values that stay on the device
            evaluates = is_due(run.step, args.eval_every) or run.step == num_steps
            if evaluates or run.meter.is_full:
                run.read_metrics(tracker)  # the only wait for the device
            if evaluates:
                run.record(run.evaluate(test_set), tracker)
            if is_due(run.step, args.log_attention_every):
                run.log_attention(test_set, tracker)
            signal_number = stop.agreed()
            if evaluates or signal_number or is_due(run.step, args.save_every):
                run.read_metrics(tracker)
                run.save(tracker.seconds())
            if signal_number and run.step < num_steps:
                raise RunStoppedError(stop_message(signal_number, run.step, run_dir), status=128 + signal_number)
        report_unreadable(train_set, test_set, tracker)
        tracker.summarise(run.progress.best_accuracy, run.progress.best_step)


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
            batch_loss = F.cross_entropy(logits, targets, label_smoothing=args.label_smoothing)
            batch_loss = batch_loss / args.gradient_accumulation_steps
            precision.backward(batch_loss)
        loss += batch_loss.detach()
        accuracy += (logits.argmax(dim=1) == labels).double().mean() / args.gradient_accumulation_steps
    grad_norm = precision.step(run.optimizer, args.max_grad_norm)  # before clipping
    run.step += 1
    if run.average:
        run.average.update(run.step)
    return {"loss": loss, "accuracy": accuracy, "grad_norm": grad_norm}


def is_due(step, interval):
    """Whether something that happens every `interval` steps, or never if it is None, happens after this step."""
    return bool(interval) and step % interval == 0


def training_batches(train_set, args, processes, first_step, num_steps):
    """Yield the MicroBatches of each step from `first_step` on."""
    steps = (args.train_batch_size, args.gradient_accumulation_steps, processes, first_step, num_steps)
    size = (args.img_size, args.img_size)
    augmentation = Augmentation(args.seed, size, args.min_crop_scale, args.horizontal_flip, args.rand_augment)
    images_and_labels = train_set.train_batches(stream_positions(*steps), augmentation)
    for positions, (images, labels) in zip(stream_positions(*steps), images_and_labels, strict=True):
        yield MicroBatch(positions, images, labels)


def check_resumption(saved, args, num_steps, run_dir):
    """Raise UserError if the saved state can't be continued with these flags."""
    started_with, step = saved["optimizer"], saved["progress"]["step"]
    if started_with != args.optimizer:
        raise UserError(
            f"the run was started with --optimizer {started_with}, so it can't be resumed with {args.optimizer}"
        )
    if step > num_steps:
        raise UserError(f"{run_dir} is at step {step} already, beyond the {num_steps} of the flags")


def open_tracker(run):
    """The records of a run, in its first process also at W&B."""
    is_first = run.processes.is_first
    wandb = WeightsAndBiases(run.run_dir, run.args) if run.args.wandb and is_first else None
    seconds = run.progress.total_seconds
    return Tracker(run.run_dir, run.step, run.schedule.num_steps, seconds, run.num_classes, is_first, wandb)


def description(run, train_set, test_set):
    """What is trained, on what and how, in two lines; a third warns of a run that ends within its warm-up."""
    args, num_steps = run.args, run.schedule.num_steps
    millions = sum(p.numel() for p in run.model.parameters()) / 1e6
    steps = f"resuming at step {run.step} of {num_steps}, steps" if run.step else f"{num_steps} steps"
    shards = ", each with its shard of the weights" if is_sharded(args, run.processes) else ""
    lines = [
        f"{args.model_type}, {millions:.2f} M parameters, on {args.dataset}: {len(train_set)} training and "
        f"{len(test_set)} test images, {len(train_set.classes)} classes",
        f"{steps} of {args.train_batch_size} images at {args.img_size}x{args.img_size}, {run.processes}{shards}",
    ]
    if args.warmup_steps >= num_steps:
        lines.append(f"warning: the run ends within the warm-up of {args.warmup_steps} steps; see --warmup_steps")
    return "\n".join(lines)


def stop_message(signal_number, step, run_dir):
    """What a run that a signal stops prints."""
    name = signal.Signals(signal_number).name
    return f"stopped by {name} after step {step}; saved {run_dir / LAST}; the same command with --resume continues"


def report_unreadable(train_set, test_set, tracker):
    """Print how many images were skipped in all processes, if any."""
    skipped = len(union_over_processes(train_set.unreadable | test_set.unreadable))
    if skipped:
        tracker.say(f"skipped {skipped} unreadable image{'s' if skipped > 1 else ''}, named above")
