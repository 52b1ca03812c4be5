"""--wandb: the records at Weights & Biases, by a stand-in for the package and once by the real one, offline."""

import importlib.util
import json
import os
import re
import signal
import sys
import types

import pytest

import train
from command_line import train_parser
from helpers import (
    ROOT,
    call_main,
    make_shallow,
    metrics,
    read_config,
    run_dir,
    script,
    start,
    succeed,
    wait_for_checkpoint,
)
from utils.errors import DIVERGED
from utils.records.weights_and_biases import WeightsAndBiases

STAND_INS = ROOT / "tests" / "stand_ins"


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """A function that returns the calls of the stand-in since the function was last called."""
    path = tmp_path / "calls"
    monkeypatch.setenv("PYTHONPATH", str(STAND_INS))
    monkeypatch.setenv("WANDB_CALLS", str(path))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    spec = importlib.util.spec_from_file_location("wandb", STAND_INS / "wandb" / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "wandb", module)

    def read():
        lines = path.read_text().splitlines() if path.exists() else []
        path.write_text("")
        return [json.loads(line) for line in lines]

    return read


@pytest.fixture
def one_block(monkeypatch):
    make_shallow(monkeypatch, 1)


def calls_of(calls, name):
    return [call for call in calls if call["call"] == name]


def scalars(calls):
    """{name: {step: value}} of all calls of log."""
    found = {}
    for call in calls_of(calls, "log"):
        for name, value in call["values"].items():
            assert found.setdefault(name, {}).setdefault(call["step"], value) == value
    return found


def tensorboard_scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()["scalars"]}


@pytest.mark.usefixtures("one_block")
def test_it_gets_the_scalars_of_tensorboard_at_the_same_steps(calls, tiny_flags, monkeypatch):
    flags = tiny_flags("--wandb", "--log_attention_every", 6)
    call_main(train, flags, monkeypatch)
    made = calls()
    (started,) = calls_of(made, "online")
    assert (started["project"], started["name"], started["dir"]) == ("vision-transformers", "run", str(run_dir(flags)))
    assert started["config"] == read_config(run_dir(flags))["flags"]
    assert started["config"]["learning_rate"] == 0.03
    logged = scalars(made)
    assert set(logged.pop("attention rollout")) == {6, 12}
    expected = tensorboard_scalars(run_dir(flags))
    assert {name: list(values) for name, values in logged.items()} == {
        name: list(values) for name, values in expected.items()
    }
    assert set(logged["train/loss"]) == set(range(1, 13))
    for name, values in logged.items():
        assert values == pytest.approx(expected[name], rel=1e-6)
    steps = [call["step"] for call in calls_of(made, "log")]
    assert steps == sorted(steps)
    best = max(metrics(flags), key=lambda row: float(row["test_accuracy"]))
    summary = calls_of(made, "summary")[-1]
    assert summary["best_accuracy"] == pytest.approx(float(best["test_accuracy"]))
    assert summary["best_step"] == int(best["step"])
    assert made[-1] == {"call": "finish", "exit_code": 0}


@pytest.mark.usefixtures("one_block")
def test_a_resumed_run_continues_the_same_run_there(calls, tiny_flags, monkeypatch):
    flags = tiny_flags("--wandb", "--wandb_project", "mine")
    call_main(train, flags, monkeypatch)
    (first,) = calls_of(calls(), "online")
    monkeypatch.setenv("WANDB_STEP", "15")  # the server has the steps up to 14
    call_main(train, [*flags, "--resume", "--num_steps", 18], monkeypatch)
    made = calls()
    (second,) = calls_of(made, "online")
    assert (second["id"], second["resume"], second["project"]) == (first["id"], "allow", "mine")
    assert second["config"]["num_steps"] == 18
    assert second["allow_val_change"]
    assert list(scalars(made)["train/loss"]) == [15, 16, 17, 18]

    monkeypatch.delenv("WANDB_STEP")
    for pattern in (
        "*.safetensors",
        "metrics.csv",
        "curves.png",
        "result.json",
    ):  # as if killed before its first checkpoint
        for path in run_dir(flags).glob(pattern):
            path.unlink()
    call_main(train, [*flags, "--resume"], monkeypatch)
    made = calls()
    assert calls_of(made, "online")[0]["id"] == first["id"]
    assert list(scalars(made)["train/loss"]) == list(range(1, 13))

    kept = run_dir(flags) / "wandb" / "offline-run"
    kept.mkdir(parents=True)
    call_main(train, [*flags, "--overwrite"], monkeypatch)
    assert calls_of(calls(), "online")[0]["id"] != first["id"]
    assert not kept.exists()


STARTED = ["online"]
RETRIED = ["online", "teardown", "offline"]
WORKS = ["log", "image", "log", "log", "summary", "log", "finish"]
KEPT = "its records are kept in .*wandb for `wandb sync`"
CONTINUES = "the training continues"


@pytest.mark.parametrize(
    "failing, warnings, made",
    [
        ("online", [("Weights & Biases", "online", KEPT)], [*RETRIED, *WORKS]),
        (
            "online offline",
            [("Weights & Biases", "online", KEPT), ("Weights & Biases", "offline", CONTINUES)],
            RETRIED,
        ),
        (
            "online teardown",
            [("Weights & Biases", "online", KEPT), ("Weights & Biases", "teardown", CONTINUES)],
            RETRIED[:2],
        ),
        ("log", [("Weights & Biases", "log", CONTINUES)], [*STARTED, "log", "log", "finish"]),
        ("image", [("a figure for Weights & Biases", "image", CONTINUES)], [*STARTED, *WORKS[:2], *WORKS[3:]]),
        ("summary", [("Weights & Biases", "summary", CONTINUES)], [*STARTED, *WORKS[:5], "finish"]),
        ("finish", [("the end of the run at Weights & Biases", "finish", KEPT)], [*STARTED, *WORKS]),
    ],
)
def test_a_failing_call_is_one_warning(failing, warnings, made, calls, tiny_flags, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WANDB_FAILS", failing)
    run = WeightsAndBiases(tmp_path, train_parser().parse_args(tiny_flags("--wandb")))
    run.log({"train/loss": 1.0}, 1)
    run.log_figure("attention rollout", None, 1)
    run.log({"test/loss": 1.0}, 1, retry=True)
    run.summarise({"best_accuracy": 0.5})
    run.log({"train/loss": 1.0}, 2)
    run.finish()
    lines = capsys.readouterr().out.splitlines()
    for line, (what, call, outcome) in zip(lines, warnings, strict=True):
        assert re.fullmatch(rf"warning: {what} has failed \({call} is out of order\); {outcome}", line)
    assert [call["call"] for call in calls()] == made


def test_the_next_evaluation_tries_again(calls, tiny_flags, monkeypatch, capsys):
    """The values of the steps between a failure and the next evaluation are lost there."""
    monkeypatch.setenv("WANDB_FAILS", "log")
    record = sys.modules["wandb"].record

    def works_from_step_4(call, **values):
        if values.get("step") == 4:
            monkeypatch.delenv("WANDB_FAILS")
        record(call, **values)

    flags = tiny_flags("--wandb", "--num_steps", 6, "--eval_every", 2)
    monkeypatch.setattr(sys.modules["wandb"], "record", works_from_step_4)
    call_main(train, flags, monkeypatch)
    assert [row["step"] for row in metrics(flags)] == ["2", "4", "6"]
    logged = scalars(calls())
    assert list(logged["train/loss"]) == [1, 5, 6]
    assert list(logged["test/loss"]) == [2, 4, 6]
    lines = [line for line in capsys.readouterr().out.splitlines() if "Weights & Biases" in line]
    assert lines == [
        "warning: Weights & Biases has failed (log is out of order); the training continues",
        "Weights & Biases works again",
    ]


def test_a_run_that_ends_with_an_error_is_marked_as_failed(calls, tiny_flags, monkeypatch):
    with pytest.raises(SystemExit) as stopped:
        call_main(train, tiny_flags("--wandb", "--learning_rate", 1e30, "--max_grad_norm", 0), monkeypatch)
    assert stopped.value.code == DIVERGED
    assert calls()[-1] == {"call": "finish", "exit_code": 1}


OLD, EMPTY = types.ModuleType("wandb"), types.ModuleType("wandb")
OLD.__version__ = "0.16.3"


@pytest.mark.parametrize(
    "package, message",
    [
        (None, "; pip install wandb\n"),
        (EMPTY, "has no attribute '__version__'); pip install wandb\n"),
        (OLD, "a newer Weights & Biases than 0.16.3; pip install --upgrade wandb\n"),
    ],
)
def test_a_missing_or_old_package_is_an_error_before_the_run(package, message, tiny_flags, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", package)
    flags = tiny_flags("--wandb")
    with pytest.raises(SystemExit) as stopped:
        call_main(train, flags, monkeypatch)
    assert stopped.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("train.py: error: --wandb needs ")
    assert errors.endswith(message)
    assert errors.count("\n") == 1
    assert not run_dir(flags).exists()


def test_without_the_flag_the_package_is_not_imported(tiny_flags, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would fail
    call_main(train, tiny_flags("--num_steps", 1), monkeypatch)


def test_an_invalid_project_name_is_an_error(calls, tiny_flags, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        call_main(train, tiny_flags("--wandb", "--wandb_project", "a/b"), monkeypatch)
    assert stopped.value.code == 2
    assert "--wandb_project 'a/b' is not a valid project name" in capsys.readouterr().err


def test_the_project_is_that_of_the_environment_variable(monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "ours")
    assert train_parser().parse_args(["--name", "x"]).wandb_project == "ours"


@pytest.mark.slow
def test_only_the_first_process_starts_a_run(calls, tiny_flags):
    succeed("train.py", *tiny_flags("--wandb", "--num_steps", 2), processes=2)
    made = calls()
    assert len(calls_of(made, "online")) == len(calls_of(made, "finish")) == 1
    assert list(scalars(made)["train/loss"]) == [1, 2]


@pytest.mark.slow
def test_a_missing_package_in_the_shell_is_one_line_and_status_2(tiny_flags, tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text("raise ImportError('imported')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = script("train.py", *tiny_flags("--wandb"))
    assert done.returncode == 2
    assert done.stderr == "train.py: error: --wandb needs Weights & Biases (imported); pip install wandb\n"


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_the_real_package_offline_records_an_interrupted_and_resumed_run(tiny_flags, monkeypatch):
    wandb = pytest.importorskip("wandb", minversion="0.31")
    monkeypatch.setenv("WANDB_MODE", "offline")
    flags = tiny_flags("--wandb", "--num_steps", 100000, "--eval_every", 5)
    process = start(flags)
    wait_for_checkpoint(process, flags, 5)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    [step] = re.findall(r"stopped by SIGTERM (?:in the evaluation )?after step (\d+); saved .*last.safetensors", errors)
    step = int(step)
    assert (run_dir(flags) / f"state-{step}").exists()
    call_main(train, [*flags, "--resume", "--num_steps", step + 2], monkeypatch)
    wandb.teardown()  # its own process may still write after the end of the run
    run_id = (run_dir(flags) / "wandb-id.txt").read_text().strip()
    paths = list((run_dir(flags) / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(paths) == 2
    for path in paths:
        names = ("train/loss", "test/accuracy", "best_accuracy", "learning_rate")
        assert [name for name in names if name.encode() not in path.read_bytes()] == [], path
