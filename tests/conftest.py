"""Settings and fixtures of all tests."""

import os
import sys

import pytest
import torch

from helpers import TINY, call_main, fails, write_images

if sys.platform == "darwin":  # GitHub's machines show an Apple GPU that has no memory
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
torch.set_num_threads(1)  # several test processes share the cores; more threads than cores are slow


@pytest.fixture
def tiny_flags(tmp_path):
    """`tiny_flags("--flag", value, ...)`: the flags of a small run of train.py; the given ones replace TINY's."""

    def flags(*given):
        given = [str(item) for item in given]
        defaults = {**TINY, "--output_dir": str(tmp_path / "output")}
        rest = [item for flag, value in defaults.items() if flag not in given for item in (flag, value)]
        return [*rest, *given]

    return flags


@pytest.fixture
def run_main(monkeypatch, capsys):
    """`run_main(module, flag, value, ...)`: run a script's main() in this process; returns what it prints."""

    def run(module, *flags):
        call_main(module, flags, monkeypatch)
        return capsys.readouterr().out

    return run


@pytest.fixture
def main_fails(monkeypatch, capsys):
    """`main_fails(module, flag, value, ...)`: run a script's main(), which must fail; returns its error of one line."""
    return lambda module, *flags: fails(module, flags, monkeypatch, capsys)


@pytest.fixture
def image_folder(tmp_path):
    """An image folder of two classes, 8 training and 4 validation images each, of different sizes."""
    root = tmp_path / "images"
    for split, count in (("train", 8), ("val", 4)):
        for number, name in enumerate(("cat", "dog")):
            write_images(root / split / name, [(20 + i, 30 - i) for i in range(count)], seed=number)
    return root
