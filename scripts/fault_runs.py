"""The runs of a fault campaign: a table of their kinds, and starting, observing and stopping one.

Most runs are forked from this process, which has imported everything already; each is still a process of its own, with
its own session and signal handlers, that executes train.py as the shell does. Only for Linux.
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sklearn.datasets  # noqa: F401, which forked runs then need not import, as those below
import sklearn.model_selection  # noqa: F401
import torch
import torch.distributed.checkpoint  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
from experiment import TRAIN
from PIL import Image
from safetensors import safe_open

import utils.curves  # noqa: F401
import utils.training
from utils.errors import UserError
from utils.records.metrics_file import read_rows
from utils.records.run_folder import METRICS
from utils.records.weights import BEST, LAST

ROOT = TRAIN.path.parent
EVALUATE = ROOT / "evaluate.py"
NUM_STEPS, EVAL_EVERY, SAVE_EVERY = 30, 10, 5
SHARED = (
    f"--num_steps {NUM_STEPS} --eval_every {EVAL_EVERY} --save_every {SAVE_EVERY} --warmup_steps 3 --dataset digits "
    "--model_type ViT-Nano_4 --img_size 8 --train_batch_size 16 --eval_batch_size 20"
)
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
PHASES = ("start-up", "training", "evaluation", "saving")
FINISHED = "after the last evaluation"
SECONDS_TO_END = 180


class Kind(NamedTuple):
    """Flags of train.py in addition to SHARED, and how it is started: "fork", "python" or "torchrun"."""

    flags: str
    launch: str = "fork"


RUNS = {
    "sgd": Kind("--dropout_rate 0.1"),
    "adam-O1-BN": Kind("--optimizer adam --learning_rate 1e-3 --norm_type BN --bf16 --fp16_opt_level O1"),
    "adamw-O2-GN-ema": Kind("--optimizer adamw --learning_rate 1e-3 --norm_type GN --ema_decay 0.9 --bf16"),
    "muon-Rescale": Kind("--optimizer muon --learning_rate 1e-3 --norm_type Rescale --drop_path_rate 0.1"),
    "sgd-O3-linear": Kind("--bf16 --fp16_opt_level O3 --decay_type linear --weight_decay 0.1"),
    "adam-O0-step": Kind("--optimizer adam --learning_rate 1e-3 --fp16 --fp16_opt_level O0 --decay_type step"),
    "mixup-cutmix": Kind("--mixup 0.2 --cutmix 1 --label_smoothing 0.1 --optimizer adamw --learning_rate 1e-3"),
    "accumulation-BN-ema": Kind("--gradient_accumulation_steps 4 --norm_type BN --ema_decay 0.8 --horizontal_flip"),
    "finetuned": Kind("--pretrained_dir checkpoint/ViT-Nano_4-digits.npz --optimizer muon --learning_rate 1e-4"),
    "cnn": Kind("--model_type ResNet-Mini_Params"),
    "cnn-O1": Kind("--model_type ResNet-Mini_Flops --bf16 --fp16_opt_level O1 --rand_augment 1 5"),
    "hybrid": Kind("--model_type R26-ViT-Mini_4 --optimizer adam --learning_rate 1e-3 --grad_checkpointing"),
    "conformer": Kind("--model_type Conformer-Mini_4 --img_size 16 --optimizer adamw --learning_rate 1e-3"),
    "tokens": Kind("--token_reduction facility --keep_tokens 2 --reduction_layer 2 --dropout_rate 0.1"),
    "pictures": Kind("--dataset imagefolder --data_dir {pictures} --num_workers 2 --eval_batch_size 3"),
    "pictures-cnn": Kind(
        "--dataset imagenet --data_dir {pictures} --num_workers 2 --eval_batch_size 3 --model_type ResNet-Mini_Flops"
    ),
    "python": Kind("--optimizer adamw --learning_rate 1e-3 --ema_decay 0.9", "python"),
    "python-pictures": Kind("--dataset imagefolder --data_dir {pictures} --num_workers 1 --norm_type BN", "python"),
    "ddp": Kind("--optimizer adamw --learning_rate 1e-3 --norm_type BN --dropout_rate 0.1", "torchrun"),
    "fsdp": Kind("--parallel fsdp --bf16 --optimizer adam --learning_rate 1e-3 --ema_decay 0.9", "torchrun"),
}


HALVES = ("sgd", "pictures")  # runs that are also kept interrupted, for the faults that need one
HALF_STEP = 13


class Lab:
    """The folders of a campaign: references, interrupted runs and cases."""

    def __init__(self, folder, seed, startup_seconds):
        """`startup_seconds` is {name of a run: seconds from its start to its first step}."""
        self.folder, self.seed, self.startup_seconds = Path(folder), seed, startup_seconds

    def case(self, name, folder):
        """A Case of the run `name` in a new folder."""
        return Case(name, self.folder / folder, self.folder / "pictures")

    def reference(self, name):
        """The folder of the run that was never interrupted."""
        return self.folder / f"reference-{name}" / "run"

    def make_reference(self, name):
        """Finish the undisturbed run; returns the seconds until its first step. Raises UserError."""
        with self.case(name, f"reference-{name}").start(resume=False) as run:
            began = time.monotonic()
            while run.status() is None and run.phase() == "start-up":
                time.sleep(0.01)
            seconds = time.monotonic() - began
            if run.wait() != 0:
                raise UserError(f"the undisturbed run {name} ended with status {run.status()}: {run.stderr()}")
        return seconds

    def make_half(self, name):
        """Stop a run after HALF_STEP, so that it has an older checkpoint too. Raises UserError."""
        case = self.case(name, f"half-{name}")
        with case.start(prepare=lambda: after_step(HALF_STEP, send_sigterm)) as run:
            run.wait()
        if last_step(case.run_dir) != HALF_STEP:
            raise UserError(f"{name} was to stop after step {HALF_STEP}; it ended with {run.status()}: {run.stderr()}")


class Case:
    """A run of one kind in a folder of its own, which is started as often as a fault requires."""

    def __init__(self, name, folder, pictures):
        """`name` is that of the kind; `pictures` is the image folder of the kinds that read one."""
        self.kind, self.folder = RUNS[name], Path(folder).resolve()
        self.run_dir = self.folder / "run"
        self.run_dir.mkdir(parents=True)
        self.pictures = Path(pictures).resolve()
        self.starts = 0

    def start(self, *further, resume=True, **keywords):
        """Start train.py; `further` flags take precedence over the kind's. Returns a Start."""
        flags = f"{SHARED} {self.kind.flags}".split()
        flags = [flag.format(pictures=self.pictures) for flag in flags]
        place = ["--output_dir", str(self.folder), "--name", self.run_dir.name, *(["--resume"] if resume else [])]
        return Start(self, [str(TRAIN.path), *flags, *place, *further], **keywords)

    def evaluate(self, weights):
        """Start evaluate.py on a weights file of the run. Returns a Start."""
        return Start(self, [str(EVALUATE), "--checkpoint", str(self.run_dir / weights)])


class Start:
    """One start of a script; a context manager that kills what is left of it at the end."""

    def __init__(self, case, command, prepare=None, launcher_flags=()):
        """`prepare` is called in a forked process first; `launcher_flags` are torchrun's."""
        case.starts += 1
        self.case, self.run_dir, self.began = case, case.run_dir, time.time()
        self.out, self.err = (case.folder / f"start-{case.starts}.{name}" for name in ("out", "err"))
        self.has_begun = False
        if case.kind.launch == "fork":
            arguments = (command, self.out, self.err, prepare)
            self.process = multiprocessing.get_context("fork").Process(target=execute, args=arguments)
            self.process.start()
            return
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *launcher_flags]
        launcher = torchrun if case.kind.launch == "torchrun" else []
        with open(self.out, "wb") as out, open(self.err, "wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=ROOT,
                env={**os.environ, **ENVIRONMENT},
                start_new_session=True,
            )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes():
            kill(process, signal.SIGKILL)
        self.wait()

    def status(self):
        """The exit status, negative for a signal; None while it runs."""
        return self.process.exitcode if self.case.kind.launch == "fork" else self.process.poll()

    def wait(self, seconds=SECONDS_TO_END):
        """Wait for the end; returns `status`, which is None if the process is still there."""
        deadline = time.monotonic() + seconds
        while self.status() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        return self.status()

    def processes(self):
        """The numbers of its living processes, the started one first, then torchrun's or those that read images."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
                arguments = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:  # it has ended
                continue
            ours = int(session) == self.process.pid or os.fsencode(self.case.folder) in arguments
            if ours and state != "Z":
                found.append(int(folder.name))
        return sorted(found, key=lambda number: (number != self.process.pid, number))

    def send(self, signal_number, target, choice=0.0):
        """Send a signal to the "group", or to "one" process: of torchrun's, `choice` from 0 to below 1 selects one."""
        if self.case.kind.launch != "torchrun":
            send = os.killpg if target == "group" else os.kill
            send(self.process.pid, signal_number)
            return
        processes = self.processes()  # torchrun starts each worker in a session of its own
        if target == "one":
            workers = processes[1:] or processes
            processes = workers if signal_number == signal.SIGKILL else processes  # workers would survive its death
            processes = [processes[int(choice * len(processes))]]
        for process in processes:
            kill(process, signal_number)

    def phase(self):
        """What the run does now, one of PHASES or FINISHED, as its output and its folder show it."""
        self.has_begun = self.has_begun or " images at " in self.out.read_text() if self.out.exists() else False
        if not self.has_begun:
            return "start-up"
        last = last_step(self.run_dir)
        newest = max((step for step, path in states(self.run_dir) if self.is_new(path)), default=0)
        if newest > last or any(self.is_new(self.run_dir / f".{name}.tmp") for name in (LAST, BEST)):
            return "saving"
        if last and (last % EVAL_EVERY == 0 or last == NUM_STEPS) and last_row(self.run_dir) < last:
            return "evaluation"
        return FINISHED if last == NUM_STEPS else "training"

    def is_new(self, path):
        """Whether the file is of this start, not left by an earlier one that was killed."""
        try:
            return path.stat().st_mtime > self.began
        except OSError:
            return False

    def stderr(self):
        return self.err.read_text() if self.err.exists() else ""

    def last_words(self):
        """The end of what it printed to stderr, in one line."""
        return " ".join(self.stderr().split())[-300:]

    def printed(self):
        return (self.out.read_text() if self.out.exists() else "") + self.stderr()


def execute(command, out, err, prepare=None):
    """The body of a forked process: a script, as the shell would execute it."""
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    for path, descriptor, name in ((out, 1, "stdout"), (err, 2, "stderr")):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), descriptor)
        setattr(sys, name, open(descriptor, "w", buffering=1, closefd=False))  # noqa: SIM115
    os.environ.update(ENVIRONMENT)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    sys.argv = command
    if prepare:
        prepare()
    status = 0
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as error:
        status = error.code
    sys.exit(status)  # without the frames of the first error, which Python frees too before it ends other processes


def after_step(step, action):
    """Call `action()` in a forked process after that step of its training."""
    train_step = utils.training.train_step

    def step_and_action(run, batches):
        metrics = train_step(run, batches)
        if run.step == step:
            action()
        return metrics

    utils.training.train_step = step_and_action


def send_sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


def kill(process, signal_number):
    """Send a signal to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal_number)


# What a run's folder shows


def states(run_dir):
    """(step, path) of each folder with the state of a checkpoint, whole or not."""
    return [(int(path.name.removeprefix("state-")), path) for path in run_dir.glob("state-*") if path.is_dir()]


def last_step(run_dir):
    """The step of last.safetensors, 0 before the first."""
    try:
        with safe_open(run_dir / LAST, framework="pt") as file:
            return int(file.metadata()["step"])
    except Exception:  # not there yet, or damaged on purpose
        return 0


def last_row(run_dir):
    """The step of the last row of metrics.csv, 0 before the first."""
    try:
        rows = read_rows(run_dir / METRICS)
        return int(rows[-1]["step"]) if rows else 0
    except (UserError, KeyError, ValueError):
        return 0


def wait_until(run, condition):
    """Wait for a condition, or for the end of the run."""
    while run.status() is None and not condition():
        time.sleep(0.002)


def make_picture_folder(folder):
    """An image folder of three classes, JPEG and PNG files of noise of different sizes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 10)):
        for name in ("ant", "bee", "cat"):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (20 + number, 30 - number, 3), dtype=np.uint8)
                suffix = "jpg" if number % 2 else "png"
                Image.fromarray(pixels).save(folder / split / name / f"{number:02d}.{suffix}")
