"""The flags of the training scripts: their help, defaults and types; a wrong one is one line on stderr and status 2."""

import argparse
import re

import pytest

import evaluate
import train
import train_flops
import train_resnet
from command_line import train_parser
from helpers import call_main, fails, script
from utils.arguments import COMMON, training_parser
from utils.flag_groups import add_model_flags

WRONG = [
    (["--img_size", "big"], "--img_size: big is not a whole number above 0"),
    (["--model_type", "ViT-B16"], "unknown model type 'ViT-B16'; did you mean ViT-B_16"),
    (["--dataset", "cifar"], "unknown dataset 'cifar'; did you mean cifar10, cifar100"),
    (["--optimizer", "adam_w"], "unknown optimizer 'adam_w'; did you mean adamw"),
    (["--decay_type", "cosin"], "did you mean cosine"),
    (["--norm_type", "XN"], "unknown norm type 'XN'"),
    (["--examples_per_class", 0], "0 is not a whole number above 0"),
    (["--fp16_opt_level", "O5"], "unknown opt level 'O5'; did you mean O0, O1, O2, O3"),
    (["--learning_rate", -1], "--learning_rate: -1 is not a number above 0"),
    (["--learning_rate", "nan"], "nan is not a number above 0"),
    (["--weight_decay", -0.1], "-0.1 is not a number, 0 or above"),
    (["--label_smoothing", 1], "1 is not a number from 0 to below 1"),
    (["--mixup", 0.001], "0.001 is not 0 or a number of at least 0.01"),
    (["--cutmix", -1], "-1 is not 0 or a number of at least 0.01"),
    (["--min_crop_scale", 0], "0 is not a number above 0 and at most 1"),
    (["--dropout_rate", 1.5], "1.5 is not a number from 0 to below 1"),
    (["--train_batch_size", 0], "0 is not a whole number above 0"),
    (["--seed", -1], "-1 is not a whole number from 0 to 2**32 - 1"),
    (["--mean_std", "imagenett"], "unknown mean and standard deviation 'imagenett'; did you mean imagenet?"),
    (["--best_metric", "f1"], "unknown metric 'f1'; did you mean "),
    (["--class_weights", "balance"], "unknown class weights 'balance'; did you mean balanced?"),
    (["--auto_augment", "cifar100"], "unknown policy 'cifar100'; did you mean cifar10?"),
    (["--color_jitter", 1.5], "--color_jitter: 1.5 is not a number from 0 to 1"),
    (["--random_erasing", -0.1], "--random_erasing: -0.1 is not a number from 0 to 1"),
    (["--repeated_augmentation", 0], "--repeated_augmentation: 0 is not a whole number above 0"),
    (["--no_such_flag"], "unrecognized arguments: --no_such_flag"),
]


@pytest.mark.parametrize("flags, message", WRONG, ids=[" ".join(map(str, flags)) for flags, _ in WRONG])
def test_a_wrong_value_is_named_and_nothing_is_started(flags, message, tiny_flags, monkeypatch, capsys, tmp_path):
    assert message in fails(train, tiny_flags(*flags), monkeypatch, capsys)
    assert not (tmp_path / "output" / "run").exists()


def test_the_name_of_the_run_is_required(monkeypatch, capsys):
    assert "--name" in fails(train, [], monkeypatch, capsys)


@pytest.mark.parametrize("module", [train_resnet, train_flops])
def test_the_scripts_of_the_cnns_have_no_model_flags(module, tiny_flags, monkeypatch, capsys):
    assert "unrecognized arguments: --model_type" in fails(module, tiny_flags(), monkeypatch, capsys)
    message = fails(module, ["--name", "x", "--pretrained_dir", "BiT-M-R50x3.npz"], monkeypatch, capsys)
    assert "bit_models/BiT-M-R50x3.npz" in message


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


def test_a_wrong_flag_in_the_shell_is_one_line_and_status_2():
    done = script("train.py", "--name", "x", "--img_size", "225")
    assert done.returncode == 2
    assert done.stderr == "train.py: error: image size 225 is not a multiple of the model's patch size 16\n"


def test_every_flag_has_help_in_a_group_and_the_usual_defaults_are_unchanged():
    parser = training_parser("")
    add_model_flags(parser, ("a",), ("b",), ("c",), str)
    flags = [action for action in parser._actions if action.dest not in ("help", "help_all")]
    assert all(action.help for action in flags)
    assert {action.container.title for action in flags}.isdisjoint({"options", "positional arguments"})
    defaults = {action.dest: action.default for action in flags}
    usual = {
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
        "best_metric": "accuracy",
        "class_weights": "none",
    }
    assert usual.items() <= defaults.items()
    text = parser.format_help()
    assert "(default: 0.03)" in text
    assert argparse.SUPPRESS not in text


@pytest.mark.parametrize("module, model_type", [(train, None), (train_resnet, "ResNet50x3_Params")])
def test_help_is_a_page_and_help_all_shows_every_flag(module, model_type, monkeypatch, capsys):
    def shown(flag):
        with pytest.raises(SystemExit) as stopped:
            call_main(module, [flag], monkeypatch)
        assert stopped.value.code == 0
        text = capsys.readouterr().out
        return text, {name for name in flags if f"\n  --{name} " in text or f"\n  -h, --{name} " in text}

    flags = {action.dest for action in train_parser("", model_type)._actions}
    page, common = shown("--help")
    assert common == (COMMON & flags) | {"help", "help_all"}
    assert flags | {"model_type"} >= COMMON
    assert page.count("\n") <= 75
    assert not re.search(r"ViT-\n|R50-\n", page)  # names are not divided
    everything, listed = shown("--help_all")
    assert listed == flags
    for text in (page, everything):
        assert "\n  python train.py --name photos " in text
        assert max(map(len, text.splitlines())) <= 120


def test_every_number_shows_its_default_in_the_help():
    """Unless the help text itself says what happens without the flag."""
    parser = training_parser("")
    for action in parser._actions:
        if isinstance(action.default, int | float) and not isinstance(action.default, bool):
            shown = parser._get_formatter()._expand_help(action)
            assert "default" in shown, f"{action.option_strings[0]}: {shown}"
