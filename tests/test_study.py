"""The core of the studies: files of results, which may be mixed, paired intervals, tables, and resuming from files."""

import json
import math
import shutil
import sys
from argparse import Namespace

import numpy as np
import pytest
from PIL import Image
from scipy.stats import ttest_rel

from helpers import ROOT, run_in_this_process
from utils.errors import DIVERGED, UserError
from utils.flag_types import Parser
from utils.recipes import TrainingImages, scratch
from utils.study_figures import plot_budgets
from utils.study_records import best_rate, check_comparable, portable_flags, read_records, write_record
from utils.study_tables import (
    Times,
    difference_text,
    final_table,
    grid_table,
    paired_interval,
    read_times,
    report_of,
    speed_file,
)

sys.path.insert(0, str(ROOT / "scripts"))
import study
from study_speed import write_json

MODELS = {"vit": {"model_type": "ViT-Nano_4"}, "cnn": {"model_type": "ResNet-Mini_Flops"}}
STUDY = study.Study("toy", MODELS, reference="vit")
XEON = {"device": "Xeon", "threads": 1, "runs_at_once": 2}
SPEED = {"vit": 200.0, "cnn": 100.0}


def record(contender="vit", seed=0, accuracy=0.5, kind="final", hardware=XEON, **flags):
    """A record of 10 steps of 100 images, five epochs of 200 images."""
    split = {"final": "test", "grid": "val"}[kind]
    recipe = {"learning_rate": 1e-3, "train_batch_size": 100, "img_size": 8, "optimizer": "adamw", "bf16": True}
    diverged = math.isnan(accuracy)
    return {
        "study": "toy",
        "kind": kind,
        "contender": contender,
        "contender_flags": MODELS[contender],
        "reference": "vit",
        "group": {"epochs": 5},
        "seed": seed,
        "data": "digits",
        "flags": {**recipe, "fp16_opt_level": "O2", "seed": seed, **MODELS[contender], **flags},
        "model": {"parameters": 2_000_000, "flops": 1e6, "training_flops": 3e6},
        "num_steps": 10,
        "images": {"train": 200, split: 50},
        "diverged": diverged,
        "result": None if diverged else {"last": {split: {"accuracy": accuracy}}},
        "hardware": hardware,
        "torch": "2.14",
        "metrics": {
            "step": [5.0, 10.0],
            "train_accuracy": [accuracy / 2, accuracy],
            "test_accuracy": [math.nan, accuracy],
            "images_per_second": [SPEED[contender], SPEED[contender]],
        },
    }


def test_the_recipe_is_that_of_small_models_from_scratch():
    """The number of steps and the learning rate aside, which the studies choose."""
    recipe = scratch(TrainingImages(50_000, 32, 32), batch=128, patch=4)
    chosen = ("num_steps", "warmup_steps", "learning_rate", "img_size")
    flags = {**vars(study.TRAIN.parser.parse_args(["--name=any"])), **study.SCRATCH}
    for name in recipe.keys() - chosen:
        assert flags[name] == recipe[name], name
    assert pytest.approx(recipe["warmup_steps"] / recipe["num_steps"], abs=1e-4) == study.WARMUP


def test_the_paired_interval_is_that_of_scipys_paired_t_test():
    random = np.random.default_rng(0)
    for count in (2, 3, 7):
        ours, reference = random.normal(0.5, 0.1, (2, count))
        expected = ttest_rel(ours, reference).confidence_interval(0.95)
        assert paired_interval(list(ours - reference)) == pytest.approx((expected.low, expected.high))
    assert paired_interval([0.1]) is None


def test_a_difference_is_shown_only_if_its_interval_is_without_zero():
    reference = {0: 0.50, 1: 0.52, 2: 0.51, 5: 0.9}
    assert difference_text({0: 0.56, 1: 0.57, 2: 0.57}, reference) == "+5.67 (+4.23 to +7.10, 3 common seeds)"
    assert difference_text({0: 0.56, 1: 0.47, 2: 0.57}, reference).endswith("; no difference shown")
    assert difference_text({0: 0.49, 7: 0.2}, reference) == "-1.00, one seed: no interval"
    assert difference_text({7: 0.2}, reference) == "no common seeds"


def test_the_table_has_accuracies_and_equal_budgets():
    """10 steps of 100 images are 5 epochs, 3 x 1e6 x 1000 FLOPs, and at half a second per step 5 seconds."""
    found = [record("cnn", seed, accuracy) for seed, accuracy in enumerate((0.6, 0.65, 0.7))]
    found += [record("vit", seed, accuracy) for seed, accuracy in enumerate((0.5, 0.55, math.nan))]
    header, _, vit, cnn = final_table(found, ["vit", "cnn"], Times({"vit": 0.5, "cnn": 1.0})).splitlines()
    assert "points from vit (95 % interval)" in header
    common = "2.000 M | 0.001"
    accuracy = "52.50 % (50.00 to 55.00), n = 2, 1 diverged"
    assert vit == f"| vit | {common} | {accuracy} | reference | 5 | 3e+09 | 500 ms | 0.1 min |"
    assert cnn.startswith(f"| cnn | {common} | 65.00 % (60.00 to 70.00), n = 3 | +10.00 (")
    assert cnn.endswith("| 5 | 3e+09 | 1000 ms | 0.2 min |")


def test_times_are_those_of_interleaved_steps(tmp_path):
    found = [record("vit"), record("cnn")]
    assert all(line.endswith("| - | - |") for line in final_table(found).splitlines()[2:])
    groups = {("final", "epochs 5"): dict(enumerate(found))}
    assert "No step was timed." in report_of(groups)
    file = speed_file(tmp_path, found[0])
    seconds = {"vit": {"training step": [6, 6, 99]}, "cnn": {"training step": [12, 3, 24]}}
    write_json(file, {"machine": "Xeon", "rounds": 3, "seconds": seconds, "flags": {"vit": {}, "cnn": {}}})
    times = read_times(tmp_path, found[0])
    assert final_table(found, times=times).count("| 6000 ms | 1.0 min |") == 1
    assert final_table(found, times=times).count("| 12000 ms | 2.0 min |") == 1
    assert "steps x time of a step, Xeon, median of 3 interleaved rounds." in report_of(
        groups, (), {("final", "epochs 5"): times}
    )
    figure = plot_budgets(found, "title", times=times)
    assert figure.axes[2].get_xlabel().replace("\n", " ") == "minutes, Xeon, median of 3 interleaved rounds"
    assert len(plot_budgets(found, "title", times=Times({"vit": 1.0})).axes) == 2  # epochs and FLOPs


def test_the_choice_of_a_learning_rate_is_marked_at_the_edge_of_the_grid():
    grid = {"vit": {1e-4: 0.2, 1e-3: 0.4, 1e-2: 0.3}, "cnn": {1e-4: 0.2, 1e-3: 0.3, 1e-2: math.nan}}
    found = [record(name, 0, each, "grid", learning_rate=rate) for name in grid for rate, each in grid[name].items()]
    assert grid_table(found).splitlines()[2:] == [
        "| vit | 20.00 % | **40.00 %** | 30.00 % | 0.001 |",
        "| cnn | 20.00 % | **30.00 %** | diverged | 0.001 |",
    ]
    assert "0.01, at the edge of the grid" in grid_table(
        [record("vit", 0, 0.9, "grid", learning_rate=1e-2), *found[:2]]
    )
    assert best_rate({1e-3: 0.4, 1e-2: 0.4, 1e-1: math.nan}) == 1e-3  # the lowest of equal ones
    with pytest.raises(UserError, match="no run of the grid has finished without divergence: 0.1"):
        best_rate({0.1: math.nan})


@pytest.mark.parametrize(
    "changed, difference",
    [
        (record("cnn", img_size=16), "--img_size is 8 and 16"),
        (record("cnn") | {"data": "CIFAR-10"}, "data is digits and CIFAR-10"),
        (record("vit", 1, learning_rate=0.1), "--learning_rate is 0.001 and 0.1"),  # of one contender
        (record("cnn", val_split=0.2), "--val_split is None and 0.2"),  # the first one is of an earlier version
    ],
)
def test_runs_with_different_flags_are_not_mixed(changed, difference, tmp_path):
    paths = tmp_path / "one.json", tmp_path / "two.json"
    for path, each in zip(paths, (record(), changed), strict=True):
        write_record(path, each)
    with pytest.raises(UserError) as error:
        read_records(tmp_path)
    assert str(error.value).startswith(f"{paths[0]} and {paths[1]} can't be in one table: {difference.lstrip('-')}")


def test_runs_of_other_groups_and_of_earlier_versions_may_be_together():
    """A flag that train.py did not have yet is no difference."""
    long = record(num_steps=1000) | {"group": {"epochs": 100}}
    check_comparable({"a": record(), "b": record("cnn", learning_rate=0.1), "c": long, "d": record(new_flag=3)})


def test_a_file_of_results_is_read_as_written(tmp_path):
    written = record(accuracy=math.nan) | {"images": {"train": 2}}
    write_record(tmp_path / "new" / "run.json", written)
    json.loads((tmp_path / "new" / "run.json").read_text(), parse_constant=pytest.fail)  # NaN is not JSON
    [found] = read_records(tmp_path / "new").values()
    np.testing.assert_equal(found, written)
    write_record(tmp_path / "new" / "run.json", record() | {"result": {"last": {"test": {"top5_accuracy": math.nan}}}})
    assert '"top5_accuracy": null' in (tmp_path / "new" / "run.json").read_text()
    for text, message in (("{", "is not a result of a study"), ('{"study": "toy"}', "it has no 'kind'")):
        (tmp_path / "new" / "other.json").write_text(text)
        with pytest.raises(UserError, match=message):
            read_records(tmp_path / "new")


def test_recorded_flags_do_not_say_where_a_run_was(tmp_path):
    flags = Namespace(name="x", output_dir="/a", data_dir="/b", num_workers=3, seed=1, mean=(1, 2))
    flags.pretrained_dir, flags.other = str(tmp_path / "checkpoint" / "a.npz"), "/elsewhere/b.npz"
    found = portable_flags(flags, tmp_path)
    assert found == {"seed": 1, "mean": [1, 2], "pretrained_dir": "checkpoint/a.npz", "other": "b.npz"}


def run_toy(tmp_path, *flags):
    """Run the toy study of two models on 8x8 digits with these flags."""
    parser = Parser("toy")
    study.add_study_flags(parser, "toy")
    given = ["--dataset", "digits", "--img_size", 8, "--train_batch_size", 16, "--epochs", 0.02, "--grid_epochs", 0.01]
    given += ["--learning_rates", 1e-3, 3e-3, "--seeds", 0, 1, "--data_note", "digits at 8x8"]
    given += ["--output_dir", tmp_path / "runs", "--results", tmp_path / "results", *flags]
    study.run_studies([STUDY], parser.parse_args([str(item) for item in given]))
    return tmp_path / "results"


def test_a_study_resumes_from_its_results_alone(tmp_path, monkeypatch, capsys):
    """The folder of the runs is gone, and so are the results of one run, as in a fresh clone."""
    started = run_in_this_process(study, monkeypatch)
    results = run_toy(tmp_path)
    grid, finals = started[:4], started[4:]
    assert [name.split("-")[0] for name in started] == ["grid"] * 4 + ["final"] * 4
    assert {path.stem for path in results.glob("*.json")} == set(started)
    for path in results.glob("*.json"):
        assert path.stat().st_size < 5000
        assert str(tmp_path) not in path.read_text()
        found = json.loads(path.read_text())
        assert found["flags"]["test_at_end"] == (found["kind"] == "final")
        assert ("val" in found["result"]["last"]) == (found["kind"] == "grid")
        assert found["images"]["train"] == (1437 if found["kind"] == "final" else 1293)
    before = {path: path.read_bytes() for path in results.rglob("*.*")}
    assert "digits at 8x8: 1,437 training images" in (results / "table.md").read_text()
    shutil.rmtree(tmp_path / "runs")
    for name in (grid[1], finals[2]):
        (results / f"{name}.json").unlink()
    for drawn in ("table.md", "final-epochs=0.02.png"):
        (results / drawn).unlink()
    started.clear()
    run_toy(tmp_path)
    assert started == [grid[1], finals[2]]
    assert before.keys() == set(results.rglob("*.*"))
    for name in set(grid + finals) - set(started):
        assert (results / f"{name}.json").read_bytes() == before[results / f"{name}.json"]
    started.clear()
    run_toy(tmp_path, "--draw", "--data_dir", "/nowhere")
    assert started == []
    with Image.open(results / "final-epochs=0.02.png") as image:
        assert min(image.size) > 300


def test_results_with_other_flags_are_not_taken_for_those_of_the_command(tmp_path, monkeypatch):
    run_in_this_process(study, monkeypatch)
    results = run_toy(tmp_path, "--learning_rates", 1e-3, "--seeds", 0)
    final = "final-epochs=0.02-vit-seed0.json"
    with pytest.raises(UserError, match=f"{final} has --learning_rate 0.001, not 0.1; remove it, or give another"):
        run_toy(tmp_path, "--learning_rates", 0.1, "--seeds", 0)
    with pytest.raises(UserError, match=r"can't be in one table: img_size is (8 and 4|4 and 8); remove one of"):
        run_toy(tmp_path, "--learning_rates", 1e-3, "--seeds", 1, "--img_size", 4)
    assert len(list(results.glob("*.json"))) == 2


def test_a_run_that_diverges_is_a_result(tmp_path, monkeypatch):
    """It is not run again, and another learning rate is chosen."""

    def diverge(runs, jobs=1, ended=None):
        for run in runs:
            run.folder.mkdir(parents=True)
            config = {"flags": {}, "num_steps": 9, "images": {"train": 8}, "classes": ["a", "b"], "threads": 1}
            versions = {"device": "Xeon", "cuda": None, "torch": "2.14"}
            (run.folder / "config.json").write_text(json.dumps({**config, "versions": versions}))
            ended(run, DIVERGED)
        return {run.flags.name: "the loss is nan" for run in runs}

    monkeypatch.setattr(study, "run_unfinished", diverge)
    with pytest.raises(UserError, match="no run of the grid has finished without divergence: 0.001, 0.003"):
        run_toy(tmp_path, "--contenders", "vit")
    found = read_records(tmp_path / "results").values()
    assert [(each["diverged"], each["result"]) for each in found] == [(True, None)] * 2


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--seeds", 1, 1], "--seeds: 1 is given 2 times"),
        (["--contenders", "rnn"], "--contenders: there is no rnn; there are vit, cnn"),
        (["--img_size", 9], "image size 9 is not a multiple"),
        (["--draw"], "results has no results; run the study without --draw first"),
    ],
)
def test_mistakes_are_errors_before_any_run(flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run_toy(tmp_path, *flags)
    assert not (tmp_path / "runs").exists()
