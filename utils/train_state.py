"""The state of a training run: what its next step needs, what a step changes, and saving and restoring it."""

import contextlib
import math
import signal
from dataclasses import asdict, dataclass

import torch
from torch.nn.parallel import DistributedDataParallel

from utils.data.augmentation import denormalise
from utils.data.mixing import make_mixing, mix_pairs
from utils.data.stream import dropout_keys
from utils.errors import DIVERGED, RunStoppedError, UserError
from utils.evaluation import evaluate
from utils.freezing import freeze
from utils.metrics import BEST_METRICS, Best
from utils.optimizers import empty_state, make_optimizer, restore_state, state_tensors
from utils.parallel.averaging import WeightAverage
from utils.parallel.cpu import compile_in_place, is_compiled
from utils.parallel.memory import recompute_activations
from utils.parallel.precision import make_precision
from utils.parallel.processes import load_whole_weights, local_parts, shard_weights, sum_over_processes
from utils.records.checkpoint import load_tensors, save_checkpoint, save_measured, update_state
from utils.records.meter import Meter
from utils.records.result import write_result
from utils.records.weights import AVERAGED, BEST, LAST, load_weights, saved_step
from utils.scheduler import Schedule, learning_rate

AVERAGE = "average"  # the name of a weight's moving average in a checkpoint
MEASURED = ("loss", "accuracy", "top5_accuracy")  # always recorded
ATTENTION_IMAGES = 8  # evaluated images that --log_attention_every draws


@dataclass
class Progress:
    """The evaluations of a run so far, and its duration."""

    best_value: float | None = None  # of --best_metric
    best_step: int = 0
    best_result: dict | None = None  # of `TrainState.measure`; None before the first evaluation by this version
    last_result: dict | None = None
    evaluated_step: int = 0  # the last one
    total_seconds: float = 0.0


class TrainState:
    """What a run needs to take its next step, and what changes with it: weights, optimizer, average, step, metrics."""

    def __init__(self, model, args, processes, num_steps, classes, run_dir=None, class_weights=None, images=None):
        """Move the model to its device, as a copy or in shards, with its optimizer; `args` are the training flags.

        `classes` are their names, `run_dir` is the folder to save in, which timing a step does not need.
        `class_weights` (classes,) multiply the terms of the loss. `images` is {split: number of images}.
        """
        self.model, self.args, self.processes, self.classes = model, args, processes, list(classes)
        self.run_dir, self.class_weights, self.images = run_dir, class_weights, images or {}
        self.evaluated_on = "val" if "val" in self.images else "test"
        self.schedule = Schedule(num_steps, args.warmup_steps, args.decay_type, args.decay_steps)
        sharded = is_sharded(args, processes)
        self.precision = make_precision(args, processes.device, args.amp_backend, args.loss_scale, sharded)
        freeze(model, args.train)
        model.train()
        self.compiled = is_compiled(args, model, processes.device)
        if args.grad_checkpointing:
            recompute_activations(model, self.compiled)
        if self.compiled:
            compile_in_place(model, processes.device)
        if sharded:  # block by block, so that a model that is too large for one device gets there
            shard_weights(model, processes, dtype=self.precision.dtype if self.precision.level == "O2" else None)
        model.to(processes.device)
        self.optimizer = self.precision.prepare(model, lambda named: make_optimizer(args, model, named))
        self.average = WeightAverage(model, self.precision.named, args.ema_decay) if args.ema_decay else None
        self.network = model
        if processes.size > 1 and not sharded:
            # All steps have the same graph, which DDP need not search again; unsynchronised micro-batches differ.
            is_static = args.gradient_accumulation_steps == 1
            self.network = DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=is_static)
        self.mixing = make_mixing(args.mixup, args.cutmix)
        random_layers = [layer for layer in model.modules() if hasattr(layer, "seed_samples")]
        self.random_layers = [layer for layer in random_layers if layer.rate > 0 and layer.training]
        self.step = 0
        self.progress = Progress()
        self.meter = Meter(processes)

    def learning_rate(self, step=None):
        """--learning_rate as scheduled for the update after this step, by default after the present one."""
        return learning_rate(self.step if step is None else step, self.args.learning_rate, self.schedule)

    def set_learning_rate(self):
        """Schedule the learning rate of each group, in proportion to its own initial one."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, group["initial_lr"], self.schedule)

    def prepare(self, batch):
        """(images, targets, labels) of a MicroBatch, mixed where asked for; seeds the layers that draw random numbers.

        Targets are the labels, or probabilities (B, classes) of mixed images, whose label is that of the larger share.
        """
        if self.random_layers:
            keys = dropout_keys(self.args.seed, batch.positions, len(self.random_layers), self.processes.device)
            for layer, layer_keys in zip(self.random_layers, keys, strict=True):
                layer.seed_samples(layer_keys)
        if not self.mixing:
            return batch.images, batch.labels, batch.labels
        seed = (self.args.seed, self.step)
        images, targets = mix_pairs(self.mixing, batch.images, batch.labels, len(self.classes), *seed)
        return images, targets, targets.argmax(dim=1)

    def read_metrics(self, tracker):
        """Read the metrics of the latest steps, which waits for the device. Raises RunStoppedError for a bad loss."""
        metrics = self.meter.read()
        if not metrics:
            return
        first_step = self.step - len(metrics["loss"]) + 1
        for step, loss in enumerate(metrics["loss"], start=first_step):
            if not math.isfinite(loss):
                raise not_finite(f"the loss is {loss} at step {step}", self.learning_rate(step - 1), self.run_dir)
        tracker.log_steps(first_step, metrics, self.learning_rate(), self.images_per_second())

    def images_per_second(self):
        """The training speed since the last evaluation."""
        return self.meter.steps_per_second() * self.args.train_batch_size

    def is_evaluation_due(self):
        """Whether the present step must be evaluated, which has not happened yet."""
        is_due_now = is_due(self.step, self.args.eval_every) or self.step == self.schedule.num_steps
        return is_due_now and self.progress.evaluated_step < self.step

    @property
    def best(self):
        """The Best evaluation so far."""
        return Best(self.args.best_metric, self.progress.best_value, self.progress.best_step)

    def evaluate(self, eval_set, tracker, stop):
        """Evaluate the weights, or their moving average if there is one; save the best, and record the result.

        With --test_at_end only the last step is evaluated, and no weights are the best; the metrics of the training are
        recorded at the other steps. Raises RunStoppedError for a stop signal, after which the evaluation is repeated
        when the run resumes. That gives the same files, so it does not matter how much of it had been written.
        """
        result = dict.fromkeys((*MEASURED, self.args.best_metric), math.nan)
        if not self.args.test_at_end or self.step == self.schedule.num_steps:
            with self.average.in_place(self.model) if self.average else contextlib.nullcontext():
                result = self.measure(eval_set, stop)
            self.progress.last_result = result
        if not self.args.test_at_end and self.best.is_improved_by(result[self.args.best_metric]):
            self.progress.best_result = result
            self.progress.best_value, self.progress.best_step = result[self.args.best_metric], self.step
            self.save_evaluated(BEST)
        row = self.metrics_row(result, tracker.seconds())
        tracker.log_evaluation(row, self.best)
        self.meter.reset()
        self.progress.evaluated_step, self.progress.total_seconds = self.step, tracker.seconds()
        if self.processes.is_first:
            update_state(self.run_dir, self.step, self.state_dict())
        self.meter.start_clock()

    def save_evaluated(self, name):
        """Write the weights that are evaluated, the moving average if there is one, to a file of the run's folder."""
        averaged = self.average.weights if self.average else {}
        weights, owner = {**self.precision.weights(), **averaged}, (self.processes.is_first, self.args.model_type)
        save_measured(self.run_dir, name, self.step, weights, *owner)

    def measure(self, images, stop):
        """{metric: number} of the model's weights on a split, with the number of its images."""

        def check_stop():
            if number := stop.agreed():
                raise self.stopped_by(number, "in the evaluation ")

        size = (self.args.img_size, self.args.img_size)
        options = (size, self.args.eval_batch_size, self.precision, self.processes)
        needs_confusion = BEST_METRICS[self.args.best_metric].from_confusion
        result = evaluate(self.model, images, *options, needs_confusion, after_batch=check_stop)
        return {name: value for name, value in result.items() if not torch.is_tensor(value)}

    def finish(self, test_set, stop):
        """Measure the last and the best weights on the test set if there is one apart; write RESULT and return it.

        {"last": {"step", split: {metric: number}}, "best": the same}, and how the run came about. With a moving
        average, "last" is of the average, which is written to AVERAGED.
        """
        progress, num_steps = self.progress, self.schedule.num_steps
        entries = {"last": {"step": num_steps, self.evaluated_on: progress.last_result}}
        if not self.args.test_at_end:
            entries["best"] = {"step": progress.best_step, self.evaluated_on: progress.best_result}
        if self.average:
            self.save_evaluated(AVERAGED)
        if test_set:
            with self.average.in_place(self.model) if self.average else contextlib.nullcontext():
                entries["last"]["test"] = self.measure(test_set, stop)
            weights, _ = load_weights(self.run_dir / BEST)
            load_whole_weights(self.model, weights)
            entries["best"]["test"] = self.measure(test_set, stop)
        result = {
            "chosen_on": None if self.args.test_at_end else self.evaluated_on,
            "chosen_by": None if self.args.test_at_end else self.args.best_metric,
            "seed": self.args.seed,
            **entries,
            "flags": vars(self.args),
        }
        if self.processes.is_first:
            write_result(self.run_dir, result)
        return result

    def metrics_row(self, result, seconds):
        """{column: number} of an evaluation and the mean metrics of the steps before it."""
        # The prefix distinguishes a training metric from the same metric of the evaluation.
        training = {f"train_{name}" if name in result else name: mean for name, mean in self.meter.means().items()}
        names = dict.fromkeys((*MEASURED, self.args.best_metric))
        evaluated = {f"{self.evaluated_on}_{name}": result[name] for name in names}
        speed = {"lr": self.learning_rate(), "images_per_second": self.images_per_second(), "seconds": seconds}
        return {"step": self.step, **training, **evaluated, **speed}

    def check_weights(self):
        """Raise RunStoppedError if a weight is not finite, as may follow a finite loss."""
        weights = local_parts({**self.model.state_dict(), **self.precision.named}.values())
        if sum_over_processes(1.0 - torch.stack([weight.isfinite().all() for weight in weights]).all().float()):
            message = f"the weights are not finite after step {self.step}"
            raise not_finite(message, self.learning_rate(self.step - 1), self.run_dir)

    def log_attention(self, eval_set, tracker):
        """Draw the attention rollout of a ViT on a few evaluated images into TensorBoard."""
        self.read_metrics(tracker)
        if self.processes.is_first:
            images, labels = eval_set.examples(ATTENTION_IMAGES, (self.args.img_size, self.args.img_size))
            figure = self.attention_figure(images, labels, eval_set.classes)
            tracker.log_figure("attention rollout", figure, self.step)
        self.meter.start_clock()

    @torch.no_grad()
    def attention_figure(self, images, labels, classes):
        """The attention rollout on images (B, 3, H, W), with their classes and predictions."""
        from utils.attention import attention_of, class_token_mask, rollout
        from utils.figures import plot_image_grid

        self.model.eval()
        with self.precision.autocast():
            logits, attention, _ = attention_of(self.model, self.precision.inputs(images))
        self.model.train()
        masks = class_token_mask(rollout(attention), self.model.patch_embed.grid_size)
        pairs = zip(labels.tolist(), logits.argmax(dim=1).tolist(), strict=True)
        captions = [f"{classes[label]}\npredicted: {classes[best]}" for label, best in pairs]
        originals = denormalise(images, self.args.mean_std).cpu()
        return plot_image_grid(originals, masks, captions, f"step {self.step}", columns=4)

    def save(self, seconds):
        """Write a checkpoint; `seconds` is the duration of the run. Raises RunStoppedError."""
        self.check_weights()
        self.progress.total_seconds = seconds
        tensors = state_tensors(self.optimizer)
        if self.average:
            tensors |= {f"{name}/{AVERAGE}": tensor for name, tensor in self.average.weights.items()}
        weights, state = self.precision.weights(), self.state_dict()
        options = (self.processes.is_first, self.args.keep_checkpoints, self.args.model_type)
        save_checkpoint(self.run_dir, self.step, weights, tensors, state, *options)
        self.meter.start_clock()

    def state_dict(self):
        """What a checkpoint contains in addition to tensors."""
        return {
            "flags": vars(self.args),
            "classes": self.classes,
            "images": self.images,
            "optimizer": self.args.optimizer,
            "precision": self.precision.state_dict(),
            "threads": torch.get_num_threads(),
            "progress": {"step": self.step, **asdict(self.progress), "metrics": self.meter.state_dict()},
        }

    def restore(self, saved):
        """Continue from the state of the checkpoint whose weights the model holds. Raises UserError."""
        progress = dict(saved["progress"])
        self.step = progress.pop("step")
        progress.setdefault("evaluated_step", self.step)  # earlier versions evaluated before they saved
        self.meter.load_state_dict(progress.pop("metrics", None) or metrics_of_earlier_version(progress, self.args))
        if "best_accuracy" in progress:  # of earlier versions, which had no other metric
            progress["best_value"] = progress.pop("best_accuracy")
        self.progress = Progress(**progress)
        self.forget_later_best()
        places = {**self.precision.weights(), **self.precision.named}
        tensors = load_tensors(self.run_dir, self.step, empty_state(places))
        averages = {name: tensors.pop(f"{name}/{AVERAGE}") for name in places if f"{name}/{AVERAGE}" in tensors}
        if self.average:
            self.average.weights.update(averages)
        restore_state(self.optimizer, tensors)
        self.precision.load_state_dict(saved["precision"])

    def forget_later_best(self):
        """Forget the best evaluation if BEST is of another step: written after the checkpoint that the run resumes."""
        with contextlib.suppress(UserError):  # it is missing or damaged, which matters at the end of the run only
            if saved_step(self.run_dir / BEST) != self.progress.best_step:
                self.progress.best_value, self.progress.best_step, self.progress.best_result = None, 0, None

    def stopped_by(self, signal_number, where=""):
        """The RunStoppedError of a run that a signal stops."""
        name, saved = signal.Signals(signal_number).name, self.run_dir / LAST
        message = f"stopped by {name} {where}after step {self.step}; saved {saved}"
        return RunStoppedError(f"{message}; the same command with --resume continues", status=128 + signal_number)


def is_due(step, interval):
    """Whether something that happens every `interval` steps, or never if it is None, happens after this step."""
    return bool(interval) and step % interval == 0


def is_sharded(args, processes):
    """Whether each process holds a shard of the weights."""
    return args.parallel == "fsdp" and processes.size > 1


def metrics_of_earlier_version(progress, args):
    """`Meter.state_dict` from the sums over images that earlier versions saved; removes them from `progress`."""
    loss, correct, images = (progress.pop(name) for name in ("loss", "correct", "images"))
    steps = images // args.train_batch_size
    totals = {"loss": loss / args.train_batch_size, "accuracy": correct / args.train_batch_size}
    totals = {name: [total, steps] for name, total in totals.items()}
    return {"totals": totals, "steps": steps, "seconds": progress.pop("training_seconds")}


def not_finite(what, lr, run_dir):
    """The RunStoppedError of a run that diverges."""
    kept = f"last good checkpoint: {run_dir / LAST}" if (run_dir / LAST).exists() else "there is no checkpoint yet"
    advice = "try a lower --learning_rate or a longer --warmup_steps"
    return RunStoppedError(f"{what} (learning rate {lr:.3g}); {kept}; {advice}", DIVERGED)
