"""Train ResNet50x3_Params, the CNN cut from BiT's R50x3 that has as many parameters as the hybrid R50-ViT-B_16."""

import functools

from models import build_model
from utils.arguments import check_training_flags, training_parser
from utils.errors import run_script
from utils.training import MODES


def train_cnn(model_type, description):
    parser = training_parser(description)
    parser.set_defaults(model_type=model_type)
    args = parser.parse_args()
    make_model = functools.partial(build_model, args.model_type, args.img_size)
    check_training_flags(args, make_model)
    MODES[args.mode](args, make_model)


def main():
    train_cnn("ResNet50x3_Params", __doc__)


if __name__ == "__main__":
    run_script(main)
