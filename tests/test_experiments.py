"""The experiments of scripts/: their plans, tables and figures; whole experiments from the shell are marked slow."""

import csv
import json
import os
import re
import shlex
import sys
import types

import numpy as np
import pytest
from PIL import Image

import train
from command_line import train_parser
from helpers import ROOT, TINY, call_main, script, stop_sweep, succeed, write_images
from models import NORM_TYPES, build_model
from synthetic import make_checkpoint
from utils.sweeps import LOG

sys.path.insert(0, str(ROOT / "scripts"))
import experiment
import make_imagenet_like
import norm_study


def study(output_dir, *given):
    """The flags of a small norm study: those of TINY except where `given`."""
    given = [str(item) for item in given]
    ours = {"--model_types": TINY["--model_type"], "--output_dir": str(output_dir), "--min_crop_scale": "0.6"}
    defaults = {**ours, **{flag: value for flag, value in TINY.items() if flag not in ("--name", "--model_type")}}
    rest = [item for flag, value in defaults.items() if flag not in given for item in (flag, value)]
    return [*rest, *given]


def rows_of(output_dir):
    with open(output_dir / "table.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("module", [make_imagenet_like, norm_study])
def test_every_script_prints_its_help(module, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        call_main(module, ["--help"], monkeypatch)
    assert stopped.value.code == 0
    assert "--output_dir" in capsys.readouterr().out


def test_every_script_is_tested():
    found = {path.stem for path in (ROOT / "scripts").glob("*.py")}
    ours = {"experiment", "make_imagenet_like", "norm_study"}
    elsewhere = {"fault_campaign", "fault_checks", "fault_runs", "faults"}  # test_fault_campaign.py
    elsewhere |= {"few_shot", "fine_tuning_table", "hybrid_vs_cnn", "norm_findings", "norm_gradients"}
    elsewhere |= {"pretraining_study", "study", "sweep", "token_study"}  # test_<name>.py
    elsewhere.add("study_pretraining")  # test_pretraining_study.py, test_norm_findings.py
    elsewhere.add("study_speed")  # test_study.py, test_token_study.py
    assert found == ours | elsewhere


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_norm_study_is_stopped_resumes_and_is_then_finished(tmp_path):
    """SIGTERM reaches the study alone, as from a queue's manager; the running job saves, no other is started."""
    command = ["scripts/norm_study.py", *study(tmp_path, "--norm_types", "BN", "Rescale", "--starts", "scratch")]
    command += ["--num_steps", "200", "--eval_every", "40"]
    first, second = tmp_path / "ViT-Mini_4-BN-scratch", tmp_path / "ViT-Mini_4-Rescale-scratch"
    errors = stop_sweep(command, first)
    assert "norm_study.py: stopped; the same command resumes" in errors
    assert re.search("stopped by SIGTERM (in the evaluation )?after step", (first / LOG).read_text())
    assert not second.exists()

    printed = succeed(*command)
    assert printed.startswith("2 runs, 0 of them already finished; 2 to do, one after another\n")
    assert "resuming at step" in (first / LOG).read_text()
    assert "[2/2] ViT-Mini_4-Rescale-scratch: finished after" in printed
    table = (tmp_path / "table.md").read_text()
    assert table in printed
    assert "digits, 200 steps of 16 images at 8x8; " in table
    rows = rows_of(tmp_path)
    assert [row["norm_type"] for row in rows] == ["BN", "Rescale"]
    for row in rows:
        assert 0.1 < float(row["test_accuracy"]) <= float(row["best_test_accuracy"]) <= 1
        assert float(row["seconds"]) > 0
        assert f"| from scratch | {row['norm_type']} | {100 * float(row['test_accuracy']):.2f} % |" in table
    figures = [tmp_path / "figures" / f"ViT-Mini_4-scratch-{name}.png" for name in ("curves", "blocks-1", "matrix-1")]
    for figure in figures:
        with Image.open(figure) as image:
            assert min(image.size) > 300
        figure.unlink()

    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("ViT*/*")}
    printed = succeed(*command)
    assert printed.startswith("2 runs, 2 of them already finished\n")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("ViT*/*")} == before
    assert (tmp_path / "table.md").read_text() == table
    assert all(figure.exists() for figure in figures)


@pytest.mark.slow
def test_a_failed_run_does_not_stop_the_study(tmp_path):
    """The weights of one start are damaged, then replaced."""
    weights = tmp_path / "ViT-Mini_4-mine.npz"
    weights.write_bytes(b"damaged")
    output = tmp_path / "study"
    command = study(output, "--starts", "pretrained", "scratch", "--norm_types", "GN", "--bf16")
    command = ["scripts/norm_study.py", *command, "--pretrained_dir", tmp_path / "{model_type}-mine.npz"]
    command += ["--figures", tmp_path / "figures"]
    done = script(*command)
    assert done.returncode == 1
    summary, failure = done.stderr.splitlines()
    assert summary == "norm_study.py: 1 of 2 runs failed; the same command tries them again"
    log = output / "ViT-Mini_4-GN-pretrained" / LOG
    assert failure.startswith(f"  ViT-Mini_4-GN-pretrained: train.py: error: {weights} is not an .npz file")
    assert failure.endswith(f"(status 2; log: {log})")
    assert "[2/2] ViT-Mini_4-GN-scratch: finished after" in done.stdout
    assert "| ViT-Mini_4 | pretrained | GN | failed |" in done.stdout
    assert [bool(row["test_accuracy"]) for row in rows_of(output)] == [False, True]

    model = build_model("ViT-Mini_4", 8, num_classes=21)
    np.savez(weights, **make_checkpoint({key: array.shape for key, array in model.export_npz().items()}))
    printed = succeed(*command)
    assert printed.startswith("2 runs, 1 of them already finished; 1 to do")
    assert "arrays of another norm" in printed
    assert all(float(row["test_accuracy"]) > 0 for row in rows_of(output))
    starts = {path.name.split("-")[2] for path in (tmp_path / "figures").glob("ViT-Mini_4-*.png")}
    assert starts == {"pretrained", "scratch"}


def test_a_norm_study_uses_runs_that_are_finished(tmp_path, run_main, main_fails):
    """A run that the dry run's command makes is finished for the study; then other flags are refused."""
    flags = study(tmp_path, "--norm_types", "Rescale", "--starts", "scratch", "--num_steps", "2", "--eval_every", "2")
    flags += ["--examples_per_class", 2, "--num_pictures", 1]
    [command] = run_main(norm_study, *flags, "--dry_run").splitlines()
    run_main(train, *shlex.split(command)[2:])
    assert run_main(norm_study, *flags, "--dry_run") == ""
    printed = run_main(norm_study, *flags)
    assert printed.startswith("1 runs, 1 of them already finished\n")
    [row] = rows_of(tmp_path)
    assert (row["norm_type"], row["start"]) == ("Rescale", "scratch")
    assert f"| from scratch | Rescale | {100 * float(row['test_accuracy']):.2f} % |" in printed
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert drawn == {f"ViT-Mini_4-scratch-{name}.png" for name in ("curves", "blocks-1", "matrix-1")}
    (tmp_path / "figures" / "ViT-Mini_4-scratch-matrix-1.png").unlink()
    [last] = tmp_path.glob("*/last.safetensors")
    last.unlink()  # to save space
    printed = run_main(norm_study, *flags)
    assert printed.startswith("1 runs, 1 of them already finished\n")
    assert f"{last} does not exist any more, so its attention is not drawn" in printed
    assert not (tmp_path / "figures" / "ViT-Mini_4-scratch-matrix-1.png").exists()
    error = main_fails(norm_study, *flags, "--learning_rate", 0.1)
    assert "ViT-Mini_4-Rescale-scratch was made with --learning_rate 0.05, not 0.1; give another" in error


def test_the_table_of_a_norm_study_names_the_evaluated_split(tmp_path, capsys):
    """With --test_at_end all evaluations but the last are NaN."""
    flags = types.SimpleNamespace(dataset="digits", data_dir="data", train_batch_size=16, img_size=8)
    flags.model_type, flags.norm_type = "ViT-B_16", "LN"
    for split, name in (("val", "validation"), ("test", "test")):
        folder = tmp_path / split
        folder.mkdir()
        columns = f"step,train_loss,train_accuracy,{split}_loss,{split}_accuracy,images_per_second,seconds"
        (folder / "metrics.csv").write_text(f"{columns}\n1,1,0,nan,nan,9,1\n2,1,0,1,0.125,9,60\n")
        config = {"flags": {}, "num_steps": 2, "versions": {"device": "a CPU"}}
        (folder / "config.json").write_text(json.dumps(config))
        runs = {("ViT-B_16", "scratch", "LN"): types.SimpleNamespace(folder=folder, flags=flags)}
        norm_study.write_table(runs, runs, folder)
        printed = capsys.readouterr().out
        assert f"| architecture | start | norm | {name} accuracy | best | time | images/s | reported best |" in printed
        assert "| 12.50 % | 12.50 % | 1.0 min | 9 |  |  |" in printed
        [row] = rows_of(folder)
        assert (row[f"{split}_accuracy"], row[f"best_{split}_accuracy"]) == ("0.125", "0.125")


def test_the_difference_from_a_reported_accuracy_is_that_of_the_best_one_with_the_reported_recipe():
    """In points; a run with another recipe is not comparable, a result that was not reported has no difference."""

    def cells(start, best, **changes):
        recipe = {**norm_study.RECIPE, "model_type": "ViT-B_16", "norm_type": "GN", "bf16": True, **changes}
        flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in recipe.items()]
        return norm_study.compared(train_parser().parse_args(["--name=x", *flags]), start, best)

    assert cells("scratch", 0.6423) == ["65.1 %", "-0.87"]
    assert cells("scratch", 0.4, dataset="cifar100") == ["38.2 %", "+1.80"]
    assert cells("scratch", 0.64, dropout_rate=0.0) == ["65.1 %", "not comparable: --dropout_rate 0.0"]
    assert cells("scratch", None) == ["65.1 %", ""]
    assert cells("pretrained", 0.98) == cells("scratch", 0.9, dataset="digits") == ["", ""]


def test_the_reported_accuracies_of_the_norms_are_those_of_the_document():
    rows = re.findall(
        r"^\| (ViT-\S+) on (CIFAR-\d+) \| (.+) \|$", (ROOT / "docs" / "norms.md").read_text(), re.MULTILINE
    )
    found = {(name.lower().replace("-", ""), model_type): cells for model_type, name, cells in rows}
    expected = {key[:2]: norms for key, norms in norm_study.REPORTED.items() if key[2] == "scratch"}
    assert found.keys() == expected.keys()
    for key, norms in expected.items():
        assert found[key].replace("*", "") == " | ".join(f"{norms[norm]} %" for norm in NORM_TYPES), key


def test_a_dry_run_prints_commands_that_train_py_accepts(tmp_path, run_main):
    """Without weights, for the grid of the reported tables."""
    output = tmp_path / "a b"
    flags = ["--output_dir", output, "--pretrained_dir", "none/{model_type}.npz", "--dry_run", "--num_steps=7"]
    lines = run_main(norm_study, *flags, "--horizontal_flip").splitlines()
    assert not output.exists()
    parser = train_parser()
    runs = [parser.parse_args(shlex.split(line)[2:]) for line in lines]
    assert {shlex.split(line)[1] for line in lines} == {str(ROOT / "train.py")}
    expected = {
        (model_type, norm_type, pretrained)
        for model_type in ("ViT-B_16", "ViT-B_32", "ViT-L_16", "ViT-L_32")
        for norm_type in NORM_TYPES
        for pretrained in (None, f"none/{model_type}.npz")
    }
    assert {(run.model_type, run.norm_type, run.pretrained_dir) for run in runs} == expected
    assert len(runs) == len({run.name for run in runs}) == 8 * len(NORM_TYPES)
    for planned in runs:
        assert (planned.dataset, planned.train_batch_size, planned.img_size) == ("cifar10", 128, 224)
        assert (planned.learning_rate, planned.num_steps, planned.horizontal_flip) == (0.05, 7, True)
        assert planned.dropout_rate == 0.1
        assert (planned.resume, planned.output_dir) == (True, str(output))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--no_such_flag"], "unrecognized arguments: --no_such_flag"),
        (["--optimizer", "adam_w"], "unknown optimizer 'adam_w'; did you mean adamw"),
        (["--norm_types", "XN"], "unknown norm type 'XN'; did you mean LN, BN, GN, Rescale"),
        (["--starts", "scrath"], "unknown start 'scrath'; did you mean scratch"),
        (["--model_types", "ViT-B16"], "unknown model type 'ViT-B16'"),
        (["--model_types", "BiT-M-R50x1"], "BiT-M-R50x1 is not in this study of ViTs and hybrids"),
        (["--model_type", "ViT-B_16"], "--model_type is not for all runs: give --model_types"),
        (["--name=x"], "--name is not for all runs"),
        (["--img_size", "225"], "image size 225 is not a multiple of the model's patch size 16"),
        (["--pretrained_dir", "nowhere/{model_type}.npz"], "nowhere/ViT-B_16.npz does not exist"),
        (["--dataset", "imagefolder", "--data_dir", "/nowhere"], "/nowhere is not a folder"),
        (["--starts", "scratch", "--figures", __file__], "test_experiments.py can't be created: File exists; see"),
    ],
)
def test_wrong_flags_of_the_norm_study_are_errors_before_any_run(flags, message, main_fails, tmp_path):
    assert message in main_fails(norm_study, "--output_dir", tmp_path / "output", *flags)
    assert not list(tmp_path.glob("output/*"))


def test_make_imagenet_like_has_the_ids_and_the_different_sizes_of_imagenet(tmp_path, run_main, main_fails):
    """ImageNet's ids as names, another size for each image, and the first images of each class only."""
    for split in ("train", "val"):
        for name, count in (("airplane", 4), ("cat", 5), ("emu", 6)):
            write_images(tmp_path / "source" / split / name, [(20, 30)] * count)
    folder = tmp_path / "like"
    flags = ("--source", tmp_path / "source", "--output_dir", folder, "--per_class", 4, "--val_per_class", 2)
    printed = run_main(make_imagenet_like, *flags)
    assert [line.rpartition("/")[2] for line in printed.splitlines()] == [
        "train: 12 images of 3 classes",
        "val: 6 images of 3 classes",
    ]
    names = {str(path.relative_to(folder)) for path in folder.rglob("*.JPEG")}
    assert names == {
        f"{split}/{wnid}/{wnid}_{number}.JPEG"
        for split, count in (("train", 4), ("val", 2))
        for wnid in ("n02690373", "n02123045", "emu")
        for number in range(count)
    }
    sizes = {Image.open(path).size for path in folder.rglob("*.JPEG")}
    assert len(sizes) == 18
    assert 200 <= min(map(min, sizes)) <= max(map(max, sizes)) <= 500
    assert "already has train/ or val/" in main_fails(make_imagenet_like, *flags)


def test_titles_name_the_seeds():
    assert experiment.seeds_text([3]) == "seed 3"
    assert experiment.seeds_text([0, 1]) == "seeds 0, 1"
