"""The classes and features of image files: evaluate.py with files, folders and patterns, and SavedModel.predict."""

import csv
import json
import os
import sys

import numpy as np
import pytest
import torch
from timm.data import ImageNetInfo

import evaluate
from helpers import DIGITS_RUN, call_main, fails, load_data, random_model, succeed, write_jpegs, write_run
from inference import SavedModel
from utils.class_names import class_names
from utils.data.images import images_of, read_image
from utils.errors import UserError

CLASSES = [f"kind {number}" for number in range(7)]


@pytest.fixture
def checkpoint(tmp_path):
    """A run on ImageNet's crops with seven classes, random."""
    flags = {**DIGITS_RUN, "dataset": "imagenet", "mean_std": "imagenet"}
    return write_run(tmp_path / "run", flags, CLASSES)[1]


@pytest.fixture
def photos(tmp_path):
    """A folder with two pictures, three in cats/ and two in cats/young/, one of them damaged, and a text file."""
    folder = tmp_path / "photos"
    for place, count in ((folder, 2), (folder / "cats", 3), (folder / "cats" / "young", 2)):
        write_jpegs(place, count, ".jpg")
    (folder / "cats" / "young" / "000.jpg").write_bytes(b"not an image")
    (folder / "notes.txt").write_text("in the zoo")
    return folder


def names(folder, *paths):
    return [str(folder / path) for path in paths]


def one_by_one(saved, path):
    """(names, probabilities) of the five best classes, from a forward pass of the image alone."""
    with torch.no_grad():
        best = saved.model(saved.prepare(read_image(path))).softmax(dim=1)[0].topk(5)
    return [CLASSES[number] for number in best.indices.tolist()], best.values.tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_predict_equals_a_loop_over_single_images(workers, checkpoint, photos, capsys):
    saved = SavedModel.load(checkpoint)
    found = saved.predict(photos, batch_size=2, num_workers=workers)
    damaged = "cats/young/000.jpg"
    expected = ["000.jpg", "001.jpg", "cats/000.jpg", "cats/001.jpg", "cats/002.jpg", damaged, "cats/young/001.jpg"]
    assert [item["image"] for item in found] == names(photos, *expected)
    assert [item["image"] for item in found if "error" in item] == names(photos, damaged)
    for item in found:
        if item["image"] != str(photos / damaged):
            classes, probabilities = one_by_one(saved, item["image"])
            assert [best["class"] for best in item["classes"]] == classes
            assert [best["probability"] for best in item["classes"]] == pytest.approx(probabilities, abs=1e-6)
    assert found[5]["classes"] == []
    assert found[5]["error"] == f"{photos / damaged} is not a readable image: its format is unknown"
    assert capsys.readouterr().err.splitlines() == [
        f"{photos}: 7 images; files ignored: 1 (1 .txt)",
        f"skipped: {found[5]['error']}",
    ]


def test_predict_takes_a_path_or_several_and_keeps_their_order(checkpoint, photos):
    saved = SavedModel.load(checkpoint)
    one, other = photos / "001.jpg", photos / "cats" / "002.jpg"
    [first] = saved.predict(one)
    several = saved.predict([other, str(one), other])
    assert [item["image"] for item in several] == [str(other), str(one), str(other)]
    assert several[0] == several[2] != first
    assert several[1]["classes"][0]["probability"] == pytest.approx(first["classes"][0]["probability"], abs=1e-6)
    assert saved.predict([]) == []


def test_files_folders_and_patterns_name_images(photos, tmp_path, monkeypatch):
    assert images_of([photos / "cats"]) == names(photos / "cats", "000.jpg", "001.jpg", "002.jpg", *young())
    assert images_of([f"{photos}/*.jpg"]) == names(photos, "000.jpg", "001.jpg")
    assert images_of([f"{photos}/cat*"]) == images_of([photos / "cats"])
    assert images_of([f"{photos}/**/00[1-9].jpg"]) == names(
        photos, "001.jpg", "cats/001.jpg", "cats/002.jpg", "cats/young/001.jpg"
    )
    assert images_of([f"{photos}/**"]) == sorted([*map(str, photos.rglob("*.jpg")), str(photos / "notes.txt")])
    assert images_of([photos / "001.jpg", f"{photos}/00*.jpg"]) == names(photos, "001.jpg", "000.jpg", "001.jpg")
    (photos / "a[1].jpg").write_bytes((photos / "000.jpg").read_bytes())
    assert images_of([photos / "a[1].jpg"]) == names(photos, "a[1].jpg")
    monkeypatch.chdir(photos)
    assert images_of(["cats/0*.jpg"]) == [os.path.join("cats", name) for name in ("000.jpg", "001.jpg", "002.jpg")]


def young():
    return os.path.join("young", "000.jpg"), os.path.join("young", "001.jpg")


def test_names_without_an_image_are_errors(photos, tmp_path):
    (tmp_path / "empty").mkdir()
    (photos / "broken.jpg").symlink_to(tmp_path / "nowhere.jpg")
    for name, message in (
        ("nothing.png", "nothing.png does not exist"),
        (f"{photos}/*.gif", r"no file matches .*/\*.gif"),
        (f"{photos}/brok*", r"no file matches .*/brok\*"),
        (photos / "broken.jpg", "broken.jpg does not exist"),
        (tmp_path / "empty", "empty has no images"),
    ):
        with pytest.raises(UserError, match=message):
            images_of([name])


def test_the_classes_of_a_folder_are_written_as_csv_and_json(checkpoint, photos, tmp_path, monkeypatch, capsys):
    command = ["--checkpoint", checkpoint, photos, "--eval_batch_size", 3, "--num_workers", 1]
    path = tmp_path / "classes.csv"
    call_main(evaluate, [*command, "--csv", path], monkeypatch)
    printed = capsys.readouterr()
    assert printed.out == f"{path}: the classes of 7 images\n"
    assert printed.err.endswith("1 of the 7 images could not be read, named above\n")
    call_main(evaluate, [*command, "--json"], monkeypatch)
    report = json.loads(capsys.readouterr().out)
    expected = SavedModel.load(checkpoint).predict(photos)
    assert [item["image"] for item in report] == [item["image"] for item in expected]
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row, item, other in zip(rows, report, expected, strict=True):
        assert (row["image"], row["error"]) == (item["image"], item.get("error", ""))
        for rank, best in enumerate(item["classes"], start=1):
            assert (row[f"class_{rank}"], row[f"probability_{rank}"]) == (best["class"], str(best["probability"]))
            assert best["class"] == other["classes"][rank - 1]["class"]
            assert best["probability"] == pytest.approx(other["classes"][rank - 1]["probability"], abs=1e-6)
    assert (rows[5]["class_1"], rows[5]["probability_5"]) == ("", "")


def test_the_text_names_what_can_not_be_read(checkpoint, photos, monkeypatch, capsys):
    files = [photos / "000.jpg", *(photos / "cats" / name for name in young())]
    call_main(evaluate, ["--checkpoint", checkpoint, *files], monkeypatch)
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert len(lines) == 2 * 6 + 1
    assert (lines[0], lines[7]) == (str(files[0]), str(files[2]))
    assert lines[6] == f"{files[1]} is not a readable image: its format is unknown"
    assert printed.err.splitlines() == [f"skipped: {lines[6]}", "1 of the 3 images could not be read, named above"]


def test_a_single_unreadable_image_and_a_folder_without_readable_ones_are_errors(
    checkpoint, photos, monkeypatch, capsys
):
    damaged = photos / "cats" / "young" / "000.jpg"
    error = fails(evaluate, ["--checkpoint", checkpoint, damaged], monkeypatch, capsys)
    assert error == f"evaluate.py: error: {damaged} is not a readable image: its format is unknown\n"
    (photos / "cats" / "young" / "001.jpg").write_bytes(b"neither")
    for paths in (damaged.parent, [damaged, damaged]):
        with pytest.raises(UserError, match="none of the 2 images can be read"):
            SavedModel.load(checkpoint).predict(paths)


def test_wrong_flags_are_errors_before_the_checkpoint_is_read(photos, tmp_path, monkeypatch, capsys):
    command = ["--checkpoint", "nothing.safetensors"]
    for flags, message in (
        ([photos, "--csv", "no/x.csv"], "--csv no/x.csv can't be written; give a .csv file in a folder that exists"),
        ([photos, "--csv", tmp_path / "x.txt"], "x.txt can't be written; give a .csv file"),
        (["--csv", tmp_path / "x.csv"], "--csv is for the classes of image files; name them"),
        ([photos, "--csv", "x.csv", "--features", "x.npz"], "--csv and --features exclude each other"),
        ([photos, "--features", tmp_path / "x.npy"], "x.npy can't be written; give a .npz file"),
        (["--mistakes", 3, "--features", tmp_path / "x.npz"], "--mistakes needs the evaluation"),
        ([photos, "nothing.png"], "nothing.png does not exist"),
        (["*.nothing"], "no file matches *.nothing"),
    ):
        (photos / "notes.txt").unlink(missing_ok=True)  # without a line on ignored files
        assert message in fails(evaluate, [*command, *flags], monkeypatch, capsys)


def test_the_features_of_a_data_set_give_its_logits(tmp_path, monkeypatch, capsys):
    """The head is linear, so its weights times the features are the logits of a direct forward pass."""
    model = random_model("ViT-Mini_4", 8, 3)  # another number of classes than the data set
    np.savez(tmp_path / "ViT-Mini_4.npz", **model.export_npz())
    path = tmp_path / "features.npz"
    flags = ["--checkpoint", tmp_path / "ViT-Mini_4.npz", "--dataset", "digits", "--features", path]
    call_main(evaluate, [*flags, "--eval_batch_size", 100], monkeypatch)
    assert capsys.readouterr().out == f"{path}: 360 x 128 features of the test images of digits\n"
    found, digits = np.load(path), load_data("digits", "test")
    assert found["features"].dtype == np.float32
    with torch.no_grad():
        logits = model(digits.images / 127.5 - 1)
        torch.testing.assert_close(model.head(torch.from_numpy(found["features"])), logits, rtol=1e-4, atol=1e-5)
    assert found["labels"].tolist() == digits.labels.tolist()
    assert found["classes"].tolist() == list(map(str, range(10)))
    assert found["files"].tolist() == [""] * 360


def test_the_features_of_a_folder_have_its_files_and_folders(checkpoint, photos, tmp_path, monkeypatch, capsys):
    path = tmp_path / "features.npz"
    flags = ["--checkpoint", checkpoint, photos, "--eval_batch_size", 2, "--num_workers", 1, "--features", path]
    call_main(evaluate, [*flags, "--json"], monkeypatch)
    report = json.loads(capsys.readouterr().out)
    assert {name: report[name] for name in ("images", "skipped", "dimension")} == {
        "images": 6,
        "skipped": 1,
        "dimension": 128,
    }
    found, saved = np.load(path), SavedModel.load(checkpoint)
    assert found["files"].tolist() == [str(file) for file in images_of([photos]) if "young/000" not in file]
    assert found["classes"].tolist() == ["cats", "photos", "young"]
    assert found["labels"].tolist() == [1, 1, 0, 0, 0, 2]
    inputs = []
    saved.model.head.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    with torch.no_grad():
        for file in found["files"]:
            saved.model(saved.prepare(read_image(file)))
    torch.testing.assert_close(torch.from_numpy(found["features"]), torch.cat(inputs), rtol=1e-5, atol=1e-5)


def test_imagenet_21k_has_the_names_of_timm_or_numbers_and_a_hint(monkeypatch, capsys):
    names, info = class_names(21843), ImageNetInfo("imagenet-21k-goog")
    assert names == [info.index_to_description(number) for number in range(21843)]
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(sys.modules, "timm.data", None)
    numbers = class_names(21843)
    assert (numbers[0], numbers[21842], len(numbers)) == ("class 0", "class 21842", 21843)
    assert "pip install timm" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_classify_a_folder_as_one(checkpoint, photos, tmp_path):
    one, two = (tmp_path / f"{count}.csv" for count in (1, 2))
    command = ["evaluate.py", "--checkpoint", checkpoint, photos, "--eval_batch_size", 2]
    succeed(*command, "--csv", one)
    assert succeed(*command, "--csv", two, processes=2) == f"{two}: the classes of 7 images\n"
    for row, other in zip(*(csv.DictReader(open(path)) for path in (one, two)), strict=True):  # noqa: SIM115
        for name, value in row.items():
            if name.startswith("probability") and value:
                assert float(other[name]) == pytest.approx(float(value), abs=1e-6)
            else:
                assert other[name] == value
