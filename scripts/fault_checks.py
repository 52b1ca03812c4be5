"""What the faults share: damage, a small disk, comparing the results of two runs, and how a start must end."""

import contextlib
import logging
import re
import shutil
import subprocess
import zlib

import experiment  # noqa: F401, which puts the repository on the path
import torch
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils.errors import UserError
from utils.records.metrics_file import read_rows
from utils.records.run_folder import METRICS
from utils.records.weights import AVERAGED, BEST, LAST

DISK = "64m"
MEASURED = ("seconds", "images_per_second")  # they differ between two runs of the same command
MEASURED_SPEED = "train/images_per_second"
logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of each resumption


class SkippedError(Exception):
    """A fault that this machine does not allow to cause."""


def truncate(path, rng):
    path.write_bytes(path.read_bytes()[: int(rng.uniform(0.2, 0.8) * path.stat().st_size)])


def flip_bit(path, rng):
    """In the middle of the file; of an image in its first bytes, because its pixels have no checksum."""
    content = bytearray(path.read_bytes())
    is_image = path.suffix in (".png", ".jpg")
    position = rng.randrange(2) if is_image else rng.randrange(len(content) // 5, 4 * len(content) // 5)
    content[position] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def empty(path, rng):
    path.write_bytes(b"")


DAMAGES = {"truncated": truncate, "bit flipped": flip_bit, "emptied": empty}
NOTICED = {**DAMAGES, "deleted": lambda path, rng: path.unlink()}  # of files without which a run may continue


@contextlib.contextmanager
def small_disk(folder):
    """Mount an empty disk at a folder. Raises SkippedError where that is not allowed."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "fault_campaign", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        raise SkippedError("mounting a tmpfs is not allowed")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


# The results of two runs


def scalars(run_dir):
    """{(tag, step): last value} of the run's TensorBoard records."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag != MEASURED_SPEED]
    return {(tag, event.step): event.value for tag in tags for event in events.Scalars(tag)}


def compare_weights(path, reference):
    """How a weights file differs from another one, as a list of at most one line; both as steps and bits."""
    contents = []
    for each in (path, reference):
        try:
            with safe_open(each, framework="pt") as file:
                step = (file.metadata() or {}).get("step")
                contents.append((step, {name: file.get_tensor(name) for name in file.keys()}))  # noqa: SIM118
        except Exception as error:
            return [f"{each} can't be read: {error}"]
    (step, weights), (expected_step, expected) = contents
    if step != expected_step:
        return [f"{path.name} is of step {step} instead of {expected_step}"]
    if weights.keys() != expected.keys():
        return [f"{path.name} has other weights: {sorted(weights.keys() ^ expected.keys())}"]
    differ = [name for name in expected if not same_bits(weights[name], expected[name])]
    return [f"{path.name}: {len(differ)} of {len(expected)} weights differ, first {differ[0]}"] if differ else []


def same_bits(tensor, other):
    """Whether two tensors have the same type, shape and bits, NaN included."""
    if (tensor.dtype, tensor.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(tensor.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def compare_metrics(run_dir, reference):
    """How metrics.csv differs in columns, rows or values, except the measured times; a list of at most one line."""
    try:
        rows, expected = read_rows(run_dir / METRICS), read_rows(reference / METRICS)
    except UserError as error:
        return [str(error)]
    steps, expected_steps = ([row.get("step") for row in each] for each in (rows, expected))
    if steps != expected_steps:
        return [f"{METRICS} has the steps {steps} instead of {expected_steps}"]
    for row, other in zip(rows, expected, strict=True):
        for name in row.keys() | other.keys():
            if name not in MEASURED and row.get(name) != other.get(name):
                return [f"{METRICS} has {name} {row.get(name)} instead of {other.get(name)} at step {row['step']}"]
    return []


def compare_scalars(run_dir, reference):
    """Which of the reference's TensorBoard values are missing or differ; a list of at most one line."""
    found, expected = scalars(run_dir), scalars(reference)
    wrong = [key for key in expected if found.get(key) != expected[key]]
    if not wrong:
        return []
    tag, step = wrong[0]
    value = found.get(wrong[0], "nothing")
    return [f"TensorBoard: {len(wrong)} values differ, first {tag} at step {step}: {value}, not {expected[tag, step]}"]


def compare(run_dir, reference):
    """The differences between the results of two runs of one kind, as lines; none if they are the same."""
    return same_weights(run_dir, reference) + compare_metrics(run_dir, reference) + compare_scalars(run_dir, reference)


# Outcomes


def finishes(case, reference, differences=compare, says="", **keywords):
    """Problems of a start that must finish with the results of the reference, and print a line that matches `says`."""
    with case.start(**keywords) as run:
        if problems := ends_with(run, 0):
            return problems
    problems = differences(case.run_dir, reference)
    if not re.search(says, run.printed()):
        problems.append(f"it did not print {says!r}")
    return problems


def refuses(case, start, names=""):
    """Problems of a Start that must end with status 2 and one line that contains `names`, and change no file."""
    before = contents(case.run_dir)
    with start as run:
        run.wait()
    lines = run.stderr().splitlines()
    problems = []
    if run.status() != 2 or len(lines) != 1 or "error: " not in lines[0] or names not in lines[0]:
        problems.append(f"it ended with {run.status()} and {len(lines)} lines: {run.last_words()}")
    if contents(case.run_dir) != before:
        changed = sorted({path for path, _ in contents(case.run_dir).items() ^ before.items()})
        problems.append(f"it changed {', '.join(changed)}")
    return problems


def contents(folder):
    """{path: checksum} of all files below a folder but locks."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): zlib.crc32(path.read_bytes()) for path in files}


def ends_with(run, *expected):
    """Problems of a started run that must end with an `expected` status and without a traceback."""
    if run.wait() not in expected or "Traceback" in run.printed():
        return [f"it ended with status {run.status()}: {run.last_words()}"]
    return []


def same_weights(run_dir, reference):
    names = [LAST, BEST] + [AVERAGED] * (reference / AVERAGED).exists()
    return [line for name in names for line in compare_weights(run_dir / name, reference / name)]


def same_weights_and_metrics(run_dir, reference):
    return same_weights(run_dir, reference) + compare_metrics(run_dir, reference)
