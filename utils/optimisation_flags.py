"""Flags of the optimisation: optimizer, learning rate, regularisation."""

from utils.flag_types import (
    beta_alpha,
    fraction,
    natural,
    natural_float,
    one_of,
    positive,
    positive_float,
    share,
    trained_part,
)
from utils.losses import CLASS_WEIGHTS
from utils.optimizers import OPTIMIZERS
from utils.scheduler import DECAY_TYPES


def add_optimisation_flags(group):
    """The optimizer and its learning rate."""
    group.add_argument(
        "--optimizer",
        type=one_of("optimizer", OPTIMIZERS),
        default="sgd",
        metavar="NAME",
        help=f"The optimizer: {', '.join(OPTIMIZERS)}. sgd has momentum 0.9; muon is for matrices and "
        "kernels of the blocks, with AdamW for all other weights.",
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
