"""scripts/fault_campaign.py: its plan, its comparisons, which must detect each kind of loss, and a small campaign."""

import csv
import random
import re
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import ROOT, call_main, script, truncate
from utils.records.run_folder import METRICS
from utils.records.weights import BEST, LAST

sys.path.insert(0, str(ROOT / "scripts"))
import fault_campaign
import fault_checks
import faults
from fault_runs import RUNS, Lab

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="forks processes and reads /proc")
VALUES = {"step": 10, "test_loss": 1.5, "seconds": 3.25}


def write_results(run_dir, values=VALUES, steps=(10, 20)):
    """The files of a run that the campaign compares."""
    from torch.utils.tensorboard import SummaryWriter

    run_dir.mkdir()
    generator = torch.Generator().manual_seed(3)
    weights = {"head.weight": torch.randn(2, 3, generator=generator), "head.bias": torch.tensor([1.0, torch.nan])}
    for name in (LAST, BEST):
        save_file(weights, run_dir / name, metadata={"step": "20"})
    write_rows(run_dir, [{**values, "step": step} for step in steps])
    with SummaryWriter(run_dir) as writer:
        for step in steps:
            writer.add_scalar("test/loss", values["test_loss"], step)
    return run_dir


def write_rows(run_dir, rows):
    with open(run_dir / METRICS, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def flip_last_bit(run_dir, name):
    content = bytearray((run_dir / name).read_bytes())
    content[-1] ^= 1
    (run_dir / name).write_bytes(content)


def save_at_another_step(run_dir, name):
    save_file(load_file(run_dir / name), run_dir / name, metadata={"step": "10"})


def test_the_same_results_have_no_differences(tmp_path):
    reference = write_results(tmp_path / "reference")
    run_dir = write_results(tmp_path / "run", {**VALUES, "seconds": 99.0})
    assert fault_checks.compare(run_dir, reference) == []


@pytest.mark.parametrize(
    "lose, message",
    [
        (lambda run: flip_last_bit(run, LAST), r"last.safetensors: 1 of 2 weights differ, first head.weight"),
        (lambda run: flip_last_bit(run, BEST), r"best.safetensors: 1 of 2 weights differ"),
        (lambda run: save_at_another_step(run, BEST), r"best.safetensors is of step 10 instead of 20"),
        (lambda run: truncate(run / LAST), r"last.safetensors can't be read"),
        (lambda run: (run / BEST).unlink(), r"best.safetensors can't be read"),
        (lambda run: (run / METRICS).unlink(), r"metrics.csv is damaged: .* No such file"),
        (lambda run: write_rows(run, [VALUES]), r"metrics.csv has the steps \['10'\] instead of \['10', '20'\]"),
        (
            lambda run: write_rows(run, [VALUES, {**VALUES, "step": 20, "test_loss": 1.25}]),
            r"metrics.csv has test_loss 1.25 instead of 1.5 at step 20",
        ),
        (
            lambda run: write_rows(run, [{"step": 10, "seconds": 1}, {"step": 20, "seconds": 2}]),
            r"metrics.csv has test_loss None instead of 1.5 at step 10",
        ),
        (
            lambda run: next(run.glob("events.*")).unlink(),
            r"TensorBoard: 2 values differ, first test/loss at step 10: nothing, not 1.5",
        ),
    ],
)
def test_each_kind_of_loss_is_found(lose, message, tmp_path):
    reference, run_dir = (write_results(tmp_path / name) for name in ("reference", "run"))
    lose(run_dir)
    (problem,) = fault_checks.compare(run_dir, reference)
    assert re.search(message, problem), problem


def test_a_changed_tensorboard_value_is_found(tmp_path):
    reference = write_results(tmp_path / "reference")
    run_dir = write_results(tmp_path / "run", {**VALUES, "test_loss": 2.5})
    write_rows(run_dir, [VALUES, {**VALUES, "step": 20}])
    assert fault_checks.compare(run_dir, reference) == [
        "TensorBoard: 2 values differ, first test/loss at step 10: 2.5, not 1.5"
    ]


class EndedStart:
    """A Start that has ended; meanwhile it did `action`."""

    def __init__(self, status, printed, action=lambda: None):
        self.ended, self.text, self.action = status, printed, action

    def __enter__(self):
        self.action()
        return self

    def __exit__(self, *error):
        pass

    def wait(self):
        return self.ended

    status = wait

    def stderr(self):
        return self.text

    printed = last_words = stderr


ERROR = "train.py: error: last.safetensors is missing\n"


@pytest.mark.parametrize(
    "status, printed, problems",
    [(2, ERROR, 0), (1, ERROR, 1), (2, ERROR + ERROR, 1), (2, "", 1), (2, "train.py: error: another\n", 1)],
)
def test_a_refusal_is_status_2_and_one_line_that_names_the_file(status, printed, problems, tmp_path):
    case = Lab(tmp_path, 0, {}).case("sgd", "case")
    assert len(fault_checks.refuses(case, EndedStart(status, printed), names=LAST)) == problems


def test_a_refusal_changes_no_file(tmp_path):
    case = Lab(tmp_path, 0, {}).case("sgd", "case")
    start = EndedStart(2, ERROR, lambda: (case.run_dir / METRICS).write_text("step\n"))
    assert fault_checks.refuses(case, start, names=LAST) == ["it changed metrics.csv"]


@pytest.mark.parametrize(
    "status, printed, problems", [(0, "", 0), (1, "", 1), (None, "", 1), (0, "Traceback (most recent call last)", 1)]
)
def test_an_unexpected_end_is_found(status, printed, problems):
    assert len(fault_checks.ends_with(EndedStart(status, printed), 0)) == problems


def test_the_plan_depends_on_the_seed_alone_and_has_all_kinds():
    plans = [fault_campaign.plan_kills(100, list(RUNS), random.Random(seed)) for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]
    kills = [kill for _, kills in plans[0] for kill in kills]
    assert len(kills) == 100
    assert len({kill[:3] for kill in kills}) == 4 * 2 * 4  # signals, targets, phases
    assert {name for name, _ in plans[0]} == set(RUNS)
    steps = [[kill.after_step for kill in kills] for _, kills in plans[0]]
    assert steps == [sorted(each) for each in steps]


@LINUX
@pytest.mark.parametrize("problems, status", [([], 0), (["last.safetensors: 1 of 2 weights differ"], 1)])
def test_a_loss_is_named_and_is_the_exit_status(problems, status, tmp_path, monkeypatch, capsys):
    fault = faults.Fault("a fault", "same bits", lambda *arguments: problems, fresh=True)
    monkeypatch.setitem(faults.FAULTS, "clock", fault)
    for name in ("make_reference", "make_half"):
        monkeypatch.setattr(Lab, name, Lab.reference)  # nothing is trained
    flags = ["--kills", 0, "--faults", "clock", "--output_dir", tmp_path / "campaign"]
    if status:
        with pytest.raises(SystemExit) as stopped:
            call_main(fault_campaign, flags, monkeypatch)
        assert stopped.value.code == status
    else:
        call_main(fault_campaign, flags, monkeypatch)
    printed = capsys.readouterr()
    assert f"| a fault | same bits | 1 | {1 - status} | {status} |" in printed.out
    for line in problems:
        assert f"clock, once: {line} ({tmp_path / 'campaign' / 'clock-once'})" in printed.err


def test_results_are_not_overwritten(tmp_path, main_fails):
    (tmp_path / "table.md").write_text("earlier")
    assert "is not empty; delete it or give another --output_dir" in main_fails(
        fault_campaign, "--output_dir", tmp_path
    )


@pytest.mark.slow
@LINUX
def test_a_small_campaign_loses_nothing(tmp_path):
    """Two runs, six interruptions, damaged weights and .npz files."""
    flags = ["--kills", 6, "--runs", "sgd", "pictures", "--faults", "last-weights", "npz", "--jobs", 2]
    done = script("scripts/fault_campaign.py", *flags, "--output_dir", tmp_path / "campaign")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| all | " in done.stdout
    assert not [path for path in (tmp_path / "campaign").iterdir() if path.name.startswith("sgd-")]
