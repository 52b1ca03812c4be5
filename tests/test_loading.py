"""Batches of images, from memory and from files by workers: the same ones; unreadable images skipped or reported."""

import json
import multiprocessing
import os
import re
import signal
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import train
from helpers import (
    CPU,
    CROPS,
    call_main,
    folder_images,
    load_data,
    photograph,
    stream,
    truncate,
    write_images,
    write_jpegs,
)
from utils.data.augmentation import Augmentation
from utils.data.datasets import DataOptions
from utils.data.images import stretch
from utils.data.loading import MAX_UNREADABLE, FolderImages, TensorImages, default_workers, on_device
from utils.errors import UserError
from utils.evaluation import evaluate as evaluate_set
from utils.parallel.precision import Precision
from utils.parallel.processes import Processes, one_process
from utils.records.run_folder import read_metrics

pytestmark = pytest.mark.filterwarnings("ignore:.*decoding and encoding capabilities:DeprecationWarning")


def test_each_test_image_is_evaluated_exactly_once_over_all_processes():
    images = np.arange(11, dtype=np.uint8)[:, None, None, None].repeat(3, 1).repeat(4, 2).repeat(4, 3)
    data = TensorImages(images, np.arange(11), map(str, range(11)), CPU)
    for size in (1, 2, 4, 16):
        groups = [Processes(rank, size, 0, CPU) for rank in range(size)]
        labels = [
            label for processes in groups for _, batch in data.eval_batches((4, 4), 2, processes) for label in batch
        ]
        assert sorted(map(int, labels)) == list(range(11))


def test_images_of_one_size_are_kept_in_memory_others_are_not(image_folder, tmp_path):
    train, test = (load_data("imagefolder", split, image_folder) for split in ("train", "val"))
    assert isinstance(train, FolderImages)
    assert (len(train), len(test), train.classes) == (16, 8, ["cat", "dog"])
    for split in ("train", "test"):
        write_images(tmp_path / "even" / split / "one", [(6, 5)] * 3)
    train = load_data("imagefolder", "train", tmp_path / "even")
    assert isinstance(train, TensorImages)
    assert train.images.shape == (3, 3, 6, 5)
    with Image.open(tmp_path / "even/train/one/001.png") as image:
        assert np.array_equal(train.images[1].permute(1, 2, 0), np.asarray(image))


def test_images_in_memory_and_from_workers_give_the_same_batches(tmp_path):
    paths = write_images(tmp_path, [(20, 24)] * 10)
    labels = list(range(10))
    images = torch.stack([torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in paths])
    in_memory = TensorImages(images, labels, map(str, labels), CPU)
    batches = [np.arange(0, 6), np.arange(6, 12)]
    augmentation = Augmentation(1, (16, 16), 0.1, True, random_erasing=0.5, repeats=2)
    expected = list(in_memory.train_batches(batches, augmentation))
    expected_eval = list(in_memory.eval_batches((16, 16), 4, one_process()))
    for workers in (0, 1, 2):
        on_disk = FolderImages(paths, labels, map(str, labels), CPU, stretch, DataOptions(num_workers=workers))
        found = list(on_disk.train_batches(batches, augmentation))
        found += list(on_disk.eval_batches((16, 16), 4, one_process()))
        for (mine, my_labels), (theirs, their_labels) in zip(found, expected + expected_eval, strict=True):
            assert torch.equal(my_labels, their_labels)
            torch.testing.assert_close(mine, theirs, rtol=0, atol=2.02 / 255)  # a level of 8-bit rounding


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_are_stored_lying_give_the_batches_of_upright_ones(workers, tmp_path):
    """By their EXIF data: the same crops in training, the same images in evaluation, from files and from memory."""
    for name in ("upright", "turned"):
        for split in ("train", "val"):
            (tmp_path / name / split / "one").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    for i, shape in enumerate([(40, 60)] * 4 + [(50, 30)] * 3):
        image, split = photograph(*shape), "train" if i < 4 else "val"
        image.save(tmp_path / "upright" / split / "one" / f"{i}.png")
        image.rotate(90, expand=True).save(tmp_path / "turned" / split / "one" / f"{i}.png", exif=exif)
    for source in ("imagefolder", "imagenet"):
        batches = []
        for name in ("upright", "turned"):
            data, test = (load_data(source, split, tmp_path / name, num_workers=workers) for split in ("train", "val"))
            assert isinstance(data, TensorImages if source == "imagefolder" else FolderImages)
            found = [*data.train_batches([np.arange(8)], CROPS), *test.eval_batches((16, 16), 3, one_process())]
            batches.append([images for images, _ in found])
        assert all(torch.equal(*pair) for pair in zip(*batches, strict=True))
        assert [len(images) for images in batches[0]] == [8, 3]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_in_a_worker_is_reported_in_one_line(workers, tmp_path):
    paths = write_images(tmp_path, [(9, 9), (8, 8)])
    paths[1].write_bytes(b"\x89PNG damaged")
    data = FolderImages(paths, [0, 0], ["one"], CPU, stretch, DataOptions(num_workers=workers))
    with pytest.raises(UserError) as error:
        list(data.train_batches([np.arange(2)], Augmentation(0, (8, 8), 0.5, False)))
    assert str(error.value).startswith(f"{paths[1]} is not a readable image")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_readable_image_replaces_an_unreadable_one(workers, tmp_path, capsys):
    paths = write_jpegs(tmp_path, 8)
    augmentation = CROPS._replace(random_erasing=0.5)
    whole, order = stream(folder_images(paths), [16], augmentation)
    for row in (2, 3, 7):
        truncate(paths[row])
    data = folder_images(paths, workers, skip_broken=True)
    images, labels = stream(data, [5, 10, 16], augmentation)
    assert labels.tolist() == [{2: 4, 3: 4, 7: 0}.get(label, label) for label in order.tolist()]
    intact = torch.tensor([label not in (2, 3, 7) for label in order])
    assert torch.equal(images[intact], whole[intact])
    assert data.unreadable == {str(paths[row]) for row in (2, 3, 7)}
    errors = capsys.readouterr().err
    assert len(re.findall(r"skipped: .* is not a readable image: ", errors)) == 3  # each once in two epochs
    assert all(f"skipped: {paths[row]} is not" in errors for row in (2, 3, 7))

    batches = list(data.eval_batches((16, 16), 2, one_process()))
    assert [labels.tolist() for _, labels in batches] == [[0, 1], [4, 5], [6]]  # the batch of 2 and 3 is omitted
    assert len(data.examples(8, (16, 16))[1]) == 5
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("workers", [0, 1])
def test_without_skip_broken_an_unreadable_image_is_an_error_that_names_the_flag(workers, tmp_path):
    paths = write_jpegs(tmp_path, 3)
    truncate(paths[1])
    message = f"{re.escape(str(paths[1]))} is not a readable image: .*; --skip_broken skips such images"
    for batches in (
        folder_images(paths, workers).train_batches([np.arange(3)], CROPS),
        folder_images(paths, workers).eval_batches((16, 16), 3, one_process()),
    ):
        with pytest.raises(UserError, match=message):
            list(batches)


def test_images_are_not_kept_in_memory_if_one_must_be_skipped(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "one").mkdir(parents=True)
        for i in range(3):
            photograph(16, 16).save(tmp_path / split / "one" / f"{i}.jpg")
    truncate(tmp_path / "train" / "one" / "1.jpg")
    with pytest.raises(UserError, match="1.jpg is not a readable image: .*--skip_broken skips such"):
        load_data("imagefolder", "train", tmp_path)
    data = load_data("imagefolder", "train", tmp_path, skip_broken=True)
    assert isinstance(data, FolderImages)
    assert len(next(data.train_batches([np.arange(3)], CROPS))[0]) == 3
    assert len(data.unreadable) == 1


def test_a_data_set_without_any_readable_image_is_an_error(tmp_path):
    paths = write_jpegs(tmp_path, 3)
    for path in paths:
        path.write_bytes(b"damaged")
    data = folder_images(paths, skip_broken=True)
    with pytest.raises(UserError, match="none of the 3 images can be read"):
        next(data.train_batches([np.arange(3)], CROPS))


@pytest.mark.parametrize("workers", [0, 1])
def test_many_unreadable_images_in_a_row_are_an_error_instead_of_skipped(workers, tmp_path, capsys):
    paths = write_jpegs(tmp_path, 2) + [tmp_path / f"missing{i:03d}.JPEG" for i in range(MAX_UNREADABLE + 20)]
    batches = folder_images(paths, workers, skip_broken=True).train_batches([np.arange(100)], CROPS)
    with pytest.raises(UserError, match=f"^{MAX_UNREADABLE} images in a row can't be read, the last one .*JPEG$"):
        next(batches)
    assert capsys.readouterr().err.count("skipped: ") >= MAX_UNREADABLE


class FirstClass(torch.nn.Module):
    """Classifies every image as class 0."""

    def forward(self, images):
        return torch.tensor([2.0, 1.0, 0.0, 0.0]).expand(len(images), -1)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_skipped_images_are_left_out_of_the_means_over_all_processes(size, tmp_path, monkeypatch):
    """The processes run one after the other here, and their sums are added up."""
    paths = write_jpegs(tmp_path, 4)
    truncate(paths[0])
    parts = []
    monkeypatch.setattr("utils.evaluation.sum_over_processes", lambda tensor: parts.append(tensor.clone()) or tensor)
    for rank in range(size):
        data = folder_images(paths, skip_broken=True)
        data.labels[:] = [0, 0, 1, 1]
        processes = Processes(rank, size, 0, CPU)
        try:
            evaluate_set(FirstClass(), data, (16, 16), 2, Precision("O0", torch.float32, CPU), processes)
        except UserError as error:  # its only image is unreadable; in a real run the others have some
            assert (size, rank) == (4, 0), error
    _, top1, _, count = sum(parts).tolist()
    assert (top1, count) == (1, 3)


def test_a_run_on_jpegs_skips_unreadable_images_by_its_flag(tmp_path, tiny_flags, run_main, monkeypatch, capsys):
    """Training with workers and RandAugment as for ImageNet, then evaluate.py; one image of each split is truncated."""
    for split, count in (("train", 5), ("val", 3)):
        for name in ("n02123045", "n02690373"):
            paths = write_jpegs(tmp_path / "imagenet" / split / name, count)
        truncate(paths[1])
    data = ["--dataset", "imagenet", "--data_dir", tmp_path / "imagenet", "--num_workers", 1, "--mean_std", "imagenet"]
    data += ["--rand_augment", 2, 9, "--horizontal_flip", "--train_batch_size", 10, "--num_steps", 2, "--eval_every", 2]
    with pytest.raises(SystemExit):
        call_main(train, tiny_flags(*data), monkeypatch)
    message = r"n02690373.001.JPEG is not a readable image: .*; --skip_broken skips such images\n$"
    assert re.search(message, capsys.readouterr().err)
    run_main(train, *tiny_flags(*data, "--skip_broken", "--overwrite"))
    folder = tmp_path / "output" / "run"
    report = json.loads(run_main(evaluate, "--checkpoint", folder / "last.safetensors", "--skip_broken", "--json"))
    assert report["loss"] == pytest.approx(read_metrics(folder)["val_loss"][-1], rel=1e-5)
    assert (report["images"], report["skipped"]) == (5, 1)
    with pytest.raises(SystemExit):
        call_main(evaluate, ["--checkpoint", folder / "last.safetensors"], monkeypatch)
    assert re.search(message, capsys.readouterr().err)


def test_the_processes_of_a_machine_share_its_cores_for_workers(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert default_workers() == 12
    for processes, workers in (("4", 3), ("8", 1), ("24", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert default_workers() == workers
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(256)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert default_workers() == 16


def test_batches_for_a_cpu_are_not_copied():
    batches = [(torch.ones(2), torch.zeros(2)), (torch.ones(1), torch.zeros(1))]
    found = list(on_device(iter(batches), CPU))
    assert all(mine is theirs for mine, theirs in zip(found, batches, strict=True))


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="only on Linux")
def test_workers_continue_after_stop_signals(tmp_path):
    """As when a whole process group is signalled: the training process saves first, with its workers alive."""
    data = folder_images(write_jpegs(tmp_path, 6), workers=2)
    batches = data.train_batches(iter([np.arange(3)] * 12), Augmentation(1, (16, 16), 0.1, True))
    next(batches)
    workers = multiprocessing.active_children()
    assert len(workers) >= 2
    for name in ("TERM", "INT"):  # from a third process
        subprocess.run(["kill", f"-{name}", *(str(worker.pid) for worker in workers)], check=True)
    assert len(list(batches)) == 11


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="only on Linux")
def test_workers_end_when_their_training_process_ends_them(tmp_path):
    """As Python does at exit after a traceback, which keeps the iterator over the batches alive."""
    before = set(multiprocessing.active_children())
    data = folder_images(write_jpegs(tmp_path, 6), workers=2)
    batches = data.train_batches(iter([np.arange(3)] * 12), Augmentation(1, (16, 16), 0.1, True))
    next(batches)
    workers = set(multiprocessing.active_children()) - before
    for worker in workers:
        worker.terminate()
        worker.join(10)
    assert [worker.exitcode for worker in workers] == [0, 0]
