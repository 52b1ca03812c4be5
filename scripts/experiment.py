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
# Flags that a run comparable with a reported one may have of its own: its files, how it computes, its seed.
FREE = ("pretrained_dir", "seed", "fp16", "bf16", "fp16_opt_level", "amp_backend", "loss_scale", "compile")
FREE += ("grad_checkpointing", "gradient_accumulation_steps", "eval_every", "log_attention_every")


def own_and_further():
    """(arguments of this script, those after `--`, which are for train.py)"""
    arguments = sys.argv[1:]
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:end], arguments[end + 1 :]


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


def difference_from(reported, accuracy, found, recipe):
    """The difference of an accuracy from a reported one, in points: `-0.30`; empty if `reported` is None.

    If the flags `found` are not those of the reported run, `recipe` and train.py's defaults, then `not comparable: ...`
    with what differs; FREE flags may differ.
    """
    expected = {**vars(TRAIN.parser.parse_args(["--name=any"])), **recipe}
    changed = [f"--{name} {value}" for name, value in found.items() if name not in FREE and value != expected.get(name)]
    if changed:
        return f"not comparable: {', '.join(changed)}"
    return "" if reported is None else f"{100 * (accuracy - reported):+.2f}"


def seeds_text(seeds):
    """`seed 0` or `seeds 0, 1`"""
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
