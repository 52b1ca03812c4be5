"""Sweeps of many runs: their commands, which of them are finished, and running them, on several GPUs too."""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

import train
from command_line import model_maker, patch_of, train_parser
from helpers import ROOT, call_main
from utils.errors import RunStoppedError, UserError
from utils.records.run_folder import LOCK
from utils.sweeps import (
    LOG,
    Run,
    TrainingScript,
    check_plan,
    mean_and_range,
    plan_run,
    raise_failures,
    run_all,
    run_unfinished,
    visible_devices,
)

TRAIN = TrainingScript(ROOT / "train.py", train_parser(), model_maker, patch_of)


def python_run(folder, name, code, *arguments):
    """A Run of Python code in place of a training script."""
    flags = argparse.Namespace(output_dir=folder, name=name)
    return Run([sys.executable, "-c", code, *map(str, arguments)], flags)


def test_a_planned_run_has_its_command_and_flags():
    flags = {"name": "a b", "num_steps": 7, "horizontal_flip": True, "output_dir": "runs"}
    run = plan_run(TRAIN, flags, ["--seed", "3"])
    assert run.command[:2] == [sys.executable, str(ROOT / "train.py")]
    assert run.command[2:] == [
        *("--name", "a b", "--num_steps", "7", "--horizontal_flip", "--output_dir", "runs"),
        *("--seed", "3", "--resume"),
    ]
    assert (run.flags.num_steps, run.flags.horizontal_flip, run.flags.seed, run.flags.resume) == (7, True, 3, True)
    assert str(run.folder) == os.path.join("runs", "a b")
    with pytest.raises(UserError, match="unrecognized arguments: --no_such_flag"):
        plan_run(TRAIN, {"name": "run", "no_such_flag": 1})


def test_a_plan_is_checked_against_earlier_runs(tiny_flags, monkeypatch):
    flags = tiny_flags("--num_steps", 1, "--eval_every", 1, "--examples_per_class", 2)
    call_main(train, flags, monkeypatch)
    check_plan(TRAIN, [plan_run(TRAIN, {}, flags)])
    with pytest.raises(UserError, match="was made with --learning_rate 0.03, not 0.1; give another --output_dir"):
        check_plan(TRAIN, [plan_run(TRAIN, {"learning_rate": 0.1}, flags)])
    with pytest.raises(UserError, match="image size 9 is not a multiple"):
        check_plan(TRAIN, [plan_run(TRAIN, {}, tiny_flags("--img_size", 9))])
    absent = plan_run(TRAIN, {}, tiny_flags("--name", "other", "--pretrained_dir", "nowhere.npz"))
    check_plan(TRAIN, [absent], files=False)
    with pytest.raises(UserError, match="nowhere.npz does not exist"):
        check_plan(TRAIN, [absent])


def test_a_run_that_another_process_trains_is_named_before_any_work(tiny_flags):
    """As when a study is started twice; a finished run needs no work."""
    run = plan_run(TRAIN, {}, tiny_flags())
    run.folder.mkdir(parents=True)
    hold = f"import time; from utils.locks import exclusive_lock; lock = exclusive_lock({str(run.folder / LOCK)!r})"
    holder = subprocess.Popen(
        [sys.executable, "-c", f"{hold}\nwith lock: print('held', flush=True); time.sleep(60)"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    try:
        holder.stdout.readline()
        with pytest.raises(UserError, match=f"run is in use by process {holder.pid} on .* since .*; wait for its end"):
            check_plan(TRAIN, [run])
    finally:
        holder.kill()
        holder.communicate()
    check_plan(TRAIN, [run])


def test_only_the_gpus_of_cuda_visible_devices_are_used(monkeypatch):
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
        assert visible_devices() == devices


def test_runs_are_spread_over_gpus(tmp_path, capsys):
    """Two that wait for each other, so that both must run at the same time, then a third on the GPU that is free."""
    code = """
import os, pathlib, sys, time
mine, other = map(pathlib.Path, sys.argv[1:])
mine.touch()
while not other.exists():
    time.sleep(0.01)
print("ran on", os.environ["CUDA_VISIBLE_DEVICES"])
sys.exit(3)
"""
    pairs = (("a", "b"), ("b", "a"), ("c", "a"))
    runs = [python_run(tmp_path / "out", mine, code, tmp_path / mine, tmp_path / other) for mine, other in pairs]
    failed, signal_number = run_all(runs, ["4", "GPU-x"])
    assert signal_number == 0
    ran_on = {name: reason.partition(" (status 3; log: ")[0] for name, reason in failed.items()}
    assert (ran_on["a"], ran_on["b"]) == ("ran on 4", "ran on GPU-x")
    assert ran_on["c"] in ("ran on 4", "ran on GPU-x")
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 6  # what the runs themselves print is in their logs only
    assert printed[1] == f"[2/3] b: started on GPU GPU-x, log in {tmp_path / 'out' / 'b' / LOG}"


def test_runs_that_share_the_cpu_have_an_equal_part_of_its_threads(tmp_path, monkeypatch, capsys):
    """Two jobs of a process with six threads; each end is reported with its status."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    code = "import os, sys; print(os.environ.get('OMP_NUM_THREADS')); sys.exit(5)"
    runs = [python_run(tmp_path, name, code) for name in "abc"]
    for run in runs:
        run.flags.download, run.flags.dataset, run.flags.data_dir = False, "imagefolder", "data"
    ended = []
    failed = run_unfinished(runs, 2, lambda run, status: ended.append((run.flags.name, status)))
    assert {reason.partition(" ")[0] for reason in failed.values()} == {"3"}
    assert sorted(ended) == [("a", 5), ("b", 5), ("c", 5)]
    assert "3 to do, 2 at a time" in capsys.readouterr().out


def test_a_failed_run_is_reported_with_its_last_line_and_its_log(tmp_path, capsys):
    """Its last line; on one device the output is printed as well."""
    runs = [python_run(tmp_path, "talks", "print('one\\ntwo\\n')"), python_run(tmp_path, "silent", "")]
    failed, _ = run_all(runs, [None])
    assert failed == {
        "talks": f"two (status 0; log: {tmp_path / 'talks' / LOG})",
        "silent": f"it printed nothing (status 0; log: {tmp_path / 'silent' / LOG})",
    }
    printed = capsys.readouterr().out
    assert "\none\ntwo\n" in printed
    raise_failures({}, 2)
    with pytest.raises(RunStoppedError, match="^2 of 3 runs failed; the same command tries them again\n  talks: two"):
        raise_failures(failed, 3)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_stop_signal_reaches_the_running_job_and_no_other_starts(tmp_path, capsys):
    code = """
import pathlib, signal, sys, time
def stop(number, frame):
    print("received", signal.Signals(number).name)
    sys.exit(9)
signal.signal(signal.SIGTERM, stop)
pathlib.Path(sys.argv[1]).touch()
time.sleep(60)
"""
    started = tmp_path / "started"

    def stop_when_started():
        while not started.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=stop_when_started, daemon=True)
    sender.start()
    runs = [python_run(tmp_path, name, code, started) for name in ("first", "second")]
    assert run_all(runs, [None]) == ({}, signal.SIGTERM)
    sender.join()
    printed = capsys.readouterr().out
    assert "received SIGTERM" in printed
    assert "[1/2] first: stopped" in printed
    assert not (tmp_path / "second").exists()


def test_mean_and_range_of_a_loss_are_in_nats():
    assert mean_and_range([0.5], "loss") == "0.5000"
    assert mean_and_range({"a": 0.5, "b": 1.0, "c": 0.75}.values(), "loss") == "0.7500 (0.5000 to 1.0000)"
    assert mean_and_range([0.5, 0.6], "macro_f1") == "55.0 % (50.0 to 60.0)"


def test_mean_and_range_in_percent():
    assert mean_and_range([0.5]) == "50.0 %"
    assert mean_and_range([0.5, 0.6, 0.4]) == "50.0 % (40.0 to 60.0)"
