"""The scripts as a user runs them: from the shell, in several processes, interrupted and resumed."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import evaluate
import visualize
from command_line import train_parser
from helpers import ROOT, assert_same_bits, metrics, run_dir, script, start, succeed, wait_for_checkpoint
from models import build_model
from models.npz import resnet_rows
from synthetic import make_checkpoint
from utils.records.weights import saved_step

LONG = [
    *("--dataset", "digits", "--model_type", "ViT-Mini_4", "--img_size", "8", "--train_batch_size", "8"),
    *("--num_steps", "300", "--eval_every", "10", "--warmup_steps", "10", "--dropout_rate", "0.1"),
]


def last_weights(flags):
    return load_file(run_dir(flags) / "last.safetensors")


@pytest.mark.slow
def test_fine_tune_then_evaluate_then_classify(tiny_flags, tmp_path):
    """The README's path: a checkpoint, a run, its accuracy, a single image."""
    weights = tmp_path / "ViT-Mini_4.npz"
    shapes = {key: array.shape for key, array in build_model("ViT-Mini_4", 8, num_classes=21).export_npz().items()}
    np.savez(weights, **make_checkpoint(shapes))
    flags = tiny_flags("--pretrained_dir", weights, "--img_size", 16)  # the grid is resized, the head is new
    printed = succeed("train.py", *flags)
    assert "ViT-Mini_4, 1.20 M parameters, on digits: 1437 training and 360 test images, 10 classes" in printed
    assert str(run_dir(flags) / "best.safetensors") in printed

    checkpoint = run_dir(flags) / "last.safetensors"
    report = json.loads(succeed("evaluate.py", "--checkpoint", checkpoint, "--json"))
    assert report["top1_accuracy"] == pytest.approx(float(metrics(flags)[-1]["test_accuracy"]))
    assert report["loss"] == pytest.approx(float(metrics(flags)[-1]["test_loss"]), rel=1e-5)
    assert report["images"] == 360
    assert report["top1_accuracy"] <= report["top5_accuracy"] <= 1
    assert list(report["per_class_accuracy"]) == [str(digit) for digit in range(10)]
    with Image.open(report["confusion_matrix"]) as image:
        assert image.width > 300

    larger = json.loads(succeed("evaluate.py", "--checkpoint", checkpoint, "--img_size", 24, "--json"))
    assert larger["loss"] != report["loss"]  # the position embeddings are resized

    Image.fromarray(np.full((50, 40), 200, np.uint8)).save(tmp_path / "grey.png")
    printed = succeed("evaluate.py", "--checkpoint", checkpoint, tmp_path / "grey.png")
    best = [float(share) for share in re.findall(r"([\d.]+) %", printed)]
    assert len(best) == 5
    assert best == sorted(best, reverse=True)


@pytest.mark.slow
def test_evaluating_a_published_checkpoint(tmp_path, image_folder):
    model = build_model("ViT-Ti_16", 64, num_classes=2)
    weights = tmp_path / "Ti_16-i1k.npz"
    np.savez(weights, **make_checkpoint({key: array.shape for key, array in model.export_npz().items()}))
    flags = ("--checkpoint", weights, "--dataset", "imagefolder", "--data_dir", image_folder)
    printed = succeed("evaluate.py", *flags, "--num_workers", "0")
    assert re.search(r"top-1 [\d.]+ % \[.*\]   top-5 100.00 % \[", printed)
    assert (tmp_path / "confusion_matrix.png").exists()
    done = script("evaluate.py", "--checkpoint", weights, "--dataset", "digits")
    assert done.returncode == 2
    assert done.stderr.endswith("Ti_16-i1k.npz has 2 classes, digits has 10\n")


@pytest.fixture(scope="module")
def r50x3(tmp_path_factory):
    """BiT-M-R50x3.npz at its full size, all zeros, which take no space."""
    path = tmp_path_factory.mktemp("checkpoint") / "BiT-M-R50x3.npz"
    with torch.device("meta"):
        shapes = {row.key: row.view.shape for row in resnet_rows(build_model("BiT-M-R50x3", num_classes=21843))}
    np.savez_compressed(path, **{key: np.zeros(shape, np.float32) for key, shape in shapes.items()})
    return path


@pytest.mark.slow
@pytest.mark.xdist_group("full-size CNNs")
@pytest.mark.parametrize(
    "name, model_type, size, fresh",
    [
        ("train_resnet.py", "ResNet50x3_Params", "96.14", "10 arrays of resnet/block4/unit01, resnet/group_norm"),
        ("train_flops.py", "ResNet50x3_Flops", "36.52", "2 arrays of resnet/group_norm"),
    ],
)
def test_the_scripts_of_the_cnns(name, model_type, size, fresh, r50x3, tiny_flags):
    """One step from R50x3's checkpoint, its records, and the accuracy of what was saved."""
    steps = ["--num_steps", 1, "--train_batch_size", 2, "--examples_per_class", 1]
    flags = tiny_flags(*steps, "--pretrained_dir", r50x3)
    at = flags.index("--model_type")
    printed = succeed(name, *flags[:at], *flags[at + 2 :])
    assert f"{model_type}, {size} M parameters, on digits: 10 training and 360 test images" in printed
    assert f"BiT-M-R50x3.npz: no weights of the right shape for {fresh}: initialised" in printed
    assert set(metrics(flags)[0]) >= {"train_loss", "train_accuracy", "test_loss", "test_accuracy"}
    report = json.loads(succeed("evaluate.py", "--checkpoint", run_dir(flags) / "last.safetensors", "--json"))
    assert report["loss"] == pytest.approx(float(metrics(flags)[0]["test_loss"]), rel=1e-5)


@pytest.mark.slow
def test_worker_processes_give_the_same_bits(tiny_flags, image_folder):
    flags = tiny_flags("--dataset", "imagefolder", "--data_dir", image_folder, "--num_workers", 2, "--horizontal_flip")
    assert "16 training and 8 validation images, 2 classes" in succeed("train.py", *flags)
    others = tiny_flags(*flags[flags.index("--dataset") :], "--num_workers", 0, "--name", "others")
    succeed("train.py", *others)
    assert_same_bits(last_weights(flags), last_weights(others))


@pytest.mark.slow
def test_two_processes_train_as_one(tiny_flags):
    """Also with dropout and accumulation; 360 test images over 2 processes, then over 1."""
    common = ["--dropout_rate", 0.1, "--learning_rate", 0.1, "--min_crop_scale", 0.5]
    one = tiny_flags(*common, "--name", "one")
    two = tiny_flags(*common, "--name", "two", "--gradient_accumulation_steps", 2)
    succeed("train.py", *one)
    printed = succeed("train.py", *two, processes=2)
    assert printed.count("12 steps of 16 images at 8x8, 2 processes on cpu") == 1
    for mine, theirs in zip(metrics(two), metrics(one), strict=True):
        assert float(mine["train_loss"]) == pytest.approx(float(theirs["train_loss"]), rel=1e-5)
        assert float(mine["grad_norm"]) == pytest.approx(float(theirs["grad_norm"]), rel=1e-4)
        assert float(mine["test_loss"]) == pytest.approx(float(theirs["test_loss"]), rel=1e-4)
        assert mine["test_accuracy"] == theirs["test_accuracy"]
    succeed("train.py", *two, "--resume", "--num_steps", 14)  # one process resumes the checkpoint of two
    assert [row["step"] for row in metrics(two)] == ["6", "12", "14"]


@pytest.mark.slow
def test_the_old_launcher_starts_two_processes(tiny_flags):
    launcher = ["-m", "torch.distributed.launch", "--nproc_per_node=2", "--master_port=29617"]
    printed = succeed(*launcher, "train.py", *tiny_flags())
    assert "2 processes on cpu" in printed


@pytest.mark.slow
def test_wrong_flags_are_reported_once_by_several_processes(tiny_flags):
    done = script("train.py", *tiny_flags("--train_batch_size", 15), processes=2)
    assert done.returncode != 0
    assert done.stderr.count("train.py: error: --train_batch_size 15 is not divisible by 2 processes") == 1


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run of 300 steps that nothing interrupts."""
    flags = [*LONG, "--name", "whole", "--output_dir", str(tmp_path_factory.mktemp("whole"))]
    succeed("train.py", *flags)
    return flags


@pytest.mark.slow
@pytest.mark.xdist_group("uninterrupted")
def test_a_run_that_was_killed_twice_ends_with_the_same_bits(uninterrupted, tmp_path):
    flags = [*LONG, "--name", "killed", "--output_dir", str(tmp_path), "--resume"]
    for step in (40, 150):
        process = start(flags)
        wait_for_checkpoint(process, flags, step)
        process.kill()
        process.communicate()
        assert int(metrics(flags)[-1]["step"]) < 300
    printed = succeed("train.py", *flags)
    assert re.search(r"resuming at step \d+ of 300", printed)
    assert_same_bits(last_weights(flags), last_weights(uninterrupted))
    assert [row["step"] for row in metrics(flags)] == [str(step) for step in range(10, 301, 10)]


@pytest.mark.slow
@pytest.mark.xdist_group("uninterrupted")
@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_run_that_receives_a_signal_saves_and_reports_it(number, uninterrupted, tmp_path):
    flags = [*LONG, "--name", "stopped", "--output_dir", str(tmp_path)]
    process = start(flags)
    wait_for_checkpoint(process, flags, 30)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    match = re.search(rf"stopped by {number.name} after step (\d+); saved .*last.safetensors; .*--resume", errors)
    assert match
    assert (run_dir(flags) / f"state-{match[1]}").exists()
    succeed("train.py", *flags, "--resume")
    assert_same_bits(last_weights(flags), last_weights(uninterrupted))


def test_the_demo_of_the_makefile_has_valid_flags(monkeypatch):
    command = ["make", "--no-print-directory", "-n", "demo"]
    make = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    commands = [line.split() for line in make.stdout.replace("\\\n", " ").splitlines() if ".py " in line]
    assert [command[1] for command in commands] == ["train.py", "evaluate.py", "visualize.py"]
    args = train_parser().parse_args(commands[0][2:])
    assert (args.name, args.dataset, args.overwrite) == ("demo", "digits", True)
    monkeypatch.chdir(ROOT)
    for module, command in zip((evaluate, visualize), commands[1:], strict=True):
        monkeypatch.setattr(sys, "argv", command[1:])
        args = module.parse_flags()
        (checkpoint,) = args.checkpoint if module is visualize else [args.checkpoint]
        paths = args.image if module is visualize else args.images
        assert len(paths) == 3 and all(Path(path).is_file() for path in [checkpoint, *paths])


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="process groups and terminals")
@pytest.mark.parametrize("how", ["SIGTERM to the group", "the terminal is closed"])
def test_a_run_with_workers_saves_when_its_group_is_stopped(how, image_folder, tiny_flags):
    """By `timeout`, systemd, Slurm or a dropped connection; and it resumes from there."""
    data = ["--dataset", "imagenet", "--data_dir", image_folder, "--num_workers", 2, "--train_batch_size", 4]
    flags = tiny_flags(*data, "--num_steps", 100000, "--eval_every", 5)
    if how == "the terminal is closed":
        import pty  # which Windows lacks

        pid, terminal = pty.fork()
        if pid == 0:
            os.chdir(ROOT)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, which may run the tests, ignores it
            os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
            os.execv(sys.executable, [sys.executable, "train.py", *flags])
        wait_for_file(run_dir(flags) / "last.safetensors", terminal)
        os.close(terminal)  # the kernel sends SIGHUP, and printing is an error from now on
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    else:
        process = start(flags, start_new_session=True)
        wait_for_file(run_dir(flags) / "last.safetensors")
        os.killpg(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGTERM, errors
        assert "Traceback" not in errors
    step = saved_step(run_dir(flags) / "last.safetensors")
    assert step >= 5
    last = step + 1
    printed = succeed("train.py", *tiny_flags(*data, "--num_steps", last, "--eval_every", 5, "--resume"))
    assert f"resuming at step {step} of {last}" in printed


def wait_for_file(path, terminal=None):
    """Meanwhile read what is printed to the terminal, if one is given, so that it does not fill up."""
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline
        if terminal is None:
            time.sleep(0.02)
        elif select.select([terminal], [], [], 0.02)[0]:
            os.read(terminal, 4096)
