"""The study of norms at their own learning rates: its plan, what still trains, batch sizes, tables, at toy size."""

import json
import math
import re
import shlex
import sys

import pytest
import torch

from command_line import train_parser
from helpers import ROOT
from models import NORM_TYPES, build_model
from utils.profiling import count_parameters

sys.path.insert(0, str(ROOT / "scripts"))
import norm_findings

TOY = ["--dataset", "digits", "--img_size", 8, "--epochs", 0.02, "--grid_epochs", 0.01, "--train_batch_size", 8]


def toy(tmp_path, *flags):
    return [*TOY, "--output_dir", tmp_path / "runs", "--results", tmp_path / "results", *flags]


def planned(printed):
    """{name of the run: flags} of a dry run."""
    lines = [line for line in printed.splitlines() if not line.startswith("#")]
    found = [train_parser().parse_args(shlex.split(line)[2:]) for line in lines]
    return {flags.name: flags for flags in found}


def record(kind, norm, accuracy, seed=0, rate=1e-3, batch_size=128, **labels):
    """A record as the study reads it, without what its tables do not need."""
    split = {"grid": "val", "final": "test"}[kind]
    return {
        "kind": kind,
        "contender": norm,
        "seed": seed,
        "diverged": math.isnan(accuracy),
        "group": labels,
        "classes": 10,
        "flags": {"learning_rate": rate, "train_batch_size": batch_size},
        "result": {"last": {split: {"accuracy": accuracy}}},
    }


def test_the_plan_has_short_runs_for_each_norm_and_then_its_final_runs(run_main, tmp_path):
    printed = run_main(norm_findings, *toy(tmp_path, "--question", "batch_size", "--dry_run"))
    runs = planned(printed)
    assert len(runs) == len(NORM_TYPES) * 3
    assert {flags.norm_type for flags in runs.values()} == set(NORM_TYPES)
    assert {(flags.model_type, flags.val_split, flags.test_at_end) for flags in runs.values()} == {
        ("ViT-Mini_4", 0.1, False)
    }
    assert printed.count("3 final runs follow when the short runs have chosen a learning rate") == len(NORM_TYPES)
    assert "# the final runs with batch size 32, 128 follow then" in printed


def test_the_learning_rate_of_a_batch_size_is_scaled_by_the_square_root_and_the_epochs_are_equal(run_main, tmp_path):
    flags = toy(tmp_path, "--learning_rates", 1e-3, "--seeds", 0, 1, "--question", "batch_size", "--dry_run")
    runs = planned(run_main(norm_findings, *flags, "--batch_sizes", 2, 8, 32, "--epochs", 1)).values()
    assert len(runs) == len(NORM_TYPES) * 2 * 3
    assert all(flags.test_at_end and flags.val_split is None for flags in runs)
    found = {(flags.train_batch_size, flags.learning_rate, flags.num_steps) for flags in runs}
    assert found == {(2, 5e-4, 719), (8, 1e-3, 180), (32, 2e-3, 45)}  # 1,437 images


def test_the_deeper_model_is_narrower_and_as_large(run_main, tmp_path):
    runs = planned(run_main(norm_findings, *toy(tmp_path, "--question", "depth", "--dry_run"))).values()
    assert {flags.norm_type for flags in runs} == set(NORM_TYPES)
    assert {(flags.model_type, *flags.model_fields) for flags in runs} == {("ViT-Nano_4", "num_layers=24")}
    with torch.device("meta"):
        deep = build_model("ViT-Nano_4", 32, 10, num_layers=24)
        usual = build_model(norm_findings.MODEL, 32, 10)
    assert len(deep.blocks) == 4 * len(usual.blocks) and deep.head.in_features == usual.head.in_features / 2
    assert count_parameters(deep) == pytest.approx(count_parameters(usual), rel=0.05)


PRETRAINED = ["--question", "pretrained", "--source", "0", "1", "2", "--target", "3", "4", "--pretraining_epochs", 0.02]


def test_each_norm_starts_from_the_same_weights_pretrained_with_layer_norm(run_main, tmp_path):
    printed = run_main(norm_findings, *toy(tmp_path, *PRETRAINED, "--learning_rates", 1e-3, "--dry_run"))
    first, *others = planned(printed).values()
    assert (first.norm_type, first.classes, first.pretrained_dir) == ("LN", ["0", "1", "2"], None)
    assert len(others) == len(NORM_TYPES) * 3
    assert {flags.norm_type for flags in others} == set(NORM_TYPES)
    weights = tmp_path / "runs" / first.name / "last.safetensors"
    assert {(*flags.classes, flags.pretrained_dir) for flags in others} == {("3", "4", str(weights))}


@pytest.mark.slow  # two runs of train.py, each in a process of its own
def test_the_question_of_pretrained_weights_has_a_table_of_its_own(run_main, tmp_path):
    flags = toy(tmp_path, *PRETRAINED, "--contenders", "BN", "--learning_rates", 1e-3, "--seeds", 0)
    run_main(norm_findings, *flags)
    table = (tmp_path / "results" / "table.md").read_text()
    assert "weights pretrained with LN" in table and "classes source" in table
    assert "Batch sizes" not in (tmp_path / "results" / "summary.md").read_text()


@pytest.mark.parametrize(
    "grid, largest",
    [
        ({1e-3: 0.5, 3e-3: 0.6, 1e-2: 0.36}, 1e-2),  # 26 points above chance, the best 50
        ({1e-3: 0.5, 3e-3: 0.6, 1e-2: 0.34}, 3e-3),
        ({1e-3: 0.5, 3e-3: math.nan}, 1e-3),
        ({1e-3: 0.05, 3e-3: 0.1}, None),
        ({1e-3: math.nan}, None),
    ],
)
def test_a_learning_rate_trains_with_half_of_the_best_accuracy_above_chance(grid, largest):
    assert norm_findings.largest_rate(grid, 0.1) == largest


def test_the_table_of_learning_rates_says_if_the_largest_one_is_the_largest_tried():
    grid = {"LN": {1e-3: 0.6, 1e-2: 0.15}, "BN": {1e-3: 0.5, 1e-2: 0.55}, "Rescale": {1e-3: 0.1, 1e-2: math.nan}}
    records = [record("grid", norm, accuracy, rate=rate) for norm in grid for rate, accuracy in grid[norm].items()]
    assert norm_findings.rates_table(records).splitlines()[2:] == [
        "| LN | 0.001 | 60.00 % |",
        "| BN | 0.01, the largest tried | 55.00 % |",
        "| Rescale | none |  |",
    ]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--contenders", "XN"], "--contenders: there is no XN; there are LN, BN, GN, Rescale"),
        (["--question", "batches"], "unknown question 'batches'"),
        (["--source", "0", "1", "--target", "1", "2"], "--source and --target have 1 in common"),
        (["--draw"], "results has no results; run the study without --draw first"),
    ],
)
def test_wrong_flags_are_errors_before_any_run(flags, message, main_fails, tmp_path):
    assert message in main_fails(norm_findings, *toy(tmp_path, *flags))
    assert not (tmp_path / "runs").exists()


def test_the_summary_compares_the_norms_at_each_batch_size():
    """The final runs with the batch size of the main question and those with others, if their epochs are equal."""
    accuracies = {(8, "LN"): (0.4, 0.5), (8, "BN"): (0.3, 0.41), (128, "LN"): (0.6, 0.6), (128, "BN"): (0.61, 0.62)}
    records = [
        record("final", norm, accuracy, seed, batch_size=size)
        for (size, norm), found in accuracies.items()
        for seed, accuracy in enumerate(found)
    ]
    columns = norm_findings.by_batch_size(records[::-1])
    assert list(columns) == ["batch size 8", "batch size 128"]
    assert {norm: len(found) for norm, found in columns["batch size 8"].items()} == {"LN": 2, "BN": 2}
    table = norm_findings.summary_table(columns, "LN", ("LN", "BN"))
    # differences -10 and -9: mean -9.5, and 12.706 standard errors of 0.5
    assert "| BN | 35.50 % (30.00 to 41.00), n = 2 | -9.50 (-15.85 to -3.15) | 61.50 %" in table
    assert "| LN | 45.00 % (40.00 to 50.00), n = 2 |  | 60.00 % (60.00 to 60.00), n = 2 |  |" in table


@pytest.mark.slow  # four runs of train.py, each in a process of its own
def test_the_study_writes_results_and_tables_once(run_main, tmp_path):
    flags = toy(tmp_path, "--contenders", "BN", "--learning_rates", 1e-3, 3e-3, "--seeds", 3)
    flags += ["--question", "batch_size", "--batch_sizes", 2]
    run_main(norm_findings, *flags)
    results = tmp_path / "results"
    records = [json.loads(path.read_text()) for path in results.glob("*.json")]
    assert len(records) == 2 + 1 + 1
    assert {record["classes"] for record in records} == {10}
    summary = (results / "summary.md").read_text()
    assert "## Largest learning rate that still trains: epochs 0.01" in summary
    assert "| contender | batch size 2 | points from LN (95 % interval) | batch size 8 |" in summary
    grid = [record for record in records if record["kind"] == "grid"]
    accuracy = {each["flags"]["learning_rate"]: each["result"]["last"]["val"]["accuracy"] for each in grid}
    finals = [record for record in records if record["kind"] == "final"]
    small, usual = sorted(finals, key=lambda each: each["flags"]["train_batch_size"])
    assert usual["flags"]["learning_rate"] == min(accuracy, key=lambda rate: (-accuracy[rate], rate))
    assert small["flags"]["learning_rate"] == pytest.approx(usual["flags"]["learning_rate"] / 2)
    shown = [f"{100 * each['result']['last']['test']['accuracy']:.2f} %, n = 1" for each in (small, usual)]
    assert re.search(rf"^\| BN \| {shown[0]} \| .*\| {shown[1]} \|", summary, re.MULTILINE)
    before = {path: path.read_bytes() for path in results.iterdir() if path.is_file() and path.suffix != ".png"}
    assert "started" not in run_main(norm_findings, *flags)
    assert {path: path.read_bytes() for path in before} == before
