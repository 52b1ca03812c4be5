"""Settings and fixtures of all tests."""

import pytest
import torch

from helpers import ROOT, TINY, call_main, fails, load_data, read_config, script, succeed, write_images  # noqa: F401

torch.set_num_threads(1)  # several test processes share the cores; threads that wait for each other would be slow


@pytest.fixture
def tiny_flags(tmp_path):
    """`tiny_flags("--flag", value, ...)`: a full list of flags for train.py, the given ones in place of TINY's."""

    def flags(*given):
        given = [str(item) for item in given]
        defaults = {**TINY, "--output_dir": str(tmp_path / "output")}
        rest = [item for flag, value in defaults.items() if flag not in given for item in (flag, value)]
        return [*rest, *given]

    return flags


@pytest.fixture
def run_main(monkeypatch, capsys):
    """`run_main(module, flag, value, ...)`: what a script's main() prints, in this process."""

    def run(module, *flags):
        call_main(module, flags, monkeypatch)
        return capsys.readouterr().out

    return run


@pytest.fixture
def main_fails(monkeypatch, capsys):
    """`main_fails(module, flag, value, ...)`: the error of one line that is all a script's main() prints."""
    return lambda module, *flags: fails(module, flags, monkeypatch, capsys)


@pytest.fixture
def image_folder(tmp_path):
    """An image folder of two classes, 8 training and 4 test pictures each, of mixed sizes."""
    root = tmp_path / "pictures"
    for split, count in (("train", 8), ("val", 4)):
        for number, name in enumerate(("cat", "dog")):
            write_images(root / split / name, [(20 + i, 30 - i) for i in range(count)], seed=number)
    return root
