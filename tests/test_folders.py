"""Image folders: how their files are listed, and an error for each mistake in their layout."""

import json
import os
import shutil

import pytest

import evaluate
import train
from helpers import CPU, call_main, load_data, write_images, write_jpegs
from utils.data.datasets import DataOptions, load_splits
from utils.data.folders import list_folder
from utils.data.loading import FolderImages, TensorImages
from utils.errors import UserError
from utils.parallel.processes import Processes, one_process


def load_for_training(name, root):
    """All splits of a data set in a folder, as a single process loads them."""
    return load_splits(name, DataOptions(root, num_workers=0), one_process())


def test_a_folder_is_listed_by_class_without_reading_the_files(image_folder):
    for path in image_folder.rglob("*.png"):
        path.write_bytes(b"")
    paths, labels, classes, note = list_folder(image_folder, "train")
    assert note == ""
    assert classes == ["cat", "dog"]
    assert labels == [0] * 8 + [1] * 8
    names = [os.path.relpath(path, image_folder) for path in paths]
    assert names == [f"train/{name}/{i:03d}.png" for name in ("cat", "dog") for i in range(8)]


def test_a_test_set_may_lack_a_class(image_folder):
    shutil.rmtree(image_folder / "val" / "cat")
    _, labels, classes, _ = list_folder(image_folder, "val")
    assert (classes, labels) == (["cat", "dog"], [1] * 4)


def test_hidden_files_are_ignored_and_large_images_stay_files(tmp_path):
    write_images(tmp_path / "train" / "one", [(300, 300)] * 2)
    write_images(tmp_path / "val" / "one", [(8, 8)] * 2)
    (tmp_path / "train" / "one" / "._000.png").write_bytes(b"written by macOS")
    (tmp_path / "train" / "__MACOSX").mkdir()
    train, test = (load_data("imagefolder", split, tmp_path) for split in ("train", "val"))
    assert isinstance(train, FolderImages)
    assert isinstance(test, TensorImages)
    assert (len(train), train.classes) == (2, ["one"])


def add_ignored_files(root):
    """Files next to the images of `image_folder` that are not read, and some that nobody misses."""
    for name in ("train/cat/a.heic", "train/dog/b.HEIC", "train/dog/sub/notes.txt", "train/labels.csv", "val/dog/c"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    for name in ("train/.DS_Store", "train/cat/Thumbs.db", "val/cat/.hidden.txt"):
        (root / name).touch()


def test_files_that_are_ignored_are_counted_in_one_line_per_split(image_folder, capsys):
    add_ignored_files(image_folder)
    lines = {
        "train": "train: 16 images; files ignored: 4 (2 .heic, 1 outside the class folders, 1 .txt); convert HEIC to "
        "JPEG, e.g. with `magick mogrify -format jpg *.heic`",
        "val": "val: 8 images; files ignored: 1 (1 without suffix)",
    }
    for split, line in lines.items():
        load_data("imagefolder", split, image_folder)
        printed = capsys.readouterr()
        assert printed.err == f"{image_folder}/{line}\n"
        assert printed.out == ""
        load_data("imagefolder", split, image_folder, Processes(1, 2, 1, CPU), num_workers=0)
        assert capsys.readouterr().err == ""


def test_training_and_evaluation_report_ignored_files_outside_their_results(
    image_folder, tiny_flags, tmp_path, monkeypatch, capsys
):
    add_ignored_files(image_folder)
    data = ["--dataset", "imagefolder", "--data_dir", image_folder, "--num_workers", 0, "--num_steps", 1]
    call_main(train, tiny_flags(*data, "--eval_every", 1), monkeypatch)
    assert capsys.readouterr().err.count("; files ignored: ") == 2
    call_main(train, tiny_flags(*data, "--mode", "eval"), monkeypatch)
    assert "/val: 8 images; files ignored: 1 (" in capsys.readouterr().err
    call_main(evaluate, ["--checkpoint", tmp_path / "output" / "run" / "best.safetensors", "--json"], monkeypatch)
    printed = capsys.readouterr()
    assert json.loads(printed.out)["images"] == 8
    assert "/val: 8 images; files ignored: 1 (1 without suffix)\n" in printed.err


def test_links_to_classes_and_to_folders_of_images_are_followed(image_folder, tmp_path):
    extra = write_images(tmp_path / "elsewhere", [(8, 8)] * 3)
    (image_folder / "train" / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    (image_folder / "train" / "emu").symlink_to(tmp_path / "elsewhere")
    (image_folder / "train" / "dog" / "loop").symlink_to(image_folder / "train")
    paths, labels, classes, _ = list_folder(image_folder, "train")
    assert classes == ["cat", "dog", "emu"]
    assert labels == [0] * 11 + [1] * 8 + [2] * 3
    assert [os.path.realpath(path) for path in paths[8:11]] == [str(path) for path in extra]


def with_fault(root, fault):
    if fault == "no folder":
        return root / "nowhere", "nowhere is not a folder"
    if fault == "no train":
        (root / "train").rename(root / "training")
        return root, "needs the folders train/ and val/ or test/"
    if fault == "no test":
        (root / "val").rename(root / "validation")
        return root, "needs the folders train/ and val/ or test/"
    if fault == "no classes":
        for name in ("cat", "dog"):
            (root / "train" / name).rename(root / name)
        return root, "train has no folders"
    if fault == "empty class":
        (root / "train" / "emu").mkdir()
        return root, "emu has no images"
    if fault == "unknown class":
        write_images(root / "val" / "fox", [(8, 8)])
        return root, "val/fox is a class that .*train does not have"
    path = root / "train" / "cat" / "000.png"
    if fault == "truncated image":
        path.write_bytes(path.read_bytes()[:200])
    if fault == "not an image":
        path.write_text("hello")
    return root, "train/cat/000.png is not a readable image"


FAULTS = [
    "no folder",
    "no train",
    "no test",
    "no classes",
    "empty class",
    "unknown class",
    "truncated image",
    "not an image",
]


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_a_folder_is_named_in_the_error(fault, image_folder):
    root, message = with_fault(image_folder, fault)
    with pytest.raises(UserError, match=message):
        load_for_training("imagefolder", root)


def test_imagenets_archives_and_loose_files_get_instructions(image_folder):
    """Validation images without class folders, and the archives of the training classes."""
    shutil.rmtree(image_folder / "val")
    write_jpegs(image_folder / "val", 2)
    message = "val has no folders; it needs one folder per class, but its 2 files are not in folders; move those"
    with pytest.raises(UserError, match=f"{message} .* into a folder with its name$"):
        load_for_training("imagenet", image_folder)
    (image_folder / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(b"")
    with pytest.raises(UserError, match="run valprep.sh of"):
        load_for_training("imagenet", image_folder)
    shutil.rmtree(image_folder / "train")
    (image_folder / "train").mkdir()
    (image_folder / "train" / "n01440764.tar").write_bytes(b"")
    with pytest.raises(UserError, match="train has no folders; .* holds 1 archives; unpack each into a folder of its"):
        load_data("imagenet", "train", image_folder)
