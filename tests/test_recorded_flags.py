"""--config FILE: a run that is repeated by the flags in its config.json."""

import json

import numpy as np
import pytest
from safetensors.torch import load_file

import train
import train_flops
import train_resnet
from command_line import train_parser
from helpers import ROOT, assert_same_bits, make_shallow, metrics, read_config, run_dir
from models import build_model
from synthetic import make_checkpoint
from utils.errors import UserError
from utils.recorded_flags import EXCLUDED_BY, NOT_REPEATED
from utils.records.run_folder import EARLIER_FLAGS

EARLIER_RUN = ROOT / "tests" / "fixtures" / "earlier_run" / "run" / "config.json"
PARSERS = {
    train: train_parser(),
    train_resnet: train_parser("", "ResNet50x3_Params"),
    train_flops: train_parser("", "ResNet50x3_Flops"),
}
# A value other than the default of each flag that is taken over, as on the command line.
VALUES = {
    "seed": "7",
    "pretrained_dir": "my weights/-a,b=c.npz",
    "dataset": "digits",
    "data_dir": "-photos",
    "skip_broken": None,
    "classes": "cat T-shirt/top",
    "val_split": "0.1",
    "test_split": "0.3",
    "split_seed": "3",
    "group_by": "-([0-9]+) ",
    "examples_per_class": "5",
    "test_at_end": None,
    "no_test": None,
    "img_size": "96",
    "min_crop_scale": "0.30000000000000004",
    "resize_size": "128",
    "crop_padding": "4",
    "horizontal_flip": None,
    "rand_augment": "2 9",
    "auto_augment": "trivial",
    "color_jitter": "0.4",
    "random_erasing": "0.25",
    "repeated_augmentation": "3",
    "gelu": "exact",
    "model_fields": ["num_heads=2", "resnet_layers=(2,2)"],
    "mean_std": "imagenet",
    "train_batch_size": "33",
    "eval_batch_size": "17",
    "num_steps": "11",
    "epochs": "1.5",
    "eval_every": "9",
    "best_metric": "macro_f1",
    "log_attention_every": "4",
    "gradient_accumulation_steps": "3",
    "optimizer": "muon",
    "learning_rate": "1e-05",
    "weight_decay": "0.1",
    "layer_decay": "0.75",
    "train": "last:2",
    "warmup_steps": "0",
    "decay_type": "step",
    "decay_steps": "3 5 8",
    "max_grad_norm": "0",
    "class_weights": "balanced",
    "label_smoothing": "0.1",
    "ema_decay": "0.99",
    "mixup": "0.2",
    "cutmix": "1",
    "fp16": None,
    "bf16": None,
    "fp16_opt_level": "O1",
    "amp_backend": "apex",
    "loss_scale": "128",
    "grad_checkpointing": None,
    "compile": None,
    "parallel": "fsdp",
    "model_type": "ViT-Nano_4",
    "norm_type": "BN",
    "dropout_rate": "0",
    "drop_path_rate": "0.2",
    "token_reduction": "tome",
    "keep_tokens": "1.0",
    "reduction_layer": "2",
    "tome_r": "3",
}


def write_config(path, flags):
    path.write_text(json.dumps({"flags": flags}))
    return path


def arguments_of(name, value):
    """A flag as in the shell; `value` is None for a switch."""
    flag = f"--{name}"
    if value is None:
        return [flag]
    return [flag, *value.split()] if name in ("classes", "rand_augment", "decay_steps") else [f"{flag}={value}"]


def test_every_flag_is_taken_over_or_says_only_where_and_how():
    flags = {action.dest for action in PARSERS[train]._actions} - {"help", "help_all"}
    assert flags == VALUES.keys() | NOT_REPEATED
    assert VALUES.keys().isdisjoint(NOT_REPEATED)
    assert {name for names in EXCLUDED_BY.values() for name in names} | EXCLUDED_BY.keys() <= VALUES.keys()


@pytest.mark.parametrize("module", PARSERS)
def test_all_recorded_values_are_parsed_as_they_were(module, tmp_path):
    parser = PARSERS[module]
    own = {action.dest for action in parser._actions}
    given = [text for name, value in VALUES.items() if name in own for text in arguments_of(name, value)]
    first = vars(parser.parse_args(["--name", "first", "--output_dir", "elsewhere", *given]))
    assert all(first[name] != parser.get_default(name) for name in VALUES.keys() & own)
    path = write_config(tmp_path / "config.json", first)
    again = vars(parser.parse_args(["--config", str(path), "--name", "again", "--resume"]))
    expected = {**first, "name": "again", "output_dir": "output", "resume": True, "config": str(path)}
    assert again == expected
    assert [type(again[name]) for name in again] == [type(expected[name]) for name in again]


def test_flags_that_are_given_win_wherever_they_stand(tmp_path):
    flags = vars(PARSERS[train].parse_args(["--name", "first", "--learning_rate", "0.5", "--seed", "3", "--mixup=1"]))
    path = write_config(tmp_path / "config.json", flags)
    args = PARSERS[train].parse_args(["--learning_rate=0.1", "--name", "b", f"--config={path}", "--seed", "4"])
    assert (args.learning_rate, args.seed, args.mixup, args.name) == (0.1, 4, 1, "b")


@pytest.mark.parametrize(
    "recorded, given, name, expected",
    [
        ("--epochs=3", "--num_steps=5", "epochs", None),
        ("--num_steps=5", "--epochs=3", "num_steps", 10000),  # the default, which --epochs replaces
        ("--decay_type=step --decay_steps 5 7", "--decay_type=linear", "decay_steps", None),
        ("--rand_augment 2 9", "--auto_augment=trivial", "rand_augment", None),
        ("--auto_augment=trivial", "--rand_augment 2 9", "auto_augment", None),
        ("--bf16", "--fp16", "bf16", False),
        ("--val_split=0.1", "--test_at_end", "val_split", None),
        ("--no_test", "--test_at_end", "no_test", False),
        ("--test_at_end", "--no_test", "test_at_end", False),
        ("--resize_size=40", "--min_crop_scale=0.5", "resize_size", None),
        ("--resize_size=40", "--crop_padding=4", "resize_size", None),
    ],
)
def test_a_given_flag_replaces_recorded_ones_that_it_excludes(recorded, given, name, expected, tmp_path):
    flags = vars(PARSERS[train].parse_args(["--name", "first", *recorded.split()]))
    if flags["epochs"]:
        flags["num_steps"] = None  # as the checks set it, before it is recorded
    path = str(write_config(tmp_path / "config.json", flags))
    parse = PARSERS[train].parse_args
    assert getattr(parse(["--config", path, "--name", "b"]), name) == flags[name]
    assert getattr(parse(["--config", path, "--name", "b", *given.split()]), name) == expected


def test_without_a_division_nothing_is_grouped(tmp_path):
    """As the final run, --test_at_end, of a run with --val_split and --group_by and its own test images."""
    recorded = ["--name", "first", "--val_split", "0.2", "--group_by", "(.)"]
    parse = PARSERS[train].parse_args
    test_split = ["--test_split", "0.2"]
    for before, now, expected in ([], [], None), (test_split, [], "(.)"), ([], test_split, "(.)"):
        path = write_config(tmp_path / "config.json", vars(parse([*recorded, *before])))
        args = parse(["--config", str(path), "--name", "b", "--test_at_end", *now])
        assert (args.val_split, args.group_by) == (None, expected)


def test_flags_that_an_earlier_version_did_not_have_mean_what_it_did():
    args = PARSERS[train].parse_args(["--config", str(EARLIER_RUN), "--name", "b"])
    assert (args.model_type, args.learning_rate, args.dropout_rate, args.horizontal_flip) == (
        "ViT-Nano_4",
        0.01,
        0.1,
        0,
    )
    assert EARLIER_FLAGS.items() <= vars(args).items()


def test_the_first_images_of_each_class_are_not_drawn_again(tmp_path):
    flags = {**json.loads(EARLIER_RUN.read_text())["flags"], "examples_per_class": 3}
    path = str(write_config(tmp_path / "config.json", flags))
    with pytest.raises(UserError, match="config.json is of an earlier version, in which --examples_per_class took the"):
        PARSERS[train].parse_args(["--config", path, "--name", "b"])
    assert (
        PARSERS[train].parse_args(["--config", path, "--name", "b", "--examples_per_class=4"]).examples_per_class == 4
    )


WRONG = [
    ("{", "config.json is not valid JSON: "),
    ('"text"', "config.json does not contain the flags of a run"),
    ('{"flags": [1]}', "config.json does not contain the flags of a run"),
    ('{"flags": {"learning_rate": "fast"}}', "config.json: argument --learning_rate: fast is not a number above 0"),
    ('{"flags": {"learning_rate": [1, 2]}}', "config.json: argument --learning_rate: [1, 2] is not a number above 0"),
    ('{"flags": {"learning_rate": null}}', "config.json: --learning_rate has no value"),
    ('{"flags": {"num_steps": null}}', "config.json: --num_steps has no value"),
    ('{"flags": {"bf16": 1}}', "config.json: --bf16 is true or false, not 1"),
    ('{"flags": {"bf16": null}}', "config.json: --bf16 has no value"),
    ('{"flags": {"rand_augment": [2]}}', "config.json: argument --rand_augment: expected 2 arguments"),
    ('{"flags": {"rand_augment": 2}}', "config.json: argument --rand_augment: expected 2 arguments"),
    ('{"flags": {"dataset": "cifar"}}', "config.json: argument --dataset: unknown dataset 'cifar'; did you mean"),
    ('{"flags": {"no_such_flag": 1}}', "config.json: this script has no flag --no_such_flag; remove it from a copy of"),
    ('{"flags": {"help": true}}', "config.json: this script has no flag --help; remove it from a copy of the file"),
    ('{"flags": {"help_all": true}}', "config.json: this script has no flag --help_all; remove it from a copy of the"),
    ('{"flags": {"data_dir": "nowhere", "dataset": "imagefolder"}}', "nowhere is not a folder"),
]


@pytest.mark.parametrize("text, message", WRONG, ids=[text for text, _ in WRONG])
def test_a_wrong_file_is_one_line(text, message, tiny_flags, main_fails, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    given = ["--config", path, "--name", "run", "--output_dir", tmp_path / "output", "--model_type=ViT-Mini_4"]
    assert message in main_fails(train, *given, "--img_size=8")
    assert not (tmp_path / "output").exists()


def test_the_file_must_exist_and_the_name_must_be_given(main_fails, tmp_path):
    assert "config.json can't be read: No such file" in main_fails(train, "--config", tmp_path / "config.json")
    assert "can't be read: Is a directory; give the config.json of a" in main_fails(train, "--config", tmp_path)
    assert "argument --config: expected one argument" in main_fails(train, "--name", "b", "--config")
    path = write_config(tmp_path / "config.json", vars(PARSERS[train].parse_args(["--name", "first"])))
    assert "the following arguments are required: --name" in main_fails(train, "--config", path)


def test_a_script_of_one_model_does_not_repeat_runs_of_another(main_fails, tmp_path):
    flags = vars(PARSERS[train_flops].parse_args(["--name", "first"]))
    path = write_config(tmp_path / "config.json", flags)
    message = main_fails(train_resnet, "--config", path, "--name", "b")
    assert "its run trains ResNet50x3_Flops, this script ResNet50x3_Params; use train.py" in message
    assert PARSERS[train].parse_args(["--config", str(path), "--name", "b"]).model_type == "ResNet50x3_Flops"
    path = write_config(tmp_path / "config.json", {"norm_type": "BN"})
    assert "this script has no flag --norm_type" in main_fails(train_resnet, "--config", path, "--name", "b")


@pytest.mark.parametrize(
    "flags",
    [
        ["--epochs", 0.1, "--mixup", 0.2, "--rand_augment", 2, 9, "--seed", 7, "--dropout_rate", 0.2],
        ["--val_split", 0.2, "--split_seed", 3, "--optimizer", "muon", "--ema_decay", 0.9, "--best_metric", "macro_f1"],
        [
            "--examples_per_class",
            9,
            "--bf16",
            "--token_reduction",
            "tome",
            "--keep_tokens",
            0.5,
            "--reduction_layer",
            1,
        ],
    ],
)
def test_a_repeated_run_ends_with_the_same_bits(flags, tiny_flags, run_main, monkeypatch, tmp_path):
    make_shallow(monkeypatch)
    first = tiny_flags("--name", "first", "--eval_batch_size", 100, "--num_steps", 4, "--eval_every", 2, *flags)
    run_main(train, *first)
    again = repetition_of(first, "again")
    run_main(train, *again)
    for file in ("last.safetensors", "best.safetensors"):
        assert_same_bits(*(load_file(run_dir(flags) / file) for flags in (first, again)))
    measured = [[dict(row, seconds="", images_per_second="") for row in metrics(each)] for each in (first, again)]
    assert measured[0] == measured[1]
    assert read_config(run_dir(first))["flags"]["config"] is None


def repetition_of(flags, name):
    """The flags of a repetition of the run with these flags, in the same folder."""
    folder = run_dir(flags)
    return ["--config", str(folder / "config.json"), "--name", name, "--output_dir", str(folder.parent)]


def test_a_repetition_is_resumed_and_repeated(tiny_flags, run_main, monkeypatch):
    make_shallow(monkeypatch)
    first = tiny_flags("--num_steps", 2, "--learning_rate", 0.02)
    run_main(train, *first)
    again = repetition_of(first, "again")
    assert "2 steps of 16 images" in run_main(train, *again, "--resume")  # nothing to resume yet
    assert "again has finished all of its 2 steps" in run_main(train, *again, "--resume")
    assert "resuming at step 2 of 3" in run_main(train, *again, "--resume", "--num_steps", 3)
    third = repetition_of(again, "third")
    assert "3 steps of 16 images" in run_main(train, *third)
    assert read_config(run_dir(third))["flags"]["learning_rate"] == 0.02
    assert "ViT-Mini_4 on digits: 360 test images" in run_main(train, *repetition_of(first, "run"), "--mode", "eval")


def test_the_weights_of_a_repeated_run_are_read_from_the_same_path(
    tiny_flags, run_main, main_fails, tmp_path, monkeypatch
):
    make_shallow(monkeypatch)
    weights = tmp_path / "weights.npz"
    shapes = {key: array.shape for key, array in build_model("ViT-Mini_4", 8, num_classes=10).export_npz().items()}
    np.savez(weights, **make_checkpoint(shapes))
    first = tiny_flags("--pretrained_dir", weights, "--num_steps", 2)
    run_main(train, *first)
    again = repetition_of(first, "again")
    run_main(train, *again)
    assert_same_bits(*(load_file(run_dir(flags) / "last.safetensors") for flags in (first, again)))
    weights.unlink()
    assert "weights.npz does not exist" in main_fails(train, *again, "--name", "third")
