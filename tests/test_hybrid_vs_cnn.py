"""The hybrid against the CNNs: the plan of the runs, their shares of the training images, table and figure."""

import json
import math
import re
import shlex
import sys

import pytest
from PIL import Image

from command_line import train_parser
from helpers import ROOT, load_data

sys.path.insert(0, str(ROOT / "scripts"))
import hybrid_vs_cnn
from study import SCRATCH

MODELS = ["R26-ViT-Mini_4", "ResNet-Mini_Params", "ResNet-Mini_Flops"]


def toy(tmp_path, *flags):
    return [
        *("--dataset", "digits", "--img_size", 8, "--train_batch_size", 64, "--epochs", 0.2, "--grid_epochs", 0.1),
        *("--output_dir", tmp_path / "runs", "--results", tmp_path / "results", *flags),
    ]


def planned(run_main, *flags):
    """The flags of train.py in the commands of a dry run."""
    lines = run_main(hybrid_vs_cnn, *flags, "--dry_run").splitlines()
    return [train_parser().parse_args(shlex.split(line)[2:]) for line in lines if not line.startswith("#")]


def test_the_plan_has_one_run_per_share_model_and_seed(run_main, tmp_path):
    """All with as many steps and with the recipe of the studies; each seed draws other images of a share."""
    runs = planned(run_main, *toy(tmp_path, "--shares", 0.3, 1, "--learning_rates", 2e-3, "--seeds", 0, 4))
    expected = [(images, seed, name) for images in (43, None) for seed in (0, 4) for name in MODELS]
    assert [(run.examples_per_class, run.seed, run.model_type) for run in runs] == expected
    assert len({run.name for run in runs}) == 12
    for run in runs:
        assert run.num_steps == math.ceil(0.2 * 1437 / 64)
        assert run.split_seed == (run.seed if run.examples_per_class else 0)
        assert (run.test_at_end, run.val_split, run.learning_rate) == (True, None, 2e-3)
        assert all(getattr(run, flag) == value for flag, value in SCRATCH.items())


def test_short_runs_have_the_images_of_their_share(run_main, tmp_path):
    """For training and validation together; both shares have as many steps."""
    rates = [1e-3, 3e-3]
    runs = planned(run_main, *toy(tmp_path, "--shares", 0.5, 1, "--learning_rates", *rates))
    assert [(run.model_type, run.learning_rate) for run in runs] == 2 * [
        (name, rate) for name in MODELS for rate in rates
    ]
    assert len({(run.num_steps, run.test_at_end) for run in runs}) == 1
    for run, share in ((runs[0], 0.5), (runs[-1], 1)):
        options = {name: getattr(run, name) for name in ("val_split", "examples_per_class", "split_seed")}
        train, validation = (len(load_data("digits", split, **options)) for split in ("train", "val"))
        assert train + validation == pytest.approx(share * 1437, rel=0.01)
        assert validation == pytest.approx(0.1 * share * 1437, abs=1)


@pytest.mark.parametrize("batch_size", [100, 125, 128, 500])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.7])
def test_a_share_has_as_many_steps_as_all_images(share, batch_size):
    for epochs in (0.5, 3, 10):
        drawn = round(50_000 * share)
        steps = math.ceil(hybrid_vs_cnn.repeated(epochs, 50_000, drawn) * drawn / batch_size)
        assert steps == math.ceil(epochs * 50_000 / batch_size)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--shares", 0.3, 0.01], "--shares 0.01: fewer than 10 images per class; give a larger share"),
        (["--shares", 1.5], "1.5 is not a number above 0 and at most 1"),
        (["--seeds", -1], "-1 is not a whole number"),
        (["--dataset", "digit"], "unknown dataset 'digit'; did you mean digits"),
        (["--img_size", 9], "image size 9 is not a multiple"),
        (["--contenders", "ResNet-Mini"], "--contenders: there is no ResNet-Mini; there are R26-ViT-Mini_4, "),
        (["--full"], "--full has other flags, which follow it: give it first"),
        (["--draw"], "results has no results; run the study without --draw first"),
    ],
)
def test_wrong_flags_are_errors_before_any_run(flags, message, main_fails, tmp_path):
    assert message in main_fails(hybrid_vs_cnn, *toy(tmp_path, *flags))
    assert not (tmp_path / "runs").exists()


def test_the_full_size_models_are_rows_of_the_fine_tuning_table(run_main, tmp_path):
    """With BiT's and Google's files, the same recipe for all, and the flags of that script."""
    flags = ["--dataset", "cifar100", "--weights", tmp_path, "--results", tmp_path / "results", "--dry_run"]
    lines = run_main(hybrid_vs_cnn, "--full", *flags, "--", "--bf16").splitlines()
    runs = [train_parser().parse_args(shlex.split(line)[2:]) for line in lines if not line.startswith("#")]
    assert [(run.model_type, run.pretrained_dir) for run in runs] == [
        ("R50-ViT-B_16", f"{tmp_path}/R50+ViT-B_16.npz"),
        ("ResNet50x3_Params", f"{tmp_path}/BiT-M-R50x3.npz"),
        ("ResNet50x3_Flops", f"{tmp_path}/BiT-M-R50x3.npz"),
    ]
    assert {(run.dataset, run.img_size, run.num_steps, run.train_batch_size, run.bf16) for run in runs} == {
        ("cifar100", 224, 10_000, 512, True)
    }


@pytest.mark.slow  # three runs of train.py, each in a process of its own
def test_the_study_writes_results_a_table_and_a_figure_once(run_main, tmp_path):
    flags = toy(tmp_path, "--shares", 0.3, "--learning_rates", 1e-3, "--seeds", 3)
    printed = run_main(hybrid_vs_cnn, *flags)
    assert printed.count("430 training and 360 test images") == 3
    results = tmp_path / "results"
    records = [json.loads(path.read_text()) for path in results.glob("*.json")]
    accuracies = {each["contender"]: 100 * each["result"]["last"]["test"]["accuracy"] for each in records}
    table = (results / "table.md").read_text()
    rows = re.findall(r"^\| (\S+) \| [\d.]+ M \| 0.001 \| ([\d.]+) %, n = 1 \| (\S+)", table, re.MULTILINE)
    assert [name for name, _, _ in rows] == MODELS
    for name, accuracy, difference in rows:
        assert float(accuracy) == pytest.approx(accuracies[name], abs=0.005)
        if name == MODELS[0]:
            assert difference == "reference"
        else:
            assert float(difference.strip(",")) == pytest.approx(accuracies[name] - accuracies[MODELS[0]], abs=0.005)
    [figure] = results.glob("*.png")
    with Image.open(figure) as image:
        assert min(image.size) > 300
    figure.unlink()
    again = run_main(hybrid_vs_cnn, *flags)
    assert "started" not in again
    assert figure.exists()
    assert (results / "table.md").read_text() == table
    assert table in run_main(hybrid_vs_cnn, *flags, "--draw")
