"""The data sets that torchvision downloads, from small archives in the official layout that a local server sends."""

import argparse
import functools
import gzip
import http.server
import io
import json
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
import urllib.error
import urllib.request
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

import evaluate
import train
from helpers import ROOT, call_main, load_data, run_dir
from utils.data.datasets import DATASETS, DataOptions, downloaded, read_split, training_splits
from utils.data.loading import FolderImages, TensorImages
from utils.data.splits import SPLITS
from utils.data.torchvision_datasets import LOCK, PUBLISHED, read_published
from utils.errors import UserError
from utils.locks import exclusive_lock
from utils.parallel.processes import one_process
from utils.records.result import read_result
from utils.sweeps import download_shared_files

RANDOM = np.random.default_rng(0)
URLOPEN = urllib.request.urlopen

pytestmark = pytest.mark.filterwarnings("ignore:.*decoding and encoding capabilities:DeprecationWarning")


def image(size, mode="RGB"):
    """The bytes of a JPEG of noise."""
    data = io.BytesIO()
    pixels = RANDOM.integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(data, format="JPEG")
    return data.getvalue()


PHOTOS, SQUARE = (image((9, 12)), image((11, 10), "L")), image((8, 8))  # of two sizes, the second one grey


# The published files, {name: bytes}, of each data set


def archive(files):
    """A .tar.gz of {path: bytes}."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return data.getvalue()


def mat(**arrays):
    data = io.BytesIO()
    savemat(data, arrays)
    return data.getvalue()


def flowers102():
    """Image i + 1 shows class i % 102; the splits have one, two and three images per class, not in order."""
    ids = np.arange(1, 6 * 102 + 1)
    files = {f"jpg/image_{number:05d}.jpg": PHOTOS[number % 2] for number in ids}
    splits = {"trnid": ids[:102][::-1], "valid": ids[102:306], "tstid": ids[306:]}
    labels = (ids - 1) % 102 + 1
    return {
        "102flowers.tgz": archive(files),
        "imagelabels.mat": mat(labels=labels[None].astype(np.uint8)),
        "setid.mat": mat(**{name: each[None].astype(np.uint16) for name, each in splits.items()}),
    }


def pets():
    """As published, `list.txt` and the trimaps too; breeds whose names start with a capital are cats."""
    lines, images = {"trainval": [], "test": []}, {}
    for label in range(1, 38):
        breed = f"big_breed_{label:02d}" if label % 2 else f"Breed_{label:02d}"
        for number, split in enumerate(["trainval", "trainval", "test"], start=1):
            images[f"images/{breed}_{number}.jpg"] = PHOTOS[(label + number) % 2]
            lines[split].append(f"{breed}_{number} {label} {label % 2 + 1} 1\n")
    annotations = {f"annotations/{name}.txt": "".join(found).encode() for name, found in lines.items()}
    return {
        "images.tar.gz": archive(images),
        "annotations.tar.gz": archive({**annotations, "annotations/list.txt": b"", "annotations/trimaps/a.png": b""}),
    }


def dtd():
    files = {}
    lines = {f"{split}{partition}": [] for split in ("train", "val", "test") for partition in (1, 2)}
    for label in range(47):
        for number, split in enumerate(["train", "val", "val", "test", "test", "test"]):
            name = f"texture{label:02d}/texture{label:02d}_{number:04d}.jpg"
            files[f"dtd/images/{name}"] = PHOTOS[(label + number) % 2]
            lines[f"{split}1"].append(f"{name}\n")
    labels = {f"dtd/labels/{name}.txt": "".join(found).encode() for name, found in lines.items()}
    return {"dtd-r1.0.1.tar.gz": archive({**files, **labels})}


def eurosat():
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for label in range(10):
            for number in range(10):
                file.writestr(f"2750/Land{label}/Land{label}_{number}.jpg", SQUARE)
    return {"EuroSAT.zip": data.getvalue()}


def food101():
    files, splits = {}, {"train": {}, "test": {}}
    for label in range(101):
        for number, split in enumerate(["train", "train", "test"]):
            name = f"food_{label:03d}/{number}{label}"
            files[f"food-101/images/{name}.jpg"] = PHOTOS[(label + number) % 2]
            splits[split].setdefault(f"food_{label:03d}", []).append(name)
    meta = {f"food-101/meta/{split}.json": json.dumps(names).encode() for split, names in splits.items()}
    return {"food-101.tar.gz": archive({**files, **meta})}


def sun397():
    """Some classes are in a folder of two, such as /a/abbey/indoor."""
    names = [f"/{'abc'[label % 3]}/scene{label:03d}{'/indoor' * (label % 2)}" for label in range(397)]
    files = {f"SUN397{name}/sun_{i}.jpg": PHOTOS[i % 2] for name in names for i in range(2)}
    return {
        "SUN397.tar.gz": archive({**files, "SUN397/ClassName.txt": "".join(f"{name}\n" for name in names).encode()})
    }


def stl10():
    """Pixels are stored column by column, labels counted from 1."""
    files = {"class_names.txt": "".join(f"thing {label}\n" for label in range(10)).encode()}
    for split, count in (("train", 20), ("test", 30), ("unlabeled", 5)):
        pixels = np.zeros((count, 3, 96, 96), np.uint8)
        pixels[:, 1, 2, 5] = np.arange(count)  # green, column 2, row 5
        files[f"{split}_X.bin"] = pixels.tobytes()
        files[f"{split}_y.bin"] = (np.arange(count) % 10 + 1).astype(np.uint8).tobytes()
    del files["unlabeled_y.bin"]
    return {"stl10_binary.tar.gz": archive({f"stl10_binary/{name}": content for name, content in files.items()})}


def fashion_mnist():
    files = {}
    for split, count in (("train", 20), ("t10k", 30)):
        pixels = np.zeros((count, 28, 28), np.uint8)
        pixels[:, 5, 2] = np.arange(count)
        header = struct.pack(">IIII", 2051, count, 28, 28)
        files[f"{split}-images-idx3-ubyte.gz"] = gzip.compress(header + pixels.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        files[f"{split}-labels-idx1-ubyte.gz"] = gzip.compress(struct.pack(">II", 2049, count) + labels.tobytes())
    return files


def svhn():
    """The images are the last dimension; the digit 0 has the label 10."""
    files = {}
    for split, count in (("train", 20), ("test", 30)):
        pixels = np.zeros((32, 32, 3, count), np.uint8)
        pixels[5, 2, 1] = np.arange(count)
        labels = np.arange(count) % 10
        files[f"{split}_32x32.mat"] = mat(X=pixels, y=np.where(labels == 0, 10, labels)[:, None].astype(np.uint8))
    return files


MAKERS = {make.__name__: make for make in (dtd, eurosat, fashion_mnist, flowers102, food101, pets, stl10, sun397, svhn)}
# Images of each split above, and the first and the last class name.
EXPECTED = {
    "dtd": ({"train": 47, "val": 94, "test": 141}, "texture00", "texture46"),
    "eurosat": ({"train": 100}, "Land0", "Land9"),
    "fashion_mnist": ({"train": 20, "test": 30}, "T-shirt/top", "Ankle boot"),
    "flowers102": ({"train": 102, "val": 204, "test": 306}, "pink primrose", "blackberry lily"),
    "food101": ({"train": 202, "test": 101}, "food_000", "food_100"),
    "pets": ({"train": 74, "test": 37}, "Big Breed 01", "Big Breed 37"),
    "stl10": ({"train": 20, "test": 30}, "thing 0", "thing 9"),
    "sun397": ({"train": 2 * 397}, "scene000", "scene396"),
    "svhn": ({"train": 20, "test": 30}, "0", "9"),
}
ARRAYS = ("fashion_mnist", "stl10", "svhn")


class Server(http.server.BaseHTTPRequestHandler):
    """Serves the `files` by their names."""

    def __init__(self, *arguments, files, **keywords):
        self.files = files
        super().__init__(*arguments, **keywords)

    def do_GET(self):
        content = self.files.get(self.path.rpartition("/")[2])
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def publish(monkeypatch):
    """`publish(name)` serves the small files of a data set; returns (its files, the list of addresses requested).

    torchvision's own download runs. Only the server behind the addresses, the comparison of MD5s (unless `checked`) and
    the number of images are replaced.
    """
    servers = []

    def start(name, checked=False):
        files, requested = MAKERS[name](), []
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, files=files))
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        local = f"http://127.0.0.1:{server.server_port}/"

        def open_locally(request, *arguments, **keywords):
            if not request.full_url.startswith(local):
                requested.append(request.full_url)
            return URLOPEN(local + request.full_url.rpartition("/")[2], *arguments, **keywords)

        monkeypatch.setattr("urllib.request.urlopen", open_locally)
        if not checked:
            monkeypatch.setattr("torchvision.datasets.utils.check_md5", lambda path, md5: True)
        count = PUBLISHED[name].num_images and EXPECTED[name][0]["train"]
        source = PUBLISHED[name]._replace(num_images=count)
        monkeypatch.setitem(DATASETS, name, downloaded(source))
        return files, requested

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_every_data_set_of_torchvision_is_tested_and_documented():
    """The small files of each entry below, and its row in the table of the documents."""
    assert PUBLISHED.keys() == MAKERS.keys() | {"cifar10", "cifar100"}  # those are in test_datasets.py
    text = (ROOT / "docs" / "data.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \| ([\d,]*) ?\| ([\d,]*) ?\| (\d+) \|", text, re.MULTILINE)
    assert [row[0] for row in rows] == sorted(PUBLISHED)
    for name, *counts, classes in rows:
        source = PUBLISHED[name]
        sizes = {split: int(count.replace(",", "")) for split, count in zip(SPLITS, counts, strict=True) if count}
        assert sizes.keys() == source.splits.keys()
        assert int(classes) == source.num_classes
        assert source.num_images in (None, sizes["train"])


def number_in(path, name):
    """The label that the small data set's image file is named after."""
    number = int(re.search(r"(?:texture|Land|image_|food_|[Bb]reed_|scene)(\d+)", path)[1])
    return (number - 1) % 102 if name == "flowers102" else number - 1 if name == "pets" else number


def read_all(name, folder):
    """{split: Split} of all own splits of a data set."""
    return {
        split: read_split(name, split, DataOptions(folder), one_process()) for split in DATASETS[name].splits(folder)
    }


@pytest.mark.parametrize("name", MAKERS)
def test_each_data_set_is_downloaded_once_with_its_official_splits(name, publish, tmp_path):
    _, requested = publish(name)
    splits = read_all(name, tmp_path)
    source, (sizes, first, last) = PUBLISHED[name], EXPECTED[name]
    assert set(requested) == {source.url + file for file in source.files}
    assert len(requested) == len(source.files)
    assert {split: len(found.labels) for split, found in splits.items()} == sizes
    for found in splits.values():
        assert len(found.images) == len(found.labels)
        assert len(found.classes) == len(set(found.classes)) == DATASETS[name].count_classes(tmp_path)
        assert (found.classes[0], found.classes[-1]) == (first, last)
        assert len(set(Counter(found.labels.tolist()).values())) == 1
        assert set(found.labels.tolist()) == set(range(source.num_classes))
        assert all(type(label) is str for label in found.classes)
    read_all(name, tmp_path)
    assert len(requested) == len(source.files)


@pytest.mark.parametrize("name", ["svhn", "eurosat"])
def test_two_runs_that_start_together_download_once(name, publish, tmp_path):
    _, requested = publish(name)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: load_data(name, "train", tmp_path), range(4)))
    assert len(requested) == len(set(requested))
    assert [len(images) for images in found] == [EXPECTED[name][0]["train"]] * 4


def hold_download_lock(data_dir, then="pass"):
    """Another process that holds the lock for two seconds and executes `then` before it releases it."""
    code = f"import os, time; from utils.locks import exclusive_lock\nwith exclusive_lock({str(data_dir / LOCK)!r}):"
    code += f" print(1, flush=True); time.sleep(2); {then}"
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    other.stdout.readline()
    return other


def test_files_that_another_process_unpacks_are_waited_for(publish, tmp_path):
    publish("eurosat")
    load_data("eurosat", "train", tmp_path)
    first = next((tmp_path / "eurosat" / "2750").glob("*/*.jpg"))
    moved = first.rename(tmp_path / "moved.jpg")  # not unpacked yet
    with hold_download_lock(tmp_path, then=f"os.rename({str(moved)!r}, {str(first)!r})"):
        assert len(load_data("eurosat", "train", tmp_path)) == 100


def test_a_download_that_starts_during_the_reading_is_waited_for(tmp_path):
    others = []

    def read(make):
        if others:
            return ["first.jpg", "second.jpg"], [0, 1], None
        others.append(hold_download_lock(tmp_path))
        return ["first.jpg"], [0], None  # all that is unpacked yet

    images, *_ = read_published(PUBLISHED["dtd"]._replace(read=read), tmp_path, "train")
    assert images == ["first.jpg", "second.jpg"]
    assert others[0].wait(timeout=0.5) == 0


def test_files_that_this_process_unpacks_meanwhile_are_waited_for(publish, tmp_path):
    """The first reading sees no lock, because the same process holds it, and finds too few images."""
    publish("eurosat")
    load_data("eurosat", "train", tmp_path)
    first = next((tmp_path / "eurosat" / "2750").glob("*/*.jpg"))
    with ThreadPoolExecutor(1) as pool:
        with exclusive_lock(tmp_path / LOCK):
            moved = first.rename(tmp_path / "moved.jpg")  # not unpacked yet
            found = pool.submit(load_data, "eurosat", "train", tmp_path)
            with pytest.raises(TimeoutError):
                found.result(timeout=1)
            moved.rename(first)
        assert len(found.result()) == 100


@pytest.mark.parametrize("name", sorted(MAKERS.keys() - set(ARRAYS)))
def test_image_files_are_listed_with_their_labels(name, publish, tmp_path):
    publish(name)
    splits = read_all(name, tmp_path)
    paths = [path for found in splits.values() for path in found.images]
    assert len(set(paths)) == len(paths)
    assert all(type(path) is str and Path(path).is_file() and Path(path).is_relative_to(tmp_path) for path in paths)
    for found in splits.values():
        assert found.labels.tolist() == [
            number_in(str(Path(path).relative_to(tmp_path)), name) for path in found.images
        ]
    test = load_data(name, list(splits)[-1], tmp_path)
    assert isinstance(test, TensorImages if name == "eurosat" else FolderImages)
    images, labels = test.examples(5, (16, 16))
    assert images.shape == (5, 3, 16, 16)


def test_the_official_files_decide_the_split(publish, tmp_path):
    """The images of each split are those that the lists name, not only as many."""
    publish("flowers102")
    numbers = {
        split: {int(Path(path).stem[-5:]) for path in found.images}
        for split, found in read_all("flowers102", tmp_path / "flowers").items()
    }
    assert numbers == {"train": {*range(1, 103)}, "val": {*range(103, 307)}, "test": {*range(307, 613)}}
    publish("dtd")
    numbers = {
        split: {int(Path(path).stem[-4:]) for path in found.images}
        for split, found in read_all("dtd", tmp_path / "dtd").items()
    }
    assert numbers == {"train": {0}, "val": {1, 2}, "test": {3, 4, 5}}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_are_kept_in_memory_as_rgb(name, publish, tmp_path):
    publish(name)
    for split, count in EXPECTED[name][0].items():
        data = load_data(name, split, tmp_path)
        assert isinstance(data, TensorImages)
        assert data.images.dtype == torch.uint8
        assert data.images.is_contiguous()
        size = {"fashion_mnist": 28, "stl10": 96, "svhn": 32}[name]
        expected = torch.zeros(count, 3, size, size, dtype=torch.uint8)
        channels = slice(None) if name == "fashion_mnist" else slice(1, 2)
        expected[:, channels, 5, 2] = torch.arange(count, dtype=torch.uint8)[:, None]
        assert torch.equal(data.images, expected)
        assert data.labels.tolist() == [label % 10 for label in range(count)]


def no_network(monkeypatch):
    """Every request fails; returns the list of addresses requested."""
    requested = []

    def fail(request, *arguments, **keywords):
        requested.append(request.full_url)
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", fail)
    return requested


@pytest.mark.parametrize("name", MAKERS)
def test_files_that_a_user_puts_where_the_error_says_are_unpacked(name, publish, tmp_path, monkeypatch):
    files, _ = publish(name)
    requested = no_network(monkeypatch)
    with pytest.raises(UserError) as failed:
        read_split(name, "train", DataOptions(tmp_path), one_process())
    folder = tmp_path / PUBLISHED[name].folder
    assert f"put {' and '.join(files)} (from " in str(failed.value)
    assert f" into {folder}, or " in str(failed.value)
    assert requested
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        (folder / file).write_bytes(content)
    requested.clear()
    assert {split: len(found.labels) for split, found in read_all(name, tmp_path).items()} == EXPECTED[name][0]
    assert requested == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_failed_download_is_one_line_that_names_the_address(name, tmp_path, monkeypatch):
    requested = no_network(monkeypatch)
    with pytest.raises(UserError) as failed:
        read_split(name, "train", DataOptions(tmp_path), one_process())
    source = PUBLISHED[name]
    assert str(failed.value).startswith(f"could not get {source.name} into {tmp_path}: ")
    assert "no network" in str(failed.value)
    assert f"(from {source.url} or a copy)" in str(failed.value)
    assert "\n" not in str(failed.value)
    assert requested[0] == source.url + source.files[0]


def test_a_damaged_download_is_not_unpacked(publish, tmp_path, monkeypatch):
    """The small archive does not have the published MD5."""
    publish("dtd", checked=True)
    with pytest.raises(UserError, match=r"could not get DTD into .*corrupted.*; try again, or put dtd-r1.0.1.tar.gz"):
        read_split("dtd", "train", DataOptions(tmp_path), one_process())
    assert not (tmp_path / "dtd" / "dtd").exists()


@pytest.mark.parametrize(
    "name, lost", [("eurosat", "eurosat/2750/Land3/Land3_4.jpg"), ("dtd", "dtd/dtd/labels/val1.txt")]
)
def test_a_folder_that_was_unpacked_in_part_is_an_error(name, lost, publish, tmp_path):
    """Torchvision unpacks again only if the folder is deleted, and lists those of EuroSAT and SUN397 as they are."""
    publish(name)
    sizes = {split: len(found.labels) for split, found in read_all(name, tmp_path).items()}
    (tmp_path / lost).unlink()
    with pytest.raises(UserError) as failed:
        read_all(name, tmp_path)
    unpacked = tmp_path / PUBLISHED[name].unpacked
    assert str(failed.value).startswith(f"{unpacked} is incomplete, as after an interruption: ")
    assert str(failed.value).endswith("; delete it and try again")
    shutil.rmtree(unpacked)
    assert {split: len(found.labels) for split, found in read_all(name, tmp_path).items()} == sizes


def test_sun397_without_any_image_is_incomplete(publish, tmp_path):
    publish("sun397")
    (tmp_path / "SUN397").mkdir()
    (tmp_path / "SUN397" / "ClassName.txt").write_text("/a/abbey\n")
    with pytest.raises(
        UserError, match="SUN397 is incomplete, as after an interruption: it has 0 images of 794; delete"
    ):
        read_split("sun397", "train", DataOptions(tmp_path), one_process())


def test_sun397_is_divided_alike_in_any_order_of_the_file_system(publish, tmp_path, monkeypatch):
    publish("sun397")
    options = DataOptions(tmp_path, test_split=0.5)

    def divided():
        return {split: read_split("sun397", split, options, one_process()) for split in ("train", "test")}

    before, rglob = divided(), Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda path, pattern: sorted(rglob(path, pattern), reverse=True))
    for split, found in divided().items():
        assert found.images == before[split].images
        assert np.array_equal(found.labels, before[split].labels)
        assert set(found.labels.tolist()) == set(range(397))
    assert sum(len(found.labels) for found in before.values()) == 2 * 397
    assert read_split("sun397", "test", options._replace(split_seed=1), one_process()).images != before["test"].images


@pytest.mark.parametrize("name", ["eurosat", "sun397"])
def test_a_data_set_without_splits_must_be_divided(name, tiny_flags, tmp_path, main_fails):
    """The error comes before the download."""
    error = main_fails(train, *tiny_flags("--dataset", name, "--data_dir", tmp_path))
    assert (
        f"{name} has no validation or test images of its own; divide its images by --val_split 0.1 or --test" in error
    )
    assert training_splits(name, DataOptions(tmp_path, val_split=0.1)) == ["train", "val"]
    assert training_splits(name, DataOptions(tmp_path, val_split=0.1, test_split=0.2)) == ["train", "val", "test"]


def test_own_splits_are_not_divided(tiny_flags, tmp_path, main_fails):
    error = main_fails(train, *tiny_flags("--dataset", "flowers102", "--data_dir", tmp_path, "--val_split", 0.1))
    assert "flowers102 has validation images of its own; omit --val_split" in error


def test_a_sweep_downloads_the_files_of_each_split(publish, tmp_path):
    _, requested = publish("svhn")
    flags = argparse.Namespace(dataset="svhn", data_dir=str(tmp_path), pretrained_dir=None, download=False)
    download_shared_files([argparse.Namespace(flags=flags)])
    assert [address.rpartition("/")[2] for address in requested] == ["train_32x32.mat", "test_32x32.mat"]


@pytest.mark.parametrize(
    "name, counts",
    [("dtd", {"val": 94, "test": 141}), ("eurosat", {"val": 18, "test": 10}), ("fashion_mnist", {"test": 30})],
)
def test_a_model_is_trained_and_evaluated_on_files_and_on_arrays(
    name, counts, publish, tiny_flags, tmp_path, monkeypatch, capsys
):
    publish(name)
    division = ("--val_split", 0.2, "--test_split", 0.1) if name == "eurosat" else ()
    data = ("--dataset", name, "--data_dir", tmp_path / "data", "--num_workers", 0, *division)
    flags = tiny_flags(*data, "--num_steps", 2, "--eval_every", 2, "--warmup_steps", 1)
    call_main(train, flags, monkeypatch)
    last = read_result(run_dir(flags))["last"]
    assert {split: last[split]["images"] for split in counts} == counts
    capsys.readouterr()
    call_main(
        evaluate, ["--checkpoint", run_dir(flags) / "last.safetensors", "--num_workers", 0, "--json"], monkeypatch
    )
    report = json.loads(capsys.readouterr().out)
    assert report["images"] == counts["test"]
    assert report["top1_accuracy"] == pytest.approx(last["test"]["accuracy"])
    assert len(report["per_class"]) == PUBLISHED[name].num_classes
