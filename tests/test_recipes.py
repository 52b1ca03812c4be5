"""--recipe: closed forms at every border, given flags win, and the same command resumes to the same bits."""

import json
import shutil

import pytest
import torch

import train
from command_line import patch_of, train_parser
from helpers import (
    assert_same_bits,
    load_data,
    make_shallow,
    read_config,
    run_dir,
    run_processes,
    stop_after,
    train_run,
    truncate,
    write_images,
)
from models import MODEL_TYPES, RESNETS, build_model, pixels_per_patch
from scripts.experiment import TRAIN
from utils.data.datasets import DataOptions
from utils.errors import UserError
from utils.recipes import RECIPES, TrainingImages, choose, parse_with_recipe, training_images
from utils.records.run_folder import is_finished
from utils.sweeps import check_earlier_run, plan_run

SHORT = {"num_steps": 500, "warmup_steps": 100}
MIDDLE = {"num_steps": 10_000, "warmup_steps": 500}
LONG = {"num_steps": 20_000, "warmup_steps": 500}
BORDERS = [(19_999, SHORT), (20_000, MIDDLE), (499_999, MIDDLE), (500_000, LONG)]
DECAY = {500: [200, 300, 400], 10_000: [3000, 6000, 9000], 20_000: [6000, 12_000, 18_000]}


def chosen(name, count, side=(300, 400), patch=16, **given):
    return choose(name, TrainingImages(count, *side), patch, given)[0]


@pytest.mark.parametrize("count, length", BORDERS)
def test_bit_follows_the_released_hyperrule(count, length):
    # At 20,000 images 10,000 steps of 512 would be 256 passes; half the batch keeps the length below the cap.
    flags = chosen("bit", count, train_batch_size=256)
    assert flags == {
        **length,
        "optimizer": "sgd",
        "learning_rate": pytest.approx(0.0015),
        "weight_decay": 0,
        "decay_type": "step",
        "decay_steps": DECAY[length["num_steps"]],
        "max_grad_norm": 0,
        "resize_size": 512,
        "img_size": 480,
        "horizontal_flip": True,
        "mixup": 0.1 if count >= 20_000 else 0,
    }


@pytest.mark.parametrize("count, length", BORDERS)
def test_vit_follows_the_paper(count, length):
    flags = chosen("vit", count, train_batch_size=256)
    assert flags == {
        **length,
        "optimizer": "sgd",
        "learning_rate": pytest.approx(0.015),
        "weight_decay": 0,
        "decay_type": "cosine",
        "max_grad_norm": 1,
        "img_size": 384,
        "min_crop_scale": 0.05,
        "horizontal_flip": True,
    }


def test_scratch_trains_for_a_hundred_passes():
    assert chosen("scratch", 50_000, (32, 32), 4) == {
        "train_batch_size": 128,
        "num_steps": 39_063,  # 100 * 50,000 / 128, rounded up
        "warmup_steps": 1953,
        "optimizer": "muon",
        "learning_rate": 4e-3,
        "weight_decay": 0.5,
        "decay_type": "cosine",
        "max_grad_norm": 1,
        "label_smoothing": 0.1,
        "img_size": 32,
        "crop_padding": 4,
        "horizontal_flip": True,
    }
    assert chosen("scratch", 50_000, train_batch_size=512)["learning_rate"] == pytest.approx(8e-3)


@pytest.mark.parametrize("side, expected", [((95, 96), (160, 128)), ((96, 96), (512, 480)), ((48, 192), (512, 480))])
def test_bit_resizes_small_images_less(side, expected):
    flags = chosen("bit", 1000, side)
    assert (flags["resize_size"], flags["img_size"]) == expected


@pytest.mark.parametrize(
    "side, patch, expected",
    [
        ((8, 8), 4, 16),  # at least 4 patches per side
        ((28, 28), 4, 28),
        ((30, 30), 4, 32),
        ((500, 300), 4, 64),  # at most 16
        ((64, 64), 16, 64),
        ((500, 300), 16, 224),
        ((500, 300), 14, 224),
    ],
)
def test_scratch_takes_the_images_own_size(side, patch, expected):
    assert chosen("scratch", 1000, side, patch)["img_size"] == expected


@pytest.mark.parametrize(
    "patch, bit, vit", [(16, (512, 480), 384), (32, (512, 480), 384), (14, (508, 476), 378), (8, (512, 480), 384)]
)
def test_image_sizes_are_rounded_to_the_patch_grid(patch, bit, vit):
    flags = chosen("bit", 1000, patch=patch)
    assert (flags["resize_size"], flags["img_size"]) == bit
    assert chosen("vit", 1000, patch=patch)["img_size"] == vit


@pytest.mark.parametrize("name, count, batch, steps", [("bit", 1000, 512, 390), ("vit", 20_000, 512, 7812)])
def test_no_recipe_exceeds_200_passes(name, count, batch, steps):
    flags, capped = choose(name, TrainingImages(count, 300, 400), 16, {})
    assert (flags["train_batch_size"], flags["num_steps"]) == (batch, steps)
    assert steps * batch <= 200 * count < (steps + 1) * batch
    assert capped == (500 if count < 20_000 else 10_000)
    assert flags["warmup_steps"] == round({500: 100, 10_000: 500}[capped] * steps / capped)
    if name == "bit":
        assert flags["decay_steps"] == [round(share * steps) for share in (0.4, 0.6, 0.8)]
    assert choose(name, TrainingImages(15_000, 300, 400), 16, {})[1] is None


@pytest.mark.parametrize("count, batch", [(512, 512), (511, 256), (100, 64), (1, 1)])
def test_a_batch_contains_no_image_twice(count, batch):
    flags = chosen("bit", count)
    assert flags["train_batch_size"] == batch
    assert flags["learning_rate"] == pytest.approx(0.003 * batch / 512)
    assert 1 <= flags["num_steps"] <= 200 * count // batch


def test_the_rest_follows_from_given_flags():
    flags = chosen("bit", 5000, num_steps=1000, img_size=224, learning_rate=0.01)
    assert (flags["warmup_steps"], flags["decay_steps"]) == (200, [400, 600, 800])
    assert flags["resize_size"] == 239  # 224 * 512 / 480
    assert not {"num_steps", "img_size", "learning_rate"} & flags.keys()
    flags = chosen("vit", 5000, epochs=3.0)  # 30 steps of 512
    assert flags["warmup_steps"] == 6
    assert "num_steps" not in flags
    assert "decay_steps" not in chosen("bit", 5000, decay_type="cosine")
    assert "resize_size" not in chosen("bit", 5000, min_crop_scale=0.2)
    assert "resize_size" not in chosen("bit", 5000, crop_padding=4)
    flags, capped = choose("bit", TrainingImages(100, 50, 50), 16, {"num_steps": 5000, "train_batch_size": 100})
    assert flags["decay_steps"] == [2000, 3000, 4000]  # more than 200 passes, as asked for
    assert capped is None


@pytest.mark.parametrize("img_size, border", [(4, 1), (16, 2), (64, 8)])
def test_the_border_of_scratch_is_an_eighth_of_the_image_size(img_size, border):
    assert chosen("scratch", 5000, (32, 32), 4, img_size=img_size)["crop_padding"] == border


@pytest.mark.parametrize("given", [{"min_crop_scale": 0.5}, {"resize_size": 40}])
def test_scratch_has_no_border_with_another_crop(given):
    assert "crop_padding" not in chosen("scratch", 5000, (32, 32), 4, **given)


def test_a_learning_rate_is_for_its_optimizer():
    with pytest.raises(UserError, match="--recipe bit has a learning rate for --optimizer sgd; with adamw give"):
        chosen("bit", 1000, optimizer="adamw")
    assert "optimizer" not in chosen("bit", 1000, optimizer="adamw", learning_rate=1e-4)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_patch_grid_is_that_of_the_model(model_type):
    patch = pixels_per_patch(model_type)
    with torch.device("meta"):
        if model_type in RESNETS:
            model = build_model(model_type)
            x = model.stem(torch.zeros(1, 3, 2 * patch, 2 * patch))
            for stage in model.stages:
                x = stage.blocks(x)
            assert x.shape[2:] == (2, 2)
        else:
            build_model(model_type, 4 * patch)
            with pytest.raises(ValueError, match=f"is not a multiple of the model's patch size {patch}$"):
                build_model(model_type, 4 * patch + patch // 2)


def test_given_flags_are_known_even_if_they_equal_the_default():
    parser = train_parser()
    flags, given = parser.parse_given(["--name", "x", "--num_steps", "10000", "--horizontal_flip", "false", "--bf16"])
    assert given == {"name", "num_steps", "horizontal_flip", "bf16"}
    assert vars(flags) == vars(parser.parse_args(["--name", "x", "--bf16"]))
    _, given = train_parser("", "ResNet50x3_Flops").parse_given(["--name", "x"])
    assert given == {"name"}


def test_the_images_are_counted_after_the_split():
    assert training_images("digits", DataOptions()) == (len(load_data("digits", "train")), 8, 8)
    for options in ({"val_split": 0.1}, {"examples_per_class": 7}, {"val_split": 0.5, "examples_per_class": 9}):
        assert training_images("digits", DataOptions(**options)).count == len(load_data("digits", "train", **options))


def test_a_folder_has_the_median_size_of_its_headers(image_folder):
    shutil.rmtree(image_folder / "train")
    paths = write_images(image_folder / "train" / "cat", [(40, 90), (10, 30), (300, 20)])
    write_images(image_folder / "train" / "dog", [(50, 60), (60, 50)])
    (image_folder / "train" / "dog" / "broken.png").write_bytes(b"no image")
    truncate(paths[0])  # its pixels can't be decoded, but its header can be read
    assert training_images("imagefolder", DataOptions(str(image_folder))) == (6, 50, 50)


def test_a_folder_without_a_readable_header_is_an_error(image_folder, tiny_flags, main_fails):
    for path in (image_folder / "train").rglob("*.png"):
        path.write_bytes(b"no image")
    data = ["--dataset", "imagefolder", "--data_dir", image_folder]
    message = main_fails(train, *tiny_flags(*data, "--recipe", "scratch"))
    assert "is not a readable image: its format is unknown" in message


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--recipe", "bits"], "unknown recipe 'bits'; did you mean bit?"),
        (["--recipe", "bit", "--dataset", "imagefolder", "--data_dir", "/nowhere"], "/nowhere is not a folder"),
        (["--recipe", "scratch", "--optimizer", "sgd"], "for --optimizer muon; with sgd give --learning_rate too"),
        (["--recipe", "vit", "--decay_steps", 5], "--decay_steps is for --decay_type step, not cosine"),
    ],
)
def test_errors_are_one_line(flags, message, tiny_flags, main_fails, tmp_path):
    assert message in main_fails(train, *tiny_flags(*flags))
    assert not (tmp_path / "output" / "run").exists()


def test_a_repeated_run_leaves_nothing_to_a_recipe(tiny_flags, main_fails, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"flags": {"num_steps": 5}}))
    message = main_fails(train, *tiny_flags("--recipe", "bit", "--config", tmp_path / "config.json"))
    assert "--recipe chooses flags that are not given, but --config gives them all; omit one of the two" in message


def recipe_flags(tmp_path, name="run", recipe="bit"):
    """A short run by a recipe, of which model, input size and length are given."""
    flags = ["--name", name, "--output_dir", tmp_path, "--dataset", "digits", "--model_type", "ViT-Nano_4"]
    flags += ["--data_dir", tmp_path / "data"]
    flags += ["--recipe", recipe, "--img_size", 8, "--train_batch_size", 16, "--num_steps", 6, "--eval_every", 3]
    return [str(flag) for flag in flags]


def test_the_same_command_resumes_to_the_same_bits(tmp_path, monkeypatch, capsys):
    make_shallow(monkeypatch)
    flags = recipe_flags(tmp_path)
    whole, rows = train_run(recipe_flags(tmp_path, "whole"), monkeypatch, "whole")
    assert "recipe bit, 1,437 training images of 8x8 pixels\n  chosen: --optimizer sgd " in capsys.readouterr().out
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_after(4, patch)
        train_run(flags, patch)
    resumed, resumed_rows = train_run([*flags, "--resume"], monkeypatch)
    assert "warning: resuming with" not in capsys.readouterr().out
    assert_same_bits(resumed, whole)
    assert [row["lr"] for row in rows] == [row["lr"] for row in resumed_rows]
    recorded = read_config(run_dir(flags))["flags"]
    expected = chosen("bit", 1437, (8, 8), 4, img_size=8, train_batch_size=16, num_steps=6)
    assert recorded["recipe"] == "bit"
    assert expected.items() <= recorded.items()
    assert (recorded["resize_size"], recorded["decay_steps"], recorded["warmup_steps"]) == (10, [2, 4, 5], 1)


def test_a_sweep_knows_the_flags_of_its_runs(tmp_path, monkeypatch):
    make_shallow(monkeypatch)
    train_run(recipe_flags(tmp_path), monkeypatch)
    run = plan_run(TRAIN, {"name": "run", "output_dir": tmp_path}, recipe_flags(tmp_path)[4:])
    assert vars(run.flags) == {**read_config(run.folder)["flags"], "resume": True}
    assert is_finished(run.folder, run.flags)
    check_earlier_run(run)
    other = plan_run(TRAIN, {"name": "run", "output_dir": tmp_path}, recipe_flags(tmp_path, recipe="vit")[4:])
    with pytest.raises(UserError, match="was made with --"):
        check_earlier_run(other)


def test_processes_choose_the_same(tmp_path, monkeypatch):
    make_shallow(monkeypatch)
    training_images.cache_clear()  # so that each process reads the data, one after the other
    flags = [*recipe_flags(tmp_path), "--num_steps", "1"]
    done = run_processes(2, flags)
    assert [status for status, _ in done] == [0, 0], done
    assert [text.count("recipe bit, ") for _, text in done] == [1, 0]
    expected, text = parse_with_recipe(train_parser(), patch_of, flags)
    assert read_config(run_dir(flags))["flags"] == vars(expected)
    assert "  chosen: " in text


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_does_not_suit_the_weights_is_a_warning(name):
    flags = ["--name", "x", "--dataset", "digits", "--recipe", name]
    fine_tuning = name != "scratch"
    for weights in ([], ["--pretrained_dir", "ViT-B_16.npz"]):
        _, text = parse_with_recipe(train_parser(), patch_of, [*flags, *weights])
        assert ("warning" in text) == (fine_tuning != bool(weights))


def test_without_a_recipe_nothing_is_chosen_or_read(monkeypatch):
    monkeypatch.setattr("utils.recipes.training_images", lambda *_: pytest.fail("read the data"))
    flags, text = parse_with_recipe(train_parser(), patch_of, ["--name", "x"])
    assert text == ""
    assert vars(flags) == vars(train_parser().parse_args(["--name", "x"]))
