"""result.json and the summary of a run: which images choose the best step, and when the test images are evaluated."""

import json
import math

import pytest
from safetensors.torch import load_file

import evaluate
import train
from command_line import train_parser
from helpers import (
    assert_same_bits,
    fails,
    make_shallow,
    metrics,
    read_config,
    run_dir,
    stop_after,
    train_run,
)
from utils import train_state
from utils.data import datasets
from utils.errors import RunStoppedError
from utils.records.result import read_result, result_of_rows, summary
from utils.records.run_folder import is_finished

# The learning rate is so high that the last step is not the best.
VAL = ["--val_split", 0.2, "--num_steps", 8, "--eval_every", 2, "--learning_rate", 0.5, "--max_grad_norm", 0]
VAL += ["--best_metric", "loss"]
O2 = ["--bf16", "--fp16_opt_level", "O2"]


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    make_shallow(monkeypatch)


@pytest.mark.parametrize("flags", [[], ["--ema_decay", 0.5], O2], ids=["", "ema", "O2"])
def test_the_validation_images_choose_and_the_test_images_are_evaluated_once(flags, tiny_flags, run_main):
    flags = tiny_flags(*VAL, *flags)
    printed = run_main(train, *flags)
    rows, result, folder = metrics(flags), read_result(run_dir(flags)), run_dir(flags)
    assert not [name for name in rows[0] if name.startswith("test_")]
    losses = [float(row["val_loss"]) for row in rows]
    best = losses.index(min(losses))
    assert result["best"]["step"] == int(rows[best]["step"]) < 8
    assert (result["chosen_on"], result["chosen_by"], result["seed"]) == ("val", "loss", 42)
    assert result["flags"] == read_config(folder)["flags"]
    assert result["last"]["val"]["loss"] == pytest.approx(losses[-1])
    assert result["best"]["val"]["loss"] == pytest.approx(min(losses))
    precision = [flag for flag in flags if flag in O2]
    for name in ("last", "best"):
        if name == "last" and "--ema_decay" in flags:
            continue  # evaluated with the averaged weights, which last.safetensors does not have
        for split in ("val", "test"):
            weights = ["--checkpoint", folder / f"{name}.safetensors"]
            report = json.loads(run_main(evaluate, *weights, "--split", split, "--json", *precision))
            measured = result[name][split]
            assert measured["images"] == report["images"]
            assert measured["loss"] == pytest.approx(report["loss"], rel=1e-5)
            assert measured["accuracy"] == pytest.approx(report["top1_accuracy"])
    assert "1149 training, 288 validation and 360 test images" in printed
    assert "\nlast, step 8   validation accuracy " in printed
    assert "   test accuracy " in printed
    assert f"\nbest: lowest loss {min(losses):.4f}, chosen on the validation set; [low, high]: 95 %" in printed


def test_the_test_images_do_not_change_the_training(tiny_flags, monkeypatch):
    """Nor does anything else that is evaluated."""
    flags = tiny_flags(*VAL, "--name", "often")
    weights, _ = train_run(flags, monkeypatch, "often")
    others, rows = train_run(tiny_flags(*VAL, "--eval_every", 100, "--name", "once"), monkeypatch, "once")
    assert_same_bits(weights, others)
    assert len(rows) == 1


def test_with_validation_images_only_the_summary_is_optimistic(image_folder, tiny_flags, run_main):
    flags = tiny_flags("--dataset", "imagefolder", "--data_dir", image_folder, "--num_workers", 0, "--num_steps", 2)
    printed = run_main(train, *flags)
    assert "\nbest: highest accuracy, chosen on the validation set: optimistic; [low" in printed
    assert set(read_result(run_dir(flags))["best"]) == {"step", "val"}
    assert "val_accuracy" in metrics(flags)[0]


def test_at_end_tests_once_and_keeps_no_best_weights(tiny_flags, run_main, monkeypatch):
    calls = []
    measure = train_state.evaluate
    monkeypatch.setattr(train_state, "evaluate", lambda *args, **kwargs: calls.append(1) or measure(*args, **kwargs))
    flags = tiny_flags("--num_steps", 6, "--eval_every", 2, "--test_at_end")
    printed = run_main(train, *flags)
    assert calls == [1]
    assert not (run_dir(flags) / "best.safetensors").exists()
    losses = [float(row["test_loss"]) for row in metrics(flags)]
    assert [math.isnan(loss) for loss in losses] == [True, True, False]
    assert all(math.isfinite(float(row["train_loss"])) for row in metrics(flags))
    result = read_result(run_dir(flags))
    assert "best" not in result
    assert (result["chosen_on"], result["chosen_by"]) == (None, None)
    assert result["last"]["test"]["loss"] == pytest.approx(losses[-1])
    assert "optimistic" not in printed
    assert f"\n  weights      {run_dir(flags) / 'last.safetensors'}\n" in printed
    assert (run_dir(flags) / "curves.png").exists()


def test_at_end_is_for_runs_without_validation_images(tiny_flags, monkeypatch, capsys):
    message = fails(train, tiny_flags("--val_split", 0.2, "--test_at_end"), monkeypatch, capsys)
    assert "--test_at_end is for runs without validation images; with them, the test is always at the end" in message


def test_no_test_reads_no_test_images(tiny_flags, run_main, monkeypatch, capsys):
    found = tiny_flags("--num_steps", 6, "--eval_every", 3, "--val_split", 0.2, "--no_test")
    read = []
    read_own = datasets.read_own_split
    monkeypatch.setattr(
        datasets, "read_own_split", lambda name, split, *rest: read.append(split) or read_own(name, split, *rest)
    )
    run_main(train, *found)
    assert set(read) == {"train"}
    result = read_result(run_dir(found))
    assert [set(result[step]) for step in ("last", "best")] == [{"step", "val"}] * 2
    message = fails(train, tiny_flags("--name", "without", "--no_test"), monkeypatch, capsys)
    assert "--no_test is for runs with validation images; give --val_split 0.1, or omit it" in message


def test_a_run_that_is_stopped_before_its_test_resumes_with_it(tiny_flags, run_main, monkeypatch):
    whole = tiny_flags(*VAL, "--name", "whole")
    run_main(train, *whole)
    flags = tiny_flags(*VAL, "--name", "stopped")
    measure, calls = train_state.TrainState.measure, []

    def measure_or_stop(run, images, stop):
        calls.append(1)
        if len(calls) == 6:  # 4 of validation images, and the last weights on the test images
            raise RunStoppedError("stopped", status=143)
        return measure(run, images, stop)

    with monkeypatch.context() as broken, pytest.raises(SystemExit):
        broken.setattr(train_state.TrainState, "measure", measure_or_stop)
        run_main(train, *flags)
    assert read_result(run_dir(flags)) is None
    assert not is_finished(run_dir(flags), train_parser().parse_args(flags))
    run_main(train, *flags, "--resume")
    results = [read_result(run_dir(each)) for each in (whole, flags)]
    for result in results:
        result["flags"] = {name: value for name, value in result["flags"].items() if name not in ("name", "resume")}
    assert results[0] == results[1]
    rows = [[{**row, "seconds": 0, "images_per_second": 0} for row in metrics(each)] for each in (whole, flags)]
    assert rows[0] == rows[1]


def test_a_run_that_is_stopped_in_training_keeps_the_results_of_its_best_step(tiny_flags, run_main, monkeypatch):
    whole, flags = tiny_flags(*VAL, "--name", "whole"), tiny_flags(*VAL, "--name", "stopped")
    run_main(train, *whole)
    with monkeypatch.context() as stopped, pytest.raises(SystemExit):
        stop_after(7, stopped)
        run_main(train, *flags)
    run_main(train, *flags, "--resume")
    assert read_result(run_dir(flags))["best"] == read_result(run_dir(whole))["best"]
    assert_same_bits(*(load_file(run_dir(each) / "best.safetensors") for each in (whole, flags)))


def test_more_steps_replace_the_result(tiny_flags, run_main, monkeypatch):
    flags = tiny_flags(*VAL)
    run_main(train, *flags)
    with monkeypatch.context() as stopped, pytest.raises(SystemExit):
        stop_after(2, stopped)
        run_main(train, *flags, "--resume", "--num_steps", 12)
    assert read_result(run_dir(flags)) is None
    run_main(train, *flags, "--resume", "--num_steps", 12)
    assert read_result(run_dir(flags))["last"]["step"] == 12


def test_a_damaged_result_is_an_error_of_one_line(tiny_flags, run_main, main_fails):
    flags = tiny_flags("--num_steps", 1)
    run_main(train, *flags)
    (run_dir(flags) / "result.json").write_text("{")
    message = main_fails(train, *flags, "--resume")
    assert "result.json is not valid JSON: " in message
    assert "delete it, and --resume writes it again" in message
    (run_dir(flags) / "result.json").unlink()
    run_main(train, *flags, "--resume")
    assert read_result(run_dir(flags))["last"]["step"] == 1


def entry(step, **splits):
    """One entry of a result, of accuracies on 100 images."""
    of_split = {"images": 100, "loss": 1.5, "top5_accuracy": 0.75, "macro_f1": 0.5}
    return {"step": step, **{split: {**of_split, "accuracy": accuracy} for split, accuracy in splits.items()}}


def test_the_summary_of_validation_and_test_images(tmp_path):
    result = {"chosen_on": "val", "chosen_by": "macro_f1", "last": entry(10, val=0.25, test=0.5)}
    result["best"] = entry(7, val=0.5, test=0.25)
    quarter, half = "25.00 % [17.55, 34.30]", "50.00 % [40.38, 59.62]"
    assert summary(tmp_path, result, num_classes=10).splitlines()[1:4] == [
        f"last, step 10   validation accuracy {quarter}   test accuracy {half}",
        f"best, step  7   validation accuracy {half}   test accuracy {quarter}",
        "best: highest macro F1 50.00 %, chosen on the validation set; [low, high]: 95 % interval",
    ]
    first = summary(tmp_path, result, num_classes=11).splitlines()[1]
    assert first.startswith(f"last, step 10   validation accuracy {quarter}, top-5 75.00 % [65.70, 82.45]   test ")


def test_the_summary_of_a_run_of_an_earlier_version(tmp_path):
    rows = [{"step": step, "test_accuracy": value} for step, value in (("5", "0.5"), ("10", "0.25"))]
    lines = summary(tmp_path, result_of_rows(rows, "accuracy"), num_classes=11).splitlines()
    assert lines[1:4] == [
        "last, step 10   test accuracy 25.00 %",
        "best, step  5   test accuracy 50.00 %",
        "best: highest accuracy, chosen on the test set: optimistic",
    ]
    assert [line.endswith("  (missing)") for line in lines[4:]] == [True] * 6
    for name in ("best.safetensors", "last.safetensors", "metrics.csv", "curves.png", "events.out.tfevents.1"):
        (tmp_path / name).touch()
    text = summary(tmp_path, result_of_rows(rows, "accuracy"), num_classes=11, incomplete=["curves.png"])
    assert text.splitlines()[4:] == [
        f"  weights      {tmp_path / 'best.safetensors'}",
        f"               {tmp_path / 'last.safetensors'}",
        f"  result       {tmp_path / 'result.json'}  (missing)",
        f"  metrics      {tmp_path / 'metrics.csv'}",
        f"  curves       {tmp_path / 'curves.png'}  (incomplete)",
        f"  TensorBoard  tensorboard --logdir {tmp_path}",
    ]
