"""A hybrid ViT against CNNs with as many parameters and as many FLOPs, from scratch on CIFAR-10 at 32x32.

The three are R50-ViT-B_16, ResNet50x3_Params and ResNet50x3_Flops with an eighth of the width and half of the depth
(models/configs.py). Short runs choose a learning rate for each. --shares repeats the comparison with a share of the
training images and the same number of steps. Each run leaves one file in results/hybrid_vs_cnn/, from which tables and
figures are drawn. The same command resumes; what has a file is not run again.

    python scripts/hybrid_vs_cnn.py --shares 0.1 0.3 1

--full, as the first flag, fine-tunes the three full-size models instead: with their rows of
scripts/fine_tuning_table.py, whose flags follow.

    python scripts/hybrid_vs_cnn.py --full --dry_run --dataset cifar10
"""

import math
import runpy
import sys
from pathlib import Path

from study import GRID_VALIDATION, Study, add_study_flags, run_studies

from utils.data.datasets import DataOptions, count_classes
from utils.errors import UserError, run_script
from utils.flag_types import Parser, share
from utils.recipes import training_images

MODELS = {
    "R26-ViT-Mini_4": "hybrid ViT",
    "ResNet-Mini_Params": "CNN with as many parameters",
    "ResNet-Mini_Flops": "CNN with as many FLOPs",
}
REFERENCE = "R26-ViT-Mini_4"
FULL_SIZE = ("--model_type", "R50-ViT-B_16", "ResNet50x3_Params", "ResNet50x3_Flops")
FULL_SIZE += ("--img_size", "224", "--num_steps", "10000")
LEAST_IMAGES = 10  # training images per class, of which one in ten is to judge the short runs


def main():
    if sys.argv[1:2] == ["--full"]:
        sys.argv[:2] = [str(Path(__file__).with_name("fine_tuning_table.py")), *FULL_SIZE]
        runpy.run_path(sys.argv[0], run_name="__main__")
        return
    args = parse_flags()
    shares = [1] if args.draw else args.shares  # tables and figures need no training images
    run_studies([study_of(each, args) for each in shares], args)


def parse_flags():
    parser = Parser(__doc__)
    parser.epilog = "contenders:\n" + "\n".join(f"  {name:<20}{what}" for name, what in MODELS.items())
    add_study_flags(parser, "hybrid_vs_cnn")
    group = parser.add_argument_group("question")
    group.add_argument(
        "--shares",
        type=share,
        nargs="+",
        default=[1],
        metavar="SHARE",
        help="Shares of the training images; each has tables of its own.",
    )
    group.add_argument(
        "--full",
        action="store_true",
        help="As the first flag: fine-tune the full-size models; --full --help lists the flags that follow.",
    )
    args = parser.parse_args()
    if args.full:
        raise UserError("--full has other flags, which follow it: give it first")
    return args


def study_of(part, args):
    """The Study with a share of the training images, drawn by the seed of a run, and the steps of all images.

    Raises UserError if there are too few images.
    """
    study = Study("hybrid_vs_cnn", {name: {"model_type": name} for name in MODELS}, REFERENCE)
    if part == 1:
        return study
    options = DataOptions(args.data_dir)
    count = training_images(args.dataset, options).count
    per_class = round(part * count / count_classes(args.dataset, options))
    if per_class < LEAST_IMAGES:
        raise UserError(f"--shares {part:g}: fewer than {LEAST_IMAGES} images per class; give a larger share")
    drawn = training_images(args.dataset, options._replace(examples_per_class=per_class)).count
    validation = round(GRID_VALIDATION * per_class)
    return study._replace(
        recipe={**study.recipe, "examples_per_class": per_class},
        labels={"share": part},
        grid_flags={
            "val_split": round(GRID_VALIDATION * part, 6),
            "examples_per_class": per_class - validation,
        },
        seed_flags=("split_seed",),
        budget={name: repeated(getattr(args, name), count, drawn) for name in ("epochs", "grid_epochs")},
    )


def repeated(epochs, count, drawn):
    """Passes over `drawn` images that have as many steps as `epochs` over `count`; rounded down, as steps are up."""
    return math.floor(1e4 * epochs * count / drawn) / 1e4


if __name__ == "__main__":
    run_script(main)
