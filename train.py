"""Fine-tune a ViT, hybrid or BiT ResNet from Google's checkpoint, or train one from scratch."""

from models import MODEL_TYPES, NORM_TYPES, TOKEN_REDUCTIONS, build_model, canonical_model_type
from utils.arguments import add_model_flags, check_training_flags, reduction_of, training_parser
from utils.errors import run_script
from utils.training import MODES


def main():
    args = make_parser().parse_args()
    make_model = model_maker(args)
    check_training_flags(args, make_model)
    MODES[args.mode](args, make_model)


def make_parser():
    parser = training_parser(__doc__)
    add_model_flags(parser, MODEL_TYPES, NORM_TYPES, TOKEN_REDUCTIONS, canonical_model_type)
    return parser


def model_maker(args):
    """The function of the number of classes that makes the model of these flags."""
    overrides = reduction_of(vars(args))
    for name in ("dropout_rate", "drop_path_rate"):
        if getattr(args, name) is not None:
            overrides[name] = getattr(args, name)
    return lambda num_classes: build_model(args.model_type, args.img_size, num_classes, args.norm_type, **overrides)


if __name__ == "__main__":
    run_script(main)
