"""What several test files need: scripts run in the shell and in this process, small data, comparing runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from models import build_model
from synthetic import make_checkpoint
from utils.data.datasets import DataOptions, load_dataset
from utils.errors import run_script
from utils.parallel.processes import one_process

ROOT = Path(__file__).parent.parent
# A model and a data set on which a step takes milliseconds: the flags that a test does not give itself.
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


def script(*command, processes=1, **keywords):
    """Run a script of the repository in the shell's way; returns the CompletedProcess with its texts."""
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
    """`script`, which must end well; returns what it printed."""
    done = script(*command, **keywords)
    assert done.returncode == 0, done.stderr
    return done.stdout


def call_main(module, flags, monkeypatch):
    """Run a script's main() in this process, as quick as it gets. SystemExit carries the exit status."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
    run_script(module.main)


def load_data(name, split, data_dir="data", processes=None, **options):
    """The split of a data set as a single process on the CPU loads it."""
    options = DataOptions(data_dir, **{"num_workers": 0, **options})
    return load_dataset(name, split, options, processes or one_process())


def read_config(run_dir):
    return json.loads((Path(run_dir) / "config.json").read_text())


def write_pictures(folder, sizes, seed=0):
    """PNG files of noise, one for each (height, width), in `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    paths = []
    for number, (height, width) in enumerate(sizes):
        path = folder / f"{number:03d}.png"
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        paths.append(path)
    return paths


def fails(module, flags, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        call_main(module, flags, monkeypatch)
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert printed.err.count("\n") == 1
    assert printed.err.startswith(f"{module.__name__}.py: error: ")
    assert printed.out == ""
    return printed.err


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
