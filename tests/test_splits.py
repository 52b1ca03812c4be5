"""Dividing a data set into training, validation and test images, and exact copies between them."""

import shutil

import numpy as np
import pytest
from sklearn.model_selection import train_test_split

import evaluate
import train
from helpers import load_data, metrics, run_dir, write_images
from utils.data.datasets import (
    DATASETS,
    DataOptions,
    DataSource,
    LoadedSplits,
    Split,
    load_splits,
    read_split,
    training_splits,
)
from utils.data.duplicates import count_copies
from utils.data.splits import divide, divide_subjects
from utils.errors import UserError
from utils.parallel.processes import one_process
from utils.training import overlaps


@pytest.fixture
def numbers(monkeypatch):
    """`numbers(labels, ...)`: a data set in memory whose image i has i in all pixels, without splits of its own."""

    def register(labels, own=("train",)):
        def read(data_dir, split):
            images = np.arange(len(labels), dtype=np.uint8)[:, None, None, None].repeat(3, axis=1)
            return Split(images, labels, [f"class {label}" for label in range(max(labels) + 1)])

        monkeypatch.setitem(
            DATASETS, "numbers", DataSource(lambda data_dir: max(labels) + 1, read, lambda data_dir: own)
        )

    return register


def rows_of(split, **options):
    """The indices of the images in a split of `numbers`."""
    return read_split("numbers", split, DataOptions(**options), one_process()).images[:, 0, 0, 0].tolist()


def test_the_shares_are_stratified_disjoint_and_complete(numbers):
    labels = [0] * 120 + [1] * 60 + [2] * 20
    numbers(labels)
    options = {"val_split": 0.25, "test_split": 0.2, "split_seed": 3}
    parts = {split: rows_of(split, **options) for split in ("train", "val", "test")}
    assert sorted(sum(parts.values(), [])) == list(range(200))
    counts = {split: np.bincount(np.array(labels)[rows]).tolist() for split, rows in parts.items()}
    assert counts == {"train": [72, 36, 12], "val": [24, 12, 4], "test": [24, 12, 4]}
    assert all(rows == sorted(rows) for rows in parts.values())
    assert rows_of("val", **options) == parts["val"]
    assert rows_of("val", **{**options, "split_seed": 4}) != parts["val"]
    test = train_test_split(np.arange(200), test_size=0.2, stratify=labels, random_state=3)[1]
    assert parts["test"] == sorted(test)


def test_a_share_comes_from_the_training_images_only(numbers):
    numbers([0, 1] * 50, own=("train", "test"))
    assert len(rows_of("test", val_split=0.1)) == 100
    assert (len(rows_of("train", val_split=0.1)), len(rows_of("val", val_split=0.1))) == (90, 10)
    assert len(rows_of("train", val_split=0.1, examples_per_class=7)) == 14
    assert set(rows_of("train", val_split=0.1, examples_per_class=7)) < set(rows_of("train", val_split=0.1))
    assert len(rows_of("val", val_split=0.1, examples_per_class=2)) == 10


@pytest.mark.parametrize("share, count", [(0.1, 100), (0.15, 40), (0.4, 10), (0.8, 10), (0.5, 3)])
def test_subjects_stay_together_at_about_the_share_of_each_class(share, count):
    """Each subject has from one to four images, of either class."""
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(count), random.integers(1, 5, count))
    labels = random.integers(0, 2, len(groups))
    kept, taken = divide_subjects(labels, groups, share, 7, "--val_split")
    assert sorted([*kept, *taken]) == list(range(len(groups)))
    assert not set(groups[kept]) & set(groups[taken])
    assert abs(len(set(groups[taken])) - share * count) <= max(1, 0.3 * share * count)
    assert abs(len(taken) / len(groups) - share) < 0.2


@pytest.mark.parametrize(
    "labels, share, message",
    [
        ([0] * 9 + [1], 0.2, "--val_split can't divide class 'b', which has one image only; add images .*"),
        (
            [0] * 9 + [1] * 9,
            0.05,
            "--val_split 0.05 divides 18 images into 17 and 1, fewer than the 2 classes; give a share nearer to 0.5",
        ),
        (
            [0] * 9 + [1] * 9,
            0.95,
            "--val_split 0.95 divides 18 images into 0 and 18, fewer than the 2 classes; give a share nearer to 0.5",
        ),
    ],
)
def test_what_can_not_be_divided_is_an_error(labels, share, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        divide(np.array(labels), share, 0, "--val_split", ["a", "b"])


def test_subjects_that_can_not_be_divided_are_an_error():
    with pytest.raises(UserError, match="--val_split can't divide the images of a single subject; check the group of"):
        divide_subjects(np.array([0, 0, 1]), np.array([0, 0, 0]), 0.3, 0, "--val_split")
    with pytest.raises(UserError, match="0.1 can't divide 3 subjects; give a share nearer to one half"):
        divide_subjects(np.zeros(30, int), np.repeat(np.arange(3), 10), 0.1, 0, "--val_split")
    with pytest.raises(UserError, match="--val_split 0.05 can't divide the images of 20 subjects: "):
        divide_subjects(np.arange(20) % 5, np.arange(20), 0.05, 0, "--val_split")


def test_a_split_without_an_image_of_a_class_is_an_error(tmp_path):
    """The only subject of a class is on one side."""
    for name, count in (("cat", 12), ("dog", 2)):
        for number, path in enumerate(write_images(tmp_path / name, [(8, 8)] * count)):
            path.rename(path.with_name(f"{name}{number // 2}-{number % 2}.png"))
    options = DataOptions(tmp_path, val_split=0.3, group_by=r"^(\w+)-")
    with pytest.raises(UserError, match=r"--val_split 0.3 leaves no (training|validation) image of class 'dog'"):
        read_split("imagefolder", "train", options, one_process())


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"val_split": 0.1}, "images has validation images of its own; omit --val_split"),
        ({"test_split": 0.1, "group_by": "("}, r"--group_by '\(' is not a regular expression: "),
        ({"test_split": 0.1, "group_by": "a"}, "--group_by 'a' must have one group in parentheses, which names"),
        ({"group_by": "(a)"}, "--group_by needs --val_split or --test_split"),
        ({"test_split": 0.3, "group_by": "(x)"}, "--group_by '\\(x\\)' does not match the name of .*cat/000.png"),
    ],
)
def test_flags_that_do_not_suit_the_data_are_errors(flags, message, image_folder):
    with pytest.raises(UserError, match=message):
        load_splits("imagefolder", DataOptions(image_folder, **flags), one_process())


def test_only_files_have_subjects(numbers):
    numbers([0, 1] * 20)
    with pytest.raises(UserError, match="--group_by needs image files, whose names it reads"):
        rows_of("train", val_split=0.2, group_by="(.)")


def test_each_folder_is_what_its_name_says(image_folder):
    shutil.copytree(image_folder / "val", image_folder / "test")
    shutil.rmtree(image_folder / "test" / "cat")
    write_images(image_folder / "test" / "cat", [(9, 9)] * 3, seed=8)
    sizes = {split: len(load_data("imagefolder", split, image_folder)) for split in ("train", "val", "test")}
    assert sizes == {"train": 16, "val": 8, "test": 7}
    splits = load_splits("imagefolder", DataOptions(image_folder), one_process())
    assert (len(splits.train), len(splits.evaluation), len(splits.test)) == (16, 8, 7)
    assert splits.evaluated_on == "val"
    assert splits.copies == {("train", "val"): 8, ("train", "test"): 4, ("val", "test"): 4}


def test_one_folder_of_classes_is_divided(image_folder):
    folder = image_folder / "train"
    with pytest.raises(
        UserError, match="needs the folders train/ and val/ or test/, .* or divide its images by --val_"
    ):
        training_splits("imagefolder", DataOptions(folder))
    assert training_splits("imagefolder", DataOptions(folder, val_split=0.25)) == ["train", "val"]
    splits = load_splits("imagefolder", DataOptions(folder, val_split=0.25, test_split=0.25), one_process())
    assert (len(splits.train), len(splits.evaluation), len(splits.test)) == (9, 3, 4)
    with pytest.raises(UserError, match="imagefolder has no test images in "):
        load_data("imagefolder", "test", folder)


def test_copies_are_counted_by_pixels_and_by_bytes(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (10, 3, 4, 4), dtype=np.uint8)
    others = np.concatenate([images[2:4], images[3:4] ^ 1])
    assert count_copies({"train": images, "test": others}) == {("train", "test"): 2}
    assert count_copies({"train": others, "test": images}) == {("train", "test"): 2}
    assert count_copies({"train": images[:2], "test": others}) == {("train", "test"): 0}
    paths = [str(path) for path in write_images(tmp_path / "a", [(8, 8), (9, 9), (9, 9)])]
    copies = [str(path) for path in write_images(tmp_path / "b", [(8, 8), (9, 9), (9, 9)])]
    (tmp_path / "b" / "002.png").write_bytes(bytes((tmp_path / "b" / "002.png").stat().st_size))
    found = count_copies({"train": paths, "val": [*copies, str(tmp_path / "missing.png")], "test": paths[:1]})
    assert found == {("train", "val"): 2, ("train", "test"): 1, ("val", "test"): 1}


def test_overlaps_are_reported_in_the_singular_and_the_plural():
    copies = {("train", "val"): 1, ("train", "test"): 2, ("val", "test"): 0}
    subjects = {("train", "val"): 0, ("train", "test"): 3, ("val", "test"): 1}
    assert list(overlaps(LoadedSplits(None, None, None, "val", copies, subjects))) == [
        "warning: 1 of the validation images is an exact copy of a training image",
        "warning: 2 of the test images are exact copies of training images",
        "warning: 3 subjects have both training and test images",
        "warning: 1 subject has both validation and test images",
    ]


def test_subjects_that_the_data_sets_own_test_images_share_are_counted(tmp_path):
    for split, names in {"train": ["ann-1", "ann-2", "bob-1", "cid-1"], "test": ["bob-9", "dan-1", "other"]}.items():
        for name in names:
            (tmp_path / split / "cat").mkdir(parents=True, exist_ok=True)
            write_images(tmp_path, [(8, 8)], seed=len(name))[0].rename(tmp_path / split / "cat" / f"{name}.png")
    options = DataOptions(tmp_path, val_split=0.3, group_by=r"^([a-z]+)-")
    splits = load_splits("imagefolder", options, one_process())
    assert splits.shared_subjects["train", "val"] == 0
    assert splits.shared_subjects["train", "test"] + splits.shared_subjects["val", "test"] == 1  # bob


def test_a_changed_division_is_not_resumed(tiny_flags, run_main, capsys):
    flags = ["--num_steps", 4, "--eval_every", 2, "--val_split", 0.2]
    run_main(train, *tiny_flags(*flags))
    for started, changed in ((0, ["--split_seed", 1]), (0.2, ["--val_split", 0.3])):
        with pytest.raises(SystemExit):
            run_main(train, *tiny_flags(*flags, "--resume", *changed))
        message = f"the run was started with {changed[0]} {started}, so it can't be resumed with {changed[1]}\n"
        assert capsys.readouterr().err.endswith(message)


def test_a_folder_that_has_grown_is_not_resumed(image_folder, tiny_flags, run_main, capsys):
    """Another number of images gives another division, so test images would be trained on."""
    flags = ["--dataset", "imagefolder", "--data_dir", image_folder / "train", "--num_workers", 0]
    flags += ["--val_split", 0.25, "--test_split", 0.25, "--num_steps", 2, "--eval_every", 1]
    run_main(train, *tiny_flags(*flags))
    write_images(image_folder / "train" / "cat" / "new", [(8, 8)] * 4)
    with pytest.raises(SystemExit):
        run_main(train, *tiny_flags(*flags, "--resume", "--num_steps", 4))
    message = "was started with 9 training, 3 validation and 4 test images, now there are 11 training, 4 validation"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("share", [0.1, 0.15, 0.2, 0.3])
def test_few_subjects_are_divided_near_to_the_share(share):
    """Twenty subjects of ten images each, of two classes."""
    groups = np.repeat(np.arange(20), 10)
    _, taken = divide_subjects(groups % 2, groups, share, 0, "--val_split")
    assert abs(len(taken) / len(groups) - share) <= 0.05


def test_evaluate_divides_the_images_as_the_run_did(tiny_flags, run_main):
    flags = tiny_flags("--num_steps", 4, "--eval_every", 4, "--val_split", 0.2, "--split_seed", 5)
    run_main(train, *flags)
    path = run_dir(flags) / "last.safetensors"
    loss = float(metrics(flags)[-1]["val_loss"])
    text = run_main(evaluate, "--checkpoint", path, "--split", "val")
    assert "on digits: 288 validation images\n" in text
    assert f"loss {loss:.4f}" in text
    assert "on digits: 1149 training images\n" in run_main(evaluate, "--checkpoint", path, "--split", "train")
    assert "on digits: 360 test images\n" in run_main(evaluate, "--checkpoint", path)


def test_evaluate_uses_the_own_splits_of_another_folder(tmp_path, tiny_flags, run_main):
    """Those that it lacks are divided as in the run; --group_by is for a division only."""
    for split in ("all", "other/train", "other/test", "new/train", "new/val", "new/test"):
        for name in ("cat", "dog"):
            write_images(tmp_path / split / name, [(8, 8)] * 6)
    division = ("--val_split", 0.3, "--test_split", 0.4, "--group_by", "0*([0-9])")
    flags = tiny_flags("--num_steps", 1, "--dataset", "imagefolder", "--data_dir", tmp_path / "all", *division)
    run_main(train, *flags)
    command = ("--checkpoint", run_dir(flags) / "last.safetensors", "--data_dir")
    assert "12 test images" in run_main(evaluate, *command, tmp_path / "other")
    assert "4 validation images" in run_main(evaluate, *command, tmp_path / "other", "--split", "val")
    assert "12 validation images" in run_main(evaluate, *command, tmp_path / "new", "--split", "val")


def test_a_split_that_the_data_lack_can_not_be_evaluated(tiny_flags, run_main, main_fails):
    flags = tiny_flags("--num_steps", 1)
    run_main(train, *flags)
    path = run_dir(flags) / "last.safetensors"
    message = main_fails(evaluate, "--checkpoint", path, "--split", "val")
    assert "--split val: digits has train, test only" in message
