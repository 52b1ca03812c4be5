"""The most confident wrong predictions: which they are, the report of evaluate.py, and the images that are drawn."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from helpers import (
    CPU,
    DIGITS_RUN,
    ROOT,
    call_main,
    load_data,
    photograph,
    random_model,
    succeed,
    write_images,
    write_run,
)
from inference import SavedModel
from utils.curves import plot_mistakes
from utils.data.images import read_image
from utils.data.loading import TensorImages
from utils.evaluation import evaluate as evaluate_images
from utils.mistakes import count_mistakes, find_mistakes
from utils.parallel.precision import Precision
from utils.parallel.processes import one_process

NANO = ROOT / "checkpoint" / "ViT-Nano_4-digits.npz"
NAMES = [f"digit {digit}" for digit in range(10)]


class Ties(torch.nn.Module):
    """Three levels of confidence, so that most images have the confidence of many others."""

    def forward(self, images):
        predicted = ((images + 1) * 127.5).round().long().flatten(1).sum(dim=1) % 10
        return torch.nn.functional.one_hot(predicted, 10).float() * (1 + predicted[:, None] % 3)


def evaluated(model, data, batch_size):
    precision = Precision("O0", torch.float32, CPU)
    return evaluate_images(model, data, (8, 8), batch_size, precision, one_process(), per_class=True)


@torch.no_grad()
@pytest.mark.parametrize("make_model", [lambda: random_model("ViT-Mini_4", 8), Ties])
def test_mistakes_are_the_wrong_predictions_in_the_order_of_confidence_then_index(make_model):
    data, model = load_data("digits", "test"), make_model().eval()
    labels = data.labels
    for count, batch_size in ((24, 50), (360, 64)):
        # in batches as large, because rounding depends on their size and may decide the last digit
        batches = (data.images / 127.5 - 1).split(batch_size)
        probabilities = torch.cat([model(images) for images in batches]).softmax(dim=1)
        predicted = probabilities.argmax(dim=1)
        confidence = probabilities.amax(dim=1).numpy().astype(np.float64).round(4)
        expected = sorted((-confidence[i], i) for i in range(360) if predicted[i] != labels[i])
        assert len(expected) > 200
        found = find_mistakes(evaluated(model, data, batch_size), data, NAMES, one_process(), count)
        assert [mistake.index for mistake in found] == [i for _, i in expected[:count]]
        for mistake, (negative, i) in zip(found, expected, strict=False):
            assert mistake[1:4] == (None, NAMES[labels[i]], NAMES[predicted[i]])
            assert mistake.confidence == pytest.approx(-negative, abs=1e-12)


def test_images_in_memory_that_come_from_files_have_their_names(tmp_path):
    for name in ("a", "b"):
        write_images(tmp_path / name, [(6, 5)] * 3, seed=ord(name))
    data = load_data("imagefolder", "train", tmp_path)
    assert isinstance(data, TensorImages)
    assert [data.path_of(i) for i in range(6)] == [str(tmp_path / c / f"00{n}.png") for c in "ab" for n in range(3)]
    assert all(torch.equal(data.whole_image(i), read_image(data.path_of(i))) for i in range(6))
    assert load_data("digits", "test").path_of(3) is None


@pytest.fixture
def photographs(tmp_path):
    """A run with the classes cat and dog; a wide and a tall photograph, stored lying, in the folder of each.

    So exactly one of the two predictions for each photograph is wrong. The data set is `imagenet`, whose model sees the
    centre of an image only.
    """
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("cat", "dog"):
        folder = tmp_path / "data" / "train" / name
        folder.mkdir(parents=True)
        for file, shape in (("wide.png", (40, 90)), ("tall.png", (70, 30))):
            photograph(*shape).rotate(90, expand=True).save(folder / file, exif=exif)
    shutil.copytree(tmp_path / "data" / "train", tmp_path / "data" / "val")
    flags = {**DIGITS_RUN, "img_size": 8, "dataset": "imagenet", "data_dir": str(tmp_path / "data")}
    _, checkpoint = write_run(tmp_path / "run", flags)
    return "--checkpoint", checkpoint, "--num_workers", 0


def test_photographs_are_drawn_upright_and_whole(photographs, tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr("utils.curves.plot_mistakes", lambda *given: drawn.append(given) or plot_mistakes(*given))
    call_main(evaluate, [*photographs, "--mistakes", 5, "--json"], monkeypatch)
    found = json.loads(capsys.readouterr().out)
    [(images, captions, title)] = drawn
    assert {tuple(image.shape[1:]) for image in images} == {(40, 90), (70, 30)}
    for image, caption, row in zip(images, captions, found["mistakes"], strict=True):
        path = Path(row["path"])
        assert torch.equal(image, torch.from_numpy(np.array(photograph(*image.shape[1:]))).permute(2, 0, 1))
        assert path.stem == ("wide" if image.shape[2] > image.shape[1] else "tall")
        assert caption == (row["true_class"], row["predicted_class"], row["confidence"], path.name)
        assert path.parent == tmp_path / "data" / "val" / row["true_class"]
        assert row["true_class"] != row["predicted_class"]
    assert title == "run/best.safetensors on the validation images of imagenet: all 2 wrong predictions for 4 images"
    assert found["mistakes_figure"] == str(tmp_path / "run" / "mistakes.png")
    with Image.open(found["mistakes_figure"]) as figure:
        assert figure.width > 600


def test_the_report_as_text(photographs, tmp_path, monkeypatch, capsys):
    call_main(evaluate, [*photographs, "--mistakes", 1, "--mistakes_figure", tmp_path / "one.png"], monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("the 1 most confident of 2 wrong predictions for 4 images, true class -> prediction, confidence:")
    assert re.fullmatch(r"  (cat -> dog|dog -> cat)  +\d+\.\d\d %  .*/val/(cat|dog)/(tall|wide)\.png", lines[at + 1])
    assert lines[-1] == f"mistakes: {tmp_path / 'one.png'}"
    assert (tmp_path / "one.png").exists()
    assert not (tmp_path / "run" / "mistakes.png").exists()


def test_without_wrong_predictions_report_and_figure_say_so(photographs, tmp_path, monkeypatch, capsys):
    for path in (tmp_path / "data" / "val").rglob("*.png"):
        saved = SavedModel.load(photographs[1])
        with torch.no_grad():
            predicted = saved.classes[saved.model(saved.prepare(read_image(path))).argmax()]
        if predicted != path.parent.name:
            path.unlink()
    call_main(evaluate, [*photographs, "--mistakes", 24], monkeypatch)
    printed = capsys.readouterr().out
    assert "\nno wrong prediction for 2 images\n" in printed
    assert (tmp_path / "run" / "mistakes.png").exists()


def test_numbers_of_wrong_predictions():
    assert count_mistakes(24, 1 - 31 / 360, 360) == "the 24 most confident of 31 wrong predictions for 360 images"
    assert count_mistakes(31, 1 - 31 / 360, 360) == "all 31 wrong predictions for 360 images"
    assert count_mistakes(1, 359 / 360, 360) == "all 1 wrong prediction for 360 images"
    assert count_mistakes(0, 1.0, 360) == "no wrong prediction for 360 images"


def test_wrong_flags_are_errors(main_fails):
    command = ("--checkpoint", NANO, "--dataset", "digits")
    for flags, message in (
        (["--mistakes", 0], "0 is not a whole number above 0"),
        (["--mistakes", 121], "--mistakes 121 is more than the 120 images that fit in a figure"),
        (["--mistakes", 24, "cat.jpg"], "--mistakes is for a data set, whose classes are known; omit the image files"),
        (["--mistakes_figure", "x.png"], "--mistakes_figure needs --mistakes"),
        (["--mistakes", 24, "--mistakes_figure", "no/x.png"], "--mistakes_figure no/x.png can't be written"),
    ):
        assert message in main_fails(evaluate, *command, *flags)


@pytest.mark.parametrize("count", [0, 1, 7])
def test_each_image_has_a_square_of_one_size_with_its_caption(count):
    shapes = [(40, 90), (70, 30), (5, 5)]
    images = [torch.full((3, *shapes[i % 3]), i, dtype=torch.uint8) for i in range(count)]
    captions = [("$x^$", "a long name " * 9, 0.98765, f"{i}.jpg") for i in range(count)]
    figure = plot_mistakes(images, captions, "title $")
    figure.draw_without_rendering()
    assert len(figure.axes) == count
    boxes = {tuple(axes.get_window_extent().size.round()) for axes in figure.axes}
    assert len(boxes) == (count > 0)
    assert all(width == pytest.approx(height, abs=1) for width, height in boxes)
    for i, axes in enumerate(figure.axes):
        (height, width), side = shapes[i % 3], max(shapes[i % 3])
        assert axes.images[0].get_extent() == [-width / 2, width / 2, height / 2, -height / 2]
        assert (*axes.get_xlim(), *axes.get_ylim()) == (-side / 2, side / 2, side / 2, -side / 2)
        text = axes.get_title(loc="left").replace("\n", " ")
        assert text.startswith("true: \\$x^\\$ predicted: a long name a long name")
        assert text.endswith("... 98.77 %")
        assert axes.get_xlabel() == f"{i}.jpg"
    if count == 7:  # two rows, whose captions of several lines do not overlap
        upper, lower = (figure.axes[i].get_tightbbox() for i in (0, 6))
        assert upper.y0 > lower.y1


@pytest.mark.slow
def test_two_processes_find_the_mistakes_of_one(image_folder, tmp_path):
    """With an image that is skipped, so that the batches are not of consecutive images."""
    flags = {**DIGITS_RUN, "img_size": 8, "dataset": "imagefolder", "data_dir": str(image_folder)}
    _, checkpoint = write_run(tmp_path / "run", flags)
    (image_folder / "train" / "cat" / "001.png").write_bytes(b"not an image")
    command = ("evaluate.py", "--checkpoint", checkpoint, "--split", "train", "--skip_broken", "--num_workers", 1)
    command = (*command, "--mistakes", 5, "--json")
    alone, together = (
        json.loads(succeed(*command, "--eval_batch_size", size, processes=processes))
        for processes, size in ((1, 64), (2, 3))
    )
    assert alone["images"] == together["images"] == 15
    assert len(alone["mistakes"]) == 5
    assert together["mistakes"] == alone["mistakes"]
    model = SavedModel.load(checkpoint)
    for row in alone["mistakes"]:
        with torch.no_grad():
            probabilities = model.model(model.prepare(read_image(row["path"]))).softmax(dim=1)[0]
        assert probabilities[model.classes.index(row["predicted_class"])] == pytest.approx(row["confidence"], abs=0.02)
        assert Path(row["path"]).parent.name == row["true_class"]
