"""Fine-tune a ViT, hybrid or BiT ResNet from Google's checkpoint, or train one from scratch."""

from models import MODEL_TYPES, NORM_TYPES, TOKEN_REDUCTIONS, build_model, canonical_model_type
from utils.arguments import add_model_flags, check_training_flags, reduction_of, training_parser
from utils.errors import run_script
from utils.training import run_training


def main():
    parser = training_parser(__doc__)
    add_model_flags(parser, MODEL_TYPES, NORM_TYPES, TOKEN_REDUCTIONS, canonical_model_type)
    args = parser.parse_args()

    def make_model(num_classes):
        overrides = reduction_of(vars(args))
        if args.dropout_rate is not None:
            overrides["dropout_rate"] = args.dropout_rate
        return build_model(args.model_type, args.img_size, num_classes, args.norm_type, **overrides)

    check_training_flags(args, make_model)
    run_training(args, make_model)


if __name__ == "__main__":
    run_script(main)
