"""The records of a run while it trains: metrics.csv, TensorBoard, curves.png and the terminal."""

import csv
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers import load_data, make_shallow, read_config, train_run, write_images
from models import build_model
from utils.data.augmentation import normalise
from utils.errors import UserError
from utils.records.run_folder import read_metrics


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    make_shallow(monkeypatch)


def test_the_files_of_a_run(tiny_flags, monkeypatch, tmp_path, capsys):
    _, rows = train_run(tiny_flags("--num_steps", 13), monkeypatch)
    folder = tmp_path / "output" / "run"
    names = {path.name.split(".")[0] for path in folder.iterdir()}
    checkpoints = {"last", "state-13", "last-12", "state-12", "best"}
    assert names == {*checkpoints, "metrics", "config", "curves", "events", ""}  # the last one is .lock
    assert list(rows[0]) == [
        *("step", "train_loss", "train_accuracy", "grad_norm", "test_loss", "test_accuracy", "test_top5_accuracy"),
        *("lr", "images_per_second", "seconds"),
    ]
    assert [row["step"] for row in rows] == [6, 12, 13]
    config = read_config(folder)
    assert config["flags"]["num_steps"] == 13
    assert config["versions"]["torch"] == torch.__version__
    assert config["classes"] == [str(digit) for digit in range(10)]
    model = build_model("ViT-Mini_4", img_size=8)
    model.load_state_dict(load_file(folder / "best.safetensors"))
    printed = capsys.readouterr().out
    assert "test accuracy" in printed
    assert ", best " in printed
    assert "top-5" not in printed  # of ten classes

    events = EventAccumulator(str(folder)).Reload()
    steps = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    tests = {"test/loss", "test/accuracy", "test/top5_accuracy"}
    assert all(steps[tag] == [6, 12, 13] for tag in tests)
    metrics = {"train/loss", "train/accuracy", "train/grad_norm"}
    assert all(steps[tag] == list(range(1, 14)) for tag in metrics)
    assert set(steps) == {*metrics, "train/lr", "train/images_per_second", *tests}


@pytest.fixture
def many_classes(tmp_path):
    """The folder of a data set of 12 classes with 3 training and 3 test images each."""
    for number in range(12):
        for split in ("train", "val"):
            write_images(tmp_path / "images" / split / f"class{number:02d}", [(8, 8)] * 3, seed=number)
    return tmp_path / "images"


def test_of_more_than_ten_classes_the_top5_accuracy_is_recorded_and_printed(
    many_classes, tiny_flags, monkeypatch, capsys
):
    flags = tiny_flags("--dataset", "imagefolder", "--data_dir", many_classes, "--learning_rate", 0.1)
    weights, rows = train_run(flags, monkeypatch)
    model = build_model("ViT-Mini_4", img_size=8, num_classes=12).eval()
    model.load_state_dict(weights)
    test_set = load_data("imagefolder", "test", many_classes)
    ranks = model(normalise(test_set.images)).argsort(dim=1, descending=True)
    top5 = np.mean([label in best for label, best in zip(test_set.labels.tolist(), ranks[:, :5].tolist(), strict=True)])
    assert rows[-1]["test_top5_accuracy"] == pytest.approx(top5)
    assert rows[-1]["test_accuracy"] < top5 < 1
    printed = capsys.readouterr().out
    assert re.search(rf"test loss [\d.]+ accuracy +[\d.]+ % top-5 +{100 * top5:.2f} %  lr", printed)
    assert re.search(rf"\ntest accuracy [\d.]+ %, top-5 {100 * top5:.2f} %, best ", printed)


def test_metrics_without_a_newer_column_are_read_and_continued(many_classes, tiny_flags, monkeypatch, tmp_path, capsys):
    """A run of an earlier version, which had no top-5 accuracy."""
    flags = tiny_flags("--dataset", "imagefolder", "--data_dir", many_classes)
    _, rows = train_run(flags, monkeypatch)
    path = tmp_path / "output" / "run" / "metrics.csv"
    with open(path, newline="") as file:
        older = [{name: row[name] for name in row if name != "test_top5_accuracy"} for row in csv.DictReader(file)]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(older[0]))
        writer.writeheader()
        writer.writerows(older)
    assert read_metrics(path.parent)["test_accuracy"] == [row["test_accuracy"] for row in rows]
    assert "test_top5_accuracy" not in read_metrics(path.parent)
    capsys.readouterr()
    train_run([*flags, "--resume"], monkeypatch)  # no step is left to do
    assert re.search(r"\ntest accuracy [\d.]+ %, best ", capsys.readouterr().out)
    _, resumed = train_run([*flags, "--resume", "--num_steps", 18], monkeypatch)
    assert np.isnan([row["test_top5_accuracy"] for row in resumed]).tolist() == [True, True, False]
    assert re.search(r"\ntest accuracy [\d.]+ %, top-5 [\d.]+ %, best ", capsys.readouterr().out)
    path.write_text(path.read_text().replace("train_loss", "loss"))
    with pytest.raises(UserError, match="needs numbers in the columns step, train_loss, "):
        read_metrics(path.parent)


def test_a_run_whose_name_has_dollar_signs_is_drawn(tiny_flags, monkeypatch, tmp_path):
    """Between two of them matplotlib would read a formula."""
    train_run(tiny_flags("--name", "$a_{$", "--num_steps", 1), monkeypatch, "$a_{$")
    assert (tmp_path / "output" / "$a_{$" / "curves.png").exists()


def test_resuming_a_finished_run_prints_its_results_again(tiny_flags, monkeypatch, capsys):
    train_run(tiny_flags("--num_steps", 2), monkeypatch)
    before = capsys.readouterr().out.splitlines()[-6:]
    assert before[0].startswith("test accuracy ")
    train_run(tiny_flags("--num_steps", 2, "--resume"), monkeypatch)
    assert capsys.readouterr().out.splitlines()[-6:] == before
