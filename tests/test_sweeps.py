"""Experiments of many runs: the study of norms as a user runs it, and runs spread over GPUs."""

import argparse
import csv
import os
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import train
from helpers import ROOT, TINY, fails, read_config, script, succeed
from models import NORM_TYPES, build_model
from synthetic import make_checkpoint
from utils.sweeps import LOG, Run, free_devices, is_finished, work_off


def study(output_dir, *given):
    """The command of a small study, less `scripts/norm_study.py` before it: TINY's flags, but for the `given`."""
    given = [str(item) for item in given]
    ours = {"--model_types": TINY["--model_type"], "--output_dir": str(output_dir), "--min_crop_scale": "0.6"}
    defaults = {**ours, **{flag: value for flag, value in TINY.items() if flag not in ("--name", "--model_type")}}
    rest = [item for flag, value in defaults.items() if flag not in given for item in (flag, value)]
    return ["scripts/norm_study.py", *rest, *given]


def norm_study(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import norm_study

    return norm_study


def rows_of(output_dir):
    with open(output_dir / "table.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_study_is_stopped_goes_on_and_is_then_finished(tmp_path, monkeypatch, capsys):
    """SIGTERM reaches the study alone, as from a queue's manager; the run at work saves, no other is started."""
    command = study(tmp_path, "--norm_types", "BN", "Rescale", "--starts", "scratch")
    command += ["--num_steps", "200", "--eval_every", "40"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    first, second = tmp_path / "ViT-Mini_4-BN-scratch", tmp_path / "ViT-Mini_4-Rescale-scratch"
    deadline = time.monotonic() + 120
    while not (first / "last.safetensors").exists():
        assert started.poll() is None, started.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    started.send_signal(signal.SIGTERM)
    _, errors = started.communicate(timeout=60)
    assert started.returncode == 128 + signal.SIGTERM
    assert "norm_study.py: stopped; the same command goes on" in errors
    assert "stopped by SIGTERM after step" in (first / LOG).read_text()
    assert not second.exists()

    printed = succeed(*command)
    assert printed.startswith("2 runs, 0 of them finished before; 2 to come, one after the other\n")
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
    figures = [tmp_path / "figures" / f"ViT-Mini_4-scratch-{name}.png" for name in ("curves", "attention-1")]
    for figure in figures:
        with Image.open(figure) as image:
            assert min(image.size) > 300
        figure.unlink()

    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("ViT*/*")}
    printed = succeed(*command)
    assert printed.startswith("2 runs, 2 of them finished before\n")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("ViT*/*")} == before
    assert (tmp_path / "table.md").read_text() == table
    assert all(figure.exists() for figure in figures)
    error = fails(norm_study(monkeypatch), [*command[1:], "--learning_rate", 0.1], monkeypatch, capsys)
    assert "ViT-Mini_4-BN-scratch was made with --learning_rate 0.05, not 0.1; give another --output_dir" in error


def test_a_run_that_fails_does_not_stop_the_rest(tmp_path):
    """The weights of one start are broken, then mended."""
    weights = tmp_path / "ViT-Mini_4-mine.npz"
    weights.write_bytes(b"broken")
    output = tmp_path / "study"
    command = study(output, "--starts", "pretrained", "scratch", "--norm_types", "GN", "--bf16")
    command += ["--pretrained_dir", tmp_path / "{model_type}-mine.npz", "--figures", tmp_path / "figures"]
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
    assert printed.startswith("2 runs, 1 of them finished before; 1 to come")
    assert "arrays of another norm are left out" in printed
    assert all(float(row["test_accuracy"]) > 0 for row in rows_of(output))
    starts = {path.name.split("-")[2] for path in (tmp_path / "figures").glob("ViT-Mini_4-*.png")}
    assert starts == {"pretrained", "scratch"}


def test_a_dry_run_prints_commands_that_train_py_takes(tmp_path):
    """Without weights, for the grid of the reported tables."""
    output = tmp_path / "a b"
    flags = ["--output_dir", output, "--pretrained_dir", "none/{model_type}.npz", "--dry_run", "--num_steps=7"]
    lines = succeed("scripts/norm_study.py", *flags, "--horizontal_flip").splitlines()
    assert not output.exists()
    parser = train.make_parser()
    runs = [parser.parse_args(shlex.split(line)[2:]) for line in lines]
    assert {shlex.split(line)[1] for line in lines} == {str(ROOT / "train.py")}
    expected = {
        (model_type, norm_type, pretrained)
        for model_type in ("ViT-B_16", "ViT-B_32", "ViT-L_16", "ViT-L_32")
        for norm_type in NORM_TYPES
        for pretrained in (None, f"none/{model_type}.npz")
    }
    assert {(run.model_type, run.norm_type, run.pretrained_dir) for run in runs} == expected
    assert len(runs) == len({run.name for run in runs}) == 32
    for run in runs:
        assert (run.dataset, run.train_batch_size, run.img_size, run.learning_rate) == ("cifar10", 128, 224, 0.05)
        assert (run.num_steps, run.horizontal_flip, run.resume, run.output_dir) == (7, True, True, str(output))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--no_such_flag"], "unrecognized arguments: --no_such_flag"),
        (["--optimizer", "adam_w"], "unknown optimizer 'adam_w'; did you mean adamw"),
        (["--norm_types", "XN"], "unknown norm type 'XN'; did you mean LN, BN, GN, Rescale"),
        (["--starts", "scrath"], "unknown start 'scrath'; did you mean scratch"),
        (["--model_types", "ViT-B16"], "unknown model type 'ViT-B16'"),
        (["--model_types", "BiT-M-R50x1"], "BiT-M-R50x1 is not in this study, which is of ViTs and hybrids"),
        (["--model_type", "ViT-B_16"], "--model_type is not for all runs: give --model_types"),
        (["--name=x"], "--name is not for all runs"),
        (["--img_size", "225"], "image size 225 is not a multiple of the model's patch size 16"),
        (["--pretrained_dir", "nowhere/{model_type}.npz"], "nowhere/ViT-B_16.npz does not exist"),
        (["--dataset", "imagefolder", "--data_dir", "/nowhere"], "/nowhere is not a folder"),
        (["--starts", "scratch", "--figures", __file__], "test_runs.py can't be made: File exists; see --figures"),
    ],
)
def test_wrong_flags_of_the_study(flags, message, monkeypatch, capsys, tmp_path):
    assert message in fails(norm_study(monkeypatch), ["--output_dir", tmp_path / "output", *flags], monkeypatch, capsys)
    assert not list(tmp_path.glob("output/*"))


def test_a_run_whose_last_weights_were_not_saved_is_not_finished(tiny_flags, tmp_path):
    """As when the disk is full after the last evaluation; and --epochs alone do not say how many steps there are."""
    flags = tiny_flags("--epochs", 0.2)
    succeed("train.py", *flags)
    run = Run([], train.make_parser().parse_args(flags))
    assert read_config(run.folder)["num_steps"] == 18
    assert is_finished(run)
    (run.folder / "last.safetensors").unlink()
    assert not is_finished(run)


def test_gpus_are_those_that_the_user_leaves(monkeypatch):
    for visible, count, devices in (
        (None, 0, [None]),
        ("", 0, [None]),
        (None, 2, ["0", "1"]),
        ("3, 1", 2, ["3", "1"]),
        ("GPU-8a, 7, 9", 2, ["GPU-8a", "7"]),  # CUDA stops at one that does not exist
    ):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert free_devices() == devices


def test_runs_are_spread_over_gpus(tmp_path, capsys):
    """Two that wait for each other, so that both must be at work at once, then a third on the GPU that is free."""
    code = """
import os, pathlib, sys, time
mine, other = map(pathlib.Path, sys.argv[1:])
mine.touch()
while not other.exists():
    time.sleep(0.01)
print("ran on", os.environ["CUDA_VISIBLE_DEVICES"])
sys.exit(3)
"""
    runs = [
        Run(
            [sys.executable, "-c", code, tmp_path / mine, tmp_path / other],
            argparse.Namespace(output_dir=tmp_path / "out", name=mine),
        )
        for mine, other in (("a", "b"), ("b", "a"), ("c", "a"))
    ]
    failed, signal_number = work_off(runs, ["4", "GPU-x"])
    assert signal_number == 0
    ran_on = {name: why.partition(" (status 3; log: ")[0] for name, why in failed.items()}
    assert (ran_on["a"], ran_on["b"]) == ("ran on 4", "ran on GPU-x")
    assert ran_on["c"] in ("ran on 4", "ran on GPU-x")
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 6  # what the runs themselves say is in their logs only
    assert printed[1] == f"[2/3] b: started on GPU GPU-x, log in {tmp_path / 'out' / 'b' / LOG}"
