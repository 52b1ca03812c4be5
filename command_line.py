"""What the training scripts share: their flags, the model that the flags describe, and their main function.

With inference.py the only module that knows both models and utils.
"""

import contextlib
import functools
import os

import utils.parallel.waiting  # noqa: F401  before PyTorch is loaded

# isort: split
from inference import flags_of_checkpoint
from models import MODEL_TYPES, NORM_TYPES, TOKEN_REDUCTIONS, build_model, canonical_model_type, pixels_per_patch
from models.configs import fields_of_flags, format_fields, parse_fields
from utils.arguments import training_parser
from utils.checkpoint_files import holds_npz
from utils.checks import check_training_flags
from utils.errors import UserError
from utils.flag_groups import TOKEN_REDUCTION_FLAGS, add_model_flags, token_reduction_of
from utils.hub import is_hub_name
from utils.pretrained import download_missing
from utils.recipes import parse_with_recipe
from utils.records.run_folder import best_weights, folder_of, read_config, resumes
from utils.terminal import say
from utils.training import run_mode

# The flags that a checkpoint decides if they are not given.
DECIDED = (
    *("model_type", "model_fields", "gelu", "mean_std"),
    *("norm_type", *TOKEN_REDUCTION_FLAGS),
)


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
    fixed = {}
    if model_type:
        fixed = {"model_type": model_type}
        parser.set_defaults(**fixed)
    else:
        add_model_flags(parser, MODEL_TYPES, NORM_TYPES, TOKEN_REDUCTIONS, canonical_model_type)
    parser.complete = lambda flags, given: complete_flags(flags, given | fixed)
    return parser


def complete_flags(args, given):
    """Fill the DECIDED flags that are not in `given`, {name: value}; returns a line on them, or an empty text.

    With --mode eval, or if --pretrained_dir chose them at its start, they are those that the run has recorded; without
    a run those of --pretrained_dir. Raises UserError.
    """
    if args.mode == "train" and not args.pretrained_dir:
        return ""  # flags that a resumed run has recorded, and that are not repeated, are reported as changed
    text, decided = "", recorded_flags(args)
    if decided is None and not (args.pretrained_dir and is_readable(args)):
        return ""
    if decided is not None:
        fields = parse_fields(decided.get("model_fields") or ()) | parse_fields(given.get("model_fields") or ())
        reduction = dict.fromkeys(TOKEN_REDUCTION_FLAGS) | token_reduction_of(decided, given)
        decided = {**decided, **reduction, "model_fields": format_fields(fields) or None}
    elif holds_npz(args.pretrained_dir):
        return ""
    else:
        decided, text = flags_of_checkpoint(args.pretrained_dir, given)
    for name in DECIDED:
        if name in decided and (name == "model_fields" or name not in given) and hasattr(args, name):
            setattr(args, name, decided[name])
    return text


def is_readable(args):
    """Whether --pretrained_dir is there; a name at Hugging Face is downloaded if the flags say so."""
    if args.download and is_hub_name(args.pretrained_dir):
        download_missing(args.pretrained_dir)
    return is_hub_name(args.pretrained_dir) or os.path.exists(args.pretrained_dir)


def recorded_flags(args):
    """The flags of the run that resumes or is evaluated, which has weights of its own; None without it."""
    has_weights = resumes(args) if args.mode == "train" else best_weights(args).exists()
    with contextlib.suppress(UserError):  # a damaged config.json does not prevent a resumption
        config = read_config(folder_of(args)) if has_weights else None
        return config and config["flags"]


def model_maker(args):
    """A function of the number of classes that makes the model of the flags; it raises ValueError."""
    flags = vars(args)
    rates = {name: flags[name] for name in ("dropout_rate", "drop_path_rate") if flags.get(name) is not None}
    overrides = token_reduction_of(flags) | fields_of(flags) | rates
    if "norm_type" in flags:
        overrides["norm_type"] = args.norm_type
    return functools.partial(build_model, args.model_type, args.img_size, **overrides)


def fields_of(flags):
    """{field: value} of the model's config that the flags set. Raises UserError."""
    try:
        return fields_of_flags(flags)
    except ValueError as error:
        raise UserError(f"--model_fields: {error}") from error


def patch_of(args):
    """The number of pixels that the image size must be a multiple of."""
    return pixels_per_patch(args.model_type, **fields_of(vars(args)))
