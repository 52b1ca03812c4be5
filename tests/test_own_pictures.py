"""docs/your-own-pictures.md: its commands, run in order on a small folder of photographs, and what it says of them.

The commands are those of the page, word by word. Around them the models are small, Google's server is a local one, and
recipes are short.
"""

import functools
import http.server
import importlib
import re
import shlex
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import utils.pretrained
from helpers import ROOT, call_main, photograph
from models import build_model
from models.configs import VITS
from synthetic import make_checkpoint
from test_docs import commands_of, lines_of
from utils import checks
from utils.errors import run_script

PAGE = ROOT / "docs" / "your-own-pictures.md"
CLASSES = ("airplane", "automobile", "frog", "horse")
SMALL = {"hidden_size": 16, "mlp_dim": 32, "num_heads": 2, "num_layers": 2}
PER_CLASS = 14


def write_photographs(folder):
    """JPEG files as of a phone, 14 per class: large and small, tall and wide, many of them stored lying."""
    whole, exif = photograph(300, 400), Image.Exif()
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(PER_CLASS):
            exif[0x0112] = 1 + (i + number) % 8
            picture = whole.crop((10 * i, 20 * number, 180 + 10 * i, 120 + 12 * i))
            picture.save(folder / name / f"IMG_{i:04d}.{'JPG' if i % 2 else 'jpg'}", exif=exif)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server with Google's addresses of the page's two files, which are those of small models with random weights."""
    for model_type, path in (
        ("ViT-B_16", "vit_models/imagenet21k/ViT-B_16.npz"),
        ("ViT-S_16", "vit_models/augreg/S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0.npz"),
    ):
        for field, value in SMALL.items():
            monkeypatch.setitem(VITS[model_type], field, value)
        model = build_model(model_type, 224, num_classes=21)
        file = tmp_path / "server" / path
        file.parent.mkdir(parents=True)
        np.savez(file, **make_checkpoint({key: array.shape for key, array in model.export_npz().items()}))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    handler = functools.partial(Handler, directory=tmp_path / "server")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{running.server_port}"
        local = functools.partial(utils.pretrained.published_url, storage=address)
        for module in (utils.pretrained, checks):
            monkeypatch.setattr(module, "published_url", local)
        yield
        running.shutdown()


def blocks(language):
    """The lines of the page in code blocks of a language."""
    found, current = [], None
    for _, line, kind in lines_of(PAGE):
        if kind == "fence":
            current = line.removeprefix("```").strip()
        elif kind == "code" and current == language:
            found.append(line)
    return found


def shape_of(line):
    """A line of output without its numbers and class names, and with single spaces."""
    line = re.sub("|".join(CLASSES), "CLASS", line)
    return " ".join(re.sub(r"\d+(\.\d+)?", "#", line).split())


def test_every_shell_line_of_the_page_is_a_command_of_the_project():
    """So none is missing in the test below."""
    lines = " ".join(line.removesuffix("\\") for line in blocks("shell"))
    commands = list(commands_of(PAGE))
    assert shlex.split(lines) == [word for _, script, words in commands for word in ("python", script, *words)]
    assert [script for _, script, _ in commands] == [
        *("train.py", "train.py", *["evaluate.py"] * 4, "visualize.py", "train.py")
    ]


@pytest.mark.slow
def test_the_commands_of_the_page_work_in_order(server, tmp_path, monkeypatch, capsys):
    place = tmp_path / "place"
    write_photographs(place / "photos")
    photograph(90, 160).save(place / "new.jpg")
    for path in (
        place / "holidays" / "sea" / "1.jpg",
        place / "holidays" / "2.jpg",
        place / "archive" / "old" / "3.jpg",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(90, 160).save(path)
    monkeypatch.chdir(place)
    monkeypatch.setattr("utils.recipes.MAX_PASSES", 6)
    printed = ""
    for _, script, words in commands_of(PAGE):
        call_main(importlib.import_module(script.removesuffix(".py")), words, monkeypatch)
        output = capsys.readouterr()
        printed += output.out
        if script == "evaluate.py" and "--mistakes" in words:
            assert " wrong prediction" in output.out
    text = PAGE.read_text(encoding="utf-8")
    assert len((place / "holidays.csv").read_text().splitlines()) == 3
    named = set(re.findall(r"`(output/[\w./-]+)`", text))
    assert len(named) >= 9
    assert [path for path in sorted(named) if not (place / path).exists()] == []
    assert len(list((place / "output/photos/pictures").glob("*.png"))) == 2
    assert not (place / "output/photos-final/best.safetensors").exists()
    assert printed.count("39 training, 8 validation and 9 test images, 4 classes") == 2
    assert "47 training and 9 test images, 4 classes" in printed
    shapes = {shape_of(line) for line in printed.splitlines()}
    documented = [line for line in blocks("text") if not re.match(r"\s*\w+/", line)]
    assert len(documented) > 10
    assert [line for line in documented if shape_of(line) not in shapes] == []


def test_memory_that_does_not_suffice_is_an_error_of_one_line(monkeypatch, capsys):
    """Which the page quotes."""
    message = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 4.00 GiB. If reserved but"

    def fail():
        raise torch.OutOfMemoryError(message)

    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setenv("RANK", "1")  # whichever process fails prints it
    with pytest.raises(SystemExit) as stopped:
        run_script(fail)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith(
        "train.py: process 1: error: CUDA out of memory. Tried to allocate 2.00 GiB; less is needed"
    )
    assert error.count("\n") == 1
    assert "--gradient_accumulation_steps" in error
