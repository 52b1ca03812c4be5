"""Data sets: what they hold, the order they come in, and the errors for broken ones."""

import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from helpers import load_data, write_pictures
from utils.data.augmentation import Augmentation
from utils.data.datasets import DATASETS, DataOptions
from utils.data.images import read_image, stretch
from utils.data.loading import FolderImages, TensorImages
from utils.data.stream import stream_positions
from utils.errors import UserError
from utils.parallel.processes import Processes, one_process

CPU = torch.device("cpu")


def load_both(name, data_dir):
    return [load_data(name, split, data_dir) for split in ("train", "test")]


def test_digits_are_split_once_and_for_all():
    train, test = load_both("digits", "data")
    assert (len(train), len(test)) == (1437, 360)
    counts = torch.bincount(test.labels)
    assert counts.min() >= 35
    assert counts.max() <= 37
    together = torch.cat([train.images, test.images])[:, 0].flatten(1).sort(dim=0).values
    pixels = np.sort(np.rint(load_digits().data * 255 / 16).astype(np.uint8), axis=0)
    assert np.array_equal(together.numpy(), pixels)


def test_the_first_examples_of_each_class(image_folder):
    whole = load_data("digits", "train")
    few = load_data("digits", "train", examples_per_class=3)
    assert len(few) == 30
    for label in range(10):
        assert torch.equal(few.images[few.labels == label], whole.images[whole.labels == label][:3])
    assert few.classes == whole.classes
    folder = load_data("imagefolder", "train", image_folder, examples_per_class=5)
    names = [os.fsdecode(path)[-11:] for path in folder.paths]
    assert names == [f"{name}/{i:03d}.png" for name in ("cat", "dog") for i in range(5)]
    assert len(load_data("imagefolder", "train", image_folder, examples_per_class=99)) == 16


def test_batches_of_all_processes_make_up_the_global_batch():
    whole = list(stream_positions(24, 1, Processes(0, 1, 0, CPU), 3, 5))
    for size, parts in ((2, 1), (2, 3), (4, 2)):
        shares = [list(stream_positions(24, parts, Processes(rank, size, 0, CPU), 3, 5)) for rank in range(size)]
        for step in range(2):
            taken = [share[step * parts + part] for part in range(parts) for share in shares]
            assert list(np.concatenate(taken)) == list(whole[step])


def test_each_test_image_comes_exactly_once_over_all_processes():
    images = np.arange(11, dtype=np.uint8)[:, None, None, None].repeat(3, 1).repeat(4, 2).repeat(4, 3)
    data = TensorImages(images, np.arange(11), map(str, range(11)), CPU)
    for size in (1, 2, 4, 16):
        groups = [Processes(rank, size, 0, CPU) for rank in range(size)]
        labels = [
            label for processes in groups for _, batch in data.eval_batches((4, 4), 2, processes) for label in batch
        ]
        assert sorted(map(int, labels)) == list(range(11))


def test_pictures_of_one_size_are_kept_in_memory_others_are_not(image_folder, tmp_path):
    train, test = load_both("imagefolder", image_folder)
    assert isinstance(train, FolderImages)
    assert (len(train), len(test), train.classes) == (16, 8, ["cat", "dog"])
    for split in ("train", "test"):
        write_pictures(tmp_path / "even" / split / "one", [(6, 5)] * 3)
    train = load_data("imagefolder", "train", tmp_path / "even")
    assert isinstance(train, TensorImages)
    assert train.images.shape == (3, 3, 6, 5)
    with Image.open(tmp_path / "even/train/one/001.png") as image:
        assert np.array_equal(train.images[1].permute(1, 2, 0), np.asarray(image))


def test_files_in_memory_and_from_workers_give_the_same_batches(tmp_path):
    paths = write_pictures(tmp_path, [(20, 24)] * 10)
    labels = list(range(10))
    images = torch.stack([torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in paths])
    in_memory = TensorImages(images, labels, map(str, labels), CPU)
    batches = [np.arange(0, 6), np.arange(6, 12)]
    expected = list(in_memory.train_batches(batches, Augmentation(1, (16, 16), 0.1, True)))
    expected_eval = list(in_memory.eval_batches((16, 16), 4, one_process()))
    for workers in (0, 1, 2):
        on_disk = FolderImages(paths, labels, map(str, labels), CPU, stretch, DataOptions(num_workers=workers))
        found = list(on_disk.train_batches(batches, Augmentation(1, (16, 16), 0.1, True)))
        found += list(on_disk.eval_batches((16, 16), 4, one_process()))
        for (mine, my_labels), (theirs, their_labels) in zip(found, expected + expected_eval, strict=True):
            assert torch.equal(my_labels, their_labels)
            torch.testing.assert_close(mine, theirs, rtol=0, atol=2.02 / 255)  # a level of 8-bit rounding


@pytest.mark.parametrize("name, classes, size", [("cifar10", 10, 20), ("cifar100", 100, 15)])
def test_cifar_is_read_from_the_official_archive(name, classes, size, tmp_path, monkeypatch):
    make_cifar_archive(name, classes, tmp_path, monkeypatch)
    train, test = load_both(name, tmp_path)
    assert train.images.shape[1:] == test.images.shape[1:] == (3, 32, 32)
    assert len(train.classes) == DATASETS[name].count_classes(tmp_path) == classes
    assert int(train.images[3, 1, 2, 4]) == (3 + 1024 + 2 * 32 + 4) % 256  # image 3, green, row 2, column 4


def make_cifar_archive(name, classes, folder, monkeypatch):
    """A small archive of the official layout, with the checksums that torchvision looks for set to its own."""
    from torchvision.datasets import CIFAR10, CIFAR100
    from torchvision.datasets.utils import calculate_md5

    dataset = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    base = folder / dataset.base_folder
    base.mkdir()
    key = "labels" if name == "cifar10" else "fine_labels"
    names = [f"class {number}" for number in range(classes)]
    for file, _ in dataset.train_list + dataset.test_list:
        pixels = (np.arange(3072)[None] + np.arange(5)[:, None]) % 256
        (base / file).write_bytes(pickle.dumps({"data": pixels.astype(np.uint8), key: [0, 1, 2, 3, 4]}))
    meta = {dataset.meta["key"]: names}
    (base / dataset.meta["filename"]).write_bytes(pickle.dumps(meta))
    for attribute in ("train_list", "test_list"):
        entries = [[file, calculate_md5(base / file)] for file, _ in getattr(dataset, attribute)]
        monkeypatch.setattr(dataset, attribute, entries)
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": calculate_md5(base / dataset.meta["filename"])})
    with tarfile.open(folder / dataset.filename, "w:gz") as archive:
        archive.add(base, arcname=dataset.base_folder)
    monkeypatch.setattr(dataset, "tgz_md5", calculate_md5(folder / dataset.filename))


def test_an_unreachable_cifar_says_where_to_put_it(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(UserError, match="could not get CIFAR10 into .* --data_dir"):
        load_data("cifar10", "train", tmp_path)


def spoil(root, fault):
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
        write_pictures(root / "val" / "fox", [(8, 8)])
        return root, "val/fox is a class that .*train does not have"
    path = root / "train" / "cat" / "000.png"
    if fault == "broken picture":
        path.write_bytes(path.read_bytes()[:200])
    if fault == "no picture":
        path.write_text("hello")
    return root, "train/cat/000.png is not a readable image"


FAULTS = [
    "no folder",
    "no train",
    "no test",
    "no classes",
    "empty class",
    "unknown class",
    "broken picture",
    "no picture",
]


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_folder_are_named(fault, image_folder):
    root, message = spoil(image_folder, fault)
    with pytest.raises(UserError, match=message):
        load_data("imagefolder", "train", root)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_met_by_a_worker_is_named_in_one_line(workers, tmp_path):
    paths = write_pictures(tmp_path, [(9, 9), (8, 8)])
    paths[1].write_bytes(b"\x89PNG broken")
    data = FolderImages(paths, [0, 0], ["one"], CPU, stretch, DataOptions(num_workers=workers))
    with pytest.raises(UserError) as error:
        list(data.train_batches([np.arange(2)], Augmentation(0, (8, 8), 0.5, False)))
    assert str(error.value).startswith(f"{paths[1]} is not a readable image")
    assert "\n" not in str(error.value)


def test_pictures_of_every_mode_become_rgb(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    for mode in ("L", "RGB", "RGBA", "P", "LA", "CMYK", "1"):
        Image.fromarray(grey).convert(mode).save(tmp_path / f"{mode}.tif")
        assert read_image(tmp_path / f"{mode}.tif").shape == (3, 8, 8)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    assert np.array_equal(read_image(tmp_path / "grey16.png"), np.stack([grey] * 3))


def test_hidden_files_and_large_pictures(tmp_path):
    write_pictures(tmp_path / "train" / "one", [(300, 300)] * 2)
    write_pictures(tmp_path / "val" / "one", [(8, 8)] * 2)
    (tmp_path / "train" / "one" / "._000.png").write_bytes(b"what macOS leaves")
    (tmp_path / "train" / "__MACOSX").mkdir()
    train, test = load_both("imagefolder", tmp_path)
    assert isinstance(train, FolderImages)
    assert isinstance(test, TensorImages)
    assert (len(train), train.classes) == (2, ["one"])
