"""Faults other than interruptions, each with its expected outcome: damaged files, disks, the clock, lost processes."""

import contextlib
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fault_checks import (
    DAMAGES,
    NOTICED,
    SkippedError,
    compare,
    compare_weights,
    ends_with,
    finishes,
    refuses,
    same_weights,
    same_weights_and_metrics,
    small_disk,
)
from fault_runs import EVAL_EVERY, HALF_STEP, HALVES, ROOT, after_step, kill, last_step, states, wait_until

from utils.records.checkpoint import STATE
from utils.records.run_folder import CONFIG, METRICS, read_config
from utils.records.weights import BEST, LAST

ONE_DAY = 24 * 3600


class Fault(NamedTuple):
    """`cause(case, reference, variant, rng)` returns what is not as expected, as lines, or raises SkippedError.

    The case is a copy of the interrupted run `base` if it is one of HALVES and `fresh` is False, else a new run. It
    happens once for each of the `variants`.
    """

    title: str
    expected: str
    cause: Callable
    variants: object = ("once",)
    base: str = "sgd"
    fresh: bool = False


class Outcome(NamedTuple):
    fault: str
    variant: str
    problems: list
    skipped: str = ""


def run_fault(lab, name, variant):
    """Cause a fault; returns its Outcome. The folder of one without problems is deleted."""
    fault = FAULTS[name]
    case = lab.case(fault.base, f"{name}-{variant}".replace(" ", "-"))
    if fault.base in HALVES and not fault.fresh:
        shutil.copytree(lab.folder / f"half-{fault.base}" / "run", case.run_dir, dirs_exist_ok=True)
    if fault.base == "pictures":
        case.pictures = Path(shutil.copytree(case.pictures, case.folder / "pictures"))
    rng = random.Random(f"{lab.seed} {name} {variant}")
    try:
        problems = fault.cause(case, lab.reference(fault.base), variant, rng)
    except SkippedError as skipped:
        return Outcome(name, variant, [], str(skipped))
    except (OSError, StopIteration) as error:  # a file that the fault needs is not there
        problems = [f"the fault can't be caused: {error!r}"]
    if not problems:
        shutil.rmtree(case.folder)
    return Outcome(name, variant, [f"{line} ({case.folder})" for line in problems])


# Damaged files


def damaged_checkpoint(find):
    """A cause: damage the file that `find(run_dir)` returns; the run must fall back to the older checkpoint."""

    def cause(case, reference, variant, rng):
        NOTICED[variant](find(case.run_dir), rng)
        return finishes(case, reference, says="warning: ")

    return cause


def find_last(run_dir):
    return run_dir / LAST


def newest_state(run_dir):
    return run_dir / f"state-{last_step(run_dir)}"


STATE_FILES = (
    ("state-tensors", "tensors", lambda run_dir: next(newest_state(run_dir).glob("*.distcp"))),
    ("state-index", "metadata", lambda run_dir: newest_state(run_dir) / ".metadata"),
    ("state-json", "numbers", lambda run_dir: newest_state(run_dir) / STATE),
)


def damaged_best(case, reference, variant, rng):
    """The best weights are not read by a run that resumes, so they are replaced or remain damaged."""
    DAMAGES[variant](case.run_dir / BEST, rng)
    problems = finishes(case, reference, lambda run, other: compare_weights(run / LAST, other / LAST))
    if compare_weights(case.run_dir / BEST, reference / BEST):
        problems += refuses(case, case.evaluate(BEST), names=BEST)
    return problems


def damaged_config(case, reference, variant, rng):
    """Resuming does not need the file and writes it again; the checkpoint holds the flags too."""
    DAMAGES[variant](case.run_dir / CONFIG, rng)
    problems = finishes(case, reference)
    if read_config(case.run_dir)["classes"] != read_config(reference)["classes"]:
        problems.append(f"{CONFIG} has other classes")
    return problems


def damaged_metrics(case, reference, variant, rng):
    DAMAGES[variant](case.run_dir / METRICS, rng)
    return finishes(case, reference, same_weights, says="" if variant == "bit flipped" else f"warning: .*{METRICS}")


def damaged_events(case, reference, variant, rng):
    NOTICED[variant](next(case.run_dir.glob("events.out.*")), rng)
    return finishes(case, reference, same_weights_and_metrics)


def damaged_image(split):
    """A cause: damage an image; the run must name it, save what it has computed, and continue once it is repaired."""

    def cause(case, reference, variant, rng):
        image = rng.choice(sorted((case.pictures / split).rglob("*.*"))[2:])  # the first two are read before training
        before = image.read_bytes()
        DAMAGES[variant](image, rng)
        with case.start() as run:
            run.wait()
        problems = []
        if run.status() != 2 or run.stderr().count("\n") != 1 or str(image) not in run.stderr():
            problems.append(f"it ended with {run.status()}: {run.last_words()}")
        if split == "val" and last_step(case.run_dir) != 2 * EVAL_EVERY:
            problems.append(f"step {last_step(case.run_dir)} is saved, not {2 * EVAL_EVERY}, whose evaluation failed")
        image.write_bytes(before)
        return problems + finishes(case, reference)

    return cause


def damaged_npz(case, reference, variant, rng):
    path = Path(shutil.copy(ROOT / "checkpoint" / "ViT-Nano_4-digits.npz", case.folder / "ViT-Nano_4-digits.npz"))
    DAMAGES[variant](path, rng)
    return refuses(case, case.start("--pretrained_dir", str(path)), names=path.name)


# Disks


def full_disk(case, reference, variant, rng):
    """Another file fills the disk during the run and is deleted before it resumes."""
    ballast = case.run_dir / "ballast"
    with small_disk(case.run_dir):
        with case.start() as run:
            wait_until(run, lambda: run.phase() == variant and last_step(run.run_dir) >= EVAL_EVERY)
            with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
                while file.write(bytes(1 << 16)):
                    pass
            problems = ends_with(run, 1)
        ballast.unlink()
        return problems + finishes(case, reference)


def file_size_limit(case, reference, variant, rng):
    """As a quota that the weights exceed."""
    limit = 1 << 20
    with case.start(prepare=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) as run:
        problems = ends_with(run, 1)
    return problems + finishes(case, reference)


def read_only_folder(case, reference, variant, rng):
    half = shutil.move(case.run_dir, case.folder / "half")
    case.run_dir.mkdir()
    with small_disk(case.run_dir):
        shutil.copytree(half, case.run_dir, dirs_exist_ok=True)
        for mode in ("ro", "rw"):
            subprocess.run(["mount", "-o", f"remount,{mode}", str(case.run_dir)], check=True)
            if mode == "ro":
                problems = refuses(case, case.start(), names="can't be written")
        return problems + finishes(case, reference)


def unwritable_metrics(case, reference, variant, rng):
    """A folder stands in the place of metrics.csv for the duration of one evaluation."""
    metrics = case.run_dir / METRICS
    with case.start() as run:
        wait_until(run, metrics.is_file)
        metrics.unlink()
        metrics.mkdir()
        wait_until(run, lambda: METRICS in run.printed())
        metrics.rmdir()
        if problems := ends_with(run, 0):
            return problems
    reports = sum("has failed" in line and METRICS in line for line in run.printed().splitlines())
    problems = [] if reports == 1 else [f"it reported the error {reports} times"]
    return problems + compare(case.run_dir, reference)


# Clock and processes


def clock_set_back(case, reference, variant, rng):
    def prepare():
        clock, began = time.time, time.time()
        delay = 0 if variant == "before a start" else 1
        time.time = lambda: clock() - (ONE_DAY if clock() - began >= delay else 0)

    return finishes(case, reference, prepare=prepare)


def lost_reading_worker(case, reference, variant, rng):
    """The run may continue or end, with any error; what it has saved must be whole."""
    with case.start() as run:
        wait_until(run, lambda: run.phase() == "training" and len(run.processes()) > 1)
        for process in run.processes()[1:2]:
            kill(process, signal.SIGKILL)
        if run.wait() is None:
            return ["it did not end"]
    return finishes(case, reference)


def unexpected_error(case, reference, variant, rng):
    """The run must end, together with the processes that read images."""

    def fail():
        raise RuntimeError("unexpected")

    with case.start(prepare=lambda: after_step(HALF_STEP + 2, fail)) as run:
        status = run.wait()
    if status != 1:
        return [f"it ended with status {status}"]
    return finishes(case, reference)


def lost_training_process(case, reference, variant, rng):
    """One of torchrun's two; with restarts the run must finish by itself."""
    flags = ["--max-restarts=3"] if variant == "with restarts" else []
    with case.start(resume=False, launcher_flags=flags) as run:
        wait_until(run, lambda: run.phase() == "training" and last_step(run.run_dir) >= EVAL_EVERY)
        run.send(signal.SIGKILL, "one", rng.random())
        status = run.wait()
    if (status == 0) != bool(flags):
        return [f"it ended with status {status}"]
    return compare(case.run_dir, reference) if flags else finishes(case, reference)


def second_process(case, reference, variant, rng):
    """The same command while the run is alive."""
    with case.start() as run:
        wait_until(run, lambda: run.phase() == "training")
        with case.start() as second:
            second.wait()
        problems = ends_with(run, 0)
    lines = second.stderr().splitlines()
    if second.status() != 2 or len(lines) != 1 or str(run.process.pid) not in lines[0]:
        problems.append(f"the second process ended with {second.status()}: {second.last_words()}")
    return problems + compare(case.run_dir, reference)


# Mistakes

REMAINING = {"all files": None, "best weights only": BEST, "metrics only": METRICS}


def new_start(case, reference, variant, rng):
    """Without --resume in a folder with results, of which some files may have been deleted."""
    remaining = REMAINING[variant]
    for path in case.run_dir.iterdir() if remaining else ():
        if path.name != remaining:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return refuses(case, case.start(resume=False))


def pruned_weights(case, reference, variant, rng):
    """--resume without any last weights."""
    for path in case.run_dir.glob("last*"):
        path.unlink()
    return refuses(case, case.start(), names=LAST)


def renamed_class(case, reference, variant, rng):
    for split in ("train", "val"):
        (case.pictures / split / "ant").rename(case.pictures / split / "wasp")
    return refuses(case, case.start())


def finished_run(case, reference, variant, rng):
    """A finished run is started again, with and without its resume state."""
    shutil.copytree(reference, case.run_dir, dirs_exist_ok=True)
    if variant == "without its state":
        for _, path in states(case.run_dir):
            shutil.rmtree(path)
    return finishes(case, reference)


OLDER = "falls back to the older checkpoint with a warning; same bits"
REFUSED = "one line and status 2; nothing changed"
WEIGHTS = "same bits of the weights"
NAMED = "one line that names it, status 2; same bits once it is repaired"
STOPS = "one line and status 1; same bits after --resume"
SAME = "same bits"
WARNS = "the run continues, says so once; same bits"
FAULTS = {
    "last-weights": Fault("last.safetensors is damaged", OLDER, damaged_checkpoint(find_last), NOTICED),
    **{
        name: Fault(f"the state's {what} are damaged", OLDER, damaged_checkpoint(find), NOTICED)
        for name, what, find in STATE_FILES
    },
    "best-weights": Fault("best.safetensors is damaged", f"{WEIGHTS}; evaluate.py refuses it", damaged_best, DAMAGES),
    "config": Fault("config.json is damaged", "same bits; the file is written again", damaged_config, DAMAGES),
    "metrics": Fault("metrics.csv is damaged", f"{WEIGHTS}; lost rows are reported", damaged_metrics, DAMAGES),
    "events": Fault("a TensorBoard file is damaged", f"{WEIGHTS} and metrics", damaged_events, NOTICED),
    "training-image": Fault("a training image is damaged", NAMED, damaged_image("train"), DAMAGES, "pictures"),
    "test-image": Fault("a validation image is damaged", NAMED, damaged_image("val"), DAMAGES, "pictures"),
    "npz": Fault("the .npz file is damaged", REFUSED, damaged_npz, DAMAGES, fresh=True),
    "full-disk": Fault("the disk is full", STOPS, full_disk, ("training", "evaluation"), fresh=True),
    "file-size-limit": Fault("no file may exceed 1 MiB", STOPS, file_size_limit, fresh=True),
    "read-only": Fault("the folder is read-only", REFUSED, read_only_folder),
    "unwritable-metrics": Fault("metrics.csv can't be written once", WARNS, unwritable_metrics, fresh=True),
    "clock": Fault("the clock is set back by a day", SAME, clock_set_back, ("before a start", "during the run")),
    "reading-worker": Fault("a process that reads images is killed", SAME, lost_reading_worker, base="pictures"),
    "unexpected-error": Fault("an unexpected error", "the run ends; same bits", unexpected_error, base="pictures"),
    "training-process": Fault(
        "one of torchrun's processes is killed", SAME, lost_training_process, ("resumed", "with restarts"), "ddp"
    ),
    "second-process": Fault(
        "a second process starts in the folder", "one line and status 2; same bits", second_process
    ),
    "new-start": Fault("a start without --resume", REFUSED, new_start, REMAINING),
    "pruned-weights": Fault("--resume without last weights", REFUSED, pruned_weights),
    "renamed-class": Fault("--resume with another class name", REFUSED, renamed_class, base="pictures"),
    "finished-run": Fault("a finished run is resumed", SAME, finished_run, ("whole", "without its state"), fresh=True),
}
