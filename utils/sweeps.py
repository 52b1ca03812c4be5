"""Experiments of many runs: the command of each, whether it is finished, and working them off, on several GPUs too."""

import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.arguments import check_files, check_flags_together
from utils.data.datasets import DATASETS, FOLDERS
from utils.errors import RunStoppedError, UserError
from utils.parallel.processes import Processes, StopSignal
from utils.pretrained import download
from utils.records.checkpoint import LAST, saved_step
from utils.records.tracker import WITHOUT_EFFECT, read_config, read_metrics

LOG = "train.log"
LOOK_EVERY = 0.2  # seconds between two looks at the runs at work


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
    """Whether the run's last step is evaluated and saved. One whose files are damaged is not: its script says more."""
    try:
        config, steps = read_config(run.folder), read_metrics(run.folder).get("step")
        saved = saved_step(run.folder / LAST) if (run.folder / LAST).exists() else 0
    except UserError:
        return False
    num_steps = config and (config.get("num_steps") or config["flags"]["num_steps"])
    return bool(steps and num_steps) and min(max(steps), saved) >= num_steps


def check_plan(script, runs, files=True):
    """Raises UserError for a run whose flags don't fit together, whose folder holds one with other flags, or, where
    `files` are to be there already, which lacks its data or weights.
    """
    for run in runs:
        check_flags_together(run.flags, script.model_maker(run.flags))
        check_earlier_run(run)
        if files and not is_finished(run):
            check_files(run.flags)


def finish(runs):
    """Let the scripts finish all of `runs` that are not finished yet; {name: why} of those that failed.

    Raises RunStoppedError when asked to stop.
    """
    unfinished = [run for run in runs if not is_finished(run)]
    devices = free_devices()
    at_once = f"spread over {len(devices)} GPUs" if len(devices) > 1 else "one after the other"
    how = f"; {len(unfinished)} to come, {at_once}" if unfinished else ""
    print(f"{len(runs)} runs, {len(runs) - len(unfinished)} of them finished before{how}", flush=True)
    if len(devices) > 1:
        fetch_for(unfinished)
    failed, signal_number = work_off(unfinished, devices)
    if signal_number:
        raise RunStoppedError("stopped; the same command goes on", status=128 + signal_number)
    return failed


def fetch_for(runs):
    """Download what several runs would otherwise fetch at once into the same place. Raises UserError."""
    for path in {run.flags.pretrained_dir for run in runs if run.flags.download}:
        if not os.path.exists(path):
            download(path)
    for dataset, data_dir in {(run.flags.dataset, run.flags.data_dir) for run in runs}:
        if dataset.startswith("cifar"):
            DATASETS[dataset].load(False, data_dir, Processes(0, 1, 0, torch.device("cpu")), 0)


def raise_failures(failed, count):
    """Raises RunStoppedError that names the failed ones, {name: why}, of `count` runs, if there are any."""
    if failed:
        lines = [f"{len(failed)} of {count} runs failed; the same command tries them again"]
        raise RunStoppedError("\n  ".join([*lines, *(f"{name}: {why}" for name, why in failed.items())]), status=1)


def data_name(flags):
    """A run's data set for a title; that of an image folder is the folder."""
    return Path(flags.data_dir).resolve().name if flags.dataset in FOLDERS else flags.dataset


def spread(accuracies):
    """The mean of some runs' accuracies and their range: `61.5 % (60.9 to 62.0)`."""
    mean = f"{100 * statistics.mean(accuracies):.1f} %"
    low, high = 100 * min(accuracies), 100 * max(accuracies)
    return mean if len(accuracies) == 1 else f"{mean} ({low:.1f} to {high:.1f})"


def free_devices():
    """What CUDA_VISIBLE_DEVICES is to be for each GPU that the user's own leaves; [None], the CPU, without a GPU."""
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else map(str, range(count))
    return [name.strip() for name in names][:count] or [None]


def work_off(runs, devices):
    """Run all of `runs`, one at a time on each of `devices`; ({name: why} of those that failed, a stop signal or 0).

    What a run prints goes to its LOG, and where there is only one device also to the terminal. At Ctrl-C, SIGTERM or
    when the terminal is closed the runs at work save and end, and no other is started.
    """
    waiting, free, at_work, failed = list(runs), list(devices), [], {}
    stop = StopSignal()
    told = False
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # nohup ignores it
        signal.signal(signal.SIGHUP, stop.receive)
    with stop.listening():
        try:
            while at_work or (waiting and not stop.number):
                while waiting and free and not stop.number:
                    place = f"[{len(runs) - len(waiting) + 1}/{len(runs)}]"
                    at_work.append(Job(waiting.pop(0), place, free.pop(0), echo=len(devices) == 1))
                if stop.number and not told:
                    for job in at_work:
                        job.tell(stop.number)
                    told = True
                time.sleep(LOOK_EVERY)
                for job in at_work.copy():
                    if job.has_ended():
                        at_work.remove(job)
                        free.append(job.device)
                        failure = job.report(asked_to_stop=bool(stop.number))
                        if failure:
                            failed[job.run.flags.name] = failure
        finally:
            for job in at_work:  # there is one only after an error or a second Ctrl-C
                job.process.kill()
                job.process.wait()
    return failed, stop.number


class Job:
    """A run at work."""

    def __init__(self, run, place, device, echo):
        self.run, self.device, self.echo = run, device, echo
        self.title = f"{place} {run.flags.name}"
        self.began = time.monotonic()
        run.folder.mkdir(parents=True, exist_ok=True)
        on_gpu = "" if device is None else f" on GPU {device}"
        print(f"{self.title}: started{on_gpu}, log in {run.folder / LOG}", flush=True)
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # else an error could stand before earlier lines
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        with open(run.folder / LOG, "ab") as log:
            self.output = open(run.folder / LOG, encoding="utf-8", errors="replace")  # noqa: SIM115
            self.output.seek(0, os.SEEK_END)  # earlier attempts stand before
            self.last_line = ""
            self.process = subprocess.Popen(
                run.command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=os.name == "posix",  # else the terminal's Ctrl-C would reach it twice
            )

    def tell(self, signal_number):
        """Pass a stop signal on, as one that training scripts listen to."""
        if os.name == "posix":  # on Windows the terminal has told the run too
            self.process.send_signal(signal.SIGINT if signal_number == signal.SIGINT else signal.SIGTERM)

    def has_ended(self):
        """Also takes note of what the run has printed meanwhile."""
        ended = self.process.poll() is not None
        text = self.output.read()
        if self.echo:
            print(text, end="", flush=True)
        self.last_line = next((line for line in reversed(text.splitlines()) if line.strip()), self.last_line)
        return ended

    def report(self, asked_to_stop):
        """Say in a line how the run has ended; returns why it failed, if it did."""
        self.output.close()
        status = self.process.returncode
        failure = None
        if status == 0 and is_finished(self.run):
            minutes = (time.monotonic() - self.began) / 60
            accuracy = 100 * read_metrics(self.run.folder)["test_accuracy"][-1]
            end = f"finished after {minutes:.1f} min, test accuracy {accuracy:.2f} %"
        elif asked_to_stop:
            end = "stopped"
        else:
            what = f"signal {-status}" if status < 0 else f"status {status}"
            failure = f"{self.last_line or 'it printed nothing'} ({what}; log: {self.run.folder / LOG})"
            end = f"failed: {failure}"
        print(f"{self.title}: {end}", flush=True)
        return failure
