"""Rules about flags that depend on each other or on files: errors before any work."""

import os
import shutil

import numpy as np
import pytest

import train
from helpers import call_main, fails, run_dir
from utils.checks import check_figure_path, make_output_folder
from utils.errors import UserError

WRONG = [
    (["--img_size", 9], "image size 9 is not a multiple of the model's patch size 4"),
    (["--img_size", 225, "--model_type", "ViT-B_16"], "image size 225 is not a multiple of the model's patch size 16"),
    (["--model_type", "BiT-M-R50x1", "--norm_type", "BN"], "BiT-M-R50x1 always has GroupNorm"),
    (["--model_type", "BiT-M-R50x1", "--dropout_rate", 0.1], "BiT-M-R50x1 has no field 'dropout_rate'"),
    (["--model_fields", "num_heads=3"], "hidden_size 128 is not a multiple of num_heads 3"),
    (["--mixup", 0.2, "--train_batch_size", 15], "--train_batch_size 15 must be even; 16 would"),
    (["--train_batch_size", 16, "--gradient_accumulation_steps", 3], "not divisible by 1 processes x 3 accumulation"),
    (["--name", "a/b"], "--name 'a/b' is not a plain folder name"),
    (["--name", ""], "--name '' is not a plain folder name"),
    (["--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
    (["--download"], "--download needs --pretrained_dir"),
    (["--pretrained_dir", "checkpoint/ViT-B_99.npz"], "ViT-B_99.npz does not exist; Google publishes no file"),
    (["--pretrained_dir", "checkpoint/ViT-L_32.npz"], "imagenet21k/ViT-L_32.npz"),
    (["--pretrained_dir", "checkpoint/mine.npz", "--download"], "mine.npz does not exist"),
    (["--dataset", "imagefolder", "--data_dir", "/nowhere"], "/nowhere is not a folder"),
    (["--amp_backend", "apex"], "NVIDIA has removed apex.amp"),
    (["--decay_steps", 5], "--decay_steps is for --decay_type step, not cosine"),
    (["--epochs", "1e99"], "--epochs 1e+99 is more than 1,000,000,000 steps, which no run reaches"),
    (["--num_steps", 10**10], "--num_steps 10000000000 is more than 1,000,000,000 steps"),
    (["--rand_augment", 0, 9], "--rand_augment 0 9: give at least 1 operation and a magnitude of at most 30"),
    (["--rand_augment", 2, 31], "--rand_augment 2 31: give at least 1 operation"),
    (["--rand_augment", 2, 9, "--auto_augment", "trivial"], "--rand_augment and --auto_augment exclude each other"),
    (["--repeated_augmentation", 17], "--repeated_augmentation 17 is more than --train_batch_size 16: a batch would"),
]


@pytest.mark.parametrize("flags, message", WRONG, ids=[" ".join(map(str, flags)) for flags, _ in WRONG])
def test_flags_that_do_not_fit_are_named_before_the_run_starts(
    flags, message, tiny_flags, monkeypatch, capsys, tmp_path
):
    assert message in fails(train, tiny_flags(*flags), monkeypatch, capsys)
    assert not (tmp_path / "output" / "run").exists()


def test_a_batch_must_be_divisible_by_the_number_of_processes(tiny_flags, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    message = fails(train, tiny_flags("--train_batch_size", 512), monkeypatch, capsys)
    assert "--train_batch_size 512 is not divisible by 3 processes x 1 accumulation steps; 510 would be" in message


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--epochs", 2e7], "--epochs 2e+07 is more than 1,000,000,000 steps"),  # of this data set and batch
        (["--train_batch_size", 14371], "14371 is more than 10 times the 1437 training images; give at most 14370"),
    ],
)
def test_a_length_that_does_not_fit_the_data_is_named(flags, message, tiny_flags, monkeypatch, capsys):
    assert message in fails(train, tiny_flags(*flags), monkeypatch, capsys)


def test_what_is_probably_a_mistake_is_a_warning(tiny_flags, image_folder, monkeypatch, capsys):
    for split in ("train", "val"):
        shutil.rmtree(image_folder / split / "dog")
    data = ["--dataset", "imagefolder", "--data_dir", image_folder, "--num_workers", 0]
    call_main(train, tiny_flags(*data, "--num_steps", 1, "--train_batch_size", 16), monkeypatch)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert warnings == [
        "warning: the run ends within the warm-up of 3 steps; see --warmup_steps",
        "warning: a batch of 16 images contains some of the 8 training images repeatedly",
        "warning: there is a single class, 'cat', so every prediction is correct",
        "warning: 4 of the validation images are exact copies of training images",
    ]
    call_main(train, tiny_flags("--num_steps", 4, "--overwrite"), monkeypatch)
    assert "warning" not in capsys.readouterr().out


def test_a_metric_of_several_classes_needs_two(tiny_flags, image_folder, monkeypatch, capsys):
    data = ["--dataset", "imagefolder", "--data_dir", image_folder, "--num_workers", 0, "--best_metric", "macro_f1"]
    shutil.rmtree(image_folder / "val" / "dog")
    message = fails(train, tiny_flags(*data), monkeypatch, capsys)
    assert "--best_metric macro_f1 needs two classes, the validation set has 1; give accuracy" in message
    assert [path.name for path in run_dir(tiny_flags()).iterdir()] == [".lock"]
    shutil.rmtree(image_folder / "train" / "dog")
    message = fails(train, tiny_flags(*data), monkeypatch, capsys)
    assert "--best_metric macro_f1 needs two classes, imagefolder has 1; give accuracy" in message


def test_an_existing_run_is_only_resumed_or_overwritten_by_a_flag(tiny_flags, monkeypatch, capsys):
    call_main(train, tiny_flags("--num_steps", 1), monkeypatch)
    capsys.readouterr()
    message = fails(train, tiny_flags("--num_steps", 1), monkeypatch, capsys)
    assert "holds a run already; give --resume, --overwrite or another --name" in message
    call_main(train, tiny_flags("--num_steps", 1, "--overwrite"), monkeypatch)


@pytest.mark.skipif(os.name != "posix", reason="a device as a folder")
def test_an_output_folder_that_cannot_be_written_is_an_error(tiny_flags, monkeypatch, capsys):
    assert "can't be written" in fails(train, tiny_flags("--output_dir", "/dev/null/out"), monkeypatch, capsys)


def test_an_image_folder_without_classes_is_found_before_the_run_starts(image_folder, tiny_flags, monkeypatch, capsys):
    for path in (image_folder / "val").iterdir():
        path.rename(image_folder / path.name)
    flags = tiny_flags("--dataset", "imagenet", "--data_dir", image_folder)
    assert "val has no folders" in fails(train, flags, monkeypatch, capsys)
    assert not (image_folder.parent / "output").exists()


def test_a_checkpoint_that_does_not_fit_is_found_before_the_data_is_read(tiny_flags, monkeypatch, capsys, tmp_path):
    (tmp_path / "page.npz").write_text("<html>login</html>")
    message = fails(train, tiny_flags("--pretrained_dir", tmp_path / "page.npz"), monkeypatch, capsys)
    assert "is a web page saved as .npz" in message
    np.savez(tmp_path / "other.npz", cls=np.zeros((1, 1, 7), np.float32))
    message = fails(train, tiny_flags("--pretrained_dir", tmp_path / "other.npz"), monkeypatch, capsys)
    assert "other.npz does not fit ViT-Mini_4: " in message


def test_the_output_folder_is_created_or_the_error_names_its_flag(tmp_path):
    make_output_folder(tmp_path / "a" / "b", "--output_dir")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file can't be created: .*; see --figures"):
        make_output_folder(tmp_path / "file", "--figures")


def test_a_figure_needs_a_png_in_a_folder_that_exists(tmp_path):
    check_figure_path(tmp_path / "figure.png", "--figure")
    for name in ("figure.pdf", "nowhere/figure.png", ""):
        with pytest.raises(UserError, match="^--figure .* can't be written; give a .png file in a folder that exists"):
            check_figure_path(tmp_path / name, "--figure")
