"""--classes: a part of a data set's classes in training, evaluation, few-shot accuracy and a saved model."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch

import evaluate
import train
from helpers import ROOT, call_main, load_data, make_shallow, metrics, read_config, run_dir
from inference import SavedModel
from utils.data.datasets import DataOptions, load_splits
from utils.errors import UserError
from utils.parallel.processes import one_process

sys.path.insert(0, str(ROOT / "scripts"))
import few_shot


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_images_of_some_classes_are_those_of_all_without_the_others(split):
    whole, part = load_data("digits", split), load_data("digits", split, classes=("7", "2", "5"))
    rows = torch.isin(whole.labels, torch.tensor([2, 5, 7]))
    assert part.classes == ["2", "5", "7"]  # in the order of the data set
    assert torch.equal(part.images, whole.images[rows])
    assert [part.classes[label] for label in part.labels] == [whole.classes[label] for label in whole.labels[rows]]


def test_shares_and_counts_refer_to_the_classes_that_remain():
    options = DataOptions(classes=("3", "8"), val_split=0.25, examples_per_class=4)
    splits = load_splits("digits", options, one_process())
    count = len(load_data("digits", "train", classes=("3", "8")))
    assert splits.counts() == {"train": 8, "val": -(-count // 4), "test": len(splits.test)}
    assert all(np.bincount(part.labels).min() > 3 for part in (splits.train, splits.evaluation, splits.test))


def test_folders_of_some_classes(image_folder):
    shutil.copytree(image_folder / "train" / "cat", image_folder / "train" / "ant")
    found = load_data("imagefolder", "train", image_folder, classes=("dog", "ant"))
    assert (found.classes, found.labels.tolist()) == (["ant", "dog"], [0] * 8 + [1] * 8)
    assert {path.split("/")[-2] for path in map(found.path_of, range(len(found)))} == {"ant", "dog"}
    with pytest.raises(UserError, match="--classes: there is no validation image of ant"):
        load_data("imagefolder", "val", image_folder, classes=("ant",))


@pytest.mark.parametrize(
    "classes, message",
    [
        (["Cats", "dog"], "has no class 'Cats'; did you mean cat?"),
        (["zebra"], "has no class 'zebra'; it has cat, dog"),
        (["cat", "dog", "cat"], "--classes: 'cat' is given 2 times"),
    ],
)
def test_unknown_classes_of_a_folder_are_errors_before_the_run(
    classes, message, image_folder, tiny_flags, main_fails, tmp_path
):
    flags = tiny_flags("--dataset", "imagefolder", "--data_dir", image_folder, "--classes", *classes)
    assert message in main_fails(train, *flags)
    assert not (tmp_path / "output").exists()


def test_unknown_classes_of_a_data_set(tiny_flags, main_fails):
    message = main_fails(train, *tiny_flags("--classes", "seven"))
    assert "--classes: digits has no class 'seven'; it has 0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in message


@pytest.fixture
def run_of_three(tiny_flags, run_main, monkeypatch):
    """The flags of a finished run on three digits."""
    make_shallow(monkeypatch)
    flags = tiny_flags("--classes", "9", "1", "4", "--num_steps", 2)
    assert "3 classes" in run_main(train, *flags)
    return flags


def test_a_run_records_its_classes_and_is_evaluated_on_them(run_of_three, run_main, main_fails):
    config = read_config(run_dir(run_of_three))
    assert (config["classes"], config["flags"]["classes"]) == (["1", "4", "9"], ["9", "1", "4"])
    path = run_dir(run_of_three) / "last.safetensors"
    assert SavedModel.load(path).classes == ["1", "4", "9"]
    report = json.loads(run_main(evaluate, "--checkpoint", path, "--json"))
    assert report["images"] == len(load_data("digits", "test", classes=("1", "4", "9")))
    assert report["top1_accuracy"] == pytest.approx(float(metrics(run_of_three)[-1]["test_accuracy"]))
    assert list(report["per_class"]) == ["1", "4", "9"]
    assert f"{report['images']} test images" in run_main(train, *run_of_three, "--mode", "eval")
    message = main_fails(evaluate, "--checkpoint", path, "--classes", "1", "4", "8")
    assert "was trained on other classes: it has '9' where digits has '8'" in message
    assert "has 3 classes (1, 4, 9), digits has 2" in main_fails(evaluate, "--checkpoint", path, "--classes", "1", "4")


def test_a_run_is_resumed_with_the_same_classes_only(run_of_three, run_main, monkeypatch, capsys):
    assert "has finished" in run_main(train, *run_of_three, "--resume")
    with pytest.raises(SystemExit) as stopped:
        call_main(train, [*run_of_three, "--resume", "--classes", "1", "4", "8"], monkeypatch)
    assert stopped.value.code == 2
    message = "was started with --classes ['9', '1', '4'], so it can't be resumed with ['1', '4', '8']"
    assert message in capsys.readouterr().err


def test_few_shot_accuracy_on_other_classes_than_those_of_the_training(run_of_three, run_main, tmp_path):
    path = run_dir(run_of_three) / "last.safetensors"
    flags = ["--checkpoint", path, "--dataset", "digits", "--shots", 5, "--output_dir", tmp_path / "shots"]
    text = run_main(few_shot, *flags, "--classes", "0", "2")
    assert f"{len(load_data('digits', 'test', classes=('0', '2')))} test images" in text
