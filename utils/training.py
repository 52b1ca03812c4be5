"""The training loop of every script.

A step is a pure function of the weights, the optimizer's state, the seed and the step's number; so resuming is
exact, and any number of processes sees the same global batch.
"""

import contextlib
import functools
import math
import signal
import time
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from utils.data.augmentation import Augmentation, denormalise
from utils.data.datasets import DATASETS, dropout_keys, stream_positions
from utils.data.mixing import make_mixing, mix_pairs
from utils.errors import RunStoppedError, UserError
from utils.evaluation import evaluate, run_evaluation
from utils.parallel.averaging import WeightAverage
from utils.parallel.memory import recompute_activations
from utils.parallel.precision import make_precision
from utils.parallel.processes import (
    StopSignal,
    barrier,
    gradients_summed,
    join_processes,
    local_parts,
    shard_weights,
    sum_over_processes,
    union_over_processes,
)
from utils.pretrained import take_pretrained
from utils.records.checkpoint import LAST, load_checkpoint, load_into, load_tensors, save_checkpoint
from utils.records.tracker import (
    Tracker,
    check_shared,
    continues,
    not_shared,
    open_run_folder,
    prepare_run_folder,
    read_config,
    report_changed_flags,
    resumes,
)
from utils.records.weights_and_biases import WeightsAndBiases
from utils.scheduler import learning_rate

OPTIMIZERS = {
    "sgd": functools.partial(torch.optim.SGD, momentum=0.9),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
AVERAGE = "average"  # a checkpoint's name for the moving average of a weight
WATCHED = 8  # test images whose attention --log_attention_every draws
READ_EVERY = {"cpu": 1, "cuda": 20}  # steps between two looks at the loss, each of which waits for the device


@dataclass
class Progress:
    """Where a run stands; the sums are over the steps since the last evaluation."""

    step: int = 0
    loss: float = 0.0
    correct: int = 0
    images: int = 0
    training_seconds: float = 0.0
    best_accuracy: float = -1.0
    best_step: int = 0
    total_seconds: float = 0.0


class Window:
    """The steps since the last look at them: their losses and hits, which stay on the device until then."""

    def __init__(self):
        self.start()

    def start(self):
        """An empty window; the time of the steps that follow counts from now."""
        self.losses, self.hits, self.started = [], [], time.monotonic()

    def add(self, loss, hits):
        self.losses.append(loss)
        self.hits.append(hits)

    def read(self, processes):
        """(losses of the steps, hits in all of them, seconds), over all processes; a new window begins."""
        values = sum_over_processes(torch.stack([*self.losses, *self.hits]).double()).tolist()
        losses = [loss / processes.size for loss in values[: len(self.losses)]]
        hits = int(sum(values[len(self.losses) :]))
        seconds = time.monotonic() - self.started
        self.start()
        return losses, hits, seconds


def run_training(args, make_model):
    """What a training script does once its flags are checked: `make_model(num_classes)` is trained on the data."""
    if continues(args):
        args.resume, args.overwrite = True, False
    run_dir = open_run_folder(args)
    with join_processes(args.local_rank) as processes:
        prepare_and_train(args, make_model, processes, run_dir)


def prepare_and_train(args, make_model, processes, run_dir):
    source = DATASETS[args.dataset]
    torch.manual_seed(args.seed)
    model = make_model(source.count_classes(args.data_dir))
    state = None
    resuming = union_over_processes({resumes(args)})
    if len(resuming) > 1:
        raise not_shared(run_dir)
    if True in resuming:
        if processes.rank == 0:
            report_changed_flags(read_config(run_dir), args)
        weights, state = load_checkpoint(run_dir)
        load_into(model, weights, run_dir / LAST)
    elif args.pretrained_dir:
        take_pretrained(model, args, processes)
    places = (args.data_dir, processes, args.num_workers)
    how = {"mean_std": args.mean_std, "skip_broken": args.skip_broken}
    train_set = source.load(True, *places, args.examples_per_class, **how)
    test_set = source.load(False, *places, **how)
    train(model, train_set, test_set, args, processes, run_dir, state)


MODES = {"train": run_training, "eval": run_evaluation}


def train(model, train_set, test_set, args, processes, run_dir, state=None):
    """Train `model`, any module from images (B, 3, H, W) to logits (B, num_classes), as the flags in `args` say.

    `state` is that of the checkpoint whose weights the model holds, if the run goes on from one. Leaves the run's
    records in `run_dir`. Raises RunStoppedError when it is asked to stop or its numbers are not finite.
    """
    num_steps = args.num_steps or math.ceil(args.epochs * len(train_set) / args.train_batch_size)
    img_size = (args.img_size, args.img_size)
    first = processes.rank == 0
    progress = Progress(**state["progress"]) if state else Progress()
    if state and state["optimizer"] != args.optimizer:
        was = state["optimizer"]
        raise UserError(f"the run was started with --optimizer {was}, so it can't be resumed with {args.optimizer}")
    if progress.step > num_steps:
        raise UserError(f"{run_dir} is at step {progress.step} already, beyond the {num_steps} asked for")
    network, precision, optimizer, average = set_up(model, args, processes)
    if state:
        restore(optimizer, average, load_tensors(run_dir, progress.step, place_beside(precision.named)))
        precision.load_state_dict(state["precision"])
    barrier()  # every process has seen whether there is a run to resume
    if first:
        prepare_run_folder(run_dir, args, train_set.classes, num_steps)
    check_shared(run_dir)
    dropouts = [layer for layer in model.modules() if hasattr(layer, "seed_samples") and layer.rate > 0]
    mixing = make_mixing(args.mixup, args.cutmix)

    def lr_at(step):
        return learning_rate(step, args.learning_rate, args.warmup_steps, num_steps, args.decay_type)

    def read_back():
        """Look at the steps since the last look, which waits for the device; their losses must be finite."""
        step_losses, step_hits, seconds = window.read(processes)
        first_step = progress.step - len(step_losses) + 1
        for step, loss in enumerate(step_losses, start=first_step):
            if not math.isfinite(loss):
                raise not_finite(f"the loss is {loss} at step {step}", lr_at(step - 1), run_dir)
        progress.loss += sum(step_losses) * args.train_batch_size
        progress.correct += step_hits
        progress.images += len(step_losses) * args.train_batch_size
        progress.training_seconds += seconds
        images_per_second = progress.images / progress.training_seconds
        tracker.log_steps(first_step, step_losses, lr_at(progress.step), images_per_second)

    def check_weights():
        """A finite loss may still have led to weights that are not, and those must not be saved."""
        weights = local_parts(precision.weights().values())
        if sum_over_processes(1.0 - torch.stack([weight.isfinite().all() for weight in weights]).all().float()):
            raise not_finite(
                f"the weights are not finite after step {progress.step}", lr_at(progress.step - 1), run_dir
            )

    def evaluate_and_record():
        with average.in_place(model) if average else contextlib.nullcontext():
            result = evaluate(model, test_set, img_size, args.eval_batch_size, precision, processes)
        if result["accuracy"] > progress.best_accuracy:
            progress.best_accuracy, progress.best_step = result["accuracy"], progress.step
        tracker.log_evaluation(
            {
                "step": progress.step,
                "train_loss": progress.loss / progress.images,
                "train_accuracy": progress.correct / progress.images,
                "test_loss": result["loss"],
                "test_accuracy": result["accuracy"],
                "test_top5_accuracy": result["top5_accuracy"],
                "lr": lr_at(progress.step),
                "images_per_second": progress.images / progress.training_seconds,
                "seconds": tracker.seconds(),
            },
            progress.best_accuracy,
            progress.best_step,
        )
        progress.loss = progress.correct = progress.images = progress.training_seconds = 0

    def save():
        progress.total_seconds = tracker.seconds()
        weights, tensors = precision.weights(), optimizer_tensors(optimizer)
        evaluated = weights
        if average:
            evaluated = {**weights, **average.weights}
            tensors |= {f"{name}/{AVERAGE}": tensor for name, tensor in average.weights.items()}
        best = evaluated if progress.best_step == progress.step else None
        state = {"optimizer": args.optimizer, "precision": precision.state_dict(), "progress": asdict(progress)}
        save_checkpoint(run_dir, progress.step, weights, best, tensors, state, first)

    wandb = WeightsAndBiases(run_dir, args) if args.wandb and first else None
    stands = (progress.step, num_steps, progress.total_seconds)
    tracker = Tracker(run_dir, *stands, len(train_set.classes), enabled=first, wandb=wandb)
    tracker.say(opening_lines(args, model, train_set, test_set, processes, progress.step, num_steps))
    stop = StopSignal()
    watched = test_set.examples(WATCHED, img_size) if args.log_attention_every and first else None
    window = Window()
    batches = training_batches(train_set, args, processes, progress.step, num_steps)
    try:
        with stop.listening():
            while progress.step < num_steps:
                for group in optimizer.param_groups:
                    group["lr"] = lr_at(progress.step)
                step_loss = step_hits = 0
                for part in range(args.gradient_accumulation_steps):
                    positions, (images, labels) = next(batches)
                    seed_samples(dropouts, args.seed, positions, processes.device)
                    targets = labels
                    if mixing:
                        images, targets = mix_pairs(
                            mixing, images, labels, len(train_set.classes), args.seed, progress.step
                        )
                        labels = targets.argmax(dim=1)  # of the larger share, for the training accuracy
                    with gradients_summed(network, last=part == args.gradient_accumulation_steps - 1):
                        with precision.autocast():
                            logits = network(precision.inputs(images)).float()
                        loss = F.cross_entropy(logits, targets, label_smoothing=args.label_smoothing)
                        loss = loss / args.gradient_accumulation_steps
                        precision.backward(loss)
                    step_loss += loss.detach()
                    step_hits += (logits.argmax(dim=1) == labels).sum()
                precision.step(optimizer, args.max_grad_norm)
                window.add(step_loss, step_hits)
                progress.step += 1
                if average:
                    average.update(precision.named, progress.step)

                evaluates = progress.step % args.eval_every == 0 or progress.step == num_steps
                if len(window.losses) == READ_EVERY[processes.device.type] or evaluates:
                    read_back()
                if evaluates:
                    check_weights()
                    evaluate_and_record()
                if args.log_attention_every and progress.step % args.log_attention_every == 0:
                    if window.losses:
                        read_back()
                    if watched is not None:
                        figure = attention_figure(
                            model, *watched, test_set.classes, precision, f"step {progress.step}", args.mean_std
                        )
                        tracker.log_figure("attention rollout", figure, progress.step)
                    window.start()  # drawing is not training time
                signal_number = stop.agreed()
                if evaluates or signal_number or (args.save_every and progress.step % args.save_every == 0):
                    if window.losses:
                        read_back()
                    check_weights()
                    save()
                    window.start()
                if signal_number and progress.step < num_steps:
                    raise RunStoppedError(stopped(signal_number, progress.step, run_dir), status=128 + signal_number)
        broken = union_over_processes(train_set.broken | test_set.broken)
        if broken:
            tracker.say(f"skipped {len(broken)} broken picture{'s' if len(broken) > 1 else ''}, named above")
        tracker.summarise(progress.best_accuracy, progress.best_step)
    finally:
        tracker.close()


def set_up(model, args, processes):
    """(network, precision, optimizer, WeightAverage or None): the model on its device, as a copy or in shards."""
    sharded = shares_weights(args, processes)
    precision = make_precision(args, processes.device, args.amp_backend, args.loss_scale, sharded)
    model.train()
    if args.grad_checkpointing:
        recompute_activations(model, args.compile)
    if args.compile:
        compile_in_place(model)
    if sharded:  # block by block, so that a model which fits on no device gets there
        shard_weights(model, processes, dtype=precision.dtype if precision.level == "O2" else None)
    model.to(processes.device)
    optimizer = precision.prepare(model, lambda named: make_optimizer(args, named))
    average = WeightAverage(precision.named, args.ema_decay) if args.ema_decay else None
    network = model
    if processes.size > 1 and not sharded:
        # Every step's graph is the same, which DDP need not find out anew; parts that are not summed would confuse it.
        whole = args.gradient_accumulation_steps == 1
        network = DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=whole)
    return network, precision, optimizer, average


def shares_weights(args, processes):
    return args.parallel == "fsdp" and processes.size > 1


@torch.no_grad()
def attention_figure(model, images, labels, classes, precision, title, mean_std):
    """Attention rollout of a ViT on test images (B, 3, H, W) with what they are and what it takes them for."""
    from utils.visualize import attention_of, class_token_mask, plot_pictures, rollout

    model.eval()
    with precision.autocast():
        logits, attention, _ = attention_of(model, precision.inputs(images))
    model.train()
    masks = class_token_mask(rollout(attention), model.patch_embed.grid_size)
    pairs = zip(labels.tolist(), logits.argmax(dim=1).tolist(), strict=True)
    captions = [f"{classes[label]}\npredicted: {classes[best]}" for label, best in pairs]
    return plot_pictures(denormalise(images, mean_std).cpu(), masks, captions, title, columns=4)


def training_batches(train_set, args, processes, first_step, num_steps):
    """(stream positions, (images, labels)) of each step's accumulation parts, from `first_step` on."""
    steps = (args.train_batch_size, args.gradient_accumulation_steps, processes, first_step, num_steps)
    size = (args.img_size, args.img_size)
    augmentation = Augmentation(args.seed, size, args.min_crop_scale, args.horizontal_flip, args.rand_augment)
    images_and_labels = train_set.train_batches(stream_positions(*steps), augmentation)
    return zip(stream_positions(*steps), images_and_labels, strict=True)


def make_optimizer(args, named_parameters):
    """The optimizer by its flag; biases, norms, the class token and position embeddings are not decayed."""
    groups = [{"params": [], "weight_decay": args.weight_decay}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in named_parameters:
        decays = parameter.ndim > 1 and name not in ("cls_token", "pos_embed")
        groups[0 if decays else 1]["params"].append((name, parameter))
    # The fused SGD of torch 2.9 leaves bfloat16 weights on a CPU (level O3) as they are, and knows no shards.
    fused = all(parameter.dtype == torch.float32 for _, parameter in named_parameters)
    fused = fused and not (args.optimizer == "sgd" and any(isinstance(p, DTensor) for _, p in named_parameters))
    return OPTIMIZERS[args.optimizer](groups, lr=args.learning_rate, fused=fused)


def compile_in_place(model):
    """Compile by torch.compile; a block's code may be compiled for training, evaluation, merged tokens, odd batches."""
    torch._dynamo.config.recompile_limit = 64  # of a function; beyond it PyTorch would go on without compiling
    torch._dynamo.config.optimize_ddp = False  # it would split a block's graph at DDP's buckets, to send parts earlier
    model.compile()


def optimizer_tensors(optimizer):
    """{"<weight>/<quantity>": tensor}: the momenta of each weight, whole or sharded, and Adam's count of the steps."""
    named = [
        pair for group in optimizer.param_groups for pair in zip(group["param_names"], group["params"], strict=True)
    ]
    return {f"{name}/{key}": tensor for name, weight in named for key, tensor in optimizer.state[weight].items()}


def place_beside(weights):
    """The `like` of `load_tensors` for `optimizer_tensors` of the weights {name: tensor}: whole or sharded as those."""

    def place(key, shape, dtype):
        weight = weights[key.rpartition("/")[0]]
        return torch.zeros_like(weight, dtype=dtype) if weight.shape == shape else torch.zeros(shape, dtype=dtype)

    return place


def restore(optimizer, average, tensors):
    """Take a checkpoint's momenta and weight averages; rates and decay are the flags'."""
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    state = {number: {} for number in range(len(names))}
    for key, tensor in tensors.items():
        name, _, quantity = key.rpartition("/")
        if quantity != AVERAGE:
            state[names.index(name)][quantity] = tensor
        elif average:
            average.weights[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def seed_samples(layers, seed, positions, device):
    """Tell the layers that draw random numbers which samples come."""
    if layers:
        for layer, keys in zip(layers, dropout_keys(seed, positions, len(layers), device), strict=True):
            layer.seed_samples(keys)


def opening_lines(args, model, train_set, test_set, processes, first_step, num_steps):
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    begins = f"resuming at step {first_step} of {num_steps}, steps" if first_step else f"{num_steps} steps"
    shards = ", each with its shard of the weights" if shares_weights(args, processes) else ""
    lines = [
        f"{args.model_type}, {millions:.2f} M parameters, on {args.dataset}: {len(train_set)} training and "
        f"{len(test_set)} test images, {len(train_set.classes)} classes",
        f"{begins} of {args.train_batch_size} images at {args.img_size}x{args.img_size}, {processes}{shards}",
    ]
    if args.warmup_steps >= num_steps:
        lines.append(f"warning: the run ends within the warm-up of {args.warmup_steps} steps; see --warmup_steps")
    return "\n".join(lines)


def not_finite(what, lr, run_dir):
    kept = f"last good checkpoint: {run_dir / LAST}" if (run_dir / LAST).exists() else "there is no checkpoint yet"
    way_out = "try a lower --learning_rate or a longer --warmup_steps"
    return RunStoppedError(f"{what} (learning rate {lr:.3g}); {kept}; {way_out}", status=1)


def stopped(signal_number, step, run_dir):
    name = signal.Signals(signal_number).name
    return f"stopped by {name} after step {step}; saved {run_dir / LAST}; the same command with --resume continues"
