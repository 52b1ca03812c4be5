"""What several test files need: the scripts run as a user runs them, small runs, small folders of pictures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from utils.parallel.processes import Processes

ROOT = Path(__file__).parent.parent
# A model and a data set on which a step takes milliseconds; what a test does not mention comes from here.
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


torch.set_num_threads(1)  # several test processes share the cores; threads that wait for each other would crawl


@pytest.fixture
def one_process():
    return Processes(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def tiny_flags(tmp_path):
    """`tiny_flags("--flag", value, ...)`: a full list of flags for train.py, the given ones in place of TINY's."""

    def flags(*given):
        given = [str(item) for item in given]
        defaults = {**TINY, "--output_dir": str(tmp_path / "output")}
        rest = [item for flag, value in defaults.items() if flag not in given for item in (flag, value)]
        return [*rest, *given]

    return flags


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
    from utils.errors import run_script

    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
    run_script(module.main)


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


@pytest.fixture
def image_folder(tmp_path):
    """An image folder of two classes, 8 training and 4 test pictures each, of mixed sizes."""
    root = tmp_path / "pictures"
    for split, count in (("train", 8), ("val", 4)):
        for number, name in enumerate(("cat", "dog")):
            write_pictures(root / split / name, [(20 + i, 30 - i) for i in range(count)], seed=number)
    return root
