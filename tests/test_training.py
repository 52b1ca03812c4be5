"""The training loop: its numbers, divided batches, resumption to the bit, new metrics and data sets, divergence."""

import ast
import functools
import math
import re
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import balanced_accuracy_score, f1_score

import train
from helpers import (
    ROOT,
    assert_same_bits,
    call_main,
    contents,
    differences,
    initial_weights,
    load_data,
    make_shallow,
    plain_loop,
    read_config,
    run_dir,
    stop_after,
    train_run,
)
from models import build_model
from utils import train_state
from utils.data.augmentation import normalise
from utils.data.mixing import make_mixing, mix_pairs
from utils.errors import DIVERGED, UserError
from utils.evaluation import evaluate
from utils.metrics import criterion_text
from utils.records.tracker import Tracker
from utils.records.weights import saved_step
from utils.train_state import is_due
from utils.training import train_step

TIMING = ("images_per_second", "seconds")  # columns that differ from run to run


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    make_shallow(monkeypatch)


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.5, 0.0])
def test_a_run_has_the_weights_and_metrics_of_a_plain_loop(max_grad_norm, tiny_flags, monkeypatch):
    flags = tiny_flags("--learning_rate", 0.1, "--label_smoothing", 0.1, "--max_grad_norm", max_grad_norm)
    weights, rows = train_run(flags, monkeypatch)
    expected, losses, correct, norms = plain_loop(12, 16, max_grad_norm=max_grad_norm)
    assert max(differences(weights, expected).values()) < 1e-6
    assert [row["step"] for row in rows] == [6, 12]
    assert rows[0]["train_loss"] == pytest.approx(np.mean(losses[:6]), rel=1e-5)
    assert rows[1]["train_loss"] == pytest.approx(np.mean(losses[6:]), rel=1e-5)
    assert [96 * row["train_accuracy"] for row in rows] == pytest.approx([sum(correct[:6]), sum(correct[6:])])
    assert [row["grad_norm"] for row in rows] == pytest.approx([np.mean(norms[:6]), np.mean(norms[6:])], rel=1e-4)
    assert [row["lr"] for row in rows] == pytest.approx([0.1 * (1 + math.cos(math.pi / 3)) / 2, 0.0])
    assert max(differences(weights, initial_weights()).values()) > 0.01


def test_accumulation_gives_the_results_of_the_whole_batch_also_with_dropout(tiny_flags, monkeypatch):
    flags = ["--dropout_rate", 0.2, "--learning_rate", 0.1]
    whole, rows = train_run(tiny_flags(*flags), monkeypatch)
    parts, part_rows = train_run(tiny_flags(*flags, "--gradient_accumulation_steps", 4, "--overwrite"), monkeypatch)
    assert max(differences(whole, parts).values()) < 2e-6
    for name in ("train_loss", "train_accuracy", "grad_norm"):
        assert [row[name] for row in part_rows] == pytest.approx([row[name] for row in rows], rel=1e-4), name


def test_class_weights_multiply_the_training_loss_only(tiny_flags, monkeypatch):
    """The same as in a plain loop, with micro-batches too; the test loss has no weights."""
    counts = load_data("digits", "train").labels.bincount()
    balanced = 1437 / (10 * counts.float())
    flags = ["--learning_rate", 0.1, "--label_smoothing", 0.1, "--class_weights", "balanced"]
    weights, rows = train_run(tiny_flags(*flags, "--gradient_accumulation_steps", 4), monkeypatch)
    expected, losses, _, _ = plain_loop(12, 16, weights=balanced)
    unweighted, *_ = plain_loop(12, 16)
    assert max(differences(weights, expected).values()) < 2e-6
    assert max(differences(weights, unweighted).values()) > 1e-4
    assert rows[0]["train_loss"] == pytest.approx(np.mean(losses[:6]), rel=1e-5)
    model = build_model("ViT-Mini_4", img_size=8).eval()
    model.load_state_dict(weights)
    assert rows[-1]["test_loss"] == pytest.approx(loss_and_predictions(model)[0], rel=1e-5)


def test_class_weights_and_mixed_images(tiny_flags, monkeypatch):
    """Each term of a mixed target has the weight of its own class."""
    flags = ["--learning_rate", 0.1, "--label_smoothing", 0.1, "--class_weights", "balanced", "--mixup", 0.5]
    weights, _ = train_run(tiny_flags(*flags), monkeypatch)
    balanced = 1437 / (10 * load_data("digits", "train").labels.bincount().float())

    def mix(images, labels, step):
        return mix_pairs(make_mixing(0.5, 0), images, labels, 10, 42, step)

    expected, *_ = plain_loop(12, 16, mix, weights=balanced)
    assert max(differences(weights, expected).values()) < 2e-6


@torch.no_grad()
def loss_and_predictions(model):
    """The loss of a model on the digits' test set, and its predictions."""
    data = load_data("digits", "test")
    logits = model(normalise(data.images))
    return torch.nn.functional.cross_entropy(logits, data.labels).item(), logits.argmax(dim=1)


def best_predictions(flags):
    """The predictions of a run's best weights on the digits' test set."""
    model = build_model("ViT-Mini_4", img_size=8).eval()
    model.load_state_dict(load_file(run_dir(flags) / "best.safetensors"))
    return loss_and_predictions(model)[1]


SEVERAL = ["--num_steps", 8, "--eval_every", 2, "--learning_rate", 0.5, "--max_grad_norm", 0]
SCORES = {"balanced_accuracy": balanced_accuracy_score, "macro_f1": functools.partial(f1_score, average="macro")}


@pytest.mark.parametrize("metric", ["balanced_accuracy", "macro_f1", "loss"])
def test_the_metric_of_the_flag_chooses_the_best_weights(metric, tiny_flags, monkeypatch, capsys):
    """The learning rate is so high that the last step is not the best."""
    flags = tiny_flags(*SEVERAL, "--best_metric", metric)
    _, rows = train_run(flags, monkeypatch)
    values = [row[f"test_{metric}"] for row in rows]
    best = values.index(min(values) if metric == "loss" else max(values))
    assert saved_step(run_dir(flags) / "best.safetensors") == rows[best]["step"] < 8
    if metric != "loss":
        assert values[best] == pytest.approx(
            SCORES[metric](load_data("digits", "test").labels, best_predictions(flags))
        )
    text = f"\nbest: {criterion_text(metric, values[best])}, chosen on the test set: optimistic; "
    assert text in capsys.readouterr().out
    assert read_config(run_dir(flags))["flags"]["best_metric"] == metric
    call_main(train, [*flags, "--resume"], monkeypatch)
    assert text in capsys.readouterr().out


def test_a_resumed_run_continues_with_the_best_value_of_its_metric(tiny_flags, monkeypatch):
    whole, stopped = (tiny_flags(*SEVERAL, "--best_metric", "loss", "--name", name) for name in ("whole", "stopped"))
    train_run(whole, monkeypatch, "whole")
    stop_after(5, monkeypatch)
    with pytest.raises(SystemExit):
        train_run(stopped, monkeypatch)
    train_run([*stopped, "--resume"], monkeypatch, "stopped")
    assert_same_bits(*(load_file(run_dir(flags) / "best.safetensors") for flags in (whole, stopped)))


def test_only_a_metric_that_is_asked_for_has_a_column(tiny_flags, monkeypatch):
    _, [row] = train_run(tiny_flags("--num_steps", 1), monkeypatch)
    tests = [name for name in row if name.startswith("test_")]
    assert tests == ["test_loss", "test_accuracy", "test_top5_accuracy"]
    _, [row] = train_run(tiny_flags("--num_steps", 1, "--overwrite", "--best_metric", "macro_f1"), monkeypatch)
    assert [name for name in row if name.startswith("test_")] == [*tests, "test_macro_f1"]


def test_dropout_changes_a_run(tiny_flags, monkeypatch):
    """Without this the tests with dropout would show nothing."""
    with_dropout, _ = train_run(tiny_flags("--num_steps", 2, "--warmup_steps", 0, "--dropout_rate", 0.2), monkeypatch)
    without, _ = train_run(tiny_flags("--num_steps", 2, "--warmup_steps", 0, "--overwrite"), monkeypatch)
    assert max(differences(with_dropout, without).values()) > 1e-4


@pytest.mark.parametrize("precision", [[], ["--bf16"], ["--bf16", "--fp16_opt_level", "O3"]], ids=["O0", "O2", "O3"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_a_resumed_run_ends_with_the_same_bits(optimizer, precision, tiny_flags, monkeypatch):
    """The run stops between two evaluations, so the sums of its metrics resume too."""
    flags = ["--optimizer", optimizer, "--dropout_rate", 0.1, "--num_steps", 8, *precision]
    whole, rows = train_run(tiny_flags(*flags), monkeypatch)
    stop_after(4, monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        train_run(tiny_flags(*flags, "--name", "stopped"), monkeypatch)
    assert stopped.value.code == 128 + 15
    resumed, resumed_rows = train_run(tiny_flags(*flags, "--name", "stopped", "--resume"), monkeypatch, "stopped")
    assert_same_bits(whole, resumed)
    for row, other in zip(rows, resumed_rows, strict=True):
        assert [row[key] for key in row if key not in TIMING] == [other[key] for key in row if key not in TIMING]


def test_a_resumed_run_has_the_same_mixing_average_and_random_paths(tiny_flags, monkeypatch):
    """All that draws random numbers or has a state of its own, at once."""
    flags = ["--ema_decay", 0.9, "--mixup", 0.2, "--cutmix", 1, "--drop_path_rate", 0.2, "--dropout_rate", 0.1]
    flags += ["--auto_augment", "trivial", "--color_jitter", 0.3, "--random_erasing", 0.5, "--repeated_augmentation", 3]
    flags += ["--gradient_accumulation_steps", 2, "--num_steps", 8]
    whole = tiny_flags(*flags)
    train_run(whole, monkeypatch)
    stop_after(3, monkeypatch)
    stopped = tiny_flags(*flags, "--name", "stopped")
    with pytest.raises(SystemExit):
        train_run(stopped, monkeypatch)
    train_run([*stopped, "--resume"], monkeypatch, "stopped")
    folder = whole[whole.index("--output_dir") + 1]
    for name in ("last", "best"):
        assert_same_bits(*(load_file(f"{folder}/{each}/{name}.safetensors") for each in ("run", "stopped")))


def interrupt_evaluation(number, how, monkeypatch):
    """The evaluation of this number fails, or the process receives SIGTERM in it."""
    calls = []

    def evaluate_and_interrupt(*arguments, **keywords):
        calls.append(None)
        if len(calls) == number and how == "broken image":
            raise UserError("test.png is not a readable image")
        if len(calls) == number and how == "out of memory":
            raise torch.OutOfMemoryError
        if len(calls) == number:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*arguments, **keywords)

    monkeypatch.setattr("utils.train_state.evaluate", evaluate_and_interrupt)


@pytest.mark.parametrize("how", ["broken image", "out of memory", "SIGTERM"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_an_interrupted_evaluation_costs_no_step(number, how, tiny_flags, monkeypatch, capsys):
    """The weights are saved before; the run resumes with the evaluation, so that its records are complete."""
    flags = ["--num_steps", 9, "--eval_every", 3, "--ema_decay", 0.9]
    whole, rows = train_run(tiny_flags(*flags, "--name", "whole"), monkeypatch, "whole")
    stopped = tiny_flags(*flags)
    interrupt_evaluation(number, how, monkeypatch)
    with pytest.raises((SystemExit, torch.OutOfMemoryError)) as error:
        train_run(stopped, monkeypatch)
    if how == "SIGTERM":
        assert error.value.code == 128 + signal.SIGTERM
        assert f"stopped by SIGTERM in the evaluation after step {3 * number}; saved" in capsys.readouterr().err
    capsys.readouterr()
    resumed, resumed_rows = train_run([*stopped, "--resume"], monkeypatch)
    assert f"resuming at step {3 * number} of 9" in capsys.readouterr().out
    assert_same_bits(resumed, whole)
    folder = run_dir(stopped).parent
    assert_same_bits(*(load_file(folder / each / "best.safetensors") for each in ("run", "whole")))
    for row, other in zip(rows, resumed_rows, strict=True):
        assert [row[key] for key in row if key not in TIMING] == [other[key] for key in row if key not in TIMING]


@pytest.mark.parametrize("failing", ["save_measured", "log_evaluation", "update_state"])
def test_a_crash_after_an_evaluation_repeats_it(failing, tiny_flags, monkeypatch):
    """Whatever of its three results was written: the best weights, the row, the progress."""
    flags = ["--num_steps", 6, "--eval_every", 3]
    whole, rows = train_run(tiny_flags(*flags, "--name", "whole"), monkeypatch, "whole")

    def crash(*arguments):
        raise ZeroDivisionError

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Tracker if failing == "log_evaluation" else train_state, failing, crash)
        train_run(tiny_flags(*flags), patch)
    resumed, resumed_rows = train_run(tiny_flags(*flags, "--resume"), monkeypatch)
    assert_same_bits(resumed, whole)
    for row, other in zip(rows, resumed_rows, strict=True):
        assert [row[key] for key in row if key not in TIMING] == [other[key] for key in row if key not in TIMING]


def test_resuming_without_a_checkpoint_starts_the_run(tiny_flags, monkeypatch):
    _, rows = train_run(tiny_flags("--resume"), monkeypatch)
    assert [row["step"] for row in rows] == [6, 12]


def test_a_warning_names_the_flags_that_change_when_a_run_resumes(tiny_flags, monkeypatch, capsys):
    train_run(tiny_flags("--num_steps", 2), monkeypatch)
    train_run(tiny_flags("--resume", "--num_steps", 4), monkeypatch)
    assert "warning: resuming with --num_steps 4; the run was started with 2" in capsys.readouterr().out


def test_a_resumed_run_takes_the_weight_decay_of_the_flags(tiny_flags, monkeypatch):
    train_run(tiny_flags("--num_steps", 6), monkeypatch)
    weights, _ = train_run(tiny_flags("--resume", "--weight_decay", 10, "--learning_rate", 0.01), monkeypatch)
    plain, _ = train_run(tiny_flags("--overwrite", "--learning_rate", 0.01), monkeypatch)
    assert weights["blocks.0.mlp.fc1.weight"].norm() < 0.9 * plain["blocks.0.mlp.fc1.weight"].norm()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model_type", "ViT-Ti_16", "--img_size", 16], "does not fit the model"),
        (["--optimizer", "adamw"], "the run was started with --optimizer sgd, so it can't be resumed with adamw"),
        (["--num_steps", 1], "is at step 2 already, beyond the 1 of the flags"),
        (
            ["--best_metric", "loss"],
            "was started with --best_metric accuracy, so it can't be resumed with loss",
        ),
    ],
)
def test_flags_that_can_not_resume_a_run_are_an_error_and_change_nothing(
    flags, message, tiny_flags, monkeypatch, capsys, tmp_path
):
    train_run(tiny_flags("--num_steps", 2), monkeypatch)
    before = contents(tmp_path / "output")
    with pytest.raises(SystemExit) as stopped:
        call_main(train, tiny_flags("--num_steps", 2, "--resume", *flags), monkeypatch)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert contents(tmp_path / "output") == before


def test_epochs_are_converted_to_steps(tiny_flags, monkeypatch):
    _, rows = train_run(tiny_flags("--epochs", 0.1, "--eval_every", 100), monkeypatch)
    assert [row["step"] for row in rows] == [math.ceil(0.1 * 1437 / 16)]


def test_when_something_is_due():
    assert [step for step in range(1, 8) if is_due(step, 3)] == [3, 6]
    assert not any(is_due(step, None) for step in range(1, 8))


@pytest.mark.parametrize("eval_every", [1, 2])
def test_a_run_that_diverges_stops_and_keeps_its_last_good_checkpoint(
    eval_every, tiny_flags, monkeypatch, capsys, tmp_path
):
    flags = tiny_flags("--learning_rate", 1e30, "--max_grad_norm", 0, "--eval_every", eval_every, "--warmup_steps", 2)
    with pytest.raises(SystemExit) as stopped:
        train_run(flags, monkeypatch)
    assert stopped.value.code == DIVERGED
    message = capsys.readouterr().err
    kept = tmp_path / "output" / "run" / "last.safetensors"
    assert re.search(
        r"(the loss is nan at|the weights are not finite after) step \d \(learning rate \d.*e\+\d+\)", message
    )
    assert f"last good checkpoint: {kept}" in message
    assert all(torch.isfinite(weight).all() for weight in load_file(kept).values())


def test_a_new_training_metric_is_recorded_everywhere(tiny_flags, monkeypatch, tmp_path):
    """One more key of the step's dictionary, which is not measured in every step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def step_with_one_more(state, batches):
        metrics = train_step(state, batches)
        return {**metrics, "step_number": metrics["loss"] * 0 + (state.step if state.step % 2 else math.nan)}

    monkeypatch.setattr("utils.training.train_step", step_with_one_more)
    shown = []
    monkeypatch.setattr("tqdm.tqdm.set_postfix_str", lambda bar, text, refresh: shown.append(text))
    _, rows = train_run(tiny_flags("--gradient_accumulation_steps", 2), monkeypatch)
    assert [row["step_number"] for row in rows] == [3, 9]  # means of 1, 3, 5 and of 7, 9, 11
    assert re.match(r"loss \S+, accuracy \S+, grad_norm \S+, step_number 11, lr ", shown[10])
    events = EventAccumulator(str(tmp_path / "output" / "run")).Reload()
    assert [event.value for event in events.Scalars("train/step_number")][::2] == [1, 3, 5, 7, 9, 11]


def functions_that_call(method, path):
    """Names of the functions in a file that call `something.method(...)`."""
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    return {function.name for function in functions if any(is_call_of(method, node) for node in ast.walk(function))}


def is_call_of(method, node):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == method


def test_the_training_step_exists_once():
    """Benchmarks time `train_step` itself; only the steps of other projects, to compare with, stand there.

    A backward pass whose FLOPs are counted is no step.
    """
    paths = [path for folder in ("utils", "scripts", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    found = {path.name: functions_that_call("backward", path) for path in (*paths, *ROOT.glob("*.py"))}
    assert {name: functions for name, functions in found.items() if functions} == {
        "training.py": {"train_step"},
        "precision.py": {"backward"},
        "profiling.py": {"count_training_flops"},
        "peers.py": {"train"},
        "end_to_end.py": {"timm_speed"},
    }
    assert found["steps.py"] == set()
