"""Groups of flags that several scripts share, such as those of the data, a checkpoint, precision and the model."""

from utils.data.augmentation import MEAN_STD, mean_and_std, mean_std_text
from utils.data.datasets import DATASETS
from utils.data.loading import MAX_WORKERS
from utils.flag_types import (
    argument,
    count_or_share,
    fraction,
    natural,
    one_of,
    open_share,
    positive,
    seed,
)
from utils.parallel.precision import OPT_LEVELS

GELUS = ("tanh", "exact")  # values of the field `gelu` of a model's config
MEAN_STD_HELP = (
    "The mean and standard deviation that normalise the pixels. half: 0.5 and 0.5, as Google's checkpoints expect; "
    "imagenet: those of ImageNet's three channels; or six numbers with commas, the means and the standard deviations."
)
TOKEN_REDUCTION_FLAGS = ("token_reduction", "keep_tokens", "reduction_layer", "tome_r")  # keywords of `build_model`
EXCLUDED_BY_TOME_R = {"keep_tokens", "reduction_layer"}


def add_data_flags(group, default):
    """The data set, which is `default` if the flag is omitted, and how its files are read."""
    group.add_argument(
        "--dataset",
        type=one_of("dataset", DATASETS),
        default=default,
        metavar="NAME",
        help=f"The data set: {', '.join(DATASETS)}.",
    )
    group.add_argument(
        "--data_dir",
        default=default and "data",
        metavar="DIR",
        help="The folder that a data set is downloaded to; for imagefolder and imagenet the folder of train/, val/ and "
        "test/, with one folder per class in each.",
    )
    group.add_argument(
        "--classes",
        nargs="+",
        metavar="NAME",
        help="Use the images of these classes alone, by their names and in the data set's order; default: all.",
    )
    group.add_argument(
        "--num_workers",
        type=natural,
        metavar="N",
        help="Number of processes that read image files, for each training process; default: its share of the cores, "
        f"at most {MAX_WORKERS}.",
    )
    group.add_argument(
        "--skip_broken",
        action="store_true",
        help="Print the paths of unreadable images and skip them: training takes the next image, tests omit them.",
    )


def add_division_flags(group):
    """How the images are divided into training, validation and test images."""
    group.add_argument(
        "--val_split",
        type=open_share,
        metavar="SHARE",
        help="The share of the training images that validates and chooses the best weights; the test images are then "
        "evaluated once, at the end. Default: the data set's own validation images, if it has any.",
    )
    group.add_argument(
        "--test_split",
        type=open_share,
        metavar="SHARE",
        help="The share of the images that tests, for a folder of images without test/; taken before --val_split.",
    )
    group.add_argument(
        "--split_seed", type=seed, default=0, metavar="N", help="The seed that divides the images, apart from --seed."
    )
    group.add_argument(
        "--group_by",
        metavar="REGEX",
        help="Keep the image files of one subject in one split. The regular expression's group gives the subject in a "
        "file's name, for example '^(patient[0-9]+)_'.",
    )


def add_checkpoint_flags(group, canonical, required=False, several=""):
    """Which saved model to load; `canonical` finds a model's name or raises ValueError.

    `several` is a sentence about several files, which are then accepted.
    """
    group.add_argument(
        "--checkpoint",
        required=required,
        metavar="FILE",
        nargs="+" if several else None,
        help="The best.safetensors or last.safetensors of a run, an .npz file, or a file or folder of timm, Hugging "
        f"Face, DeiT, DINO or ViT-pytorch; hf:OWNER/NAME and timm:NAME are at Hugging Face. {several}".rstrip(),
    )
    group.add_argument(
        "--model_type",
        type=argument(canonical),
        metavar="NAME",
        help="The architecture; default: that of the run or of the weights, or the one in the name of the .npz file.",
    )
    group.add_argument(
        "--img_size",
        type=positive,
        metavar="PIXELS",
        help="Side of the square input images in pixels; default: that of the training.",
    )
    group.add_argument(
        "--download", action="store_true", help="Download Google's .npz file or hf:OWNER/NAME if it does not exist."
    )
    add_gelu_flag(group, default="that of the checkpoint")
    add_model_fields_flag(group, default="those of the checkpoint")
    group.add_argument(
        "--mean_std",
        type=argument(mean_std),
        metavar="NAME",
        help=f"{MEAN_STD_HELP} Default: those of the checkpoint.",
    )


def mean_std(text):
    """The value of --mean_std: a name, or six numbers. Raises ValueError or ArgumentTypeError."""
    if "," not in text:
        return one_of("mean and standard deviation", MEAN_STD)(text)
    return mean_std_text(*mean_and_std(text))


def add_gelu_flag(group, default):
    """The GELU of a ViT; `default` describes the effect of omitting the flag."""
    group.add_argument(
        "--gelu",
        type=one_of("GELU", GELUS),
        metavar="NAME",
        help="The GELU of a ViT. tanh: the approximation of Google's models; exact: that of timm, DeiT, DINO and most "
        f"models of Hugging Face. Default: {default}.",
    )


def add_model_fields_flag(group, default):
    """Fields of the model's config; `default` describes the effect of omitting the flag."""
    group.add_argument(
        "--model_fields",
        nargs="+",
        metavar="FIELD=VALUE",
        help="Fields of the config (models/configs.py) that differ from those of --model_type, for example "
        f"num_layers=6 num_heads=4; default: {default}.",
    )


def add_precision_flags(group):
    """16-bit computation and its opt level."""
    group.add_argument("--fp16", action="store_true", help="Compute in 16 bits: float16 on a GPU, bfloat16 on a CPU.")
    group.add_argument("--bf16", action="store_true", help="Compute in 16 bits: bfloat16 on every device.")
    group.add_argument(
        "--fp16_opt_level",
        type=one_of("opt level", OPT_LEVELS),
        default="O2",
        metavar="LEVEL",
        help="The level used with --fp16 or --bf16. O0: float32; O1: autocast; O2: 16-bit weights with float32 "
        "masters; O3: 16 bits everywhere.",
    )


def add_model_flags(parser, model_types, norm_types, token_reductions, canonical):
    """The model of train.py; `canonical` finds a name in `model_types` or raises ValueError."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model_type",
        type=argument(canonical),
        default="ViT-B_16",
        metavar="NAME",
        help=f"The architecture: {', '.join(model_types)}.",
    )
    group.add_argument(
        "--norm_type",
        default="LN",
        metavar="NORM",
        help=f"The normalisation of a ViT's tokens: {', '.join(norm_types)} (Rescale has none). BN computes its "
        "statistics over the images that all processes compute at once: the batch, or with gradient accumulation a "
        "micro-batch.",
    )
    group.add_argument(
        "--dropout_rate",
        type=fraction,
        metavar="RATE",
        help="The dropout rate of a ViT; default: that of the published model.",
    )
    group.add_argument(
        "--drop_path_rate",
        type=fraction,
        metavar="RATE",
        help="Stochastic depth of a ViT: the rate rises from 0 in the first block to RATE in the last; default: 0.",
    )
    add_gelu_flag(group, default="that of --pretrained_dir, or tanh")
    add_token_reduction_flags(group, token_reductions, default="none; for a Conformer facility")


def add_token_reduction_flags(group, names, default):
    """The flags of one token reduction; `default` describes the effect of omitting them."""
    group.add_argument(
        "--token_reduction",
        metavar="NAME",
        help=f"The token reduction of a ViT or Conformer: {', '.join(names)}. It merges all patches into those that "
        "facility location selects, by ToMe's bipartite soft matching, or into random ones, the baseline; "
        f"default: {default}.",
    )
    group.add_argument(
        "--keep_tokens",
        type=count_or_share,
        metavar="N",
        help="The patches that remain: a number such as 49, or a fraction of them such as 0.25.",
    )
    group.add_argument(
        "--reduction_layer", type=positive, metavar="N", help="Number of blocks before the token reduction, at least 1."
    )
    group.add_argument(
        "--tome_r",
        type=natural,
        metavar="R",
        help="With --token_reduction tome and without the two flags above: every block of a ViT merges R tokens, at "
        "most half of them, between its attention and its MLP, as ToMe was published.",
    )


def add_token_reduction_grid_flags(group, reduction_layer, tome_r):
    """The flags of a comparison of several token reductions: after one block, or of ToMe in every block.

    `reduction_layer` and `tome_r` are defaults.
    """
    group.add_argument(
        "--keep_tokens",
        type=count_or_share,
        nargs="+",
        default=[0.75, 0.5, 0.25],
        metavar="N",
        help="The patches that remain in each reduction: numbers or fractions.",
    )
    group.add_argument(
        "--reduction_layer",
        type=positive,
        default=reduction_layer,
        metavar="N",
        help="Number of blocks before the token reduction.",
    )
    group.add_argument(
        "--tome_r",
        type=natural,
        nargs="*",
        default=tome_r,
        metavar="R",
        help="The numbers of tokens that ToMe merges in every block, in one model each.",
    )


def token_reduction_of(flags, given=None):
    """The keywords of `build_model` for a run with these flags, {name: value}; values in `given` replace them.

    A given `token_reduction` of "none" removes the run's others; those that exclude each other replace each other.
    """
    given = {name: given[name] for name in TOKEN_REDUCTION_FLAGS if (given or {}).get(name) is not None}
    found = {name: flags[name] for name in TOKEN_REDUCTION_FLAGS if flags.get(name) is not None}
    if given.get("token_reduction") == "none":
        return given
    replaced = EXCLUDED_BY_TOME_R if "tome_r" in given else set()
    if EXCLUDED_BY_TOME_R.intersection(given):
        replaced = {"tome_r"}
    return {name: value for name, value in found.items() if name not in replaced} | given
