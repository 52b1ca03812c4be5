"""The flags that all training scripts share, and their help."""

import os

from utils.data.augmentation import MEAN_STD
from utils.flag_groups import (
    add_augmentation_flags,
    add_crop_flags,
    add_data_flags,
    add_division_flags,
    add_precision_flags,
    add_recipe_flag,
)
from utils.flag_types import (
    beta_alpha,
    fraction,
    natural,
    natural_float,
    one_of,
    positive,
    positive_float,
    seed,
    share,
    trained_part,
)
from utils.losses import CLASS_WEIGHTS
from utils.metrics import BEST_METRICS
from utils.optimizers import OPTIMIZERS
from utils.parallel.precision import AMP_BACKENDS
from utils.parallel.processes import PARALLEL
from utils.recorded_flags import RepeatingParser
from utils.scheduler import DECAY_TYPES

MODES = ("train", "eval")


def training_parser(description):
    """The parser of all training scripts, without the flags of the model."""
    parser = RepeatingParser(description)
    add_run_flags(parser.add_argument_group("run"))
    add_weights_flags(parser.add_argument_group("pretrained weights"))
    add_training_data_flags(parser.add_argument_group("data"))
    add_recipe_flag(parser.add_argument_group("recipe"))
    add_training_flags(parser.add_argument_group("training"))
    add_optimisation_flags(parser.add_argument_group("optimisation"))
    add_regularisation_flags(parser.add_argument_group("regularisation"))
    add_speed_flags(parser.add_argument_group("precision and speed"))
    add_process_flags(parser.add_argument_group("processes"))
    return parser


def add_run_flags(group):
    """The run's name, folder, seed and records."""
    group.add_argument("--name", required=True, help="The name of the run and of its folder in --output_dir.")
    group.add_argument(
        "--config",
        metavar="FILE",
        help="The config.json of a run to repeat: its flags replace the defaults, except those that only say where the "
        "run is and how it is started. Flags that are given win.",
    )
    group.add_argument(
        "--mode",
        type=one_of("mode", MODES),
        default="train",
        metavar="MODE",
        help="What the script does. train: train a model; eval: test the run's best weights, or without a run "
        "--pretrained_dir with its head. eval accepts the flags of the training and writes no files.",
    )
    group.add_argument("--output_dir", default="output", metavar="DIR", help="The folder that contains all runs.")
    group.add_argument(
        "--resume", action="store_true", help="Continue from the run's last checkpoint, if there is one."
    )
    group.add_argument("--overwrite", action="store_true", help="Delete an earlier run of the same name first.")
    group.add_argument(
        "--seed",
        type=seed,
        default=42,
        metavar="N",
        help="The seed of the initial weights, the sample order, the augmentation and dropout.",
    )
    group.add_argument(
        "--wandb",
        action="store_true",
        help="Also send flags and curves to Weights & Biases (pip install wandb). With WANDB_MODE=offline they are "
        "kept in the run's folder.",
    )
    group.add_argument(
        "--wandb_project",
        default=os.environ.get("WANDB_PROJECT", "vision-transformers"),
        metavar="NAME",
        help="The project at Weights & Biases that the run belongs to.",
    )


def add_weights_flags(group):
    """The weights with which the training begins."""
    group.add_argument(
        "--pretrained_dir",
        metavar="FILE",
        help="The path of Google's .npz file to fine-tune; default: train from scratch.",
    )
    group.add_argument("--download", action="store_true", help="Download --pretrained_dir if it does not exist.")


def add_training_data_flags(group):
    """The data set and its augmentation."""
    add_data_flags(group, default="cifar10")
    add_division_flags(group)
    group.add_argument(
        "--examples_per_class",
        type=positive,
        metavar="N",
        help="Train on N images of each class only, drawn by --split_seed after the validation images; default: all.",
    )
    group.add_argument(
        "--test_at_end",
        action="store_true",
        help="Evaluate the test images once, after the last step, and keep no best weights: for final runs.",
    )
    group.add_argument(
        "--img_size", type=positive, default=224, metavar="PIXELS", help="Side of the square input images in pixels."
    )
    add_crop_flags(group)
    add_augmentation_flags(group)
    group.add_argument(
        "--mean_std",
        type=one_of("mean and standard deviation", MEAN_STD),
        default="half",
        metavar="NAME",
        help="The mean and standard deviation that normalise the pixels. half: 0.5 and 0.5, as Google's checkpoints "
        "expect; imagenet: those of ImageNet's three channels.",
    )


def add_training_flags(group):
    """The length of the training and what happens how often."""
    group.add_argument(
        "--train_batch_size",
        type=positive,
        default=512,
        metavar="N",
        help="Images per step, over all processes and accumulation steps.",
    )
    group.add_argument(
        "--eval_batch_size", type=positive, default=64, metavar="N", help="Evaluated images per batch of each process."
    )
    group.add_argument("--num_steps", type=positive, default=10000, metavar="N", help="Number of optimizer steps.")
    group.add_argument(
        "--epochs", type=positive_float, metavar="N", help="Passes over the training set, in place of --num_steps."
    )
    group.add_argument(
        "--eval_every",
        type=positive,
        default=100,
        metavar="N",
        help="Steps between two evaluations; each of them also writes a checkpoint.",
    )
    group.add_argument(
        "--best_metric",
        type=one_of("metric", BEST_METRICS),
        default="accuracy",
        metavar="NAME",
        help=f"The metric that chooses the weights of best.safetensors: {', '.join(BEST_METRICS)} (the lowest). "
        "balanced_accuracy and macro_f1 count all classes equally.",
    )
    group.add_argument(
        "--save_every",
        type=positive,
        metavar="N",
        help="Steps between two further checkpoints, the most that a crash may cost; default: none.",
    )
    group.add_argument(
        "--keep_checkpoints",
        type=positive,
        default=2,
        metavar="N",
        help="Number of the latest checkpoints to keep. If the last one is damaged, --resume continues from the one "
        "before it.",
    )
    group.add_argument(
        "--log_attention_every",
        type=positive,
        metavar="N",
        help="Steps between two figures of a ViT's attention in TensorBoard: the rollout on eight evaluated images; "
        "default: none.",
    )
    group.add_argument(
        "--gradient_accumulation_steps",
        type=positive,
        default=1,
        metavar="N",
        help="Number of micro-batches that a batch is divided into.",
    )


def add_optimisation_flags(group):
    """The optimizer and its learning rate."""
    group.add_argument(
        "--optimizer",
        type=one_of("optimizer", OPTIMIZERS),
        default="sgd",
        metavar="NAME",
        help=f"The optimizer: {', '.join(OPTIMIZERS)}. sgd has momentum 0.9; muon updates the 2-D weights of a ViT's "
        "blocks, and AdamW all others.",
    )
    group.add_argument(
        "--learning_rate", type=positive_float, default=3e-2, metavar="LR", help="The learning rate after the warm-up."
    )
    group.add_argument(
        "--weight_decay",
        type=natural_float,
        default=0.0,
        metavar="WD",
        help="The weight decay; it does not apply to biases, norms, the class token and position embeddings.",
    )
    group.add_argument(
        "--layer_decay",
        type=share,
        default=1.0,
        metavar="FACTOR",
        help="The learning rate of each layer is that of the layer after it times FACTOR, for example 0.75; the head's "
        "is --learning_rate. A layer is a block, or the embedding.",
    )
    group.add_argument(
        "--train",
        type=trained_part,
        default="all",
        metavar="PART",
        help="The weights that are trained; the others are frozen. all; head: the head only; last:N: also the last N "
        "blocks (of a CNN: stages) and the final norm; norms: also all norms.",
    )
    group.add_argument(
        "--warmup_steps", type=natural, default=500, metavar="N", help="Steps of linear warm-up from learning rate 0."
    )
    group.add_argument(
        "--decay_type",
        type=one_of("decay type", DECAY_TYPES),
        default="cosine",
        metavar="TYPE",
        help=f"The learning rate after the warm-up: {', '.join(DECAY_TYPES)}. cosine and linear end at 0.",
    )
    group.add_argument(
        "--decay_steps",
        type=positive,
        nargs="+",
        metavar="N",
        help="The steps at which --decay_type step divides the learning rate by 10; default: 30, 60 and 90 %% of all.",
    )
    group.add_argument(
        "--max_grad_norm",
        type=natural_float,
        default=1.0,
        metavar="NORM",
        help="The gradients are clipped to this global norm; 0: no clipping.",
    )


def add_regularisation_flags(group):
    """Class weights, soft labels, mixed images and averaged weights."""
    group.add_argument(
        "--class_weights",
        type=one_of("class weights", CLASS_WEIGHTS),
        default="none",
        metavar="NAME",
        help="The weights of the classes in the training loss. balanced: images / (classes * images of the class); "
        "none: 1.",
    )
    group.add_argument(
        "--label_smoothing",
        type=fraction,
        default=0.0,
        metavar="SHARE",
        help="The probability that is spread over all classes.",
    )
    group.add_argument(
        "--ema_decay",
        type=fraction,
        default=0.0,
        metavar="DECAY",
        help="Evaluate, and save as the best, an exponential moving average of the weights, for example 0.9999; "
        "0: the weights themselves.",
    )
    group.add_argument(
        "--mixup",
        type=beta_alpha,
        default=0.0,
        metavar="ALPHA",
        help="Mix pairs of images and labels in a proportion from Beta(ALPHA, ALPHA) (Zhang et al., 2018); 0: never.",
    )
    group.add_argument(
        "--cutmix",
        type=beta_alpha,
        default=0.0,
        metavar="ALPHA",
        help="Paste a box of another image, whose area is from Beta(ALPHA, ALPHA) (Yun et al., 2019); 0: never. With "
        "--mixup too, each step applies one of the two at random.",
    )


def add_speed_flags(group):
    """Precision, memory and compilation."""
    add_precision_flags(group)
    group.add_argument(
        "--amp_backend",
        type=one_of("AMP backend", AMP_BACKENDS),
        default="torch",
        metavar="NAME",
        help="The library for mixed precision: torch, or apex for an old build that still has apex.amp.",
    )
    group.add_argument(
        "--loss_scale",
        type=natural_float,
        default=0.0,
        metavar="SCALE",
        help="The loss scale for float16. With 0 it is dynamic at O1 and O2, and 1 at O3.",
    )
    group.add_argument(
        "--grad_checkpointing",
        action="store_true",
        help="Keep only the inputs of the blocks and compute the rest again, which saves memory and takes longer.",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="Compile the model by torch.compile: the start takes longer, the steps are faster.",
    )


def add_process_flags(group):
    """Several processes."""
    group.add_argument(
        "--parallel",
        type=one_of("parallel mode", PARALLEL),
        default="ddp",
        metavar="NAME",
        help="How several processes share the work. ddp: each holds all weights; fsdp (FSDP2): each holds a shard of "
        "the weights, gradients and momenta, for models that are too large for one device.",
    )
    group.add_argument(
        "--local_rank",
        "--local-rank",
        type=int,
        metavar="RANK",
        help="Set by torch.distributed.launch; torchrun does not need it.",
    )
