"""Experiments of many runs: the command of each, whether it fits an earlier one, whether it is finished."""

import sys
from dataclasses import dataclass
from pathlib import Path

from utils.checkpoint import LAST, saved_step
from utils.errors import UserError
from utils.tracking import read_config, read_metrics

# What makes no other run of it: its folder may have been moved, its weights downloaded meanwhile.
WITHOUT_EFFECT = {"output_dir", "resume", "overwrite", "local_rank", "download", "num_workers", "eval_batch_size"}


@dataclass
class Run:
    """One call of a training script: its command, and all of its flags as the script sees them."""

    command: list
    flags: object

    @property
    def folder(self):
        return Path(self.flags.output_dir) / self.flags.name


def plan_run(script, flags, further=()):
    """The Run of `script`, the module of a training script; it goes on where it was broken off.

    `flags` are {name: value}, where True is a flag without a value, `further` more of them as in the shell. Raises
    UserError where the script would not know one.
    """
    arguments = []
    for flag, value in flags.items():
        arguments += [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
    arguments += [*further, "--resume"]
    return Run([sys.executable, script.__file__, *arguments], script.make_parser().parse_args(arguments))


def check_earlier_run(run):
    """Raises UserError where the run's folder holds one that was made with other flags."""
    config = read_config(run.folder)
    if config is None:
        return
    for flag, wanted in vars(run.flags).items():
        found = config["flags"].get(flag, wanted)
        if flag not in WITHOUT_EFFECT and found != wanted:
            raise UserError(f"{run.folder} was made with --{flag} {found}, not {wanted}; give another --output_dir")


def is_finished(run):
    """Whether the run's last step is evaluated and saved."""
    config, steps = read_config(run.folder), read_metrics(run.folder).get("step")
    if not config or not steps or not (run.folder / LAST).exists():
        return False
    num_steps = config.get("num_steps") or config["flags"]["num_steps"]
    return min(max(steps), saved_step(run.folder / LAST)) >= num_steps


def data_name(flags):
    """A run's data set for a title; that of an image folder is the folder."""
    return Path(flags.data_dir).resolve().name if flags.dataset == "imagefolder" else flags.dataset
