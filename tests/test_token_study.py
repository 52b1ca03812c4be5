"""scripts/token_study.py: its contenders, both questions at toy size, paired differences and the figure."""

import json
import re
import shlex
import shutil
import sys
from argparse import Namespace

import pytest

from command_line import train_parser
from helpers import ROOT, run_in_this_process
from utils.errors import UserError

sys.path.insert(0, str(ROOT / "scripts"))
import study
import study_speed
import token_study

METHODS = ("none", "facility", "tome", "random", "tome in every block", "Conformer-Mini_4")


@pytest.fixture
def flags(tmp_path):
    """The flags of a study of runs that take a second."""
    given = ["--dataset", "digits", "--img_size", 8, "--train_batch_size", 16, "--epochs", 0.02, "--seeds", 0, 1]
    given += ["--keep_tokens", 0.5, "--tome_r", 1, "--learning_rates", 1e-3]
    return [*given, "--output_dir", tmp_path / "runs", "--results", tmp_path / "results"]


def test_each_contender_is_trained_in_the_same_way_but_for_its_reduction(flags, run_main):
    printed = run_main(token_study, *flags, "--dry_run")
    commands = [shlex.split(line) for line in printed.splitlines() if "train.py" in line]
    runs = [train_parser().parse_args(command[2:]) for command in commands]
    assert len(runs) == 12
    names = ("model_type", "token_reduction", "keep_tokens", "reduction_layer", "tome_r")
    assert [tuple(vars(run)[name] for name in names) for run in runs[:6]] == [
        ("ViT-Mini_4", None, None, None, None),
        ("ViT-Mini_4", "facility", 0.5, 2, None),
        ("ViT-Mini_4", "tome", 0.5, 2, None),
        ("ViT-Mini_4", "random", 0.5, 2, None),
        ("ViT-Mini_4", "tome", None, None, 1),
        ("Conformer-Mini_4", None, None, 2, None),
    ]
    differing = {*names, "name", "seed"}
    shared = [{key: value for key, value in vars(run).items() if key not in differing} for run in runs]
    assert all(each == shared[0] for each in shared)
    assert [run.seed for run in runs] == 6 * [0] + 6 * [1]


@pytest.mark.slow  # trains six models
def test_both_questions_end_in_tables_and_figures_and_are_drawn_again(flags, run_main, monkeypatch, tmp_path):
    monkeypatch.setattr(study_speed, "ROUNDS", 1)
    flags += ["--seeds", 0]
    started, results = run_in_this_process(study, monkeypatch), tmp_path / "results"
    run_main(token_study, *flags)
    assert len(started) == 6
    untrained = run_main(token_study, *flags, "--question", "untrained")
    assert len(started) == 6  # the whole model is trained already
    rows = {}
    for question, expected in (("trained", METHODS), ("untrained", METHODS[:-1])):
        text = (results / f"{question}-epochs=0.02.md").read_text()
        rows[question] = re.findall(r"^\| ([\w -]+) \| \S+ \| [\d.]+ \|.* ([\d.]+) % \| 1 \|$", text, re.MULTILINE)
        assert tuple(name for name, _ in rows[question]) == expected
        assert re.findall(r"^\| (\w+ - \w+) \|", text, re.MULTILINE) == [f"{a} - {b}" for a, b in token_study.PAIRS]
        assert (results / f"{question}-epochs=0.02.png").exists()
        (results / f"{question}-epochs=0.02.png").unlink()
    assert rows["untrained"][0] == rows["trained"][0]  # the whole model's own accuracy
    monkeypatch.setattr(study_speed, "time_passes", None)
    shutil.move(tmp_path / "runs", tmp_path / "moved")
    again = run_main(token_study, *flags, "--question", "untrained", "--draw")
    assert again.partition("ViT-Mini_4 on")[2] == untrained.partition("ViT-Mini_4 on")[2]
    assert (results / "untrained-epochs=0.02.png").exists()


def test_measurements_with_other_keywords_are_not_taken():
    at_layer = {layer: {"token_reduction": "tome", "keep_tokens": 0.5, "reduction_layer": layer} for layer in (2, 3)}
    content = study_speed.completed(
        {}, "accuracy", {"tome 0.5": 0.7, "whole": 0.8}, {"tome 0.5": at_layer[2], "whole": {}}
    )
    content = json.loads(json.dumps(content))
    for layer, expected in ((2, {"tome 0.5": 0.7, "whole": 0.8}), (3, {"whole": 0.8})):
        assert study_speed.known_of(content, "accuracy", {"tome 0.5": at_layer[layer], "whole": {}}) == expected
    assert study_speed.known_of({}, "accuracy", {"whole": {}}) == {}
    further = study_speed.completed(content, "accuracy", {"tome 0.5": 0.6}, {"tome 0.5": at_layer[3]})
    assert further["accuracy"] == {"tome 0.5": 0.6, "whole": 0.8}


def test_the_weights_of_a_run_must_be_there(tmp_path):
    with pytest.raises(UserError, match=r"run/last.safetensors does not exist, so its tokens can't be reduced"):
        token_study.evaluate_reductions("run", {}, Namespace(output_dir=tmp_path))


def test_the_whole_model_is_needed_and_runs_of_the_budget(flags, main_fails, monkeypatch):
    assert "results has no results; run the study without --draw" in main_fails(token_study, *flags, "--draw")
    monkeypatch.setattr(token_study, "run_studies", lambda studies, args: None)
    assert "has no final runs of 0.02 epochs" in main_fails(token_study, *flags, "--draw")
    monkeypatch.setattr(token_study, "final_records", lambda args: {})
    assert "has no finished run of whole" in main_fails(token_study, *flags, "--draw")


def test_differences_are_paired_over_the_seeds_and_between_equal_numbers_of_patches():
    """Seed 1 of ToMe is missing at 0.5, so one pair is left there; at 0.25 each seed gains 4, 5 and 6 points."""
    accuracies = {
        ("none", "all"): {0: 0.9},
        ("facility", 0.5): {0: 0.63, 1: 0.7},
        ("tome", 0.5): {0: 0.61},
        ("facility", 0.25): {0: 0.54, 1: 0.65, 2: 0.76},
        ("random", 0.25): {0: 0.50, 1: 0.60, 2: 0.70},
        ("tome in every block", "r=3"): {0: 0.1},
    }
    rows = [line.split(" | ") for line in token_study.pairs_table(accuracies).splitlines()]
    assert rows[0] == ["| points (95 % interval)", "0.5 kept", "0.25 kept |"]
    assert rows[2] == ["| facility - tome", "+2.00, one seed: no interval", "no common seeds |"]
    assert rows[3][:2] == ["| facility - random", "no common seeds"]
    half = 4.302653 / 3**0.5  # Student's t of two degrees of freedom; the standard deviation is 1
    assert rows[3][2] == f"+5.00 ({5 - half:+.2f} to {5 + half:+.2f}) |"


def test_the_figure_has_one_line_per_method():
    """The vertical bars range over the seeds."""
    accuracies = {
        ("none", "all"): {0: 0.5, 1: 0.6},
        ("tome", 0.5): {0: 0.4, 1: 0.5},
        ("tome", 0.25): {0: 0.3, 1: 0.4},
        ("tome in every block", "r=3"): {0: 0.2},
    }
    speeds = dict(zip(accuracies, (10.0, 15.0, 20.0, 18.0), strict=True))
    figure = token_study.draw(speeds, accuracies, "title", "training step (images/s)")
    [axes], [legend] = figure.axes, figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["ViT, all patches", "ToMe", "ToMe in every block"]
    none, tome, every_block = axes.containers
    assert list(tome.lines[0].get_xdata()) == [15.0, 20.0]
    assert list(tome.lines[0].get_ydata()) == pytest.approx([45.0, 35.0])
    bars = tome.lines[2][0].get_segments()
    assert [bar[:, 1].tolist() for bar in bars] == [pytest.approx([40.0, 50.0]), pytest.approx([30.0, 40.0])]
    assert list(none.lines[0].get_ydata()) == pytest.approx([55.0])
    assert list(every_block.lines[0].get_ydata()) == pytest.approx([20.0])
