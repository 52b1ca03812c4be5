"""The data sets: their splits, sizes and classes."""

import os
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torchvision.transforms.v2 import functional as tv

import train
from helpers import CPU, call_main, evaluate_and_export, fails, load_data, photograph, read_config, train_run
from utils.data.augmentation import normalise
from utils.data.datasets import DATASETS, DataSource, Split
from utils.data.loading import FolderImages, TensorImages
from utils.errors import UserError
from utils.parallel.processes import Processes, one_process


def load_both(name, data_dir):
    return [load_data(name, split, data_dir) for split in ("train", "test")]


def test_digits_are_always_split_in_the_same_way():
    train, test = load_both("digits", "data")
    assert (len(train), len(test)) == (1437, 360)
    counts = torch.bincount(test.labels)
    assert counts.min() >= 35
    assert counts.max() <= 37
    together = torch.cat([train.images, test.images])[:, 0].flatten(1).sort(dim=0).values
    pixels = np.sort(np.rint(load_digits().data * 255 / 16).astype(np.uint8), axis=0)
    assert np.array_equal(together.numpy(), pixels)


def test_examples_per_class_are_drawn_by_the_split_seed(image_folder):
    whole = load_data("digits", "train")
    few, more, other = (
        load_data("digits", "train", examples_per_class=count, split_seed=seed)
        for count, seed in ((3, 0), (4, 0), (3, 1))
    )
    assert torch.bincount(few.labels).tolist() == torch.bincount(other.labels).tolist() == [3] * 10
    assert few.classes == whole.classes
    drawn, nested, others, known = (
        {image.tobytes() for image in data.images.numpy()} for data in (few, more, other, whole)
    )
    assert drawn < nested < known
    assert others != drawn
    folder = load_data("imagefolder", "train", image_folder, examples_per_class=5)
    names = [os.fsdecode(path)[-11:] for path in folder.paths]
    assert names == sorted(set(names))
    assert [name[:3] for name in names] == ["cat"] * 5 + ["dog"] * 5
    assert len(load_data("imagefolder", "train", image_folder, examples_per_class=99)) == 16


def test_the_note_of_a_data_set_is_printed_once_by_the_first_process(monkeypatch, capsys):
    def read(data_dir, split):
        return Split(np.zeros((2, 3, 4, 4), np.uint8), [0, 1], ["a", "b"], f"{split}: 3 files ignored")

    monkeypatch.setitem(DATASETS, "toy", DataSource(lambda data_dir: 2, read))
    for rank in range(2):
        load_data("toy", "train", processes=Processes(rank, 2, 0, CPU))
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "train: 3 files ignored\n")


@pytest.mark.parametrize("name, classes, size", [("cifar10", 10, 20), ("cifar100", 100, 15)])
def test_cifar_is_read_from_the_official_archive(name, classes, size, tmp_path, monkeypatch):
    make_cifar_archive(name, classes, tmp_path, monkeypatch)
    train, test = load_both(name, tmp_path)
    assert train.images.shape[1:] == test.images.shape[1:] == (3, 32, 32)
    assert len(train.classes) == DATASETS[name].count_classes(tmp_path) == classes
    assert int(train.images[3, 1, 2, 4]) == (3 + 1024 + 2 * 32 + 4) % 256  # image 3, green, row 2, column 4


def make_cifar_archive(name, classes, folder, monkeypatch):
    """A small archive of the official layout, whose checksums torchvision is made to expect."""
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


def test_the_error_without_a_download_says_where_to_put_cifar(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(UserError, match="could not get CIFAR10 into .* --data_dir"):
        load_data("cifar10", "train", tmp_path)


def test_imagenet_is_read_by_workers_even_if_it_would_fit_into_memory(tmp_path):
    for split in ("train", "val"):
        photograph(20, 20).save(tmp_path / f"{split}.png")
        for wnid in ("n02", "n01"):
            (tmp_path / split / wnid).mkdir(parents=True)
            shutil.copy(
                tmp_path / f"{split}.png", tmp_path / split / wnid / "1.JPEG"
            )  # one of ImageNet's files is a PNG too
    data = load_data("imagenet", "train", tmp_path)
    assert isinstance(data, FolderImages)
    assert (len(data), data.classes, DATASETS["imagenet"].count_classes(tmp_path)) == (2, ["n01", "n02"], 2)
    assert isinstance(load_data("imagefolder", "train", tmp_path), TensorImages)
    (images, labels), *_ = data.eval_batches((16, 16), 2, one_process())
    assert labels.tolist() == [0, 1]
    image = torch.from_numpy(np.array(photograph(20, 20))).permute(2, 0, 1)
    assert torch.equal(images[0], normalise(tv.center_crop(tv.resize(image, 18, antialias=True), 16)))


def test_a_new_data_set_needs_one_entry_to_be_trained_resumed_and_evaluated(tiny_flags, monkeypatch, capsys, tmp_path):
    """Trained, resumed, exported and evaluated by its name."""
    random = np.random.default_rng(0)
    sizes = {"train": 48, "test": 20}
    images = {split: random.integers(0, 256, (size, 3, 9, 7), dtype=np.uint8) for split, size in sizes.items()}
    names = ["left", "right", "straight on"]

    def read(data_dir, split):
        return Split(images[split], np.arange(sizes[split]) % 3, names)

    monkeypatch.setitem(DATASETS, "toy", DataSource(lambda data_dir: 3, read))
    flags = tiny_flags("--dataset", "toy", "--num_steps", 6, "--eval_every", 3, "--learning_rate", 0.1)
    train_run(flags, monkeypatch)
    assert read_config(tmp_path / "output" / "run")["classes"] == names
    _, rows = train_run([*flags, "--num_steps", 9, "--resume"], monkeypatch)
    assert [row["step"] for row in rows] == [3, 6, 9]
    assert evaluate_and_export(flags, monkeypatch, capsys)["images"] == 20
    call_main(train, [*flags, "--mode", "eval"], monkeypatch)
    assert "on toy: 20 test images, 3 classes, at 8x8" in capsys.readouterr().out
    unknown = tiny_flags("--dataset", "toys")
    assert "unknown dataset 'toys'; did you mean toy" in fails(train, unknown, monkeypatch, capsys)
