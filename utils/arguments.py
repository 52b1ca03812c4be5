"""The flags of the scripts, their help, and the checks that need no work to be started."""

import argparse
import difflib
import os
from pathlib import Path

import torch

from utils.data.augmentation import MAX_MAGNITUDE, MEAN_STD
from utils.data.datasets import DATASETS, FOLDERS, MAX_WORKERS, class_folders, image_folders
from utils.errors import UserError
from utils.parallel.precision import AMP_BACKENDS, OPT_LEVELS, import_apex_amp
from utils.parallel.processes import PARALLEL
from utils.pretrained import check_exists, published_url
from utils.records.tracker import best_weights, resumes
from utils.records.weights_and_biases import check_project, import_wandb
from utils.scheduler import DECAY_TYPES
from utils.training import MODES, OPTIMIZERS, WATCHED

REDUCTION = ("token_reduction", "keep_tokens", "reduction_layer")  # flags, and keywords of `build_model`


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; help shows the defaults."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)

    def error(self, message):
        raise UserError(message)


class HelpFormatter(argparse.HelpFormatter):
    """Adds "(default: ...)" where a flag has one."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=38, width=118)

    def _get_help_string(self, action):
        if action.default in (None, argparse.SUPPRESS) or action.default is False or "default" in action.help:
            return action.help
        return f"{action.help} (default: %(default)s)"


def training_parser(description):
    """The flags that all training scripts share."""
    parser = Parser(description)

    run = parser.add_argument_group("run")
    run.add_argument("--name", required=True, help="name of the run, and of its folder below --output_dir")
    run.add_argument(
        "--mode",
        type=one_of("mode", MODES),
        default="train",
        metavar="MODE",
        help="train, or eval: test the run's best weights, or before there are any --pretrained_dir with its head; "
        "the other flags may stay as in training, and nothing is written",
    )
    run.add_argument("--output_dir", default="output", metavar="DIR", help="where runs are kept")
    run.add_argument("--resume", action="store_true", help="continue from the run's last checkpoint, if it has one")
    run.add_argument("--overwrite", action="store_true", help="delete an earlier run of the same name first")
    run.add_argument(
        "--seed", type=seed, default=42, metavar="N", help="of the weights, the sample order, augmentation and dropout"
    )
    run.add_argument(
        "--wandb",
        action="store_true",
        help="send flags and curves to Weights & Biases too (pip install wandb); WANDB_MODE=offline keeps them in the "
        "run's folder",
    )
    run.add_argument(
        "--wandb_project",
        default=os.environ.get("WANDB_PROJECT", "vision-transformers"),
        metavar="NAME",
        help="with --wandb: the project that the run belongs to",
    )

    weights = parser.add_argument_group("pretrained weights")
    weights.add_argument(
        "--pretrained_dir", metavar="FILE", help="path of Google's .npz to fine-tune; none: from scratch"
    )
    weights.add_argument("--download", action="store_true", help="fetch --pretrained_dir where it does not exist yet")

    data = parser.add_argument_group("data")
    add_data_flags(data, default="cifar10")
    data.add_argument(
        "--examples_per_class",
        type=positive,
        metavar="N",
        help="train on the first N images of each class only; default: all",
    )
    data.add_argument(
        "--img_size", type=positive, default=224, metavar="PIXELS", help="side of the square input images in pixels"
    )
    data.add_argument(
        "--min_crop_scale",
        type=share,
        default=0.05,
        metavar="SHARE",
        help="smallest random crop as a share of the image's area; 1: no cropping but of the aspect ratio",
    )
    data.add_argument("--horizontal_flip", action="store_true", help="mirror half of the training images")
    data.add_argument(
        "--rand_augment",
        type=natural,
        nargs=2,
        metavar=("N", "M"),
        help=f"torchvision's RandAugment after crop and flip: N operations of magnitude M, {MAX_MAGNITUDE} at most, as "
        "in 2 9; done picture by picture, which is slow for data sets in memory; default: none",
    )
    data.add_argument(
        "--mean_std",
        type=one_of("mean and standard deviation", MEAN_STD),
        default="half",
        metavar="NAME",
        help="which mean and standard deviation pixels are normalised by: half, 0.5 and 0.5 as Google's checkpoints "
        "expect, or imagenet, each channel's own",
    )

    training = parser.add_argument_group("training")
    training.add_argument(
        "--train_batch_size",
        type=positive,
        default=512,
        metavar="N",
        help="images a step, over all processes and accumulation parts",
    )
    training.add_argument(
        "--eval_batch_size", type=positive, default=64, metavar="N", help="test images at once, each process"
    )
    training.add_argument("--num_steps", type=positive, default=10000, metavar="N", help="optimizer steps")
    training.add_argument(
        "--epochs", type=positive_float, metavar="N", help="passes over the training set, instead of --num_steps"
    )
    training.add_argument(
        "--eval_every",
        type=positive,
        default=100,
        metavar="N",
        help="steps between two evaluations, each with a checkpoint",
    )
    training.add_argument(
        "--save_every",
        type=positive,
        metavar="N",
        help="steps between two checkpoints besides those of the evaluations: what a crash may cost; default: none",
    )
    training.add_argument(
        "--log_attention_every",
        type=positive,
        metavar="N",
        help=f"steps between two pictures of a ViT's attention in TensorBoard: rollout on {WATCHED} test images; "
        "default: none",
    )
    training.add_argument(
        "--gradient_accumulation_steps",
        type=positive,
        default=1,
        metavar="N",
        help="parts that a batch is worked through in",
    )

    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument(
        "--optimizer",
        type=one_of("optimizer", OPTIMIZERS),
        default="sgd",
        metavar="NAME",
        help=f"{', '.join(OPTIMIZERS)}; sgd has momentum 0.9",
    )
    optimisation.add_argument(
        "--learning_rate", type=positive_float, default=3e-2, metavar="LR", help="the highest, after warm-up"
    )
    optimisation.add_argument(
        "--weight_decay",
        type=natural_float,
        default=0.0,
        metavar="WD",
        help="not on biases, norms, class token and position embeddings",
    )
    optimisation.add_argument(
        "--warmup_steps", type=natural, default=500, metavar="N", help="steps of linear warm-up from 0"
    )
    optimisation.add_argument(
        "--decay_type",
        type=one_of("decay type", DECAY_TYPES),
        default="cosine",
        metavar="TYPE",
        help=f"{' or '.join(DECAY_TYPES)}, to 0 at the last step",
    )
    optimisation.add_argument(
        "--max_grad_norm",
        type=natural_float,
        default=1.0,
        metavar="NORM",
        help="clip the gradients' global norm to this; 0: never",
    )
    optimisation.add_argument(
        "--label_smoothing", type=fraction, default=0.0, metavar="SHARE", help="probability spread over all classes"
    )
    optimisation.add_argument(
        "--ema_decay",
        type=fraction,
        default=0.0,
        metavar="DECAY",
        help="evaluate, and keep as the best, an exponential moving average of the weights, such as 0.9999; "
        "0: the weights themselves",
    )
    optimisation.add_argument(
        "--mixup",
        type=beta_alpha,
        default=0.0,
        metavar="ALPHA",
        help="mix pairs of pictures and labels in a proportion from Beta(ALPHA, ALPHA) (Zhang et al., 2018); 0: never",
    )
    optimisation.add_argument(
        "--cutmix",
        type=beta_alpha,
        default=0.0,
        metavar="ALPHA",
        help="paste a box of another picture, its share from Beta(ALPHA, ALPHA) (Yun et al., 2019); 0: never; with "
        "--mixup too, each step does one of the two at random",
    )

    precision = parser.add_argument_group("precision and speed")
    add_precision_flags(precision)
    precision.add_argument(
        "--amp_backend",
        type=one_of("AMP backend", AMP_BACKENDS),
        default="torch",
        metavar="NAME",
        help="torch, or apex for an old build that still has apex.amp",
    )
    precision.add_argument(
        "--loss_scale",
        type=natural_float,
        default=0.0,
        metavar="SCALE",
        help="for float16; 0: dynamic at O1 and O2, 1 at O3",
    )
    precision.add_argument(
        "--grad_checkpointing",
        action="store_true",
        help="keep the blocks' inputs only and compute the rest again: less memory, a second forward pass",
    )
    precision.add_argument(
        "--compile", action="store_true", help="compile the model by torch.compile: slow to start, then faster"
    )

    processes = parser.add_argument_group("processes")
    processes.add_argument(
        "--parallel",
        type=one_of("way to share the work", PARALLEL),
        default="ddp",
        metavar="NAME",
        help="of several processes: ddp, each with all weights; fsdp (FSDP2), each with a shard of the weights, "
        "gradients and momenta, for models that do not fit",
    )
    processes.add_argument(
        "--local_rank",
        "--local-rank",
        type=int,
        metavar="RANK",
        help="set by torch.distributed.launch; torchrun needs none",
    )
    return parser


def add_data_flags(group, default):
    names = ", ".join(DATASETS)
    group.add_argument("--dataset", type=one_of("dataset", DATASETS), default=default, metavar="NAME", help=names)
    group.add_argument(
        "--data_dir",
        default=default and "data",
        metavar="DIR",
        help="where CIFAR is downloaded to; for imagefolder and imagenet: the folder with train/ and val/ or test/, "
        "and a folder a class in each",
    )
    group.add_argument(
        "--num_workers",
        type=natural,
        metavar="N",
        help="processes that read pictures which are not kept in memory, for each training process; default: its "
        f"share of the cores, {MAX_WORKERS} at most",
    )
    group.add_argument(
        "--skip_broken",
        action="store_true",
        help="name pictures that can't be read and go on without them: training takes the next one, tests leave it out",
    )


def add_checkpoint_flags(group, canonical, required=False):
    """Which saved model to load; `canonical` finds a model's name or raises ValueError."""
    group.add_argument(
        "--checkpoint",
        required=required,
        metavar="FILE",
        help="a run's best.safetensors or last.safetensors, or an .npz",
    )
    group.add_argument(
        "--model_type",
        type=argument(canonical),
        metavar="NAME",
        help="default: the run's own, or what the .npz is named after",
    )
    group.add_argument("--img_size", type=positive, metavar="PIXELS", help="default: what the model was trained at")
    group.add_argument("--download", action="store_true", help="fetch Google's .npz where it does not exist yet")


def add_precision_flags(group):
    group.add_argument("--fp16", action="store_true", help="16-bit numbers: float16 on a GPU, bfloat16 on a CPU")
    group.add_argument("--bf16", action="store_true", help="16-bit numbers: bfloat16 everywhere")
    group.add_argument(
        "--fp16_opt_level",
        type=one_of("opt level", OPT_LEVELS),
        default="O2",
        metavar="LEVEL",
        help="with --fp16 or --bf16: O0 float32; O1 autocast; O2 16-bit weights with float32 masters; O3 all 16-bit",
    )


def add_model_flags(parser, model_types, norm_types, token_reductions, canonical):
    """The model's flags; `canonical` finds a name in `model_types` or raises ValueError."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model_type", type=argument(canonical), default="ViT-B_16", metavar="NAME", help=", ".join(model_types)
    )
    group.add_argument(
        "--norm_type",
        default="LN",
        metavar="NORM",
        help=f"of a ViT's tokens: {', '.join(norm_types)} (Rescale is none). BN takes its statistics over the images "
        "that all processes work on at once: the batch, or with gradient accumulation each of its parts",
    )
    group.add_argument("--dropout_rate", type=fraction, metavar="RATE", help="of a ViT; default: the published model's")
    group.add_argument(
        "--drop_path_rate",
        type=fraction,
        metavar="RATE",
        help="of a ViT: stochastic depth, from 0 in the first block to RATE in the last; default: 0",
    )
    add_reduction_flags(group, token_reductions, default="none; a Conformer: facility")


def add_reduction_flags(group, names, default):
    """The flags of the token reduction; `default` stands in the help for what is meant by leaving them away."""
    group.add_argument(
        "--token_reduction",
        metavar="NAME",
        help=f"of a ViT or Conformer: {', '.join(names)}. Merges patches: into those that facility location chooses, "
        f"or by ToMe's bipartite soft matching; default: {default}",
    )
    group.add_argument(
        "--keep_tokens",
        type=count_or_share,
        metavar="N",
        help="patches that stay: a number like 49, or a share of them like 0.25",
    )
    group.add_argument(
        "--reduction_layer", type=positive, metavar="N", help="blocks before the token reduction, at least 1"
    )


def add_reductions_flags(group, reduction_layer):
    """The flags of a comparison of several reductions at one layer, which is `reduction_layer` by default."""
    group.add_argument(
        "--keep_tokens",
        type=count_or_share,
        nargs="+",
        default=[0.75, 0.5, 0.25],
        metavar="N",
        help="patches that stay, numbers or shares",
    )
    group.add_argument(
        "--reduction_layer", type=positive, default=reduction_layer, metavar="N", help="blocks before the reduction"
    )


def reduction_of(flags, given=None):
    """The keywords of `build_model` for a run with these flags, {name: value}; those of `given` that are set win.

    A given `token_reduction` of "none" takes the run's other two away.
    """
    given = {name: value for name, value in (given or {}).items() if name in REDUCTION and value is not None}
    found = {name: flags[name] for name in REDUCTION if flags.get(name) is not None}
    return given if given.get("token_reduction") == "none" else {**found, **given}


def check_training_flags(args, make_model):
    """What a parser can't see flag by flag; `make_model(num_classes)` is tried out, without its weights.

    Raises UserError.
    """
    check_flags_together(args, make_model)
    check_files(args)


def check_flags_together(args, make_model):
    """The part of `check_training_flags` that needs no file to be there yet."""
    if args.name in ("", ".", "..") or Path(args.name).name != args.name:
        raise UserError(f"--name {args.name!r} is not a plain folder name")
    if args.resume and args.overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    if args.mode == "train":
        check_division(args)
        check_restarts(args)
    if args.epochs:
        args.num_steps = None
    if args.amp_backend == "apex":
        import_apex_amp()
        if args.bf16:
            raise UserError("--amp_backend apex knows float16 only; use --fp16, or leave --amp_backend away for --bf16")
    if args.parallel == "fsdp":
        check_sharding(args)
    if args.wandb and args.mode == "train":
        check_project(args.wandb_project)
        import_wandb()
    if args.download and not args.pretrained_dir:
        raise UserError("--download needs --pretrained_dir, the path to download to")
    if args.rand_augment and not (args.rand_augment[0] and args.rand_augment[1] <= MAX_MAGNITUDE):
        given = " ".join(map(str, args.rand_augment))
        raise UserError(f"--rand_augment {given}: give 1 or more operations and a magnitude of {MAX_MAGNITUDE} at most")
    try:
        with torch.device("meta"):
            model = make_model(num_classes=1)
    except ValueError as error:
        raise UserError(str(error)) from error
    if args.log_attention_every and not hasattr(model, "forward_with_attention"):
        raise UserError(f"--log_attention_every: {args.model_type} has no attention")


def check_restarts(args):
    """Raises UserError where processes that torchrun starts anew would disagree on where the run stands."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    several_machines = int(os.environ.get("LOCAL_WORLD_SIZE", processes)) < processes
    # A process knows only of its own machine's restarts.
    if several_machines and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and not args.resume:
        raise UserError("torchrun --max-restarts on several machines needs --resume, to go on from the last checkpoint")


def check_sharding(args):
    """Raises UserError for what can't be done with a shard of the weights."""
    if args.fp16 and not args.bf16 and torch.cuda.is_available():
        raise UserError("--parallel fsdp knows no loss scale for float16; use --bf16")
    if (args.fp16 or args.bf16) and args.fp16_opt_level == "O3":
        raise UserError("--parallel fsdp knows no level O3; use O2, whose float32 masters are shared out too")
    if args.log_attention_every:
        raise UserError("--log_attention_every needs the whole model in one process; leave --parallel fsdp away")


def check_division(args):
    """Whether the batch can be divided over the processes and accumulation steps. Raises UserError."""
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


def check_files(args):
    """Whether the data and the weights are there, as far as can be told without reading them. Raises UserError."""
    if args.dataset in FOLDERS:
        for folder in image_folders(args.data_dir):
            class_folders(folder)
    has_weights = resumes(args) if args.mode == "train" else best_weights(args).exists()
    if args.mode == "eval" and not has_weights and not args.pretrained_dir:
        raise UserError(
            f"--mode eval: {best_weights(args)} does not exist and no --pretrained_dir is given; train first, or see "
            "--output_dir and --name"
        )
    if args.pretrained_dir and not has_weights and not (args.download and published_url(args.pretrained_dir)):
        check_exists(args.pretrained_dir)


def check_picture_path(path, flag):
    """Raises UserError where a picture can't be written as `path`, before it has taken hours to make."""
    path = Path(path)
    if path.suffix != ".png" or path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{flag} {path} can't be written; give a .png file in a folder that exists")


def positive(text):
    return number(text, int, "a whole number above 0", lambda n: n > 0)


def natural(text):
    return number(text, int, "a whole number, 0 or above", lambda n: n >= 0)


def seed(text):
    return number(text, int, "a whole number from 0 to 2**32 - 1", lambda n: 0 <= n < 2**32)


def positive_float(text):
    return number(text, float, "a number above 0", lambda x: 0 < x < float("inf"))


def natural_float(text):
    return number(text, float, "a number, 0 or above", lambda x: 0 <= x < float("inf"))


def beta_alpha(text):
    """Of smaller ones than 0.01 PyTorch's samples underflow, to 0.5 instead of 0 or 1."""
    return number(text, float, "0 or a number of at least 0.01", lambda x: x == 0 or 0.01 <= x < float("inf"))


def fraction(text):
    return number(text, float, "a number from 0 to below 1", lambda x: 0 <= x < 1)


def share(text):
    return number(text, float, "a number above 0, 1 at most", lambda x: 0 < x <= 1)


def count_or_share(text):
    """An int for a count, a float for a share: `1` is one, `1.0` all."""
    return positive(text) if text.lstrip("+-").isdigit() else share(text)


def number(text, kind, what, fits):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not fits(value):
        raise argparse.ArgumentTypeError(f"{text} is not {what}")
    return value


def one_of(what, names):
    """A parser of one of `names`, whose error offers the nearest."""

    def parse(text):
        if text in names:
            return text
        nearest = difflib.get_close_matches(text, names, n=3, cutoff=0.6) or names
        raise argparse.ArgumentTypeError(f"unknown {what} {text!r}; did you mean {', '.join(nearest)}?")

    return parse


def argument(parse):
    """A flag's parser out of a function that raises ValueError with a message for the user."""

    def parse_argument(text):
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(error) from error

    return parse_argument
