"""Wrong flags: one line on stderr, exit status 2, nothing started."""

import argparse
import os

import numpy as np
import pytest

import evaluate
import train
import train_flops
import train_resnet
from helpers import call_main, fails, script
from utils.arguments import training_parser
from utils.flag_groups import add_model_flags

WRONG = [
    (["--img_size", 9], "image size 9 is not a multiple of the model's patch size 4"),
    (["--img_size", 225, "--model_type", "ViT-B_16"], "image size 225 is not a multiple of the model's patch size 16"),
    (["--img_size", "big"], "--img_size: big is not a whole number above 0"),
    (["--model_type", "ViT-B16"], "unknown model type 'ViT-B16'; did you mean ViT-B_16"),
    (["--dataset", "cifar"], "unknown dataset 'cifar'; did you mean cifar10, cifar100"),
    (["--optimizer", "adam_w"], "unknown optimizer 'adam_w'; did you mean adamw"),
    (["--decay_type", "cosin"], "did you mean cosine"),
    (["--norm_type", "XN"], "unknown norm type 'XN'"),
    (["--model_type", "BiT-M-R50x1", "--norm_type", "BN"], "BiT-M-R50x1 always has GroupNorm"),
    (["--model_type", "BiT-M-R50x1", "--dropout_rate", 0.1], "BiT-M-R50x1 has no field 'dropout_rate'"),
    (["--examples_per_class", 0], "0 is not a whole number above 0"),
    (["--fp16_opt_level", "O5"], "unknown opt level 'O5'; did you mean O0, O1, O2, O3"),
    (["--learning_rate", -1], "--learning_rate: -1 is not a number above 0"),
    (["--learning_rate", "nan"], "nan is not a number above 0"),
    (["--weight_decay", -0.1], "-0.1 is not a number, 0 or above"),
    (["--label_smoothing", 1], "1 is not a number from 0 to below 1"),
    (["--mixup", 0.001], "0.001 is not 0 or a number of at least 0.01"),
    (["--cutmix", -1], "-1 is not 0 or a number of at least 0.01"),
    (["--mixup", 0.2, "--train_batch_size", 15], "--train_batch_size 15 must be even; 16 would"),
    (["--min_crop_scale", 0], "0 is not a number above 0 and at most 1"),
    (["--dropout_rate", 1.5], "1.5 is not a number from 0 to below 1"),
    (["--train_batch_size", 0], "0 is not a whole number above 0"),
    (["--train_batch_size", 16, "--gradient_accumulation_steps", 3], "not divisible by 1 processes x 3 accumulation"),
    (["--seed", -1], "-1 is not a whole number from 0 to 2**32 - 1"),
    (["--name", "a/b"], "--name 'a/b' is not a plain folder name"),
    (["--name", ""], "--name '' is not a plain folder name"),
    (["--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
    (["--download"], "--download needs --pretrained_dir"),
    (["--pretrained_dir", "checkpoint/ViT-B_99.npz"], "ViT-B_99.npz does not exist; Google publishes no file"),
    (["--pretrained_dir", "checkpoint/ViT-L_32.npz"], "imagenet21k/ViT-L_32.npz"),
    (["--pretrained_dir", "checkpoint/mine.npz", "--download"], "mine.npz does not exist"),
    (["--dataset", "imagefolder", "--data_dir", "/nowhere"], "/nowhere is not a folder"),
    (["--amp_backend", "apex"], "NVIDIA has removed apex.amp"),
    (["--no_such_flag"], "unrecognized arguments: --no_such_flag"),
]


@pytest.mark.parametrize("flags, message", WRONG, ids=[" ".join(map(str, flags)) for flags, _ in WRONG])
def test_wrong_flags(flags, message, tiny_flags, monkeypatch, capsys, tmp_path):
    assert message in fails(train, tiny_flags(*flags), monkeypatch, capsys)
    assert not (tmp_path / "output" / "run").exists()


@pytest.mark.parametrize("module", [train_resnet, train_flops])
def test_the_flags_of_the_cnns_are_those_of_train_but_the_models(module, tiny_flags, monkeypatch, capsys):
    assert "unrecognized arguments: --model_type" in fails(module, tiny_flags(), monkeypatch, capsys)
    message = fails(module, ["--name", "x", "--pretrained_dir", "BiT-M-R50x3.npz"], monkeypatch, capsys)
    assert "bit_models/BiT-M-R50x3.npz" in message


def test_the_name_is_required(monkeypatch, capsys):
    assert "--name" in fails(train, [], monkeypatch, capsys)


def test_processes_count_in_the_divisibility_of_a_batch(tiny_flags, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    message = fails(train, tiny_flags("--train_batch_size", 512), monkeypatch, capsys)
    assert "--train_batch_size 512 is not divisible by 3 processes x 1 accumulation steps; 510 would be" in message


def test_an_existing_run_needs_a_decision(tiny_flags, monkeypatch, capsys):
    call_main(train, tiny_flags("--num_steps", 1), monkeypatch)
    capsys.readouterr()
    message = fails(train, tiny_flags("--num_steps", 1), monkeypatch, capsys)
    assert "holds a run already; give --resume, --overwrite or another --name" in message
    call_main(train, tiny_flags("--num_steps", 1, "--overwrite"), monkeypatch)


@pytest.mark.skipif(os.name != "posix", reason="a device as a folder")
def test_an_output_folder_that_cannot_be_written(tiny_flags, monkeypatch, capsys):
    assert "can't be written" in fails(train, tiny_flags("--output_dir", "/dev/null/out"), monkeypatch, capsys)


def test_a_bad_checkpoint_is_found_before_the_data_is_read(tiny_flags, monkeypatch, capsys, tmp_path):
    (tmp_path / "page.npz").write_text("<html>login</html>")
    message = fails(train, tiny_flags("--pretrained_dir", tmp_path / "page.npz"), monkeypatch, capsys)
    assert "is a web page saved as .npz" in message
    np.savez(tmp_path / "other.npz", cls=np.zeros((1, 1, 7), np.float32))
    message = fails(train, tiny_flags("--pretrained_dir", tmp_path / "other.npz"), monkeypatch, capsys)
    assert "other.npz does not fit ViT-Mini_4: " in message


def test_wrong_flags_in_the_shell():
    done = script("train.py", "--name", "x", "--img_size", "225")
    assert done.returncode == 2
    assert done.stderr == "train.py: error: image size 225 is not a multiple of the model's patch size 16\n"


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "--checkpoint"),
        (["--checkpoint", "nothing.safetensors"], "nothing.safetensors does not exist"),
        (["--checkpoint", "checkpoint/ViT-B_16.npz"], "ViT-B_16.npz does not exist"),
    ],
)
def test_wrong_flags_of_evaluate(flags, message, monkeypatch, capsys):
    assert message in fails(evaluate, flags, monkeypatch, capsys)


def test_every_flag_has_help_in_a_group():
    parser = training_parser("")
    add_model_flags(parser, ("a",), ("b",), ("c",), str)
    flags = [action for action in parser._actions if action.dest != "help"]
    assert all(action.help for action in flags)
    assert {action.container.title for action in flags}.isdisjoint({"options", "positional arguments"})
    defaults = {action.dest: action.default for action in flags}
    family = {
        "dataset": "cifar10",
        "model_type": "ViT-B_16",
        "pretrained_dir": None,
        "output_dir": "output",
        "img_size": 224,
        "train_batch_size": 512,
        "eval_batch_size": 64,
        "eval_every": 100,
        "learning_rate": 3e-2,
        "weight_decay": 0,
        "num_steps": 10000,
        "decay_type": "cosine",
        "warmup_steps": 500,
        "max_grad_norm": 1.0,
        "seed": 42,
        "gradient_accumulation_steps": 1,
        "fp16": False,
        "fp16_opt_level": "O2",
        "loss_scale": 0,
        "norm_type": "LN",
    }
    assert family.items() <= defaults.items()
    text = parser.format_help()
    assert "(default: 0.03)" in text
    assert argparse.SUPPRESS not in text
