"""The records of a run: config.json, metrics.csv, TensorBoard, W&B, curves.png, and what the terminal shows."""

import csv
import importlib.metadata
import json
import math
import os
import platform
import shutil
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from utils.errors import UserError
from utils.parallel.processes import launcher, restarted, union_over_processes
from utils.records.checkpoint import BEST, LAST, replace_file
from utils.records.weights_and_biases import RECORDS, RUN_ID

CONFIG, METRICS, CURVES = "config.json", "metrics.csv", "curves.png"
# Flags that make no other run of it: its folder may have been moved, its weights downloaded meanwhile.
WITHOUT_EFFECT = {
    *("output_dir", "resume", "overwrite", "mode", "wandb", "wandb_project", "download"),
    *("local_rank", "parallel", "save_every", "num_workers", "skip_broken", "eval_batch_size"),
}
COLUMNS = (
    "step",
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "test_top5_accuracy",
    "lr",
    "images_per_second",
    "seconds",
)
NETWORK_DISK = 60  # seconds that it may take to show on one machine what another one has written
NEWER_COLUMNS = ("test_top5_accuracy",)  # those that earlier runs have not measured: not a number there
FEW_CLASSES = 10  # up to here the terminal does not show the top-5 accuracy


def open_run_folder(args):
    """`<output_dir>/<name>/`, made and checked for writing.

    Raises UserError where the folder can't be written, or holds a run and neither --resume nor --overwrite is given.
    """
    run_dir = Path(args.output_dir) / args.name
    if int(os.environ.get("RANK", 0)):
        return run_dir  # the first process looks after it
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


def continues(args):
    """Whether torchrun has started the processes anew after they had begun the run in this folder."""
    config = read_config(Path(args.output_dir) / args.name) if restarted() else None
    return bool(config) and config.get("launcher") == launcher()


def resumes(args):
    """Whether there is a checkpoint that --resume continues; without one it starts the run."""
    return args.resume and (Path(args.output_dir) / args.name / LAST).exists()


def best_weights(args):
    """Where the run of these flags keeps its best weights, whether there are any or not."""
    return Path(args.output_dir) / args.name / BEST


def prepare_run_folder(run_dir, args, classes, num_steps):
    """Write config.json; before that, delete what an earlier run has written where it is not resumed."""
    if not resumes(args):
        for pattern in (CONFIG, METRICS, CURVES, LAST, BEST, "events.out.tfevents.*", ".*.tmp"):
            for path in run_dir.glob(pattern):
                path.unlink()
        for state in run_dir.glob("state-*"):  # a file in runs of earlier versions
            shutil.rmtree(state) if state.is_dir() else state.unlink()
        if not args.resume:  # a run that broke off before its first checkpoint goes on at W&B
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
    """Raises UserError in all processes where one of them does not see what the first one has prepared."""
    deadline = time.monotonic() + NETWORK_DISK
    while not (run_dir / CONFIG).exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    if False in union_over_processes({(run_dir / CONFIG).exists()}):
        raise not_shared(run_dir)


def not_shared(run_dir):
    return UserError(
        f"the processes do not see the same {run_dir}; --output_dir must be on a disk that all machines share"
    )


def report_changed_flags(config, args):
    """Say with which flags a run is resumed that it was not started with."""
    before = config["flags"] if config else vars(args)
    for flag, value in vars(args).items():
        if flag not in WITHOUT_EFFECT and before.get(flag, value) != value:
            print(f"warning: resuming with --{flag} {value}; the run was started with {before[flag]}")


def read_config(run_dir):
    """The config.json of a run, or None. Raises UserError for one that is no JSON."""
    path = Path(run_dir) / CONFIG
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not readable as JSON: {error}") from error


def read_metrics(run_dir):
    """The rows of a run's metrics.csv as {column: list of floats}; empty before its first evaluation."""
    path = Path(run_dir) / METRICS
    if not path.exists():
        return {}
    try:
        rows = read_rows(path)
        return {name: [float(row[name]) for row in rows] for name in (COLUMNS if rows else ())}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: it needs numbers in the columns {', '.join(COLUMNS)}") from error


def read_rows(path):
    """The rows of a metrics.csv as {column: text}."""
    with open(path, newline="") as file:
        return [{**dict.fromkeys(NEWER_COLUMNS, "nan"), **row} for row in csv.DictReader(file)]


def read_run(run_dir):
    """(flags, metrics) of a run that has been evaluated. Raises UserError for a folder without one."""
    config, metrics = read_config(run_dir), read_metrics(run_dir)
    if not isinstance(config, dict) or "flags" not in config:
        raise UserError(f"{run_dir} is no folder of a run: it has no {CONFIG} with a run's flags")
    if not metrics:
        raise UserError(f"{run_dir} has no evaluation in its {METRICS} yet")
    return config["flags"], metrics


def device_name():
    """The GPU's name, or the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


class Tracker:
    """Writes the records, in the first process only; elsewhere its methods do nothing."""

    def __init__(self, run_dir, first_step, num_steps, seconds, num_classes, enabled, wandb=None):
        """`seconds` is what the run has taken before it was resumed at `first_step`; `wandb` a WeightsAndBiases."""
        self.run_dir = run_dir
        self.num_classes = num_classes
        self.enabled = enabled
        self.wandb = wandb
        self.started = time.monotonic() - seconds
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter  # a slow import that other processes need not pay

        self.tensorboard = SummaryWriter(run_dir, purge_step=first_step + 1 if first_step else None)
        self.rows = kept_rows(run_dir / METRICS, first_step)
        self.write_metrics()
        self.bar = tqdm(
            total=num_steps,
            initial=first_step,
            desc="train",
            unit="step",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def say(self, message):
        """A line in the terminal, above the progress bar."""
        if self.enabled:
            tqdm.write(message, file=sys.stdout)
            sys.stdout.flush()

    def log_steps(self, first_step, losses, lr, images_per_second):
        """The losses of the steps from `first_step` on, just read back from the device."""
        if not self.enabled:
            return
        last_step = first_step + len(losses) - 1
        for step, loss in enumerate(losses, start=first_step):
            self.add_scalars({"train/loss": loss}, step)
        self.add_scalars({"train/lr": lr, "train/images_per_second": images_per_second}, last_step)
        self.bar.set_postfix_str(f"loss {losses[-1]:.4f}, lr {lr:.2e}, {images_per_second:.1f} img/s", refresh=False)
        self.bar.update(len(losses))

    def log_evaluation(self, row, best_accuracy, best_step):
        """A row of metrics.csv (see COLUMNS), the same in TensorBoard and as a line in the terminal."""
        if not self.enabled:
            return
        self.rows.append({name: format(row[name], ".8g") for name in COLUMNS})
        self.write_metrics()
        tests = ("loss", "accuracy", "top5_accuracy")
        self.add_scalars({f"test/{name}": row[f"test_{name}"] for name in tests}, row["step"])
        self.tensorboard.flush()
        if self.wandb:
            self.wandb.summarise({"best_accuracy": best_accuracy, "best_step": best_step})
        top5 = f" top-5 {100 * row['test_top5_accuracy']:6.2f} %" if self.num_classes > FEW_CLASSES else ""
        width = len(str(self.bar.total))
        self.say(
            f"step {row['step']:>{width}}/{self.bar.total}"
            f"  train loss {row['train_loss']:.4f} accuracy {100 * row['train_accuracy']:6.2f} %"
            f"  test loss {row['test_loss']:.4f} accuracy {100 * row['test_accuracy']:6.2f} %{top5}"
            f"  lr {row['lr']:.2e}  {row['images_per_second']:.1f} img/s"
        )

    def add_scalars(self, values, step):
        """{name: number} in TensorBoard and at W&B."""
        for name, value in values.items():
            self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(values, step)

    def log_figure(self, name, figure, step):
        """A matplotlib figure in TensorBoard and at W&B."""
        if self.enabled:
            self.tensorboard.add_figure(name, figure, step)
            if self.wandb:
                self.wandb.log_figure(name, figure, step)

    def write_metrics(self):
        def write(path):
            with open(path, "w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(self.rows)

        replace_file(self.run_dir / METRICS, write)

    def seconds(self):
        """Since the run began, the time of earlier sittings included."""
        return time.monotonic() - self.started

    def close(self):
        """Draw the curves, however the run has ended."""
        if not self.enabled:
            return
        self.bar.close()
        self.tensorboard.close()
        if self.rows:
            from utils.visualize import plot_curves, save

            flags = read_config(self.run_dir)["flags"]
            title = f"{flags['name']}: {flags['model_type']} on {flags['dataset']}"
            save(plot_curves(read_metrics(self.run_dir), title), self.run_dir / CURVES)
        if self.wandb:
            self.wandb.finish()

    def summarise(self, best_accuracy, best_step):
        """Say how well the run has ended and where everything lies."""
        if not self.enabled:
            return
        last = ""
        if self.rows:
            top1, top5 = (100 * float(self.rows[-1][name]) for name in ("test_accuracy", "test_top5_accuracy"))
            shows_top5 = self.num_classes > FEW_CLASSES and not math.isnan(top5)
            last = f"test accuracy {top1:.2f} %, {f'top-5 {top5:.2f} %, ' if shows_top5 else ''}"
        self.bar.close()
        self.say(
            f"\n{last}best {100 * best_accuracy:.2f} % at step {best_step}\n"
            f"  weights      {self.run_dir / BEST}\n"
            f"               {self.run_dir / LAST}\n"
            f"  metrics      {self.run_dir / METRICS}\n"
            f"  curves       {self.run_dir / CURVES}\n"
            f"  TensorBoard  tensorboard --logdir {self.run_dir}"
        )


def kept_rows(path, first_step):
    """The rows of an earlier sitting that the checkpoint at `first_step` still stands for."""
    if not first_step or not path.exists():
        return []
    return [row for row in read_rows(path) if int(row["step"]) <= first_step]
