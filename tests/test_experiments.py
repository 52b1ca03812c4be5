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
import hybrid_vs_cnn
import make_imagenet_like
import norm_study
import token_study

TINY_EXPERIMENT = ["--dataset", "digits", "--examples_per_class", 2, "--num_steps", 2]
TINY_EXPERIMENT += ["--img_size", 8, "--train_batch_size", 4]


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


@pytest.mark.parametrize("module", [hybrid_vs_cnn, make_imagenet_like, norm_study, token_study])
def test_every_script_prints_its_help(module, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        call_main(module, ["--help"], monkeypatch)
    assert stopped.value.code == 0
    assert "--output_dir" in capsys.readouterr().out


def test_every_script_is_tested():
    found = {path.stem for path in (ROOT / "scripts").glob("*.py")}
    ours = {"experiment", "hybrid_vs_cnn", "make_imagenet_like", "norm_study", "study", "token_study"}
    elsewhere = {"fault_campaign", "fault_checks", "fault_runs", "faults"}  # test_fault_campaign.py
    elsewhere |= {"few_shot", "fine_tuning_table", "sweep"}  # test_few_shot.py and so on
    elsewhere |= {"norm_findings", "pretraining_study"}
    assert found == ours | elsewhere


@pytest.mark.parametrize("module", [hybrid_vs_cnn, token_study])
@pytest.mark.parametrize(
    "flags, message",
    [
        (["--figure", "nowhere/figure.png"], "--figure nowhere/figure.png can't be written"),
        (["--seeds", -1], "-1 is not a whole number"),
        (["--dataset", "digit"], "unknown dataset 'digit'; did you mean digits"),
        (["--img_size", 9], "image size 9 is not a multiple"),
    ],
)
def test_wrong_flags_of_an_experiment_are_errors_before_any_run(module, flags, message, main_fails, tmp_path):
    given = {"--figure": tmp_path / "figure.png", "--dataset": "digits", "--output_dir": tmp_path / "runs"}
    given |= {flags[0]: flags[1]}
    assert message in main_fails(module, *(item for pair in given.items() for item in pair))
    assert not (tmp_path / "runs").exists()


def test_the_token_study_plans_one_run_per_model_and_seed(monkeypatch, tmp_path):
    """One run per model and seed, all with the same recipe; the names say what differs."""
    planned = []
    monkeypatch.setattr(token_study, "finish_runs", planned.extend)
    monkeypatch.setattr(token_study, "time_steps", lambda runs: sys.exit(0))  # ends main() after the plan
    figure = tmp_path / "figure.png"
    flags = [*TINY_EXPERIMENT, "--keep_tokens", 0.25, "--seeds", 0, 3, "--figure", figure]
    with pytest.raises(SystemExit, match="0"):
        call_main(token_study, flags, monkeypatch)
    names = ["ViT-Mini_4", "ViT-Mini_4-facility-0.25", "ViT-Mini_4-tome-0.25", "Conformer-Mini_4"]
    assert [run.flags.name for run in planned] == [f"{name}-seed{n}" for n in (0, 3) for name in names]
    assert [run.flags.token_reduction for run in planned[:4]] == [None, "facility", "tome", None]
    assert [run.flags.reduction_layer for run in planned[:4]] == [None, 2, 2, 2]
    for run in planned:
        assert str(ROOT / "train.py") in run.command
        assert (run.flags.optimizer, run.flags.bf16, run.flags.fp16_opt_level) == ("adamw", True, "O1")
        assert (run.flags.num_steps, run.flags.train_batch_size, run.flags.dataset) == (2, 4, "digits")


def test_the_figure_of_the_token_study_has_one_line_per_method():
    """One line per method; the vertical bars range over the seeds."""
    accuracies = {("none", "all"): [0.5, 0.6], ("tome", 0.5): [0.4, 0.5], ("tome", 0.25): [0.3, 0.4]}
    speeds = {("none", "all"): 10.0, ("tome", 0.5): 15.0, ("tome", 0.25): 20.0}
    [axes] = token_study.draw(speeds, accuracies, "title", "test accuracy").axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["ViT, all patches", "ToMe"]
    none, tome = axes.containers
    assert list(tome.lines[0].get_xdata()) == [15.0, 20.0]
    assert list(tome.lines[0].get_ydata()) == pytest.approx([45.0, 35.0])
    bars = tome.lines[2][0].get_segments()
    assert [bar[:, 1].tolist() for bar in bars] == [pytest.approx([40.0, 50.0]), pytest.approx([30.0, 40.0])]
    assert list(none.lines[0].get_ydata()) == pytest.approx([55.0])


@pytest.mark.slow
def test_the_token_study_resumes(tmp_path):
    command = ["scripts/token_study.py", *TINY_EXPERIMENT, "--keep_tokens", 0.25]
    command += ["--output_dir", tmp_path / "runs", "--figure", tmp_path / "figure.png"]
    printed = succeed(*command)
    assert printed.count("20 training and 360 test images") == 4
    rows = re.findall(r"^\| (\S+) \| \S+ \| .* \| ([\d.]+) % \|$", printed, re.MULTILINE)
    assert [name for name, _ in rows] == ["none", "facility", "tome", "Conformer-Mini_4"]
    (tmp_path / "figure.png").unlink()
    again = succeed(*command)  # no run is repeated
    assert "training and" not in again
    assert re.findall(r"^\| (\S+) \| \S+ \| .* \| ([\d.]+) % \|$", again, re.MULTILINE) == rows
    assert (tmp_path / "figure.png").exists()


@pytest.mark.slow
def test_the_experiment_of_hybrid_and_cnns_resumes(tmp_path):
    command = ["scripts/hybrid_vs_cnn.py", *TINY_EXPERIMENT]
    command += ["--output_dir", tmp_path / "runs", "--figure", tmp_path / "figure.png"]
    printed = succeed(*command)
    assert printed.count("20 training and 360 test images") == 3
    rows = re.findall(r"\| (\S+), (hybrid ViT|CNN with [\w ]+) \| [\d.]+ M \| ([\d.]+) G \| [\d.]+ % \|", printed)
    assert [name for name, _, _ in rows] == ["R26-ViT-Mini_4", "ResNet-Mini_Params", "ResNet-Mini_Flops"]
    (tmp_path / "figure.png").unlink()
    first, table = succeed(*command).split("\n", 1)
    assert first == "3 runs, 3 of them already finished"
    assert printed.endswith(table)  # no run is repeated
    assert (tmp_path / "figure.png").exists()
    for flag, value in (("--examples_per_class", 3), ("--num_steps", 4)):
        done = script(*command, flag, value)  # the folder has other runs
        assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, "")
        assert f"was made with {flag} 2, not {value}; give another --output_dir" in done.stderr


def test_the_table_of_hybrid_and_cnns_has_mean_and_range_over_seeds():
    """Mean and range over the seeds, in the order of the seeds' last evaluations."""
    seeds = [
        {
            "test_accuracy": [0.1, accuracy],
            "train_accuracy": [0.2, 0.5],
            "images_per_second": [8, 9],
            "seconds": [3, 90],
        }
        for accuracy in (0.3, 0.5)
    ]
    table = hybrid_vs_cnn.table({"R26-ViT-Mini_4": seeds}, 32)
    cells = table.splitlines()[-1].split(" | ")
    assert cells[0] == "| R26-ViT-Mini_4, hybrid ViT"
    assert cells[3:] == ["40.0 % (30.0 to 50.0)", "50.0 % (50.0 to 50.0)", "8", "1.5 min |"]


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
    figures = [
        tmp_path / "figures" / f"ViT-Mini_4-scratch-{name}.png" for name in ("curves", "attention-1", "matrix-1")
    ]
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
    assert drawn == {f"ViT-Mini_4-scratch-{name}.png" for name in ("curves", "attention-1", "matrix-1")}
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
