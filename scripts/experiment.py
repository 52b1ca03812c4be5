"""What scripts of many runs share: the training script, flags that they set themselves, and titles.

Importing this module puts the repository on the path.
"""

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from command_line import model_maker, patch_of, train_parser
from utils.errors import UserError
from utils.records.run_folder import is_finished
from utils.sweeps import TrainingScript

TRAIN = TrainingScript(Path(__file__).resolve().parent.parent / "train.py", train_parser(), model_maker, patch_of)
OWN_FLAGS = {  # flags of train.py that a study of any runs sets itself: what to use instead
    "--name": "the runs are named by what differs",
    "--resume": "the runs always resume",
    "--overwrite": "give another --output_dir",
    "--local_rank": "choose the GPUs by CUDA_VISIBLE_DEVICES",
    "--local-rank": "choose the GPUs by CUDA_VISIBLE_DEVICES",
}
RECIPE = {
    "min_crop_scale": 0.5,
    "horizontal_flip": True,
    "optimizer": "adamw",
    "learning_rate": 1e-3,
    "weight_decay": 0.05,
    "warmup_steps": 60,
    "eval_every": 150,
    "bf16": True,
    "fp16_opt_level": "O1",
}


def flags_in(arguments):
    """The flags among arguments of the shell, with their dashes."""
    return {text.partition("=")[0] for text in arguments if text.startswith("--")}


def refuse_flags(further, own_flags):
    """Raise UserError for one of `own_flags`, as OWN_FLAGS, among the arguments that are passed to train.py."""
    for flag in flags_in(further):
        if flag in own_flags:
            raise UserError(f"{flag} is not for all runs: {own_flags[flag]}")


def print_unfinished(runs):
    """Print the commands of the runs that are not finished."""
    for run in runs:
        if not is_finished(run.folder, run.flags):
            print(shlex.join(run.command))


def seeds_text(seeds):
    """`seed 0` or `seeds 0, 1`"""
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
