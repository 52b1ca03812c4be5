"""scripts/sweep.py: its flags and errors, its table and what it chooses, and whole sweeps from the shell."""

import csv
import json
import os
import shlex
import sys

import pytest
from PIL import Image

from helpers import ROOT, TINY, script, stop_sweep, succeed, write_images
from utils.records.run_folder import last_accuracy
from utils.sweeps import LOG

sys.path.insert(0, str(ROOT / "scripts"))
import sweep

PASSED = [text for flag, value in TINY.items() if flag != "--name" for text in (flag, value)]
GRID = ("--grid", "learning_rate=0.01,0.03")


@pytest.mark.parametrize(
    "ours, further, message",
    [
        ((), [], "the following arguments are required: --grid"),
        (GRID, ["--learning_rate", "0.1"], "--learning_rate is in --grid and after --; give it once"),
        (GRID, ["--learning_rate=0.1"], "--learning_rate is in --grid and after --; give it once"),
        (GRID, ["--name", "x"], "--name is not for all runs: the runs are named by what differs"),
        (GRID, ["--seed=3"], "--seed is not for all runs: give --seeds before --"),
        (GRID, ["--output_dir", "x"], "--output_dir is not for all runs: give it before --"),
        (GRID, ["--mode", "eval"], "--mode is not for all runs: a sweep trains"),
        (GRID, ["--overwrite"], "--overwrite is not for all runs: give another --output_dir"),
        (GRID, ["--no_such_flag"], "unrecognized arguments: --no_such_flag"),
        (GRID, ["digits"], "unrecognized arguments: digits"),
        ((*GRID, "--dataset", "digits"), [], "unrecognized arguments: --dataset digits; the flags of train.py follow"),
        ((*GRID, "--seeds", "1", "2", "1"), [], "--seeds: 1 is given 2 times"),
        ((*GRID, "--seeds", "-1"), [], "-1 is not a whole number from 0"),
        (("--grid", "learning_rat=1"), [], "the training has no flag --learning_rat; did you mean learning_rate"),
        (("--grid", "learning_rate=0.1,x"), [], "argument --learning_rate: x is not a number above 0"),
        (("--grid", "img_size=8,9"), ["--model_type=ViT-Mini_4"], "image size 9 is not a multiple of the model's"),
        (("--grid", "num_steps=1,2"), ["--epochs=1"], "--grid num_steps=1 has no effect: other flags set it to None"),
        (("--grid", "val_split=0.1,0.2"), [], "runs with --val_split 0.1 and 0.2 can't be compared"),
        (("--grid", "pretrained_dir=a.npz,b.npz"), [], "a.npz does not exist"),
    ],
)
def test_wrong_flags_are_one_line_before_any_run(ours, further, message, main_fails, tmp_path):
    given = [text for flag, value in TINY.items() if flag in ("--dataset", "--model_type") for text in (flag, value)]
    further = (
        [*given, "--img_size=8", *further] if ours and "img_size" not in str(ours) else ["--dataset=digits", *further]
    )
    assert message in main_fails(sweep, *ours, "--output_dir", tmp_path / "runs", "--", *further)
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_can_not_be_divided_is_one_line_before_any_run(main_fails, tmp_path):
    for name, count in (("cat", 8), ("dog", 1)):
        write_images(tmp_path / "images" / name, [(8, 8)] * count)
    further = ["--dataset", "imagefolder", "--data_dir", tmp_path / "images", "--val_split", 0.3, "--img_size", 8]
    error = main_fails(sweep, *GRID, "--output_dir", tmp_path, "--", *further, "--model_type", "ViT-Mini_4")
    assert "--val_split can't divide class 'dog', which has one image only" in error
    assert not list(tmp_path.glob("*/train.log"))


def test_a_dry_run_prints_the_commands_of_all_runs(run_main, tmp_path):
    grid = ["--grid", "learning_rate=0.01,0.03", "rand_augment=2 9", "bf16=false,true"]
    printed = run_main(sweep, *grid, "--seeds", 0, 7, "--output_dir", tmp_path / "my runs", "--dry_run", "--", *PASSED)
    commands = [shlex.split(line) for line in printed.splitlines()]
    assert len(commands) == 8
    assert len({tuple(command) for command in commands}) == 8
    for command, bf16, number in zip(commands[:4], (False, False, True, True), (0, 7, 0, 7), strict=True):
        name = f"learning_rate=0.01-rand_augment=2_9-bf16={str(bf16).lower()}-seed{number}"
        args = sweep.TRAIN.parser.parse_args(command[2:])
        assert (args.name, args.seed, args.bf16) == (name, number, bf16)
        assert (args.learning_rate, args.rand_augment, args.resume) == (0.01, [2, 9], True)
        assert (args.output_dir, args.num_steps) == (str(tmp_path / "my runs"), 12)
    assert not (tmp_path / "my runs").exists()


def result(accuracy, loss, test=None, split="val"):
    """The result.json of a run; `test` are the test accuracies of the last and the best step."""
    measured = {"images": 100, "loss": loss, "accuracy": accuracy}
    entries = {name: {"step": 5, split: measured} for name in ("last", "best")}
    for name, value in zip(entries, test or (), strict=False):
        entries[name]["test"] = {"images": 50, "loss": 1 - value, "accuracy": value}
    return entries


def finished_runs(split="val", test=True):
    """Results whose best mean accuracy is that of 0.1, whose best loss that of 0.2; a run of 0.3 failed."""
    accuracies = {(0.1,): (0.80, 0.70), (0.2,): (0.79, 0.69), (0.3,): (0.99,)}
    losses = {(0.1,): (0.5, 0.7), (0.2,): (0.4, 0.6), (0.3,): (0.1,)}
    tests = {(0.1,): ((0.6, 0.7), (0.4, 0.3)), (0.2,): ((0.9, 0.9), (0.9, 0.9)), (0.3,): ((0.9, 0.9),)}
    return {
        (point, number): result(accuracy, losses[point][number], tests[point][number] if test else None, split)
        for point in accuracies
        for number, accuracy in enumerate(accuracies[point])
    }


def outcome(metric="accuracy", **keywords):
    return sweep.outcome_of({"learning_rate": [0.1, 0.2, 0.3, 0.4]}, [0, 1], metric, finished_runs(**keywords))


def test_the_table_has_the_means_and_ranges_of_the_validation_set():
    """Computed by hand. The highest value, 99 %, is of a combination of which a run failed."""
    assert list(sweep.table_rows(outcome())) == [
        ["0.1", "75.0 % (70.0 to 80.0)", "chosen"],
        ["0.2", "74.0 % (69.0 to 79.0)", ""],
        ["0.3", "99.0 %, 1 of 2 seeds", ""],
        ["0.4", "failed", ""],
    ]
    assert [row[1:] for row in sweep.table_rows(outcome("loss"))][:2] == [
        ["0.6000 (0.5000 to 0.7000)", ""],
        ["0.5000 (0.4000 to 0.6000)", "chosen"],
    ]


def test_test_results_are_those_of_the_chosen_combination_only():
    titles, *rows = sweep.csv_rows(outcome())
    assert ",".join(titles) == (
        "learning_rate,val_accuracy_mean,val_accuracy_min,val_accuracy_max,val_accuracy_seed0,val_accuracy_seed1,chosen,"
        "test_accuracy_mean,test_accuracy_min,test_accuracy_max"
    )
    assert rows[0] == ["0.1", pytest.approx(0.75), 0.7, 0.8, 0.8, 0.7, 1, pytest.approx(0.5), 0.4, 0.6]
    assert rows[1] == ["0.2", pytest.approx(0.74), 0.69, 0.79, 0.79, 0.69, 0, None, None, None]
    assert rows[2] == ["0.3", 0.99, 0.99, 0.99, 0.99, None, 0, None, None, None]
    assert rows[3] == ["0.4", None, None, None, None, None, 0, None, None, None]
    assert sweep.conclusion(outcome()) == [
        "Chosen by the mean validation accuracy: learning_rate 0.1.",
        "Test accuracy after the last step: 50.0 % (40.0 to 60.0) on 50 images (95 % interval 36.6 to 63.4).",
        "Test accuracy with each run's weights of the best validation accuracy: 50.0 % (30.0 to 70.0) on 50 images "
        "(95 % interval 36.6 to 63.4).",
    ]
    by_loss = sweep.conclusion(outcome("loss"))
    assert by_loss[0] == "Chosen by the mean validation loss: learning_rate 0.2."
    assert by_loss[1].endswith("; loss 0.1000 (0.1000 to 0.1000).")


@pytest.mark.parametrize("split, what", [("test", "test"), ("val", "validation")])
def test_a_choice_without_another_set_is_called_optimistic(split, what):
    """Without validation images, or as with ImageNet without test images."""
    found = outcome(split=split, test=False)
    assert sweep.conclusion(found) == [
        f"Chosen by the mean {what} accuracy: learning_rate 0.1.",
        f"It is chosen on the {what} set: optimistic.",
    ]
    titles, *rows = sweep.csv_rows(found)
    assert titles[-1] == "chosen"
    assert [len(row) for row in rows] == [len(titles)] * 4


def test_nothing_is_chosen_from_failed_runs():
    finished = {key: value for key, value in finished_runs().items() if key[1] == 0}
    found = sweep.outcome_of({"learning_rate": [0.1, 0.2, 0.3]}, [0, 1], "accuracy", finished)
    assert sweep.conclusion(found) == ["Nothing is chosen: no combination has finished with all seeds."]


def rows_of(folder):
    with open(folder / "table.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_sweep_ends_in_table_and_figure_and_is_extended(tmp_path):
    """A rate at which the training diverges is named and prevents no choice. Finished runs are not repeated."""
    folder, passed = (
        tmp_path / "my sweep",
        [*PASSED, "--val_split", "0.2", "--optimizer", "sgd", "--max_grad_norm", "0"],
    )
    command = ["scripts/sweep.py", "--output_dir", folder, "--seeds", 0, 1, "--grid"]
    done = script(*command, "learning_rate=0.01,1e30", "--", *passed)
    assert done.returncode == 1, done.stderr
    assert "2 of 4 runs failed; the same command tries them again\n  learning_rate=1e+30-seed0: " in done.stderr
    assert "| 1e+30 | failed |  |" in done.stdout
    first = {number: folder / f"learning_rate=0.01-seed{number}" for number in (0, 1)}
    made = {number: (path / "last.safetensors").stat().st_mtime_ns for number, path in first.items()}

    printed = succeed(*command, "learning_rate=0.03,1e-2", "--", *passed)
    assert printed.startswith("4 runs, 2 of them already finished; 2 to do, one after another\n")
    assert made == {number: (path / "last.safetensors").stat().st_mtime_ns for number, path in first.items()}
    rows, chosen = rows_of(folder), None
    assert [row["learning_rate"] for row in rows] == ["0.03", "0.01"]
    for row in rows:
        folders = [folder / f"learning_rate={row['learning_rate']}-seed{number}" for number in (0, 1)]
        values = [last_accuracy(path) for path in folders]
        assert [float(row[f"val_accuracy_seed{number}"]) for number in (0, 1)] == pytest.approx(
            [value for _, value in values], rel=1e-6
        )
        assert {split for split, _ in values} == {"val"}
        assert float(row["val_accuracy_mean"]) == pytest.approx(sum(value for _, value in values) / 2, rel=1e-6)
        if row["chosen"] == "1":
            chosen = row
            tests = [json.loads((path / "result.json").read_text())["last"]["test"]["accuracy"] for path in folders]
            assert float(row["test_accuracy_mean"]) == pytest.approx(sum(tests) / 2)
        else:
            assert row["test_accuracy_mean"] == ""
    assert float(chosen["val_accuracy_mean"]) == max(float(row["val_accuracy_mean"]) for row in rows)
    assert (folder / "table.md").read_text() in printed
    assert f"Chosen by the mean validation accuracy: learning_rate {chosen['learning_rate']}.\n" in printed
    with Image.open(folder / "sweep.png") as image:
        assert image.width > 600
    # the printed command repeats a run of the chosen combination
    config = folder / f"learning_rate={chosen['learning_rate']}-seed0" / "config.json"
    [line] = [line for line in printed.splitlines() if line.startswith("To repeat it: `python ")]
    assert shlex.split(line.partition("python ")[2].rstrip("`")) == [
        "train.py",
        "--config",
        str(config),
        "--name",
        "NAME",
    ]
    again = succeed("train.py", "--config", config, "--name", "final", "--output_dir", tmp_path, "--test_at_end")
    assert "1437 training and 360 test images" in again

    other = script(*command, "learning_rate=0.03", "--", *passed, "--num_steps", "13")
    assert (other.returncode, other.stderr.count("\n"), other.stdout) == (2, 1, "")
    assert "was made with --num_steps 12, not 13; give another --output_dir" in other.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_sweep_is_stopped_and_resumes(tmp_path):
    passed = [*PASSED, "--num_steps", "200", "--eval_every", "40"]
    command = ["scripts/sweep.py", "--output_dir", str(tmp_path), *GRID, "--", *passed]
    first, second = tmp_path / "learning_rate=0.01-seed0", tmp_path / "learning_rate=0.03-seed0"
    errors = stop_sweep(command, first)
    assert "sweep.py: stopped; the same command resumes" in errors
    assert not second.exists()
    assert not (tmp_path / "table.md").exists()

    printed = succeed(*command)
    assert printed.startswith(
        "warning: there are no validation images, so the best is chosen on the test set; see --val"
    )
    assert "resuming at step" in (first / LOG).read_text()
    assert "It is chosen on the test set: optimistic.\n" in printed
    table = (tmp_path / "table.md").read_text()
    again = succeed(*command)
    assert "2 runs, 2 of them already finished\n" in again
    assert table in again
