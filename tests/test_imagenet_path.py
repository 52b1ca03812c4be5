"""ImageNet's path from the shell: images, a run with all flags of data, its accuracy, the classes of an image."""

import json
import re

import pytest

from helpers import read_config, script, succeed, truncate, write_jpegs
from inference import SavedModel
from utils.data.images import read_image


@pytest.mark.slow
def test_imagenets_path_from_images_to_accuracy_classes_and_figure(tmp_path, tiny_flags):
    for split in ("train", "val"):
        for i, name in enumerate(("airplane", "cat", "emu")):
            write_jpegs(tmp_path / "source" / split / name, 4 + i, ".jpg")
    folder = tmp_path / "like"
    flags = ("--source", tmp_path / "source", "--output_dir", folder, "--per_class", 4, "--val_per_class", 2)
    assert "like/val: 6 images of 3 classes" in succeed("scripts/make_imagenet_like.py", *flags)

    truncate(folder / "train" / "emu" / "emu_2.JPEG")
    truncate(folder / "val" / "emu" / "emu_1.JPEG")
    data = ["--dataset", "imagenet", "--data_dir", folder, "--mean_std", "imagenet", "--rand_augment", 2, 9]
    data += ["--horizontal_flip", "--num_workers", 1, "--num_steps", 3, "--eval_every", 3, "--train_batch_size", 12]
    failed = script("train.py", *tiny_flags(*data))
    assert failed.returncode == 2
    assert re.search(r"emu_\d.JPEG is not a readable image: .*; --skip_broken skips such images", failed.stderr)
    done = script("train.py", *tiny_flags(*data, "--skip_broken", "--overwrite"))
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"skipped: .*(train|val)/emu/emu_\d.JPEG", done.stderr)) == ["train", "val"]
    run = tmp_path / "output" / "run"
    assert read_config(run)["flags"]["rand_augment"] == [2, 9]

    evaluation = ("evaluate.py", "--checkpoint", run / "last.safetensors")
    report = json.loads(succeed(*evaluation, "--skip_broken", "--json"))
    row = (run / "metrics.csv").read_text().splitlines()[-1].split(",")
    header = (run / "metrics.csv").read_text().splitlines()[0].split(",")
    assert report["loss"] == pytest.approx(float(row[header.index("val_loss")]), rel=1e-5)
    assert (report["images"], report["skipped"]) == (5, 1)
    assert list(report["per_class_accuracy"]) == ["emu", "n02123045", "n02690373"]
    assert "--skip_broken" in script(*evaluation).stderr

    image = folder / "val" / "n02123045" / "n02123045_0.JPEG"
    [found] = json.loads(succeed(*evaluation, image, "--json"))
    saved = SavedModel.load(run / "last.safetensors")
    probabilities = saved.model(saved.prepare(read_image(image))).softmax(dim=1)[0]
    expected = {name: p.item() for name, p in zip(saved.classes, probabilities, strict=True)}
    assert {best["class"]: best["probability"] for best in found["classes"]} == pytest.approx(expected, rel=1e-4)
    printed = succeed("visualize.py", "--checkpoint", run / "last.safetensors", "--image", image, "--rollout")
    assert printed.strip().endswith("-rollout.png")
