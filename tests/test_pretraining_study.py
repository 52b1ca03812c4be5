"""What does pretraining change: the plan, the probes of frozen features, the tables and figures, at toy size."""

import json
import re
import sys
from argparse import Namespace

import numpy as np
import pytest
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from helpers import ROOT, load_data
from inference import SavedModel
from utils.features import extract_features
from utils.parallel.processes import one_process
from utils.study_tables import summary_table

sys.path.insert(0, str(ROOT / "scripts"))
import pretraining_study

SOURCE, TARGET = ("0", "1", "2", "3", "4"), ("5", "6", "7", "8", "9")
TOY = ["--dataset", "digits", "--img_size", 8, "--source", *SOURCE, "--target", *TARGET, "--budget", 0.01]


def toy(tmp_path, *flags):
    return [*TOY, "--output_dir", tmp_path / "runs", "--results", tmp_path / "results", *flags]


def flag_of(command, name, count=1):
    """The values of a flag in a command."""
    return re.search(rf"--{name}((?: (?!--)\S+){{{count}}})", command)[1].split()


def commands(run_main, flags):
    """{name of the run: command} of a dry run."""
    lines = run_main(pretraining_study, *flags, "--dry_run").splitlines()
    return {flag_of(line, "name")[0]: line for line in lines if not line.startswith("#")}


@pytest.fixture
def fewer_images(monkeypatch):
    """Of 100 images per class, as the digits have too few for 100 further ones."""
    size = pretraining_study.SIZES[100]._replace(grid_images=90, validation=50)
    monkeypatch.setitem(pretraining_study.SIZES, 100, size)


@pytest.mark.usefixtures("fewer_images")
def test_the_plan_has_one_run_per_size_contender_and_seed(run_main, tmp_path):
    found = commands(run_main, toy(tmp_path, "--sizes", 10, 100, "--learning_rates", 1e-3, "--seeds", 0, 4))
    pretraining, *others = found.values()
    assert flag_of(pretraining, "classes", 5) == list(SOURCE)
    assert len(others) == 2 * 2 * 2
    for name, command in found.items():
        assert "--test_at_end" in command
        if command in others:
            [seed] = flag_of(command, "seed")
            assert flag_of(command, "split_seed") == [seed]  # other images for each seed
            assert flag_of(command, "classes", 5) == list(TARGET)
            assert f"images_per_class={flag_of(command, 'examples_per_class')[0]}-" in name
            assert ("--pretrained_dir" in command) == ("fine-tuned" in name)


@pytest.mark.usefixtures("fewer_images")
def test_short_runs_train_and_are_judged_on_images_of_their_size(run_main, tmp_path):
    """At ten images per class by 100 further ones, since two could not rank learning rates."""
    found = commands(run_main, toy(tmp_path, "--sizes", 10, 100, "--learning_rates", 1e-3, 3e-3))
    grid = {name: command for name, command in found.items() if name.startswith("grid")}
    assert len(grid) == 2 * 2 * 2
    count = len(load_data("digits", "train", classes=TARGET))
    for name, command in grid.items():
        size = int(re.search(r"images_per_class=(\d+)", name)[1])
        train, validation = {10: (10, 100), 100: (90, 50)}[size]
        assert flag_of(command, "examples_per_class") == [str(train)]
        assert float(flag_of(command, "val_split")[0]) == pytest.approx(5 * validation / count, abs=1e-6)
        assert flag_of(command, "learning_rate")[0] in ("0.001", "0.003")
        assert "--no_test" in command
        assert "--test_at_end" not in command


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--sizes", 20], "--sizes 20: there is no number of steps for it; give 10, 100, 1000"),
        (["--sizes", 1000], "--sizes 1000: it needs 1000 training images per class, digits has fewer"),
        (["--source", "1", "5"], "--source and --target have 5 in common; give different classes"),
        (["--models", "ViT-B_16"], "unknown model 'ViT-B_16'; did you mean "),
        (["--draw"], "results has no results; run the study without --draw first"),
    ],
)
def test_wrong_flags_are_errors_before_any_run(flags, message, main_fails, tmp_path):
    assert message in main_fails(pretraining_study, *toy(tmp_path, *flags))
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow  # three runs of train.py, each in a process of its own
def test_the_study_writes_results_tables_and_figures_once(run_main, main_fails, tmp_path):
    flags = toy(tmp_path, "--sizes", 10, "--learning_rates", 1e-3, "--seeds", 3)
    printed = run_main(pretraining_study, *flags)
    assert printed.count("training and 180 test images, 5 classes") == 3
    results = tmp_path / "results"
    records = {path.stem: json.loads(path.read_text()) for path in results.glob("*.json")}
    assert len(records) == 1 + 2 + 4
    check_probe(records, tmp_path / "runs")
    rows = re.findall(r"^\| ([\w ,-]+?) \| ([\d.]+) %, n = 1 \|", (results / "summary.md").read_text(), re.MULTILINE)
    assert [name for name, _ in rows] == list(pretraining_study.ORDER)
    for name, accuracy in rows:
        [record] = [each for each in records.values() if each["contender"] == name]
        assert 100 * record["result"]["last"]["test"]["accuracy"] == pytest.approx(float(accuracy), abs=0.005)
    with Image.open(results / "images-ViT-Mini_4.png") as figure:
        assert min(figure.size) > 300
    before = {path: path.read_bytes() for path in results.iterdir() if path.is_file() and path.suffix != ".png"}
    assert "started" not in run_main(pretraining_study, *flags)
    for path in (tmp_path / "runs").rglob("*.safetensors"):
        path.unlink()
    run_main(pretraining_study, *flags)  # the results are enough
    assert {path: path.read_bytes() for path in before} == before
    next(results.glob("*nearest*.json")).unlink()
    with pytest.raises(SystemExit):
        run_main(pretraining_study, *flags)


def check_probe(records, runs):
    """The probe by nearest neighbours has the images that the training draws, and scikit-learn's accuracy."""
    [record] = [each for each in records.values() if each["contender"] == "frozen, nearest neighbours"]
    [folder] = runs.glob("*pretraining*")
    saved = SavedModel.load(folder / "last.safetensors")
    assert saved.classes == list(SOURCE)
    flags = Namespace(eval_batch_size=64, fp16=False, bf16=False)
    train, test = (
        extract_features(saved, load_data("digits", split, classes=TARGET, **options), flags, one_process())
        for split, options in (("train", {"examples_per_class": 10, "split_seed": 3}), ("test", {}))
    )
    assert np.bincount(train[1]).tolist() == [10] * 5
    model = KNeighborsClassifier(10, weights="distance", metric="cosine").fit(*train)
    assert record["result"]["last"]["test"]["accuracy"] == pytest.approx(model.score(*test))
    assert record["images"] == {"train": 50, "test": 180}


def test_the_summary_has_paired_differences_from_scratch():
    def record(contender, seed, accuracy):
        result = {"last": {"test": {"accuracy": accuracy}}}
        return {"kind": "final", "contender": contender, "seed": seed, "diverged": False, "result": result}

    scratch = [record("scratch", seed, accuracy) for seed, accuracy in ((0, 0.40), (1, 0.50), (2, 0.45))]
    tuned = [record("fine-tuned", seed, accuracy) for seed, accuracy in ((0, 0.45), (1, 0.56), (2, 0.49))]
    table = summary_table({"10 images": {"scratch": scratch, "fine-tuned": tuned}}, "scratch", pretraining_study.ORDER)
    assert "| scratch | 45.00 % (40.00 to 50.00), n = 3 |  |" in table
    # differences 5, 6 and 4: mean 5, and 4.303 standard errors of 1 / sqrt(3)
    assert "| fine-tuned | 50.00 % (45.00 to 56.00), n = 3 | +5.00 (+2.52 to +7.48) |" in table


def test_fine_tuning_is_compared_with_each_classifier():
    tuned = {10: {0: 0.5, 1: 0.6, 2: 0.55}, 100: {0: 0.7}}
    accuracies = {"fine-tuned": tuned} | {name: {10: {0: 0.4, 1: 0.48, 2: 0.47}} for name in pretraining_study.PROBES}
    table = pretraining_study.over_frozen(accuracies, [10, 100])
    # differences 10, 12 and 8
    assert table.count("| +10.00 (+5.03 to +14.97) | no common seeds |") == 4
