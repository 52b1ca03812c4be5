"""The folder of a run: which files it holds, who may write to it, and reading its config.json and metrics.csv."""

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from utils.data.splits import evaluated_split
from utils.errors import UserError
from utils.locks import LockedError, exclusive_lock
from utils.parallel.processes import device_name, launcher, restarted, union_over_processes
from utils.records.checkpoint import CONFIG, has_checkpoint, older_weights, state_folders
from utils.records.files import replace_file
from utils.records.metrics_file import as_columns, damaged_metrics, read_rows, required_columns
from utils.records.weights import AVERAGED, BEST, LAST, saved_step
from utils.records.weights_and_biases import RECORDS, RUN_ID

METRICS, CURVES, LOCK = "metrics.csv", "curves.png", ".lock"
RESULT = "result.json"
EVENTS = "events.out.tfevents.*"
RESULTS = (BEST, AVERAGED, METRICS, CURVES, RESULT)
# Flags that do not change the results of a run: its folder may be moved, its weights downloaded before a resumption.
WITHOUT_EFFECT = {
    *("config", "output_dir", "resume", "overwrite", "mode", "wandb", "wandb_project", "download"),
    *("local_rank", "parallel", "save_every", "keep_checkpoints", "num_workers", "skip_broken", "eval_batch_size"),
    "recipe",  # its flags have an effect
}
# What earlier versions did, whose runs have no such flags.
EARLIER_FLAGS = {
    "best_metric": "accuracy",
    "class_weights": "none",
    "resize_size": None,
    "crop_padding": None,
    "train": "all",
    "layer_decay": 1.0,
    "classes": None,
    "val_split": None,
    "test_split": None,
    "split_seed": 0,
    "group_by": None,
    "test_at_end": False,
    "no_test": False,
    "gelu": None,
    "model_fields": None,
    "tome_r": None,
}
NETWORK_DISK_SECONDS = 60  # until every machine should see what another one has written


def folder_of(args):
    """`<output_dir>/<name>/` of the flags."""
    return Path(args.output_dir) / args.name


@contextlib.contextmanager
def open_run_folder(args):
    """The run's folder, created, checked for writing, and locked for other processes as long as the block runs.

    Raises UserError if it can't be written, if another process trains in it, or if the run would delete earlier
    results that the flags do not allow it to delete.
    """
    run_dir = folder_of(args)
    if int(os.environ.get("RANK", 0)):
        yield run_dir  # the first process prepares and locks it
        return
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"the output folder {run_dir} can't be written: {error.strerror}") from error
    try:
        with exclusive_lock(run_dir / LOCK):
            check_earlier_results(run_dir, args)
            yield run_dir
    except LockedError as error:
        raise in_use(run_dir, error.holder) from error


def in_use(run_dir, holder):
    """The UserError of a second process in the folder of a run; `holder` names the first one."""
    return UserError(f"{run_dir} is in use by {holder or 'another process'}; wait for its end, or give another --name")


def check_earlier_results(run_dir, args):
    """Raise UserError if the run would delete files of an earlier one without --overwrite."""
    found = files_of_run(run_dir)
    if found and not (args.resume or args.overwrite):
        raise UserError(f"{run_dir} holds a run already; give --resume, --overwrite or another --name")
    results = [path.name for path in found if path.name in RESULTS]
    if args.resume and results and not (has_checkpoint(run_dir) or is_finished(run_dir, args)):
        raise UserError(
            f"{run_dir} holds {', '.join(results)} but no {LAST}, so --resume can't continue; give another --name, or "
            "--overwrite to delete what it holds"
        )


def files_of_run(run_dir):
    """The paths of all files and folders that a new run in this folder would delete."""
    # What --resume needs comes first, so that it never continues from what is left of an interrupted deletion.
    patterns = (LAST, *RESULTS, CONFIG, EVENTS, ".*.tmp", RUN_ID, RECORDS)
    paths = [path for pattern in patterns for path in sorted(run_dir.glob(pattern))]
    return [*older_weights(run_dir).values(), *paths, *state_folders(run_dir)]


def is_restart(args):
    """Whether torchrun has restarted the processes after they had begun the run in this folder."""
    config = read_config(folder_of(args)) if restarted() else None
    return bool(config) and config.get("launcher") == launcher()


def resumes(args):
    """Whether there is a checkpoint that --resume continues from; without one the run starts from step 0."""
    return args.resume and has_checkpoint(folder_of(args))


def is_finished(run_dir, flags):
    """Whether the run of these flags has evaluated its last step, even if its checkpoint was deleted since then.

    False if its records are damaged: training then explains what is wrong.
    """
    try:
        config, steps = read_config(run_dir), read_metrics(run_dir).get("step")
        has_last = (Path(run_dir) / LAST).exists()
        saved = saved_step(Path(run_dir) / LAST) if has_last else math.inf
    except UserError:
        return False
    if not config or not steps or ("images" in config and not (Path(run_dir) / RESULT).exists()):
        return False
    num_steps = config.get("num_steps") or config["flags"]["num_steps"]
    return min(max(steps), saved) >= num_steps and not changed_flags(config["flags"], flags)


def best_weights(args):
    """The path of the run's best weights, whether it exists or not."""
    return folder_of(args) / BEST


def prepare_run_folder(run_dir, args, classes, num_steps, images, compiled):
    """Write config.json; `images` are {split: number}, `compiled` tells whether --compile had an effect.

    Before, delete an earlier run that is not resumed.
    """
    if not resumes(args):
        kept = {RUN_ID, RECORDS} if args.resume else ()  # interrupted before its first checkpoint, it continues at W&B
        for path in files_of_run(run_dir):
            if path.name not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()  # an early version's state was a file
    for name in (RESULT, AVERAGED):
        (run_dir / name).unlink(missing_ok=True)  # of fewer steps, after which the run goes on
    config = {
        "flags": vars(args),
        "classes": classes,
        "num_steps": num_steps,
        "images": images,
        "compiled": compiled,
        "threads": torch.get_num_threads(),
        "command": sys.argv,
        "launcher": launcher(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": importlib.metadata.version("torchvision"),
            "cuda": torch.version.cuda if torch.cuda.is_available() else None,
            "device": device_name(),
            "platform": platform.platform(),
            "commit": commit_of_code(),
        },
    }
    replace_file(run_dir / CONFIG, lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))


def commit_of_code():
    """The git commit of this code, with `-dirty` if it was changed since; None outside of a git repository."""
    git = ["git", "-C", str(Path(__file__).resolve().parents[2])]
    try:
        found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changes = ["diff", "--quiet", "HEAD", "--", ".", ":!results", ":!docs"]
        is_changed = subprocess.run([*git, *changes], capture_output=True).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip() + ("-dirty" if is_changed else "")


def check_shared(run_dir):
    """Raise UserError in all processes if one of them does not see what the first one has prepared."""
    deadline = time.perf_counter() + NETWORK_DISK_SECONDS
    while not (run_dir / CONFIG).exists() and time.perf_counter() < deadline:
        time.sleep(0.1)
    if False in union_over_processes({(run_dir / CONFIG).exists()}):
        raise not_shared(run_dir)


def not_shared(run_dir):
    """The UserError of processes that see different folders."""
    return UserError(
        f"the processes do not see the same {run_dir}; --output_dir must be on a disk that all machines share"
    )


def started_with(saved, run_dir):
    """{"flags", "classes"} of the run that the saved state belongs to; either is None if it is not known.

    Earlier versions recorded them in config.json only, whose damage is no reason not to resume.
    """
    config = {}
    if "flags" not in saved:
        try:
            config = read_config(run_dir) or {}
        except UserError as error:
            print(f"warning: {error}; its flags and classes are not compared with those of this run")
    return {name: saved.get(name, config.get(name)) for name in ("flags", "classes")}


def report_changed_flags(before, args):
    """Print the flags whose values differ from those `before`, with which the run was started."""
    for flag, (earlier, value) in changed_flags(before, args).items():
        print(f"warning: resuming with --{flag} {value}; the run was started with {earlier}")


def changed_flags(before, args):
    """{flag: (value before, value)} of the flags in `args` that would change the results of a run with those before."""
    before = {**EARLIER_FLAGS, **before}
    return {
        flag: (before[flag], value)
        for flag, value in vars(args).items()
        if flag not in WITHOUT_EFFECT and before.get(flag, value) != value
    }


def read_config(run_dir):
    """The config.json of a run, or None. Raises UserError for a damaged one."""
    path = Path(run_dir) / CONFIG
    return load_config(path) if path.exists() else None


def load_config(path):
    """The content of a config.json. Raises UserError for any other file."""
    try:
        config = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}; give the config.json of a run") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("flags"), dict):
        raise UserError(f"{path} does not contain the flags of a run")
    return config


def read_metrics(run_dir):
    """The rows of a run's metrics.csv as {column: list of floats}; empty before its first evaluation.

    A value that was not measured is NaN. Raises UserError for a damaged file.
    """
    path = Path(run_dir) / METRICS
    if not path.exists():
        return {}
    rows = read_rows(path)
    for name in required_columns(rows[0]) if rows else ():
        if name not in rows[0]:
            raise damaged_metrics(path, f"it has no column {name}")
    return as_columns(rows)


def last_accuracy(run_dir):
    """(split, accuracy) of the run's last evaluation. Raises UserError."""
    metrics = read_metrics(run_dir)
    split = evaluated_split(metrics)
    return split, metrics[f"{split}_accuracy"][-1]


def read_run(run_dir):
    """(flags, metrics) of a run that has been evaluated at least once. Raises UserError for any other folder."""
    config, metrics = read_config(run_dir), read_metrics(run_dir)
    if config is None:
        raise UserError(f"{run_dir} is not the folder of a run: it has no {CONFIG} with a run's flags")
    if not metrics:
        raise UserError(f"{run_dir} has no evaluation in its {METRICS} yet")
    return config["flags"], metrics


def read_runs(folders):
    """{label: [metrics]} of the runs in these folders, as `utils.curves.plot_runs` takes them."""
    runs = {}
    for folder in folders:
        flags, metrics = read_run(folder)
        label = f"{flags['name']}: {flags['model_type']} on {flags['dataset']}"
        runs[f"{label} ({folder})" if label in runs else label] = [metrics]
    return runs
