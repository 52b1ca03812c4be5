"""Weights & Biases in addition to TensorBoard, by --wandb. Its errors never end a training nor delay it for long."""

import os
import secrets
import sys

from utils.errors import UserError
from utils.records.best_effort import BestEffort, reason
from utils.records.files import replace_file
from utils.terminal import say

RUN_ID, RECORDS = "wandb-id.txt", "wandb"  # in the run's folder; W&B chooses the second name
OLDEST = (0, 31)  # has `finish_timeout`, without which the end of a run waits forever for a dead connection
TIMEOUT = 20  # seconds for W&B to start, and to send the rest at the end


def import_wandb():
    """The package wandb. Raises UserError if it is missing or too old."""
    # If W&B can't be reached, its reports of its own errors would delay the exit.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_LOGIN_TIMEOUT", "60")  # in a terminal it asks for a key, perhaps unattended
    try:
        import wandb

        version = wandb.__version__  # a folder called wandb can be imported too, but has no version
    except (ImportError, AttributeError) as error:
        raise UserError(f"--wandb needs Weights & Biases ({error}); pip install wandb") from error
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise UserError(f"--wandb needs a newer Weights & Biases than {version}; pip install --upgrade wandb")
    return wandb


def check_project(name):
    """Raise UserError for a project name that W&B would reject."""
    if not name or len(name) > 128 or set(name) & set("/\\#?%:"):
        raise UserError(
            f"--wandb_project {name!r} is not a valid project name: give 1 to 128 characters without / \\ # ? % :"
        )


class WeightsAndBiases:
    """The run at W&B, for the first process. An error there is a warning, and the training continues.

    After an error its calls are omitted until the next evaluation tries again; values in between are lost there. The
    connection is not started a second time, nor is a run whose start has failed: each attempt could take `TIMEOUT`.
    """

    def __init__(self, run_dir, args):
        """Start the run, or resume the one whose id is in `run_dir`; offline if that fails."""
        self.package = import_wandb()
        self.sending = BestEffort("Weights & Biases", Exception)  # any error of another package that runs a service
        self.sending_figures = BestEffort("a figure for Weights & Biases", Exception)
        kept = f"its records are kept in {run_dir / RECORDS} for `wandb sync`"
        self.finishing = BestEffort("the end of the run at Weights & Biases", Exception, kept)
        options = {
            "project": args.wandb_project,
            "name": args.name,
            "id": run_id(run_dir),
            "resume": "allow",
            "config": vars(args),
            "allow_val_change": True,  # flags may differ after --resume
            "dir": run_dir,
            "settings": {
                # A signal handler prints, which could deadlock with W&B's own lock around stdout.
                "console": "off",
                "init_timeout": TIMEOUT,
                "finish_timeout": TIMEOUT,
            },
        }
        self.run = None
        try:
            self.run = self.package.init(**options)
        except Exception as error:
            say(f"warning: Weights & Biases has failed ({reason(error)}); {kept}")
            self.sending.attempt(lambda: self.start_again({**options, "mode": "offline"}))

    def start_again(self, options):
        self.package.teardown()  # otherwise the id is still in use
        self.run = self.package.init(**options)

    def log(self, values, step, retry=False):
        """Record {name: number} at a step; after an error only to `retry`.

        W&B does not accept earlier steps again, so what a killed run has sent beyond its checkpoint stays.
        """
        if self.run and (retry or not self.sending.failed):
            self.sending.attempt(lambda: self.run.log(values, step=step) if step >= self.run.step else None)

    def log_figure(self, name, figure, step):
        """Record a matplotlib figure."""
        if self.run and not self.sending.failed:
            self.sending_figures.attempt(lambda: self.run.log({name: self.package.Image(figure)}, step=step))

    def summarise(self, values):
        """Record {name: number} of the whole run."""
        if self.run and not self.sending.failed:
            self.sending.attempt(lambda: self.run.summary.update(values))

    def finish(self):
        """Send the rest. W&B marks a run that an exception ends as failed."""
        if self.run:
            self.finishing.attempt(lambda: self.run.finish(exit_code=1 if sys.exception() else 0))


def run_id(run_dir):
    """The id of the run at W&B, drawn at its first start and kept in its folder."""
    path = run_dir / RUN_ID
    found = path.read_text().strip() if path.exists() else ""
    if not found:
        found = secrets.token_hex(8)
        replace_file(path, lambda path: path.write_text(found + "\n"))
    return found
