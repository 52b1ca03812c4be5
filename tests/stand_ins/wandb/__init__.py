"""Stands in for Weights & Biases: writes every call as a line of JSON into the file $WANDB_CALLS.

$WANDB_FAILS names the calls that fail; $WANDB_STEP is the step that the server has got to.
"""

import json
import os

__version__ = "0.31.0"


def record(call, **values):
    with open(os.environ["WANDB_CALLS"], "a") as file:
        file.write(json.dumps({"call": call, **values}, default=str) + "\n")
    if call in os.environ.get("WANDB_FAILS", "").split():
        raise RuntimeError(f"{call} is out of order")


def init(**options):
    record("online" if options.get("mode") != "offline" else "offline", **options)
    return Run()


def teardown():
    record("teardown")


class Image:
    def __init__(self, figure):
        record("image", type=type(figure).__name__)


class Run:
    def __init__(self):
        self.step = int(os.environ.get("WANDB_STEP", 0))
        self.summary = Summary()

    def log(self, values, step):
        self.step = step
        record("log", values=values, step=step)

    def finish(self, exit_code):
        record("finish", exit_code=exit_code)


class Summary:
    def update(self, values):
        record("summary", **values)
