"""The published fine-tuning tables: which rows are run and how, and their results next to the reported ones."""

import json
import re
import sys

import numpy as np
import pytest

from helpers import ROOT
from models import build_model
from synthetic import make_checkpoint, shapes_of
from utils.pretrained import published_url

sys.path.insert(0, str(ROOT / "scripts"))
import fine_tuning_table

TINY_MODEL = {"hidden_size": 16, "mlp_dim": 32, "num_heads": 2, "num_layers": 1}
TINY_FLAGS = ["--dataset", "digits", "--img_size", 32, "--train_batch_size", 4, "--num_steps", 2, "--warmup_steps", 1]
TINY_FLAGS += ["--model_fields", *(f"{name}={value}" for name, value in TINY_MODEL.items())]
SHORT = "ViT-B_16-21k-cifar10-224-500"


def write_weights(folder, row):
    """A file with the name of the row's weights and the keys of its model, at toy size."""
    path = folder / row.weights
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **make_checkpoint(shapes_of(build_model(row.model_type, 64, num_classes=3, **TINY_MODEL))))


def test_the_rows_are_published_files_and_each_has_a_name():
    rows = fine_tuning_table.ROWS
    assert len(rows) == 22
    for name, row in rows.items():
        folder = "imagenet21k+imagenet2012" if "-1k-" in name else "imagenet21k"
        folder = "bit_models" if row.model_type.startswith("ResNet") else folder
        assert published_url(row.weights).endswith(f"/{folder}/{row.weights.rpartition('/')[2]}".replace(" ", ""))
        assert (row.reported is None) == (folder == "bit_models")
        assert row.reported is None or 0.9 < row.reported < 1


def test_the_reported_accuracies_are_those_of_the_readme():
    """Which prints them as they were published, such as 0.923."""
    text = (ROOT / "README.md").read_text()
    for row in fine_tuning_table.ROWS.values():
        if "-21k-" in row.name and row.num_steps != 1_000 and row.reported:
            assert f"{row.reported:.4f}".rstrip("0") in text, row.name


def test_a_dry_run_prints_commands_estimates_and_sizes(run_main, tmp_path):
    flags = ["--dry_run", "--img_size", 224, "--num_steps", 10000, "--dataset", "cifar100", "--results", tmp_path]
    lines = run_main(fine_tuning_table, *flags, "--", "--bf16", "--compile").splitlines()
    titles, commands = ([line for line in lines if line.startswith("#") == is_title] for is_title in (True, False))
    assert len(commands) == 7
    for part in ("--num_steps 10000", "--train_batch_size 512", "--warmup_steps 500", "--compile", "--resume"):
        assert all(part in command for command in commands)
    hours = 10_000 * 512 / 4075 / 3600
    assert f"# ViT-B_16-21k-cifar100-224-10000: estimate {hours:.2f} h" in titles
    assert "# R50-ViT-B_16-21k-cifar100-224-10000: no estimate: speed not measured" in titles
    assert f"# estimate: {2 * hours:.2f} h of training steps on one NVIDIA H200 for 2 of 7 rows" in titles
    assert "# download, if it is missing: checkpoint/ViT-B_16.npz, about 0.41 GB" in titles
    assert "# download, if it is missing: cifar100, about 0.17 GB" in titles
    # the CNNs are cut from this model, whose whole file is downloaded
    assert "# download, if it is missing: checkpoint/BiT-M-R50x3.npz, about 1.38 GB" in titles
    assert list(tmp_path.iterdir()) == []
    without = run_main(fine_tuning_table, *flags)  # in float32, whose speed was not measured
    assert without.count("no estimate") == 7


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--rows", f"{SHORT}0"], f"unknown row '{SHORT}0'; did you mean {SHORT}, "),
        (["--img_size", "256"], "unknown img size '256'; did you mean 224"),
        (["--img_size", "384", "--num_steps", "500"], "no row has all of these values"),
        (["--weights", "nowhere", "--rows", SHORT], "ViT-B_16.npz does not exist; get it with --download"),
        (["--", "--recipe", "vit"], "--recipe is not for all runs: the rows have a recipe of their own"),
        (["--", "--epochs", "1"], "--epochs is not for all runs: the rows have a number of steps"),
    ],
)
def test_wrong_flags_are_errors_before_any_run(flags, message, main_fails, tmp_path):
    assert message in main_fails(fine_tuning_table, "--output_dir", tmp_path / "runs", *flags)
    assert not (tmp_path / "runs").exists()


def test_a_row_is_measured_once_and_the_table_says_what_was_changed(run_main, tmp_path):
    row = fine_tuning_table.ROWS[SHORT]
    write_weights(tmp_path / "weights", row)
    flags = ["--rows", SHORT, "--weights", tmp_path / "weights", "--output_dir", tmp_path / "runs"]
    flags += ["--results", tmp_path / "results", "--", *TINY_FLAGS]
    printed = run_main(fine_tuning_table, *flags)
    [path] = (tmp_path / "results").glob("*.json")
    record = json.loads(path.read_text())
    accuracy = record["result"]["last"]["test"]["accuracy"]
    lines = (tmp_path / "results" / "table.md").read_text().splitlines()
    [line] = [line for line in lines if " | 500 |" in line and "| cifar10 |" in line]
    assert f"| 98.59 % | {100 * accuracy:.2f} % | not comparable: --" in line
    assert {"--dataset digits", "--num_steps 2"} <= set(re.split(r", | \| |: ", line))
    assert record["hardware"]["device"] in line
    assert sum("| not measured |" in line for line in lines) == 21
    assert "started" in printed
    again = run_main(fine_tuning_table, *flags)
    assert "started" not in again
    assert lines == (tmp_path / "results" / "table.md").read_text().splitlines()


def test_the_difference_is_in_points_and_only_of_runs_with_the_flags_of_the_row():
    """The flags that say how a run computes may differ."""
    row = fine_tuning_table.ROWS[SHORT]
    flags = {**row.flags(), "bf16": True, "seed": 3, "pretrained_dir": "elsewhere/ViT-B_16.npz"}
    record = {"kind": "final", "flags": flags, "diverged": False}
    records = [record | {"result": {"last": {"test": {"accuracy": accuracy}}}} for accuracy in (0.9819, 0.9839)]
    assert fine_tuning_table.measured(row, records) == ("98.29 % (98.19 to 98.39)", "-0.30")
    records[0]["flags"] = {**flags, "optimizer": "adamw"}
    assert fine_tuning_table.measured(row, records[:1]) == ("98.19 %", "not comparable: --optimizer adamw")
    assert fine_tuning_table.measured(row, []) == ("not measured", "")
    assert fine_tuning_table.measured(row._replace(reported=None), records[1:]) == ("98.39 %", "")


@pytest.mark.parametrize(
    "hours, text", [(3 + 13 / 60, "3 h 13 min"), (0.02, "1.2 min"), (None, ""), (0.9999, "1 h 0 min")]
)
def test_times_are_readable(hours, text):
    assert fine_tuning_table.time_text(hours) == text
