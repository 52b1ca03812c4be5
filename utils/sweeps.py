"""Experiments of many runs: the command of each run, whether it is finished, and running them, on several GPUs too."""

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from utils.checks import check_files, check_flags_together
from utils.data.datasets import DATASETS, DataOptions, read_splits
from utils.data.splits import NAMES
from utils.errors import RunStoppedError, UserError
from utils.flag_types import Parser
from utils.locks import holder_of
from utils.parallel.processes import StopSignal, one_process
from utils.pretrained import download_missing
from utils.recipes import parse_with_recipe
from utils.records.run_folder import LOCK, changed_flags, in_use, is_finished, last_accuracy, read_config

LOG = "train.log"
POLL_SECONDS = 0.2


class TrainingScript(NamedTuple):
    """What a sweep needs to know about a training script."""

    path: Path
    parser: Parser
    model_maker: Callable  # from the parsed flags to a function from num_classes to the model
    patch_of: Callable  # from the parsed flags to the number of pixels that the image size must be a multiple of


@dataclass
class Run:
    """One call of a training script: its command, and all of its flags as the script parses them."""

    command: list
    flags: object

    @property
    def folder(self):
        return Path(self.flags.output_dir) / self.flags.name


def plan_run(script, flags, further=()):
    """The Run of a TrainingScript, which resumes where it was interrupted.

    `flags` are {name: value}, where True is a flag without a value and a list several values; `further` are flags as in
    the shell. Raises UserError for a flag that the script does not have.
    """
    arguments = []
    for flag, value in flags.items():
        values = value if isinstance(value, list | tuple) else [] if value is True else [value]
        arguments += [f"--{flag}", *map(str, values)]
    arguments += [*further, "--resume"]
    parsed, _ = parse_with_recipe(script.parser, script.patch_of, arguments)
    return Run([sys.executable, str(script.path), *arguments], parsed)


def check_plan(script, runs, files=True):
    """Raises UserError for a run whose flags contradict each other or whose folder holds a run with other flags.

    With `files` also for an unfinished run that another process works on, or whose data or weights do not exist.
    """
    for run in runs:
        check_flags_together(run.flags, script.model_maker(run.flags))
        check_earlier_run(run)
        if files and not is_finished(run.folder, run.flags):
            if holder := holder_of(run.folder / LOCK):
                raise in_use(run.folder, holder)
            check_files(run.flags)


def check_earlier_run(run):
    """Raises UserError where the run's folder holds one that was made with other flags."""
    config = None
    with contextlib.suppress(UserError):  # a damaged one, which the run itself reports
        config = read_config(run.folder)
    if config is None:
        return
    for flag, (found, wanted) in changed_flags(config["flags"], run.flags).items():
        raise UserError(f"{run.folder} was made with --{flag} {found}, not {wanted}; give another --output_dir")


def run_unfinished(runs, jobs=1, ended=None):
    """Finish all runs that are not finished yet, `jobs` at a time on each GPU or on the CPU.

    Runs that share the CPU have an equal part of its threads each. `ended(run, exit status)` is called after each run.
    Returns {name: reason} of those that failed. Raises RunStoppedError when asked to stop.
    """
    unfinished = [run for run in runs if not is_finished(run.folder, run.flags)]
    devices = [device for device in visible_devices() for _ in range(jobs)]
    threads = max(1, torch.get_num_threads() // jobs) if devices[0] is None and jobs > 1 else None
    order = "one after another" if len(devices) == 1 else f"{len(devices)} at a time"
    if len(set(devices)) > 1:
        order = f"spread over {len(set(devices))} GPUs"
    remaining = f"; {len(unfinished)} to do, {order}" if unfinished else ""
    print(f"{len(runs)} runs, {len(runs) - len(unfinished)} of them already finished{remaining}", flush=True)
    if len(devices) > 1:
        download_shared_files(unfinished)
    failed, signal_number = run_all(unfinished, devices, threads, ended)
    if signal_number:
        raise RunStoppedError("stopped; the same command resumes", status=128 + signal_number)
    return failed


def download_shared_files(runs):
    """Download what several runs would otherwise download to the same place at the same time. Raises UserError."""
    for path in {run.flags.pretrained_dir for run in runs if run.flags.download}:
        download_missing(path)
    for dataset, data_dir in {(run.flags.dataset, run.flags.data_dir) for run in runs}:
        if not DATASETS[dataset].in_folders:
            splits = DATASETS[dataset].splits(data_dir)  # some data sets have a file for each
            read_splits(dataset, splits, DataOptions(data_dir), one_process())


def raise_failures(failed, count):
    """Raises RunStoppedError with the names of the failed runs, {name: reason}, of `count` runs, if there are any."""
    if failed:
        lines = [f"{len(failed)} of {count} runs failed; the same command tries them again"]
        raise RunStoppedError(
            "\n  ".join([*lines, *(f"{name}: {reason}" for name, reason in failed.items())]), status=1
        )


def data_name(flags):
    """A run's data set for a title: the folder's name for an image folder."""
    return Path(flags.data_dir).resolve().name if DATASETS[flags.dataset].in_folders else flags.dataset


def mean_and_range(values, metric="accuracy"):
    """The mean of the accuracies, or another metric, of several runs and their range: `61.5 % (60.9 to 62.0)`."""
    if metric == "loss":
        mean, low, high = (f"{value:.4f}" for value in (statistics.mean(values), min(values), max(values)))
    else:
        mean, low, high = (f"{100 * value:.1f}" for value in (statistics.mean(values), min(values), max(values)))
        mean += " %"
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"


def visible_devices():
    """A CUDA_VISIBLE_DEVICES for each GPU that the user's own admits; [None], the CPU, without a GPU."""
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else map(str, range(count))
    return [name.strip() for name in names][:count] or [None]


def run_all(runs, devices, threads=None, ended=None):
    """Run all of `runs`, one at a time on each of `devices`; ({name: reason} of those that failed, stop signal or 0).

    A run has that many CPU `threads`, by default all. Its output goes to its LOG, and to the terminal as well if there
    is only one device. `ended(run, exit status)` is called after each run. At Ctrl-C, SIGTERM or when the terminal is
    closed, running jobs save and end, and no other is started.
    """
    waiting, free, running, failed = list(runs), list(devices), [], {}
    stop = StopSignal()
    forwarded = False
    with stop.listening():
        try:
            while running or (waiting and not stop.number):
                while waiting and free and not stop.number:
                    place = f"[{len(runs) - len(waiting) + 1}/{len(runs)}]"
                    running.append(Job(waiting.pop(0), place, free.pop(0), threads, echo=len(devices) == 1))
                if stop.number and not forwarded:
                    for job in running:
                        job.send_stop(stop.number)
                    forwarded = True
                time.sleep(POLL_SECONDS)
                for job in running.copy():
                    if job.poll():
                        running.remove(job)
                        free.append(job.device)
                        failure = job.report(asked_to_stop=bool(stop.number))
                        if failure:
                            failed[job.run.flags.name] = failure
                        if ended:
                            ended(job.run, job.process.returncode)
        finally:
            for job in running:  # only after an error or a second Ctrl-C
                job.process.kill()
                job.process.wait()
    return failed, stop.number


class Job:
    """The process of a run."""

    def __init__(self, run, place, device, threads, echo):
        self.run, self.device, self.echo = run, device, echo
        self.title = f"{place} {run.flags.name}"
        self.began = time.perf_counter()
        run.folder.mkdir(parents=True, exist_ok=True)
        on_gpu = "" if device is None else f" on GPU {device}"
        print(f"{self.title}: started{on_gpu}, log in {run.folder / LOG}", flush=True)
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # else an error could be printed before earlier lines
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        with open(run.folder / LOG, "ab") as log:
            self.output = open(run.folder / LOG, encoding="utf-8", errors="replace")  # noqa: SIM115
            self.output.seek(0, os.SEEK_END)  # after the output of earlier attempts
            self.last_line = ""
            self.process = subprocess.Popen(
                run.command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=os.name == "posix",  # else the terminal's Ctrl-C would reach it twice
            )

    def send_stop(self, signal_number):
        """Forward a stop signal as one that training scripts handle."""
        if os.name == "posix":  # on Windows the terminal has sent it to the run as well
            self.process.send_signal(signal.SIGINT if signal_number == signal.SIGINT else signal.SIGTERM)

    def poll(self):
        """Read what the run has printed since the last call; returns whether it has ended."""
        ended = self.process.poll() is not None
        text = self.output.read()
        if self.echo:
            print(text, end="", flush=True)
        self.last_line = next((line for line in reversed(text.splitlines()) if line.strip()), self.last_line)
        return ended

    def report(self, asked_to_stop):
        """Print in one line how the run ended; returns the reason if it failed."""
        self.output.close()
        status = self.process.returncode
        failure = None
        if status == 0 and is_finished(self.run.folder, self.run.flags):
            minutes = (time.perf_counter() - self.began) / 60
            split, accuracy = last_accuracy(self.run.folder)
            end = f"finished after {minutes:.1f} min, {NAMES[split]} accuracy {100 * accuracy:.2f} %"
        elif asked_to_stop:
            end = "stopped"
        else:
            what = f"signal {-status}" if status < 0 else f"status {status}"
            failure = f"{self.last_line or 'it printed nothing'} ({what}; log: {self.run.folder / LOG})"
            end = f"failed: {failure}"
        print(f"{self.title}: {end}", flush=True)
        return failure
