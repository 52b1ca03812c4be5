"""Weights & Biases beside TensorBoard, by --wandb: no training fails because of it, or waits long for it."""

import os
import secrets
import sys

from tqdm import tqdm

from utils.errors import UserError
from utils.records.checkpoint import replace_file

RUN_ID, RECORDS = "wandb-id.txt", "wandb"  # in the run's folder; W&B itself names the second
OLDEST = (0, 31)  # knows `finish_timeout`, without which the end of a run waits for a dead connection for ever
PATIENCE = 20  # seconds that W&B gets to start, and to send the rest at the end


def import_wandb():
    """The package. Raises UserError where it is missing or too old."""
    # Where W&B can't be reached, its reports of its own errors would hold up the exit.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_LOGIN_TIMEOUT", "60")  # in a terminal it asks for a key, perhaps of nobody
    try:
        import wandb

        version = wandb.__version__  # a mere folder called wandb can be imported too, but has none
    except (ImportError, AttributeError) as error:
        raise UserError(f"--wandb needs Weights & Biases ({error}); pip install wandb") from error
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise UserError(f"--wandb needs a newer Weights & Biases than {version}; pip install --upgrade wandb")
    return wandb


def check_project(name):
    """Raises UserError for a project's name that W&B would refuse."""
    if not name or len(name) > 128 or set(name) & set("/\\#?%:"):
        raise UserError(f"--wandb_project {name!r} is no name of a project: 1 to 128 characters, none of / \\ # ? % :")


class WeightsAndBiases:
    """The run at W&B, for the first process. Whatever fails there is a warning, and the training goes on without."""

    def __init__(self, run_dir, args):
        """Start it, or go on with the one whose id is in `run_dir`; offline where that fails."""
        self.package = import_wandb()
        options = {
            "project": args.wandb_project,
            "name": args.name,
            "id": run_id(run_dir),
            "resume": "allow",
            "config": vars(args),
            "allow_val_change": True,  # flags may differ after --resume
            "dir": run_dir,
            "settings": {
                # A signal's handler prints, which must not meet W&B's own lock around stdout.
                "console": "off",
                "init_timeout": PATIENCE,
                "finish_timeout": PATIENCE,
            },
        }
        self.run = None
        try:
            self.run = self.package.init(**options)
        except Exception as error:
            warn(error, f"its records are kept in {run_dir / RECORDS}, for `wandb sync`")
            options["mode"] = "offline"
            self.attempt(lambda _: self.start_again(options))

    def start_again(self, options):
        self.package.teardown()  # else the id is still in use
        self.run = self.package.init(**options)

    def attempt(self, action):
        """Do what may fail; after a failure W&B is left alone."""
        try:
            action(self.run)
        except Exception as error:
            self.run = None
            warn(error, "the run goes on without it")

    def log(self, values, step):
        """{name: number or picture} at a step.

        W&B takes no step again that it has left behind: what a killed run has sent beyond its checkpoint stays.
        """
        if self.run:
            self.attempt(lambda run: run.log(values, step=step) if step >= run.step else None)

    def log_figure(self, name, figure, step):
        """A matplotlib figure."""
        if self.run:
            self.attempt(lambda run: run.log({name: self.package.Image(figure)}, step=step))

    def summarise(self, values):
        """{name: number} of the run as a whole."""
        if self.run:
            self.attempt(lambda run: run.summary.update(values))

    def finish(self):
        """Send the rest; W&B marks a run that an exception ends as failed."""
        if self.run:
            self.attempt(lambda run: run.finish(exit_code=1 if sys.exception() else 0))


def run_id(run_dir):
    """The id of the run at W&B, chosen at its first start and kept in its folder."""
    path = run_dir / RUN_ID
    found = path.read_text().strip() if path.exists() else ""
    if not found:
        found = secrets.token_hex(8)
        replace_file(path, lambda path: path.write_text(found + "\n"))
    return found


def warn(error, outcome):
    reason = str(error).partition("\n")[0]
    tqdm.write(f"warning: Weights & Biases has failed ({reason}); {outcome}", file=sys.stdout)
