"""What several test files need: running scripts, small data sets, reading and comparing runs."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from models import build_model
from synthetic import make_checkpoint
from utils.data.augmentation import Augmentation
from utils.data.datasets import DataOptions, load_dataset
from utils.data.images import stretch
from utils.data.loading import FolderImages
from utils.errors import run_script
from utils.parallel.processes import StopSignal, one_process

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


def train_run(flags, monkeypatch, name="run"):
    """Run train.py in this process; returns (weights of the last checkpoint, rows of metrics.csv as floats)."""
    import train

    call_main(train, flags, monkeypatch)
    folder = Path(flags[flags.index("--output_dir") + 1]) / name
    with open(folder / "metrics.csv", newline="") as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    return load_file(folder / "last.safetensors"), rows


def stop_after(step, monkeypatch):
    """Let the training stop after that step, as if SIGTERM had been received while it ran."""
    calls = []

    def agreed(self):
        calls.append(None)
        return 15 if len(calls) == step else 0

    monkeypatch.setattr(StopSignal, "agreed", agreed)


def differences(weights, others):
    """{name: largest absolute difference} of two state dicts with the same names."""
    assert weights.keys() == others.keys()
    return {name: (weights[name] - others[name]).abs().max().item() for name in weights}


def run_dir(flags):
    """The folder of the run with these flags of train.py."""
    return Path(flags[flags.index("--output_dir") + 1]) / flags[flags.index("--name") + 1]


def metrics(flags):
    """The rows of the run's metrics.csv, as text."""
    with open(run_dir(flags) / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


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


write_pictures = write_images  # until the last file uses the new name


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
