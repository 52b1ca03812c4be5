"""The study of token reduction and its benchmark, as run in the shell."""

import re

import pytest

from conftest import script, succeed
from models import REDUCTION_METHODS

pytestmark = pytest.mark.slow


def test_the_benchmark():
    """The table has each row, and facility location covers the tokens best."""
    command = ["benchmarks/token_reduction.py", "--model_type", "ViT-Mini_4", "--img_size", 16, "--batch_size", 2]
    printed = succeed(*command, "--rounds", 1, "--reduction_layer", 2, "--keep_tokens", 0.5, 4)
    rows = re.findall(
        r"^\| (none|facility|tome|Conformer-Mini_4) \| (\S+) \| [\d.]+ \| [\d.]+ \|", printed, re.MULTILINE
    )
    reduced = [(name, keep) for keep in ("0.5", "4") for name in REDUCTION_METHODS]
    assert rows == [("none", "all"), *reduced, ("Conformer-Mini_4", "0.25")]
    ratios = re.findall(r"\| (\d+) of 64 " + 4 * r"\| ([\d.]+) \(.*?\) ", printed)
    assert [row[0] for row in ratios] == ["32", "4"]
    for _, facility, *others in ratios:
        assert 1 >= float(facility) > max(map(float, others))
    done = script(*command, "--reduction_layer", 6)
    assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, "")
    done = script("benchmarks/token_reduction.py", "--model_type", "ViT-S_16", "--keep_tokens", 98)
    assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, "")
    assert "digits.npz: keep_tokens 98 is neither a count from 1 to the model's 64 patches" in done.stderr


def test_the_study_resumes_after_its_last_run(tmp_path):
    command = ["scripts/token_reduction.py", "--dataset", "digits", "--examples_per_class", 2, "--num_steps", 2]
    command += ["--output_dir", tmp_path / "runs", "--figure", tmp_path / "figure.png", "--keep_tokens", 0.25]
    command += ["--img_size", 8, "--train_batch_size", 4]
    printed = succeed(*command)
    assert printed.count("20 training and 360 test images") == 4
    rows = re.findall(r"^\| (\S+) \| \S+ \| .* \| ([\d.]+) % \|$", printed, re.MULTILINE)
    assert [name for name, _ in rows] == ["none", "facility", "tome", "Conformer-Mini_4"]
    (tmp_path / "figure.png").unlink()
    again = succeed(*command)  # no run is repeated
    assert "training and" not in again
    assert re.findall(r"^\| (\S+) \| \S+ \| .* \| ([\d.]+) % \|$", again, re.MULTILINE) == rows
    assert (tmp_path / "figure.png").exists()
    runs = tmp_path / "runs" / "ViT-Mini_4-tome-0.25-seed0"
    done = script("benchmarks/token_reduction.py", "--model_type", "ViT-Mini_4", "--img_size", 8, "--runs", runs)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)  # the benchmark's --reduction_layer is another
    assert "with {'token_reduction': 'tome', 'keep_tokens': 0.25, 'reduction_layer': 2}, which is not" in done.stderr
