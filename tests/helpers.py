"""What several test files need: running scripts, small data sets, reading and comparing runs."""

import json
import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import evaluate
import train
from inference import SavedModel
from models import build_model
from models.configs import VITS
from synthetic import make_checkpoint
from utils.data.augmentation import Augmentation, normalise, random_crops, resized_crops
from utils.data.datasets import DataOptions, load_dataset
from utils.data.images import stretch
from utils.data.loading import FolderImages
from utils.data.stream import samples_at
from utils.errors import run_script
from utils.parallel.processes import one_process
from utils.records.metrics_file import read_rows
from utils.records.run_folder import LOCK, METRICS
from utils.records.weights import LAST
from utils.training import train_step

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
# A model and a data set on which a step takes milliseconds: the flags that a test does not give.
TINY = {
    "--dataset": "digits",
    "--model_type": "ViT-Mini_4",
    "--img_size": "8",
    "--train_batch_size": "16",
    "--eval_batch_size": "256",
    "--num_steps": "12",
    "--eval_every": "6",
    "--warmup_steps": "3",
    "--name": "run",
}
# The flags of a run that a SavedModel needs.
DIGITS_RUN = {"model_type": "ViT-Mini_4", "img_size": 16, "dataset": "digits", "norm_type": "LN"}
CROPS = Augmentation(seed=5, img_size=(16, 16), min_crop_scale=0.3, flip=True)


def script(*command, processes=1, **keywords):
    """Run a script of the repository as the shell does, by torchrun if `processes` > 1; returns a CompletedProcess."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *launcher, *map(str, command)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        **keywords,
    )


def succeed(*command, **keywords):
    """`script` that must exit with status 0; returns what it printed."""
    done = script(*command, **keywords)
    assert done.returncode == 0, done.stderr
    return done.stdout


def call_main(module, flags, monkeypatch):
    """Run a script's main() in this process, without the seconds of a new one. SystemExit has the exit status."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
    run_script(module.main)


def load_data(name, split, data_dir="data", processes=None, **options):
    """The split of a data set as a single process on the CPU loads it."""
    options = DataOptions(data_dir, **{"num_workers": 0, **options})
    return load_dataset(name, split, options, processes or one_process())


def fails(module, flags, monkeypatch, capsys):
    """The error of a script's main(): status 2 and one line on stderr, nothing on stdout."""
    with pytest.raises(SystemExit) as stopped:
        call_main(module, flags, monkeypatch)
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert printed.err.count("\n") == 1
    assert printed.err.startswith(f"{module.__name__}.py: error: ")
    assert printed.out == ""
    return printed.err


def read_config(run_dir):
    return json.loads((Path(run_dir) / "config.json").read_text())


def write_images(folder, sizes, seed=0):
    """PNG files of noise, one for each (height, width), in `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    paths = []
    for number, (height, width) in enumerate(sizes):
        path = folder / f"{number:03d}.png"
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        paths.append(path)
    return paths


def photograph(height, width):
    """A photograph as an image of Pillow, resized."""
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image("flower.jpg")).resize((width, height), Image.Resampling.BICUBIC)


def write_jpegs(folder, count, suffix=".JPEG"):
    """JPEG files of different parts of a photograph, of different sizes; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:03d}{suffix}" for i in range(count)]
    whole = photograph(120, 160)
    for i, path in enumerate(paths):
        whole.crop((4 * i, 3 * i, 50 + 5 * i, 40 + 5 * i)).save(path, format="JPEG", quality=95)
    return paths


def truncate(path, share=0.6):
    """Keep only the first part of a file."""
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def flip_bit(path, position=0.7):
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[int(position * len(data))] ^= 4
    path.write_bytes(data)


def damage_jpeg(path, surplus=False):
    """Overwrite bytes in the middle of a JPEG's pixels, or with `surplus` add some that decoders ignore."""
    data = path.read_bytes()
    middle = len(data) // 2
    damaged = data[:middle] + b"\xff\x7b" + data[middle + 2 :]
    path.write_bytes(data[:-2] + bytes(40) + data[-2:] if surplus else damaged)


def folder_images(paths, workers=0, **options):
    """FolderImages in which the label of each image is its index."""
    options = DataOptions(num_workers=workers, **options)
    return FolderImages(paths, list(range(len(paths))), map(str, range(len(paths))), CPU, stretch, options)


def stream(data, ends, augmentation):
    """Images and labels at the positions below ends[-1] of the stream, read in batches that end at `ends`."""
    batches = [np.arange(*span) for span in zip([0, *ends], ends, strict=False)]
    images, labels = zip(*data.train_batches(batches, augmentation), strict=True)
    return torch.cat(images), torch.cat(labels)


def random_model(*arguments, **keywords):
    """`build_model` with random weights everywhere, in evaluation mode."""
    model = build_model(*arguments, **keywords)
    shapes = {key: array.shape for key, array in model.export_npz().items()}
    model.load_from(make_checkpoint(shapes), head="keep")
    return model.eval()


def write_run(folder, flags=DIGITS_RUN, classes=("cat", "dog"), **keywords):
    """The files of a run that a SavedModel reads; returns its model and the path of its weights."""
    folder.mkdir()
    model = random_model(flags["model_type"], flags["img_size"], len(classes), flags.get("norm_type", "LN"), **keywords)
    save_file(model.state_dict(), folder / "best.safetensors", metadata={"step": "7"})
    (folder / "config.json").write_text(json.dumps({"flags": flags, "classes": list(classes)}))
    return model, folder / "best.safetensors"


# Runs of train.py in this process


def train_run(flags, monkeypatch, name="run"):
    """Run train.py in this process; returns (weights of the last checkpoint, rows of metrics.csv as floats)."""
    call_main(train, flags, monkeypatch)
    folder = Path(flags[flags.index("--output_dir") + 1]) / name
    rows = [{key: float(value) for key, value in row.items()} for row in read_rows(folder / METRICS)]
    return load_file(folder / LAST), rows


def run_in_this_process(study, monkeypatch):
    """Let the module `study` start its runs of train.py in this process; returns the list of their names."""
    started = []

    def run_all(runs, jobs=1, ended=None):
        for run in runs:
            started.append(run.flags.name)
            call_main(train, run.command[2:], monkeypatch)
            ended(run, 0)
        return {}

    monkeypatch.setattr(study, "run_unfinished", run_all)
    return started


def evaluate_and_export(flags, monkeypatch, capsys):
    """The report of evaluate.py on the last weights of a run, which must also survive an export to Google's format."""
    path = run_dir(flags) / LAST
    capsys.readouterr()
    call_main(evaluate, ["--checkpoint", path, "--json"], monkeypatch)
    report = json.loads(capsys.readouterr().out)
    assert report["top1_accuracy"] == pytest.approx(float(metrics(flags)[-1]["test_accuracy"]))
    model = SavedModel.load(path).model
    arrays, weights = model.export_npz(), {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_()
    model.load_from(arrays, head="keep")
    assert_same_bits(model.state_dict(), weights)
    return report


def run_dir(flags):
    """The folder of the run with these flags."""
    return Path(flags[flags.index("--output_dir") + 1]) / flags[flags.index("--name") + 1]


def metrics(flags):
    """The rows of the run's metrics.csv, {column: text}."""
    return read_rows(run_dir(flags) / METRICS)


def contents(folder):
    """{path: bytes} of all files below a folder, without locks."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != LOCK}


def differences(weights, others):
    """{name: largest absolute difference} of two state dicts with the same names."""
    assert weights.keys() == others.keys()
    return {name: (weights[name] - others[name]).abs().max().item() for name in weights}


def assert_same_bits(weights, others):
    """Both state dicts have the same names and the same bits."""
    assert weights.keys() == others.keys()
    assert [name for name in weights if not torch.equal(weights[name], others[name])] == []


def initial_weights():
    """The weights with which a run of TINY starts."""
    torch.manual_seed(42)
    return build_model("ViT-Mini_4", img_size=8).state_dict()


def make_shallow(monkeypatch, num_layers=2):
    """Give the small ViTs and hybrids fewer blocks, for tests of what does not depend on their depth."""
    for name in ("ViT-Nano_4", "ViT-Mini_4", "R26-ViT-Mini_4"):
        monkeypatch.setitem(VITS[name], "num_layers", num_layers)


def stop_after(step, monkeypatch):
    """The next run receives SIGTERM in that step, counted from its first one."""
    calls = []

    def train_step_with_signal(run, batches):
        calls.append(None)
        if len(calls) == step:
            signal.raise_signal(signal.SIGTERM)
        return train_step(run, batches)

    monkeypatch.setattr("utils.training.train_step", train_step_with_signal)


def one_hot(images, labels, step):
    """The `mix` of `plain_loop` that mixes nothing."""
    return images, F.one_hot(labels, 10).float()


def plain_loop(steps, batch, mix=one_hot, max_grad_norm=1.0, weights=None):
    """A run of TINY in ordinary PyTorch: momentum SGD, clipping, warm-up of 3 steps, then cosine.

    `weights` (10,) are those of the classes in the loss. Returns (weights, losses, correct predictions and gradient
    norms of the steps).
    """
    torch.manual_seed(42)
    model = build_model("ViT-Mini_4", img_size=8).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = load_data("digits", "train")
    losses, correct, norms = [], [], []
    for step in range(steps):
        progress = (step - 3) / (steps - 3)
        optimizer.param_groups[0]["lr"] = 0.1 * (step / 3 if step < 3 else (1 + math.cos(math.pi * progress)) / 2)
        epochs, indices = samples_at(42, np.arange(step * batch, (step + 1) * batch), len(data))
        boxes, _ = random_crops(42, epochs, indices, len(data), 8, 8, 0.05)
        images = normalise(resized_crops(data.images[indices], boxes, (8, 8)))
        images, targets = mix(images, data.labels[indices], step)
        logits = model(images)
        loss = F.cross_entropy(logits, targets, weights, label_smoothing=0.1)  # targets are one-hot: divided by B
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf).item())
        optimizer.step()
        losses.append(loss.item())
        correct.append((logits.argmax(dim=1) == targets.argmax(dim=1)).sum().item())
    return model.state_dict(), losses, correct, norms


# Runs of train.py in other processes


def run_processes(count, flags):
    """Train in `count` processes that are forked from this one; returns (exit status, what it printed) of each.

    That is faster than torchrun. Only for Linux: elsewhere a process may not be able to compute after a fork.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    paths = [run_dir(flags).with_suffix(f".process-{rank}") for rank in range(count)]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    started = [fork.Process(target=run_rank, args=(rank, count, port, flags, paths[rank])) for rank in range(count)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        process.kill()
    return [(process.exitcode, path.read_text()) for process, path in zip(started, paths, strict=True)]


def run_rank(rank, count, port, flags, path):
    """The body of a process of `run_processes`, with the environment that torchrun gives it."""
    sys.stdout = sys.stderr = open(path, "w", buffering=1)  # noqa: SIM115
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({name: str(number) for name, number in numbers.items()}, MASTER_ADDR="localhost")
    sys.argv = ["train.py", *flags]
    run_script(train.main)


def start(flags, **keywords):
    """Start train.py in the shell's way; returns the Popen."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "train.py", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes, **keywords)


def wait_for_checkpoint(process, flags, step):
    """Wait until the run of a Popen has been evaluated at `step` or later."""
    deadline = time.monotonic() + 120
    while not ((run_dir(flags) / METRICS).exists() and any(int(row["step"]) >= step for row in metrics(flags))):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def stop_sweep(command, first_run):
    """Start a script of many runs, and send it SIGTERM after the first checkpoint of its run in the folder `first_run`.

    The signal reaches the script alone, as from a queue's manager. Returns what it printed on stderr.
    """
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, **pipes)
    deadline = time.monotonic() + 120
    while not (first_run / LAST).exists():
        assert started.poll() is None, started.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    started.send_signal(signal.SIGTERM)
    _, errors = started.communicate(timeout=60)
    assert started.returncode == 128 + signal.SIGTERM
    return errors


def step_metrics(run_dir, name):
    """The values of a training metric in all steps, from the run's TensorBoard records."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return [event.value for event in events.Scalars(f"train/{name}")]
