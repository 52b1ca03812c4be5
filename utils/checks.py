"""Checks of flags that depend on each other or on files, before any work. All of them raise UserError."""

import math
import os
from pathlib import Path

import torch

from utils.data.datasets import DATASETS, DataOptions, check_class_names, count_classes, training_splits
from utils.data.folders import class_folders, image_folders
from utils.data.policies import MAX_MAGNITUDE
from utils.errors import UserError
from utils.freezing import freeze
from utils.metrics import BEST_METRICS
from utils.optimizers import make_optimizer
from utils.parallel.precision import import_apex_amp, trained_parameters
from utils.pretrained import check_exists, published_url
from utils.records.result import last_measured
from utils.records.run_folder import best_weights, folder_of, resumes
from utils.records.weights_and_biases import check_project, import_wandb

MAX_STEPS = 10**9
MAX_REPEATS = 10  # of an image in one batch, beyond which the size must be a mistake


def check_training_flags(args, make_model):
    """All checks of a training script; `make_model(num_classes)` is tried without weights."""
    check_flags_together(args, make_model)
    check_files(args)


def check_flags_together(args, make_model):
    """The checks that do not need any file."""
    if args.name in ("", ".", "..") or Path(args.name).name != args.name:
        raise UserError(f"--name {args.name!r} is not a plain folder name")
    if args.resume and args.overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    if args.mode == "train":
        check_division(args)
        check_restarts(args)
    if args.epochs:
        args.num_steps = None
    check_length(args, args.num_steps or args.epochs / args.train_batch_size, math.inf)
    if args.decay_steps and args.decay_type != "step":
        raise UserError(f"--decay_steps is for --decay_type step, not {args.decay_type}")
    if args.amp_backend == "apex":
        import_apex_amp()
        if args.bf16:
            raise UserError("--amp_backend apex supports float16 only; use --fp16, or omit --amp_backend for --bf16")
    if args.parallel == "fsdp":
        check_sharding(args)
    if args.wandb and args.mode == "train":
        check_project(args.wandb_project)
        import_wandb()
    if args.download and not args.pretrained_dir:
        raise UserError("--download needs --pretrained_dir, the path to download to")
    check_augmentation(args)
    check_model(args, make_model)


def check_augmentation(args):
    """Whether the augmentation can be applied."""
    if args.rand_augment and args.auto_augment:
        raise UserError("--rand_augment and --auto_augment exclude each other")
    if args.rand_augment and not (args.rand_augment[0] and args.rand_augment[1] <= MAX_MAGNITUDE):
        given = " ".join(map(str, args.rand_augment))
        raise UserError(f"--rand_augment {given}: give at least 1 operation and a magnitude of at most {MAX_MAGNITUDE}")
    if args.repeated_augmentation > args.train_batch_size:
        raise UserError(
            f"--repeated_augmentation {args.repeated_augmentation} is more than --train_batch_size "
            f"{args.train_batch_size}: a batch would contain a single image"
        )
    if args.resize_size and args.crop_padding:
        raise UserError("--resize_size and --crop_padding exclude each other")
    if args.crop_padding and args.crop_padding >= args.img_size:
        raise UserError(
            f"--crop_padding {args.crop_padding} is not smaller than --img_size {args.img_size}: more pixels than the "
            "image has can't be mirrored"
        )
    if args.resize_size and args.resize_size < args.img_size:
        raise UserError(
            f"--resize_size {args.resize_size} is smaller than --img_size {args.img_size}, the part that is taken of it"
        )


def check_model(args, make_model):
    """Whether the model and its optimizer can be made, by making them without memory."""
    try:
        with torch.device("meta"):
            model = make_model(num_classes=1)
        freeze(model, args.train)
        make_optimizer(args, model, trained_parameters(model).items())
    except ValueError as error:
        raise UserError(str(error)) from error
    if args.log_attention_every and not hasattr(model, "forward_with_attention"):
        raise UserError(f"--log_attention_every: {args.model_type} has no attention")


def check_restarts(args):
    """Whether processes that torchrun restarts would agree on where the run stands."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    several_machines = int(os.environ.get("LOCAL_WORLD_SIZE", processes)) < processes
    # A process is informed of the restarts on its own machine only.
    if several_machines and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and not args.resume:
        raise UserError(
            "torchrun --max-restarts on several machines needs --resume, to continue from the last checkpoint"
        )


def check_sharding(args):
    """Whether the flags suit shards of the weights."""
    if args.fp16 and not args.bf16 and torch.cuda.is_available():
        raise UserError("--parallel fsdp does not support loss scaling for float16; use --bf16")
    if (args.fp16 or args.bf16) and args.fp16_opt_level == "O3":
        raise UserError("--parallel fsdp does not support level O3; use O2, whose float32 masters are sharded too")
    if args.optimizer == "muon":
        raise UserError("--parallel fsdp does not support --optimizer muon, which needs whole matrices; use adamw")
    if args.log_attention_every:
        raise UserError("--log_attention_every needs the whole model in one process; omit --parallel fsdp")


def check_division(args):
    """Whether the batch can be divided over the processes and accumulation steps."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    parts = processes * args.gradient_accumulation_steps
    if args.train_batch_size % parts:
        raise UserError(
            f"--train_batch_size {args.train_batch_size} is not divisible by {processes} processes x "
            f"{args.gradient_accumulation_steps} accumulation steps; "
            f"{args.train_batch_size // parts * parts or parts} would be"
        )
    if (args.mixup or args.cutmix) and args.train_batch_size // parts % 2:
        flag = "--mixup" if args.mixup else "--cutmix"
        each = f"{processes} processes x {args.gradient_accumulation_steps} accumulation steps"
        must = f"give an even number to each of {each}" if parts > 1 else "be even"
        raise UserError(
            f"{flag} mixes pairs, so --train_batch_size {args.train_batch_size} must {must}; "
            f"{args.train_batch_size + parts} would"
        )


def check_length(args, num_steps, num_images):
    """Whether the run's length is possible and its batch fits the number of training images."""
    if num_steps > MAX_STEPS:
        flag = f"--epochs {args.epochs:g}" if args.epochs else f"--num_steps {num_steps}"
        raise UserError(f"{flag} is more than {MAX_STEPS:,} steps, which no run reaches; give a smaller number")
    if args.train_batch_size > MAX_REPEATS * num_images:
        raise UserError(
            f"--train_batch_size {args.train_batch_size} is more than {MAX_REPEATS} times the {num_images} training "
            f"images; give at most {MAX_REPEATS * num_images}"
        )


def check_best_metric(args, num_classes, where):
    """Whether --best_metric is defined for the number of classes in the data set or evaluated split, named `where`."""
    if BEST_METRICS[args.best_metric].from_confusion and num_classes < 2:
        raise UserError(f"--best_metric {args.best_metric} needs two classes, {where} has {num_classes}; give accuracy")


def check_files(args):
    """Whether the data and the weights exist, as far as possible without reading them."""
    options = DataOptions.from_flags(args)
    if DATASETS[args.dataset].in_folders:
        classes = {split: class_folders(folder) for split, folder in image_folders(args.data_dir).items()}
        check_class_names(options.classes or (), classes["train"], args.data_dir)
    splits = training_splits(args.dataset, options)
    if args.test_at_end and "val" in splits:
        raise UserError("--test_at_end is for runs without validation images; with them, the test is always at the end")
    if args.no_test and "val" not in splits:
        raise UserError("--no_test is for runs with validation images; give --val_split 0.1, or omit it")
    if args.mode == "train":
        check_best_metric(args, count_classes(args.dataset, options), args.dataset)
    has_weights = resumes(args) if args.mode == "train" else best_weights(args).exists()
    if args.mode == "eval" and not has_weights and not args.pretrained_dir:
        last = folder_of(args) / last_measured(folder_of(args))
        way_out = "train first, or check --output_dir and --name"
        if last.exists():  # of a run with --test_at_end
            way_out = f"give its last weights to evaluate.py --checkpoint {last}"
        raise UserError(f"--mode eval: {best_weights(args)} does not exist and no --pretrained_dir is given; {way_out}")
    if args.pretrained_dir and not has_weights and not (args.download and published_url(args.pretrained_dir)):
        check_exists(args.pretrained_dir)


def check_figure_path(path, flag):
    """Whether a figure can be written to `path`, before it takes hours to compute."""
    check_output_path(path, flag, ".png")


def check_output_path(path, flag, suffix):
    """Whether a file with this suffix can be written to `path`."""
    path = Path(path)
    if path.suffix != suffix or path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{flag} {path} can't be written; give a {suffix} file in a folder that exists")


def make_output_folder(folder, flag):
    """Create the folder that `flag` names, and check that it can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} can't be created: {error.strerror}; see {flag}") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder} can't be written; see {flag}")
