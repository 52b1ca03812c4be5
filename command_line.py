"""What the training scripts share: their flags, the model that the flags describe, and their main function.

With inference.py the only module that knows both models and utils.
"""

import functools
import os

import utils.parallel.waiting  # noqa: F401  before PyTorch is loaded

# isort: split
from models import MODEL_TYPES, NORM_TYPES, TOKEN_REDUCTIONS, build_model, canonical_model_type, pixels_per_patch
from utils.arguments import training_parser
from utils.checks import check_training_flags
from utils.flag_groups import add_model_flags, token_reduction_of
from utils.recipes import parse_with_recipe
from utils.terminal import say
from utils.training import run_mode


def train_main(description, model_type=None):
    """The main function of a training script, for any model or for the CNN `model_type` only."""
    args, chosen = parse_with_recipe(train_parser(description, model_type), patch_of)
    make_model = model_maker(args)
    check_training_flags(args, make_model)
    if chosen and int(os.environ.get("RANK", 0)) == 0:
        say(chosen)
    run_mode(args, make_model)


def train_parser(description="", model_type=None):
    """The parser of train.py, or of the script of the CNN `model_type`, which has no flags for its model."""
    parser = training_parser(description)
    if model_type:
        parser.set_defaults(model_type=model_type)
    else:
        add_model_flags(parser, MODEL_TYPES, NORM_TYPES, TOKEN_REDUCTIONS, canonical_model_type)
    return parser


def model_maker(args):
    """A function of the number of classes that makes the model of the flags; it raises ValueError."""
    flags = vars(args)
    overrides = {name: flags[name] for name in ("dropout_rate", "drop_path_rate") if flags.get(name) is not None}
    overrides |= token_reduction_of(flags)
    if "norm_type" in flags:
        overrides["norm_type"] = args.norm_type
    return functools.partial(build_model, args.model_type, args.img_size, **overrides)


def patch_of(args):
    """The number of pixels that the image size must be a multiple of."""
    return pixels_per_patch(args.model_type)
