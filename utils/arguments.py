"""The flags that all training scripts share, and their help."""

import os

from utils.augmentation_flags import add_augmentation_flags, add_crop_flags
from utils.flag_groups import (
    MEAN_STD_HELP,
    add_data_flags,
    add_division_flags,
    add_model_fields_flag,
    add_precision_flags,
    mean_std,
)
from utils.flag_types import (
    argument,
    natural_float,
    one_of,
    positive,
    positive_float,
    seed,
)
from utils.metrics import BEST_METRICS
from utils.optimisation_flags import add_optimisation_flags, add_regularisation_flags
from utils.parallel.precision import AMP_BACKENDS
from utils.parallel.processes import PARALLEL
from utils.recipes import RECIPES
from utils.recorded_flags import RepeatingParser

MODES = ("train", "eval")
COMMON = {  # what --help shows
    *("name", "config", "output_dir", "resume", "seed"),
    *("pretrained_dir", "download"),
    *("dataset", "data_dir", "val_split", "img_size", "horizontal_flip"),
    *("recipe", "train_batch_size", "num_steps", "epochs", "eval_every", "gradient_accumulation_steps"),
    *("optimizer", "learning_rate", "weight_decay", "train", "warmup_steps"),
    *("bf16", "model_type"),
}
EXAMPLES = """\
example, fine-tuning on a folder with one folder of images per class:
  python train.py --name photos --dataset imagefolder --data_dir photos --val_split 0.15 --test_split 0.15 \\
      --recipe vit --pretrained_dir checkpoint/ViT-B_16.npz --download --bf16

--help_all shows all flags."""


def training_parser(description):
    """The parser of all training scripts, without the flags of the model."""
    usage = "%(prog)s --name NAME [--flag VALUE ...]"
    parser = RepeatingParser(description, COMMON, usage=usage, epilog=EXAMPLES)
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
        help="Weights to fine-tune, a file or hf:OWNER/NAME; default: train from scratch.",
    )
    group.add_argument("--download", action="store_true", help="Download --pretrained_dir if it does not exist.")
    add_model_fields_flag(group, default="those of --pretrained_dir")


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
        "--no_test",
        action="store_true",
        help="Read no test images: for runs from which the validation images choose one, such as its learning rate.",
    )
    group.add_argument(
        "--img_size", type=positive, default=224, metavar="PIXELS", help="Side of the square input images in pixels."
    )
    add_crop_flags(group)
    add_augmentation_flags(group)
    group.add_argument(
        "--mean_std",
        type=argument(mean_std),
        default="half",
        metavar="NAME",
        help=f"{MEAN_STD_HELP} Default: those of --pretrained_dir, or half.",
    )


def add_recipe_flag(group):
    """What chooses the flags of the training that are not given."""
    group.add_argument(
        "--recipe",
        type=one_of("recipe", RECIPES),
        metavar="NAME",
        help="Choose the flags that are not given by the number and size of the training images and the batch size: "
        f"{', '.join(RECIPES)}. bit and vit fine-tune, scratch trains small models from scratch; default: none.",
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
        help="Compile the model by torch.compile: the start takes longer, the steps are faster. On a CPU this "
        "concerns the blocks of a transformer in bfloat16; other models are not faster there and run eagerly.",
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
