"""Data at ImageNet's size: its layout, odd and broken JPEGs, decoding at reduced size, RandAugment, the whole path."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data import ImageNetInfo
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

import evaluate as evaluate_script
import train
from helpers import call_main, load_data, read_config, script, succeed
from utils.data.augmentation import (
    Augmentation,
    denormalise,
    normalise,
    rand_augment_bits,
    rand_augmented,
)
from utils.data.datasets import DATASETS, DataOptions
from utils.data.images import ImageFile, centre_crop, centre_square, read_image, stretch
from utils.data.loading import MAX_UNREADABLE, FolderImages, TensorImages, default_workers, on_device
from utils.errors import UserError
from utils.evaluation import evaluate
from utils.parallel.precision import Precision
from utils.parallel.processes import Processes, one_process

CPU = torch.device("cpu")
PLAIN = Augmentation(5, (16, 16), 0.3, True)
pytestmark = pytest.mark.filterwarnings("ignore:.*decoding and encoding capabilities:DeprecationWarning")


def photograph(height, width):
    return Image.fromarray(load_sample_image("flower.jpg")).resize((width, height), Image.Resampling.BICUBIC)


def write_jpegs(folder, count, suffix=".JPEG"):
    """JPEGs of different parts of a photograph, of mixed sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:03d}{suffix}" for i in range(count)]
    for i, path in enumerate(paths):
        photograph(120, 160).crop((4 * i, 3 * i, 50 + 5 * i, 40 + 5 * i)).save(path, format="JPEG", quality=95)
    return paths


@pytest.fixture
def imagenet_folder(tmp_path):
    for split, count in (("train", 6), ("val", 3)):
        for wnid in ("n01440764", "n01443537"):
            write_jpegs(tmp_path / "imagenet" / split / wnid, count)
    return tmp_path / "imagenet"


def folder_images(paths, workers=0, prepare=stretch, **options):
    return FolderImages(
        paths,
        list(range(len(paths))),
        map(str, range(len(paths))),
        CPU,
        prepare,
        DataOptions(num_workers=workers, **options),
    )


def cut(path, share=0.6):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def test_imagenet_is_read_by_workers_even_where_it_would_fit_into_memory(tmp_path):
    for split in ("train", "val"):
        photograph(20, 20).save(tmp_path / f"{split}.png")
        for wnid in ("n02", "n01"):
            (tmp_path / split / wnid).mkdir(parents=True)
            shutil.copy(tmp_path / f"{split}.png", tmp_path / split / wnid / "1.JPEG")  # ImageNet has such a PNG too
    data = load_data("imagenet", "train", tmp_path)
    assert isinstance(data, FolderImages)
    assert (len(data), data.classes, DATASETS["imagenet"].count_classes(tmp_path)) == (2, ["n01", "n02"], 2)
    assert isinstance(load_data("imagefolder", "train", tmp_path), TensorImages)
    (images, labels), *_ = data.eval_batches((16, 16), 2, one_process())
    assert labels.tolist() == [0, 1]
    image = torch.from_numpy(np.array(photograph(20, 20))).permute(2, 0, 1)
    assert torch.equal(images[0], normalise(tv.center_crop(tv.resize(image, 18, antialias=True), 16)))


def test_files_are_listed_without_being_read(imagenet_folder):
    for path in imagenet_folder.rglob("*.JPEG"):
        path.write_bytes(b"")
    assert len(load_data("imagenet", "train", imagenet_folder)) == 12


def test_the_usual_mistakes_of_the_layout_say_what_to_do(imagenet_folder, tiny_flags, monkeypatch, capsys):
    flags = tiny_flags("--dataset", "imagenet", "--data_dir", imagenet_folder)
    shutil.rmtree(imagenet_folder / "val")
    write_jpegs(imagenet_folder / "val", 2)
    with pytest.raises(SystemExit):
        call_main(train, flags, monkeypatch)
    message = capsys.readouterr().err
    assert (
        "val has no folders; it needs one folder per class, but its 2 files are not in folders; valprep.sh" in message
    )
    shutil.rmtree(imagenet_folder / "train")
    (imagenet_folder / "train").mkdir()
    (imagenet_folder / "train" / "n01440764.tar").write_bytes(b"")
    with pytest.raises(SystemExit):
        call_main(train, flags, monkeypatch)
    assert "holds 1 archives; unpack each into a folder of its name" in capsys.readouterr().err


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("shape", [(60, 90), (301, 257)])
def test_validation_is_torchvisions_resize_and_centre_crop(shape, size):
    image = torch.from_numpy(np.array(photograph(*shape))).permute(2, 0, 1)
    usual = v2.Compose([v2.Resize({32: 37, 224: 256}[size], antialias=True), v2.CenterCrop(size)])
    assert torch.equal(centre_crop(image, (size, size)), usual(image))
    rows, columns = torch.meshgrid(torch.arange(shape[0]), torch.arange(shape[1]), indexing="ij")
    places = torch.stack([rows, columns, rows]).mul(0.8).to(torch.uint8)
    shown = tv.resize(centre_square(places), [size, size], antialias=True)  # what visualize.py shows
    assert (shown.float() - usual(places).float()).abs().mean() < 0.03 * max(shape)


def odd_jpeg(kind, path):
    picture = photograph(40, 50)
    if kind == "cmyk":
        picture.convert("CMYK").save(path, format="JPEG")
    if kind == "grey":
        picture.convert("L").save(path, format="JPEG")
    if kind == "png":
        picture.save(path, format="PNG")
    if kind == "palette png":
        picture.convert("P").save(path, format="PNG")
    if kind == "progressive":
        picture.save(path, format="JPEG", progressive=True)
    if kind == "turned by EXIF":
        exif = Image.Exif()
        exif[0x0112] = 6
        picture.save(path, format="JPEG", exif=exif)


@pytest.mark.parametrize("kind", ["cmyk", "grey", "png", "palette png", "progressive", "turned by EXIF"])
def test_odd_files_named_jpeg_are_read_as_pillow_does(kind, tmp_path):
    path = tmp_path / "1.JPEG"
    odd_jpeg(kind, path)
    with Image.open(path) as image:
        expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    assert expected.shape == (3, 40, 50)
    assert (read_image(path).int() - expected.int()).abs().max() <= 1
    data = folder_images([path, path])
    images, _ = next(data.train_batches([np.arange(2)], PLAIN))
    assert images.shape == (2, 3, 16, 16)
    assert len(next(data.eval_batches((16, 16), 2, one_process()))[0]) == 2


def test_a_jpeg_is_decoded_at_reduced_size_where_the_crop_allows(tmp_path):
    path = tmp_path / "1.jpg"
    photograph(427, 640).save(path, quality=95)
    whole = read_image(path)
    for box, out_size, reduction in [
        ((40, 64, 320, 480), (160, 240), 2),
        ((40, 64, 320, 480), (161, 240), 1),
        ((40, 64, 320, 480), (160, 241), 1),
        ((8, 16, 400, 600), (100, 120), 4),
        ((8, 16, 400, 600), (50, 70), 8),
        ((3, 5, 421, 633), (50, 70), 8),
        ((0, 0, 427, 640), (24, 24), 8),
    ]:
        picture = ImageFile(path)
        found = picture.resized_crop(box, out_size).float()
        assert picture.image.width == -(-640 // reduction)  # Pillow's; it stays whole where torchvision decodes
        expected = tv.resized_crop(whole, *box, size=list(out_size), antialias=True).float()
        assert found.shape == (3, *out_size)
        difference = (found - expected).abs().mean().item()
        assert difference == 0 if reduction == 1 else difference < 4.5  # of 255
        shifted = tv.resized_crop(whole, *(np.array(box) + (reduction, reduction, 0, 0)).tolist(), size=list(out_size))
        assert reduction == 1 or difference < (found - shifted.float()).abs().mean()


def test_a_reduced_picture_without_detail_is_the_same(tmp_path):
    """Where no filter can matter, edges and colours are exactly where full decoding has them."""
    ramp = np.linspace(20, 230, 512).astype(np.uint8)
    pixels = np.stack([np.tile(ramp, (512, 1)), np.tile(ramp[:, None], (1, 512)), np.full((512, 512), 99, np.uint8)], 2)
    path = tmp_path / "1.jpg"
    Image.fromarray(pixels).save(path, quality=95, subsampling=0)
    for n in (2, 4, 8):
        box, out_size = (16, 32, 384, 256), (384 // n, 256 // n)
        found = ImageFile(path).resized_crop(box, out_size).float()
        expected = tv.resized_crop(read_image(path), *box, size=list(out_size), antialias=True).float()
        assert (found - expected).abs().max() <= 4
        assert (found - expected).abs().mean() < 0.6


@pytest.mark.parametrize("share", [0.2, 0.6, 0.99])
@pytest.mark.parametrize("out_size", [(16, 16), (100, 100)], ids=["reduced", "whole"])
def test_a_truncated_jpeg_is_broken_however_it_is_decoded(share, out_size, tmp_path):
    path = tmp_path / "1.jpg"
    photograph(120, 160).save(path, quality=95)
    cut(path, share)
    with pytest.raises(UserError, match="1.jpg is not a readable image"):
        ImageFile(path).resized_crop((0, 0, 120, 160), out_size)
    with pytest.raises(UserError, match="1.jpg is not a readable image"):
        read_image(path)


def stream(data, splits, augmentation):
    """Images and labels of the positions below splits[-1], cut into batches at the other splits."""
    batches = [np.arange(*ends) for ends in zip([0, *splits], splits, strict=False)]
    images, labels = zip(*data.train_batches(batches, augmentation), strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize("kind", ["files", "in memory"])
def test_rand_augment_depends_on_seed_epoch_and_sample_alone(kind, tmp_path):
    paths = write_jpegs(tmp_path, 6)
    augmentation = PLAIN._replace(rand_augment=(2, 15))
    if kind == "files":
        sets = [folder_images(paths, workers) for workers in (0, 0, 2)]
    else:
        pictures = torch.stack([tv.resize(read_image(path), [20, 24], antialias=True) for path in paths])
        sets = [TensorImages(pictures, range(6), map(str, range(6)), CPU)] * 2
    whole, labels = stream(sets[0], [12], augmentation)  # two epochs
    for data, splits in zip(sets[1:], ([1, 5, 12], [4, 8, 12]), strict=False):
        torch.rand(3)  # nobody else's draws matter
        images, their_labels = stream(data, splits, augmentation)
        assert torch.equal(images, whole)
        assert torch.equal(labels, their_labels)
    plain, _ = stream(sets[0], [12], PLAIN)
    changed = (plain != whole).flatten(1).any(dim=1)
    assert changed.sum() >= 8  # some operations are none
    other, _ = stream(sets[0], [12], augmentation._replace(seed=6))
    assert not torch.equal(other, whole)


def test_rand_augment_is_torchvisions_after_crop_and_flip_and_leaves_its_generator_alone(tmp_path):
    data = folder_images(write_jpegs(tmp_path, 4))
    plain, labels = stream(data, [4], PLAIN)
    found, _ = stream(data, [4], PLAIN._replace(rand_augment=(3, 20)))
    words = rand_augment_bits(5, np.zeros(4, int), labels.numpy(), 4)  # here a label is the sample's index
    for image, word, mine in zip(denormalise(plain), words, found, strict=True):
        torch.manual_seed(int(word))
        assert torch.equal(normalise(v2.RandAugment(3, 20)(image)), mine)
        state = torch.get_rng_state()
        rand_augmented(image, word, 3, 20)
        assert torch.equal(torch.get_rng_state(), state)


def test_mean_and_deviation_are_torchvisions():
    images = torch.arange(256, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    usual = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    torch.testing.assert_close(normalise(images, "imagenet"), usual(images / 255), rtol=1e-6, atol=1e-6)
    floats = images.float()
    torch.testing.assert_close(normalise(floats, "half"), v2.Normalize([0.5] * 3, [0.5] * 3)(floats / 255))
    assert torch.equal(floats, images.float())  # what is given stays
    for name in ("half", "imagenet"):
        assert torch.equal(denormalise(normalise(images, name), name), images)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_picture_gives_its_place_to_the_next_readable_one(workers, tmp_path, capsys):
    paths = write_jpegs(tmp_path, 8)
    whole, order = stream(folder_images(paths), [16], PLAIN)
    for row in (2, 3, 7):
        cut(paths[row])
    data = folder_images(paths, workers, skip_broken=True)
    images, labels = stream(data, [5, 10, 16], PLAIN)
    assert labels.tolist() == [{2: 4, 3: 4, 7: 0}.get(label, label) for label in order.tolist()]
    intact = torch.tensor([label not in (2, 3, 7) for label in order])
    assert torch.equal(images[intact], whole[intact])
    assert data.unreadable == {str(paths[row]) for row in (2, 3, 7)}
    errors = capsys.readouterr().err
    assert len(re.findall(r"skipped: .* is not a readable image: ", errors)) == 3  # of two epochs, each named once
    assert all(f"skipped: {paths[row]} is not" in errors for row in (2, 3, 7))

    batches = list(data.eval_batches((16, 16), 2, one_process()))
    assert [labels.tolist() for _, labels in batches] == [[0, 1], [4, 5], [6]]  # the batch of 2 and 3 is none
    assert len(data.examples(8, (16, 16))[1]) == 5
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("workers", [0, 1])
def test_without_the_flag_a_broken_picture_ends_the_run_and_names_the_flag(workers, tmp_path):
    paths = write_jpegs(tmp_path, 3)
    cut(paths[1])
    message = f"{re.escape(str(paths[1]))} is not a readable image: .*; --skip_broken skips such images"
    for batches in (
        folder_images(paths, workers).train_batches([np.arange(3)], PLAIN),
        folder_images(paths, workers).eval_batches((16, 16), 3, one_process()),
    ):
        with pytest.raises(UserError, match=message):
            list(batches)


def test_pictures_in_memory_are_read_by_workers_where_one_is_to_be_skipped(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "one").mkdir(parents=True)
        for i in range(3):
            photograph(16, 16).save(tmp_path / split / "one" / f"{i}.jpg")
    cut(tmp_path / "train" / "one" / "1.jpg")
    with pytest.raises(UserError, match="1.jpg is not a readable image: .*--skip_broken skips such"):
        load_data("imagefolder", "train", tmp_path)
    data = load_data("imagefolder", "train", tmp_path, skip_broken=True)
    assert isinstance(data, FolderImages)
    assert len(next(data.train_batches([np.arange(3)], PLAIN))[0]) == 3
    assert len(data.unreadable) == 1


def test_nothing_but_broken_pictures_is_an_error(tmp_path):
    paths = write_jpegs(tmp_path, 3)
    for path in paths:
        path.write_bytes(b"broken")
    data = folder_images(paths, skip_broken=True)
    with pytest.raises(UserError, match="none of the 3 images can be read"):
        next(data.train_batches([np.arange(3)], PLAIN))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_fails_ends_the_run_instead_of_all_pictures_being_skipped(workers, tmp_path, capsys):
    paths = write_jpegs(tmp_path, 2) + [tmp_path / f"missing{i:03d}.JPEG" for i in range(MAX_UNREADABLE + 20)]
    batches = folder_images(paths, workers, skip_broken=True).train_batches([np.arange(100)], PLAIN)
    with pytest.raises(UserError, match=f"^{MAX_UNREADABLE} images in a row can't be read, the last one .*JPEG$"):
        next(batches)
    assert capsys.readouterr().err.count("skipped: ") >= MAX_UNREADABLE


class Guess(torch.nn.Module):
    """Takes every picture for class 0."""

    def forward(self, images):
        return torch.tensor([2.0, 1.0, 0.0, 0.0]).expand(len(images), -1)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_skipped_pictures_are_left_out_of_the_means_of_all_processes(size, tmp_path, monkeypatch):
    """As the processes would, one after the other; what each would sum is summed here."""
    paths = write_jpegs(tmp_path, 4)
    cut(paths[0])
    parts = []
    monkeypatch.setattr("utils.evaluation.sum_over_processes", lambda tensor: parts.append(tensor.clone()) or tensor)
    for rank in range(size):
        data = folder_images(paths, skip_broken=True)
        data.labels[:] = [0, 0, 1, 1]
        processes = Processes(rank, size, 0, CPU)
        try:
            evaluate(Guess(), data, (16, 16), 2, Precision("O0", torch.float32, CPU), processes)
        except UserError as error:  # the process whose only picture is broken is not alone in reality
            assert (size, rank) == (4, 0), error
    _, top1, _, count = sum(parts).tolist()
    assert (top1, count) == (1, 3)


def test_workers_are_the_cores_of_this_process_shared_by_the_processes_of_the_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert default_workers() == 12
    for processes, workers in (("4", 3), ("8", 1), ("24", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert default_workers() == workers
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(256)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert default_workers() == 16


def test_on_a_cpu_batches_pass_as_they_are():
    batches = [(torch.ones(2), torch.zeros(2)), (torch.ones(1), torch.zeros(1))]
    found = list(on_device(iter(batches), CPU))
    assert all(mine is theirs for mine, theirs in zip(found, batches, strict=True))


def test_imagenets_classes_get_their_names():
    wnids = ImageNetInfo("imagenet-1k").label_names()
    names = evaluate_script.readable(wnids)
    assert (names[0], names[1], names[999]) == (
        *("tench (n01440764)", "goldfish (n01443537)"),
        f"toilet tissue ({wnids[999]})",
    )
    assert len(set(names)) == 1000
    for others in (wnids[:999], [*wnids[:-1], "n99999999"], ["cat", "dog"]):
        assert evaluate_script.readable(others) == others


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--rand_augment", 0, 9], "--rand_augment 0 9: give at least 1 operation and a magnitude of at most 30"),
        (["--rand_augment", 2, 31], "--rand_augment 2 31: give at least 1"),
        (["--mean_std", "imagenett"], "unknown mean and standard deviation 'imagenett'; did you mean imagenet?"),
    ],
)
def test_wrong_flags_of_the_data(flags, message, tiny_flags, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        call_main(train, tiny_flags(*flags), monkeypatch)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_whole_path_on_a_small_folder_like_imagenet(tmp_path, tiny_flags):
    """Pictures made by the script, a run with all flags of the data, its accuracy, the classes of a picture."""
    for split in ("train", "val"):
        for i, name in enumerate(("airplane", "cat", "emu")):
            write_jpegs(tmp_path / "source" / split / name, 4 + i, ".jpg")
    folder = tmp_path / "like"
    flags = ("--source", tmp_path / "source", "--output_dir", folder, "--per_class", 4, "--val_per_class", 2)
    assert "like/val: 6 images of 3 classes" in succeed("scripts/make_imagenet_like.py", *flags)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.JPEG"))
    assert len(names) == 18
    assert "train/n02690373/n02690373_3.JPEG" in names
    sizes = {Image.open(path).size for path in folder.rglob("*.JPEG")}
    assert len(sizes) == 18
    assert 200 <= min(map(min, sizes)) <= max(map(max, sizes)) <= 500
    again = script("scripts/make_imagenet_like.py", *flags)
    assert (again.returncode, "already has train/ or val/" in again.stderr) == (2, True)

    cut(folder / "train" / "emu" / "emu_2.JPEG")
    cut(folder / "val" / "emu" / "emu_1.JPEG")
    data = ["--dataset", "imagenet", "--data_dir", folder, "--mean_std", "imagenet", "--rand_augment", 2, 9]
    data += ["--horizontal_flip", "--num_workers", 1, "--num_steps", 3, "--eval_every", 3, "--train_batch_size", 12]
    failed = script("train.py", *tiny_flags(*data))
    assert failed.returncode == 2
    assert re.search(r"emu_\d.JPEG is not a readable image: .*; --skip_broken leaves", failed.stderr)
    done = script("train.py", *tiny_flags(*data, "--skip_broken", "--overwrite"))
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"skipped: .*(train|val)/emu/emu_\d.JPEG", done.stderr)) == ["train", "val"]
    run = tmp_path / "output" / "run"
    assert read_config(run)["flags"]["rand_augment"] == [2, 9]

    evaluation = ("evaluate.py", "--checkpoint", run / "last.safetensors")
    report = json.loads(succeed(*evaluation, "--skip_broken", "--json"))
    row = (run / "metrics.csv").read_text().splitlines()[-1].split(",")
    assert report["loss"] == pytest.approx(float(row[3]), rel=1e-5)
    assert (report["images"], report["skipped"]) == (5, 1)
    assert list(report["per_class_accuracy"]) == ["emu", "n02123045", "n02690373"]
    assert "--skip_broken" in script(*evaluation).stderr

    picture = folder / "val" / "n02123045" / "n02123045_0.JPEG"
    [found] = json.loads(succeed(*evaluation, picture, "--json"))
    model, classes, _, _ = evaluate_script.load_model(run / "last.safetensors")
    image = v2.Compose([v2.Resize(9, antialias=True), v2.CenterCrop(8)])(read_image(picture))  # 8 * 256 / 224
    usual = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(image / 255)
    probabilities = model.eval()(usual[None]).softmax(dim=1)[0]
    expected = {name: p.item() for name, p in zip(classes, probabilities, strict=True)}
    assert {best["class"]: best["probability"] for best in found["classes"]} == pytest.approx(expected, rel=1e-4)
    printed = succeed("visualize.py", "--checkpoint", run / "last.safetensors", "--image", picture, "--rollout")
    assert printed.strip().endswith("-rollout.png")
