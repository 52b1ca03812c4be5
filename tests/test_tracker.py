"""The records of a run while it trains: metrics.csv, TensorBoard, curves.png and the terminal."""

import contextlib
import csv
import json
import re
import subprocess
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from helpers import call_main, load_data, make_shallow, read_config, train_run, write_images
from models import build_model
from utils.data.augmentation import normalise
from utils.errors import RunStoppedError, UserError
from utils.metrics import Best
from utils.records.event_file import EventFile
from utils.records.metrics_file import read_rows
from utils.records.run_folder import read_metrics
from utils.records.tracker import Tracker

FULL = "No space left on device"


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    make_shallow(monkeypatch)


def test_the_files_of_a_run(tiny_flags, monkeypatch, tmp_path, capsys):
    _, rows = train_run(tiny_flags("--num_steps", 13), monkeypatch)
    folder = tmp_path / "output" / "run"
    names = {path.name.split(".")[0] for path in folder.iterdir()}
    checkpoints = {"last", "state-13", "last-12", "state-12", "best"}
    assert names == {*checkpoints, "metrics", "config", "curves", "result", "events", ""}  # the last one is .lock
    assert list(rows[0]) == [
        *("step", "train_loss", "train_accuracy", "grad_norm", "test_loss", "test_accuracy", "test_top5_accuracy"),
        *("lr", "images_per_second", "seconds"),
    ]
    assert [row["step"] for row in rows] == [6, 12, 13]
    config = read_config(folder)
    assert config["flags"]["num_steps"] == 13
    assert config["versions"]["torch"] == torch.__version__
    assert config["classes"] == [str(digit) for digit in range(10)]
    model = build_model("ViT-Mini_4", img_size=8)
    model.load_state_dict(load_file(folder / "best.safetensors"))
    printed = capsys.readouterr().out
    assert re.search(r"\nlast, step 13   test accuracy [\d.]+ % \[.*\]\nbest, step +\d+   test accuracy", printed)
    assert "\nbest: highest accuracy, chosen on the test set: optimistic; [low, high]: 95 % interval\n" in printed
    assert "top-5" not in printed  # of ten classes

    events = EventAccumulator(str(folder)).Reload()
    steps = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    tests = {"test/loss", "test/accuracy", "test/top5_accuracy"}
    assert all(steps[tag] == [6, 12, 13] for tag in tests)
    metrics = {"train/loss", "train/accuracy", "train/grad_norm"}
    assert all(steps[tag] == list(range(1, 14)) for tag in metrics)
    assert set(steps) == {*metrics, "train/lr", "train/images_per_second", *tests}


@pytest.fixture
def many_classes(tmp_path):
    """The folder of a data set of 12 classes with 3 training and 3 test images each."""
    for number in range(12):
        for split in ("train", "test"):
            write_images(tmp_path / "images" / split / f"class{number:02d}", [(8, 8)] * 3, seed=number)
    return tmp_path / "images"


def test_of_more_than_ten_classes_the_top5_accuracy_is_recorded_and_printed(
    many_classes, tiny_flags, monkeypatch, capsys
):
    flags = tiny_flags("--dataset", "imagefolder", "--data_dir", many_classes, "--learning_rate", 0.1)
    weights, rows = train_run(flags, monkeypatch)
    model = build_model("ViT-Mini_4", img_size=8, num_classes=12).eval()
    model.load_state_dict(weights)
    test_set = load_data("imagefolder", "test", many_classes)
    ranks = model(normalise(test_set.images)).argsort(dim=1, descending=True)
    top5 = np.mean([label in best for label, best in zip(test_set.labels.tolist(), ranks[:, :5].tolist(), strict=True)])
    assert rows[-1]["test_top5_accuracy"] == pytest.approx(top5)
    assert rows[-1]["test_accuracy"] < top5 < 1
    printed = capsys.readouterr().out
    assert re.search(rf"test loss [\d.]+ accuracy +[\d.]+ % top-5 +{100 * top5:.2f} %  lr", printed)
    assert re.search(rf"   test accuracy [\d.]+ % \[.*\], top-5 {100 * top5:.2f} % \[.*\]\nbest, ", printed)


def test_metrics_without_a_newer_column_are_read_and_continued(many_classes, tiny_flags, monkeypatch, tmp_path, capsys):
    """A run of an earlier version, which had no top-5 accuracy."""
    flags = tiny_flags("--dataset", "imagefolder", "--data_dir", many_classes)
    _, rows = train_run(flags, monkeypatch)
    path = tmp_path / "output" / "run" / "metrics.csv"
    with open(path, newline="") as file:
        older = [{name: row[name] for name in row if name != "test_top5_accuracy"} for row in csv.DictReader(file)]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(older[0]))
        writer.writeheader()
        writer.writerows(older)
    assert read_metrics(path.parent)["test_accuracy"] == [row["test_accuracy"] for row in rows]
    assert "test_top5_accuracy" not in read_metrics(path.parent)
    (path.parent / "result.json").unlink()
    config = json.loads((path.parent / "config.json").read_text())
    del config["images"]
    (path.parent / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    train_run([*flags, "--resume"], monkeypatch)  # no step is left to do
    assert re.search(r"\nlast, step 12   test accuracy [\d.]+ %\nbest, ", capsys.readouterr().out)
    _, resumed = train_run([*flags, "--resume", "--num_steps", 18], monkeypatch)
    assert np.isnan([row["test_top5_accuracy"] for row in resumed]).tolist() == [True, True, False]
    assert re.search(
        r"\nlast, step 18   test accuracy [\d.]+ % \[.*\], top-5 [\d.]+ % \[.*\]\nbest, ", capsys.readouterr().out
    )
    path.write_text(path.read_text().replace("train_loss", "loss"))
    with pytest.raises(UserError, match="needs numbers in the columns step, train_loss, "):
        read_metrics(path.parent)


def test_a_run_whose_name_has_dollar_signs_is_drawn(tiny_flags, monkeypatch, tmp_path):
    """Between two of them matplotlib would read a formula."""
    train_run(tiny_flags("--name", "$a_{$", "--num_steps", 1), monkeypatch, "$a_{$")
    assert (tmp_path / "output" / "$a_{$" / "curves.png").exists()


def test_resuming_a_finished_run_prints_its_results_again(tiny_flags, monkeypatch, capsys):
    train_run(tiny_flags("--num_steps", 2), monkeypatch)
    before = capsys.readouterr().out.splitlines()[-9:]
    assert before[0].startswith("last, step 2   test accuracy ")
    train_run(tiny_flags("--num_steps", 2, "--resume"), monkeypatch)
    assert capsys.readouterr().out.splitlines()[-9:] == before


# Records that fail


def open_tracker(folder, first_step=0):
    return Tracker(folder, first_step, num_steps=100, seconds=0.0, num_classes=10, enabled=True)


def evaluate_at(tracker, step):
    """Log a step and its evaluation; the values derive from the step."""
    tracker.log_steps(step, {"loss": [step / 2]}, lr=0.1, images_per_second=100.0)
    names = ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "test_top5_accuracy")
    row = {"step": step, **dict.fromkeys(names, step / 4), "lr": 0.1, "images_per_second": 100.0, "seconds": step}
    tracker.log_evaluation(row, Best("accuracy", 0.5, 1))


def recorded(folder):
    """{name: {step: value}} of the scalars that TensorBoard reads; no step occurs twice."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    found = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert all(len(dict(values)) == len(values) for values in found.values())
    return {name: dict(values) for name, values in found.items()}


def reports(capsys):
    """The printed lines except those of the evaluations."""
    printed = capsys.readouterr()
    assert printed.err == ""
    return [line for line in printed.out.splitlines() if not line.startswith("step ")]


@contextlib.contextmanager
def file_size_limit(size):
    """As a quota does, the system writes only the bytes of a file below the limit; the next write raises OSError."""
    resource = pytest.importorskip("resource")
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, previous[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)


def test_events_that_could_not_be_written_are_written_at_the_next_evaluation(tmp_path, capsys):
    tracker = open_tracker(tmp_path)
    evaluate_at(tracker, 1)
    (path,) = tmp_path.glob("events.*")
    whole = path.read_bytes()
    with file_size_limit(len(whole) + 7):  # within an event
        tracker.log_steps(2, {"loss": [1.0]}, lr=0.1, images_per_second=100.0)
        tracker.log_steps(3, {"loss": [1.5]}, lr=0.1, images_per_second=100.0)
        assert len(path.read_bytes()) == len(whole) + 7
        assert recorded(tmp_path)["train/loss"] == {1: 0.5}
    assert reports(capsys) == [
        "warning: writing TensorBoard's events has failed (File too large); the training continues"
    ]
    evaluate_at(tracker, 4)
    assert reports(capsys) == ["writing TensorBoard's events works again"]
    assert recorded(tmp_path)["train/loss"] == {1: 0.5, 2: 1.0, 3: 1.5, 4: 2.0}
    assert recorded(tmp_path)["test/loss"] == {1: 0.25, 4: 1.0}
    assert path.read_bytes().startswith(whole)
    tracker.close()
    assert list(tmp_path.glob("events.*")) == [path]


def test_a_full_disk_is_reported_once_per_record(tmp_path, capsys):
    """A file system in memory, which only root may mount, and only on some machines."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed")
    try:
        tracker = open_tracker(disk)
        evaluate_at(tracker, 1)
        with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass
        for step in range(2, 80):
            evaluate_at(tracker, step)
        assert reports(capsys) == [
            f"warning: writing {disk}/metrics.csv has failed ({FULL}); the training continues",
            f"warning: writing TensorBoard's events has failed ({FULL}); the training continues",
        ]
        assert read_rows(disk / "metrics.csv")[0]["step"] == "1"  # the file of the last success is whole
        (disk / "filler").unlink()
        evaluate_at(tracker, 80)
        tracker.close()
        assert reports(capsys) == [
            f"writing {disk}/metrics.csv works again",
            "writing TensorBoard's events works again",
        ]
        assert read_metrics(disk)["step"] == list(range(1, 81))
        assert list(recorded(disk)["test/loss"]) == list(range(1, 81))
        assert (disk / "curves.png").stat().st_size
    finally:
        subprocess.run(["umount", disk], check=True)


def break_events(folder, monkeypatch):
    monkeypatch.setattr("utils.records.event_file.file_name", lambda _: "missing/events.out.tfevents.1")


def break_metrics(folder, monkeypatch):
    (folder / ".metrics.csv.tmp" / "x").mkdir(parents=True)  # which can be neither written nor replaced


def break_curves(folder, monkeypatch):
    (folder / "curves.png" / "x").mkdir(parents=True)


@pytest.mark.parametrize(
    "breaks, warning, line",
    [
        (break_events, "writing TensorBoard's events has failed (No such", "  TensorBoard  tensorboard --logdir {run}"),
        (break_metrics, "writing {run}/metrics.csv has failed (Is a", "  metrics      {run}/metrics.csv"),
        (break_curves, "drawing {run}/curves.png has failed (Is a", "  curves       {run}/curves.png"),
    ],
)
def test_a_failing_record_neither_ends_the_training_nor_counts_as_written(
    breaks, warning, line, tiny_flags, monkeypatch, tmp_path, capsys
):
    run, start = tmp_path / "output" / "run", Tracker.__init__

    def start_broken(*arguments, **keywords):
        breaks(run, monkeypatch)
        start(*arguments, **keywords)

    monkeypatch.setattr(Tracker, "__init__", start_broken)
    call_main(train, tiny_flags("--num_steps", 4, "--eval_every", 1), monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: " + warning.format(run=run))
    marked = [line for line in lines if line.endswith(("(missing)", "(incomplete)"))]
    assert len(marked) == 1
    assert marked[0].startswith(line.format(run=run))
    assert (run / "last.safetensors").exists()


def test_metrics_are_written_again_with_all_rows(tmp_path, capsys):
    break_metrics(tmp_path, None)
    tracker = open_tracker(tmp_path)
    evaluate_at(tracker, 1)
    evaluate_at(tracker, 2)
    assert not (tmp_path / "metrics.csv").exists()
    (tmp_path / ".metrics.csv.tmp" / "x").rmdir()
    (tmp_path / ".metrics.csv.tmp").rmdir()
    tracker.close()
    assert read_metrics(tmp_path)["step"] == [1, 2]
    assert reports(capsys) == [
        f"warning: writing {tmp_path}/metrics.csv has failed (Is a directory); the training continues",
        f"writing {tmp_path}/metrics.csv works again",
    ]


@pytest.mark.parametrize("error", [RunStoppedError("the loss is nan", status=1), KeyboardInterrupt()])
def test_failing_records_do_not_hide_the_error_that_ends_a_run(error, tmp_path, monkeypatch, capsys):
    for breaks in (break_events, break_metrics, break_curves):
        breaks(tmp_path, monkeypatch)
    with pytest.raises(type(error)) as raised, open_tracker(tmp_path) as tracker:
        evaluate_at(tracker, 1)
        raise error
    assert raised.value is error
    assert len(reports(capsys)) == 3


def test_an_error_of_the_program_is_raised_unless_another_one_ends_the_run(tmp_path, monkeypatch, capsys):
    def plot_curves(*_):
        raise TypeError("wrong call")

    monkeypatch.setattr("utils.curves.plot_curves", plot_curves)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with pytest.raises(TypeError, match="wrong call"), open_tracker(tmp_path / "a") as tracker:
        evaluate_at(tracker, 1)
    with pytest.raises(RunStoppedError), open_tracker(tmp_path / "b") as tracker:
        evaluate_at(tracker, 1)
        raise RunStoppedError("stopped", status=1)
    assert reports(capsys) == ["warning: closing the records has failed (wrong call)"]


def test_a_figure_that_can_not_be_drawn_is_a_warning(tmp_path, capsys):
    from matplotlib.figure import Figure

    class NoLatex(Figure):
        def savefig(self, *args, **keywords):
            raise RuntimeError("Failed to process string with tex because latex could not be found")

    with open_tracker(tmp_path) as tracker:
        tracker.log_figure("attention", NoLatex(), 1)
        tracker.log_figure("attention", NoLatex(), 2)
        tracker.log_figure("attention", Figure(figsize=(2, 1)), 3)
    first, second = reports(capsys)
    assert first.startswith("warning: drawing a figure has failed (Failed to process string with tex")
    assert second == "drawing a figure works again"
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(image.step, image.width, image.height) for image in events.Images("attention")] == [(3, 200, 100)]


# Resuming


def test_an_evaluation_replaces_the_row_of_its_step(tmp_path):
    with open_tracker(tmp_path) as tracker:
        for step in (1, 2, 3):
            evaluate_at(tracker, step)
    path = tmp_path / "metrics.csv"
    path.write_text(path.read_text().replace("\n2,0.5,", "\n2,0.75,"))
    with open_tracker(tmp_path, first_step=2) as tracker:
        assert read_metrics(tmp_path)["step"] == [1, 2]
        assert read_metrics(tmp_path)["train_loss"] == [0.25, 0.75]
        evaluate_at(tracker, 2)
    assert read_metrics(tmp_path)["step"] == [1, 2]
    assert read_metrics(tmp_path)["train_loss"] == [0.25, 0.5]


def test_tensorboard_ignores_what_is_later_than_the_checkpoint_even_if_the_clock_was_set_back(tmp_path, monkeypatch):
    with open_tracker(tmp_path) as tracker:
        for step in (1, 2, 3):
            evaluate_at(tracker, step)
    monkeypatch.setattr(time, "time", lambda: 1e9)
    with open_tracker(tmp_path, first_step=2) as tracker:
        assert recorded(tmp_path)["train/loss"] == {1: 0.5, 2: 1.0}
        evaluate_at(tracker, 4)
    assert recorded(tmp_path)["train/loss"] == {1: 0.5, 2: 1.0, 4: 2.0}
    names = sorted(path.name for path in tmp_path.glob("events.*"))
    assert EventFile(tmp_path).path.name > names[1] > names[0]


def test_the_duration_is_measured_by_the_clock_of_the_highest_resolution(tmp_path, monkeypatch):
    """That of time.monotonic is 15.6 ms on Windows."""
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    tracker = Tracker(tmp_path, 5, 10, seconds=60.0, num_classes=10, enabled=False)
    assert 60 < tracker.seconds() < 120
