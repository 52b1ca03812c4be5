"""The folder of a run: which files it holds, who may write to it, and reading its config.json and metrics.csv."""

import importlib.metadata
import json
import os
import platform
import shutil
import sys
import time
from pathlib import Path

import torch

from utils.errors import UserError
from utils.parallel.processes import device_name, launcher, restarted, union_over_processes
from utils.records.checkpoint import BEST, LAST, replace_file
from utils.records.metrics_file import REQUIRED_COLUMNS, as_columns, damaged_metrics, read_rows
from utils.records.weights_and_biases import RECORDS, RUN_ID

CONFIG, METRICS, CURVES, EVENTS = "config.json", "metrics.csv", "curves.png", "events.out.tfevents.*"
# Flags that do not change the results of a run: its folder may be moved, its weights downloaded before a resumption.
WITHOUT_EFFECT = {
    *("output_dir", "resume", "overwrite", "mode", "wandb", "wandb_project", "download"),
    *("local_rank", "parallel", "save_every", "num_workers", "skip_broken", "eval_batch_size"),
}
NETWORK_DISK_SECONDS = 60  # until every machine should see what another one has written


def folder_of(args):
    """`<output_dir>/<name>/` of the flags."""
    return Path(args.output_dir) / args.name


def open_run_folder(args):
    """The run's folder, created and checked for writing.

    Raises UserError if it can't be written, or if it holds a run and neither --resume nor --overwrite is given.
    """
    run_dir = folder_of(args)
    if int(os.environ.get("RANK", 0)):
        return run_dir  # the first process prepares it
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"the output folder {run_dir} can't be written: {error.strerror}") from error
    if any((run_dir / file).exists() for file in (CONFIG, LAST)) and not (args.resume or args.overwrite):
        raise UserError(f"{run_dir} holds a run already; give --resume, --overwrite or another --name")
    return run_dir


def is_restart(args):
    """Whether torchrun has restarted the processes after they had begun the run in this folder."""
    config = read_config(folder_of(args)) if restarted() else None
    return bool(config) and config.get("launcher") == launcher()


def resumes(args):
    """Whether there is a checkpoint that --resume continues from; without one the run starts from step 0."""
    return args.resume and (folder_of(args) / LAST).exists()


def best_weights(args):
    """The path of the run's best weights, whether it exists or not."""
    return folder_of(args) / BEST


def prepare_run_folder(run_dir, args, classes, num_steps):
    """Write config.json. Before that, delete the files of an earlier run that is not resumed."""
    if not resumes(args):
        for pattern in (CONFIG, METRICS, CURVES, LAST, BEST, "events.out.tfevents.*", ".*.tmp"):
            for path in run_dir.glob(pattern):
                path.unlink()
        for state in run_dir.glob("state-*"):  # a file in runs of earlier versions
            shutil.rmtree(state) if state.is_dir() else state.unlink()
        if not args.resume:  # a run that was interrupted before its first checkpoint continues at W&B
            (run_dir / RUN_ID).unlink(missing_ok=True)
            shutil.rmtree(run_dir / RECORDS, ignore_errors=True)
    config = {
        "flags": vars(args),
        "classes": classes,
        "num_steps": num_steps,
        "command": sys.argv,
        "launcher": launcher(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": importlib.metadata.version("torchvision"),
            "cuda": torch.version.cuda if torch.cuda.is_available() else None,
            "device": device_name(),
            "platform": platform.platform(),
        },
    }
    replace_file(run_dir / CONFIG, lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))


def check_shared(run_dir):
    """Raise UserError in all processes if one of them does not see what the first one has prepared."""
    deadline = time.monotonic() + NETWORK_DISK_SECONDS
    while not (run_dir / CONFIG).exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    if False in union_over_processes({(run_dir / CONFIG).exists()}):
        raise not_shared(run_dir)


def not_shared(run_dir):
    """The UserError of processes that see different folders."""
    return UserError(
        f"the processes do not see the same {run_dir}; --output_dir must be on a disk that all machines share"
    )


def report_changed_flags(config, args):
    """Print the flags whose values differ from those that the run was started with."""
    before = config["flags"] if config else vars(args)
    for flag, value in vars(args).items():
        if flag not in WITHOUT_EFFECT and before.get(flag, value) != value:
            print(f"warning: resuming with --{flag} {value}; the run was started with {before[flag]}")


def read_config(run_dir):
    """The config.json of a run, or None. Raises UserError for one that is not valid JSON."""
    path = Path(run_dir) / CONFIG
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def read_metrics(run_dir):
    """The rows of a run's metrics.csv as {column: list of floats}; empty before its first evaluation.

    A value that was not measured is NaN. Raises UserError for a damaged file.
    """
    path = Path(run_dir) / METRICS
    if not path.exists():
        return {}
    rows = read_rows(path)
    for name in REQUIRED_COLUMNS if rows else ():
        if name not in rows[0]:
            raise damaged_metrics(path, f"it has no column {name}")
    return as_columns(rows)


def read_run(run_dir):
    """(flags, metrics) of a run that has been evaluated at least once. Raises UserError for any other folder."""
    config, metrics = read_config(run_dir), read_metrics(run_dir)
    if not isinstance(config, dict) or "flags" not in config:
        raise UserError(f"{run_dir} is not the folder of a run: it has no {CONFIG} with a run's flags")
    if not metrics:
        raise UserError(f"{run_dir} has no evaluation in its {METRICS} yet")
    return config["flags"], metrics
