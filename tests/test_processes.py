"""Several processes: the same results as one, checkpoints for any number of them, signals, and dead workers."""

import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from safetensors.torch import load_file

import train
from helpers import (
    ROOT,
    assert_same_bits,
    differences,
    fails,
    make_shallow,
    metrics,
    run_dir,
    run_processes,
    script,
    step_metrics,
    succeed,
    train_run,
)
from utils import train_state
from utils.errors import UserError
from utils.parallel.processes import StopSignal, choose_device, first_on_each_machine, join_processes, one_process
from utils.records import checkpoint
from utils.records.result import read_result
from utils.records.weights import LAST
from utils.train_state import TrainState

EVERYTHING = [
    *("--optimizer", "adamw", "--learning_rate", "1e-3", "--dropout_rate", "0.1", "--drop_path_rate", "0.1"),
    *("--ema_decay", "0.9", "--eval_batch_size", "100"),
]


FORKS = pytest.mark.skipif(sys.platform != "linux", reason="forks processes that compute")


@FORKS
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_have_the_results_of_one_and_resume_in_it(parallel, tiny_flags, monkeypatch):
    """With dropout, accumulation, class weights and a moving average; two processes share the evaluated images."""
    make_shallow(monkeypatch)
    flags = [*EVERYTHING, "--class_weights", "balanced", "--best_metric", "macro_f1", "--val_split", 0.2]
    flags += ["--gradient_accumulation_steps", 2, "--num_steps", 8, "--eval_every", 4]
    one, two = (tiny_flags(*flags, "--name", name, "--parallel", parallel) for name in ("one", "two"))
    train_run(one, monkeypatch, "one")
    (status, printed), (other_status, others) = run_processes(2, two)
    assert (status, other_status, others) == (0, 0, ""), printed + others  # the first process alone prints
    sharded = ", each with its shard of the weights" if parallel == "fsdp" else ""
    assert f"8 steps of 16 images at 8x8, 2 processes on cpu{sharded}\n" in printed
    assert_same_results(two, one)
    for flags, name in ((one, "one"), (two, "two")):
        train_run([*flags, "--resume", "--num_steps", "12"], monkeypatch, name)
    assert [row["step"] for row in metrics(two)] == ["4", "8", "12"]
    assert_same_results(two, one)


def assert_same_results(flags, others):
    """The metrics, the weights and their average are those of the other run but for rounding."""
    for row, other in zip(metrics(flags), metrics(others), strict=True):
        for name in ("step", "train_loss", "train_accuracy", "grad_norm", "val_loss", "val_accuracy", "val_macro_f1"):
            assert float(row[name]) == pytest.approx(float(other[name]), rel=1e-4), name
    result, expected = (read_result(run_dir(each)) for each in (flags, others))
    for name in ("last", "best"):
        assert result[name]["step"] == expected[name]["step"]
        for split in ("val", "test"):
            assert result[name][split] == pytest.approx(expected[name][split], rel=1e-4)
    for name in ("last", "best"):
        weights, expected = (load_file(run_dir(each) / f"{name}.safetensors") for each in (flags, others))
        assert max(differences(weights, expected).values()) < 1e-4


STEPS, MORE_STEPS = 20, 26
SMALL = [
    *("--dataset", "digits", "--model_type", "ViT-Mini_4", "--img_size", "8", "--train_batch_size", "16"),
    *("--eval_every", "100", "--warmup_steps", "3", "--name", "run", *EVERYTHING),
]


def last_line(printed):
    """The losses and accuracies of the last evaluation."""
    line = [line for line in printed.splitlines() if line.startswith("step ")][-1]
    return line[: line.index("  lr")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(folder, what it printed) of a run of one process, then of its continuation."""
    folder = tmp_path_factory.mktemp("alone")
    flags = [*SMALL, "--output_dir", folder, "--resume"]
    printed = [succeed("train.py", *flags, "--num_steps", steps) for steps in (STEPS, MORE_STEPS)]
    return folder / "run", printed


@pytest.fixture(scope="module")
def four_shards(tmp_path_factory):
    """(folder, what it printed) of the same run, by four processes with a shard of the weights each."""
    folder = tmp_path_factory.mktemp("shards")
    flags = [*SMALL, "--output_dir", folder, "--num_steps", STEPS]
    return folder / "run", succeed("train.py", *flags, "--parallel", "fsdp", processes=4)


def assert_same_steps(folder, other):
    """Each step has the loss and the gradient norm of the other run's step, as far as both have it."""
    for name in ("loss", "grad_norm"):
        values, expected = step_metrics(folder, name), step_metrics(other, name)
        assert values == pytest.approx(expected[: len(values)], rel=1e-4), name


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("processes, parallel", [(2, "ddp"), (2, "fsdp"), (4, "ddp")])
def test_copies_and_shards_have_the_metrics_of_one_process(processes, parallel, alone, tmp_path):
    flags = [*SMALL, "--output_dir", tmp_path, "--num_steps", STEPS, "--parallel", parallel]
    printed = succeed("train.py", *flags, processes=processes)
    assert len(step_metrics(tmp_path / "run", "loss")) == STEPS
    assert_same_steps(tmp_path / "run", alone[0])
    assert last_line(printed) == last_line(alone[1][0])


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
def test_four_shards_have_the_metrics_of_one_process(alone, four_shards):
    folder, printed = four_shards
    assert "4 processes on cpu, each with its shard of the weights" in printed
    assert len(step_metrics(folder, "loss")) == STEPS
    assert_same_steps(folder, alone[0])
    assert last_line(printed) == last_line(alone[1][0])
    assert len(list((folder / f"state-{STEPS}").glob("*.distcp"))) == 4


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("processes, parallel", [(1, "ddp"), (2, "ddp"), (2, "fsdp")])
def test_the_checkpoint_of_four_shards_resumes_with_fewer_processes(processes, parallel, alone, four_shards, tmp_path):
    shutil.copytree(four_shards[0], tmp_path / "run")
    flags = [*SMALL, "--output_dir", tmp_path, "--num_steps", MORE_STEPS, "--resume"]
    printed = succeed("train.py", *flags, "--parallel", parallel, processes=processes)
    assert f"resuming at step {STEPS} of {MORE_STEPS}" in printed
    assert len(step_metrics(tmp_path / "run", "loss")) == MORE_STEPS
    assert_same_steps(tmp_path / "run", alone[0])
    assert last_line(printed) == last_line(alone[1][1])


@pytest.mark.slow
def test_shards_of_a_hybrid_with_everything_have_the_metrics_of_one_process(image_folder, tmp_path):
    """Three processes with 3, 3 and 2 validation images: one of them evaluates fewer batches than the others.

    The test images are evaluated at the end with the last and the best weights, which are loaded into the shards.
    """
    flags = [
        *("--dataset", "imagefolder", "--data_dir", image_folder, "--model_type", "R26-ViT-Mini_4", "--img_size", 32),
        *("--norm_type", "BN", "--token_reduction", "facility", "--keep_tokens", 4, "--reduction_layer", 1),
        *("--train_batch_size", 12, "--gradient_accumulation_steps", 2, "--grad_checkpointing", "--num_workers", 0),
        *("--num_steps", 5, "--eval_every", 2, "--eval_batch_size", 1, "--warmup_steps", 1, "--output_dir", tmp_path),
        *("--test_split", 0.25),
    ]
    one = succeed("train.py", *flags, "--name", "one")
    many = succeed("train.py", *flags, "--name", "many", "--parallel", "fsdp", processes=3)
    assert len(step_metrics(tmp_path / "many", "loss")) == 5
    assert_same_steps(tmp_path / "many", tmp_path / "one")
    assert last_line(many) == last_line(one)
    results = [read_result(tmp_path / name) for name in ("one", "many")]
    for weights in ("last", "best"):
        expected, found = (result[weights]["test"] for result in results)
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow  # four processes
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    "reduction",
    [("tome", "--tome_r", 3), ("random", "--keep_tokens", 4, "--reduction_layer", 1)],
    ids=["tome", "random"],
)
def test_two_processes_that_merge_tokens_have_the_metrics_of_one(reduction, parallel, tmp_path):
    flags = [*SMALL, "--token_reduction", *reduction, "--img_size", 16, "--grad_checkpointing", "--num_steps", 5]
    flags += ["--output_dir", tmp_path, "--dropout_rate", 0.1]
    succeed("train.py", *flags, "--name", "one")
    succeed("train.py", *flags, "--name", "two", "--parallel", parallel, processes=2)
    assert len(step_metrics(tmp_path / "two", "loss")) == 5
    assert_same_steps(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--bf16", "--fp16_opt_level", "O3"], "--parallel fsdp does not support level O3; use O2"),
        (["--log_attention_every", 5], "--log_attention_every needs the whole model in one process"),
        (["--parallel", "zero"], "unknown parallel mode 'zero'; did you mean ddp, fsdp?"),
    ],
)
def test_flags_that_sharding_does_not_support(flags, message, tiny_flags, monkeypatch, capsys):
    assert message in fails(train, tiny_flags("--parallel", "fsdp", *flags), monkeypatch, capsys)


def test_one_process_is_the_first_of_one():
    alone = one_process()
    assert (alone.rank, alone.size, alone.is_first, str(alone)) == (0, 1, True, str(alone.device))
    assert choose_device().type in ("cpu", "cuda")


# Stop signals


def test_a_signal_is_recorded_and_a_second_one_interrupts_after_two_seconds(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    stop = StopSignal()
    assert stop.agreed() == 0
    stop.receive(signal.SIGTERM, None)
    assert stop.agreed() == signal.SIGTERM
    assert capsys.readouterr().err.startswith("\nSIGTERM: stopping at the end of this step")
    clock[0] += 1  # forwarded by a launcher
    stop.receive(signal.SIGTERM, None)
    assert capsys.readouterr().err == ""
    clock[0] += 3
    with pytest.raises(KeyboardInterrupt):
        stop.receive(signal.SIGINT, None)


def test_signals_are_handled_only_while_listening():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal().listening() as stop:
        assert signal.getsignal(signal.SIGTERM) == stop.receive
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed() == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP")
@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_stops_a_run_unless_it_is_ignored(ignored, monkeypatch):
    """As by nohup, which starts the run with SIGHUP ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with StopSignal().listening() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.agreed() == (0 if ignored else signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_worker_that_reads_images_leaves_signals_to_its_training_process(monkeypatch, capsys):
    stop = StopSignal()
    monkeypatch.setattr(os, "getpid", lambda: -1)  # as in a process that was forked since
    stop.receive(signal.SIGINT, None)
    assert (stop.number, capsys.readouterr().err) == (0, "")
    monkeypatch.undo()
    stop.receive(signal.SIGINT, None)
    assert stop.number == signal.SIGINT


@FORKS
def test_a_signal_in_the_evaluation_of_one_process_stops_all(tiny_flags, monkeypatch):
    make_shallow(monkeypatch)
    original = train_state.evaluate

    def evaluate_with_signal(*arguments, **keywords):
        if os.environ["RANK"] == "1":
            signal.raise_signal(signal.SIGTERM)
        return original(*arguments, **keywords)

    flags = tiny_flags("--eval_batch_size", 32, "--num_steps", 6)
    with monkeypatch.context() as patch:
        patch.setattr(train_state, "evaluate", evaluate_with_signal)
        (first_status, first), second = run_processes(2, flags)
    assert (first_status, second) == (128 + signal.SIGTERM, (128 + signal.SIGTERM, ""))
    assert "stopped by SIGTERM in the evaluation after step 6; saved" in first
    assert not (run_dir(flags) / "metrics.csv").exists()
    (status, printed), _ = run_processes(2, [*flags, "--resume"])
    assert status == 0, printed
    assert [row["step"] for row in metrics(flags)] == ["6"]


# Errors and deaths of processes


def test_restarts_on_several_machines_need_resume(tiny_flags, monkeypatch, capsys):
    for name, value in (("WORLD_SIZE", 4), ("LOCAL_WORLD_SIZE", 2), ("TORCHELASTIC_MAX_RESTARTS", 3)):
        monkeypatch.setenv(name, str(value))
    message = fails(train, tiny_flags(), monkeypatch, capsys)
    assert "torchrun --max-restarts on several machines needs --resume" in message


@FORKS
@pytest.mark.parametrize("fails", [False, True])
def test_the_others_wait_for_the_first_process_of_the_machine_longer_than_for_a_step(fails, tiny_flags, monkeypatch):
    """And if its body fails, they end too, without running it."""
    limited = functools.partial(dist.init_process_group, timeout=timedelta(seconds=1.2))
    monkeypatch.setattr(dist, "init_process_group", limited)

    def body():
        with join_processes() as processes, first_on_each_machine(processes):
            if processes.is_first:
                time.sleep(0.1 if fails else 1.8)
                if fails:
                    raise UserError("no such file")
            print("prepared", time.time())

    monkeypatch.setattr(train, "main", body)
    first, second = run_processes(2, tiny_flags())
    if fails:
        assert first == (2, "train.py: error: no such file\n")
        assert second == (1, "")
    else:
        assert (first[0], second[0]) == (0, 0), first[1] + second[1]
        assert first[1].split()[1] < second[1].split()[1]


@FORKS
def test_wrong_flags_are_reported_by_the_first_process_only(tiny_flags):
    (status, printed), second = run_processes(2, tiny_flags("--train_batch_size", 15))
    assert (status, printed.count("\n")) == (2, 1)
    assert printed.startswith("train.py: error: --train_batch_size 15 is not divisible by 2 processes")
    assert second == (2, "")


@FORKS
def test_an_image_that_only_the_second_process_can_not_read_is_named(tiny_flags, image_folder, monkeypatch):
    """Of the test images, the odd ones are its share."""
    make_shallow(monkeypatch)
    (image_folder / "val" / "cat" / "001.png").write_bytes(b"damaged")
    flags = tiny_flags("--dataset", "imagefolder", "--data_dir", image_folder, "--num_steps", 2, "--num_workers", 0)
    (first_status, first), (status, printed) = run_processes(2, flags)
    assert first_status != 0
    assert status == 2
    assert re.search(r"train.py: process 1: error: .*001.png is not a readable image", printed)
    assert "Traceback" not in first + printed


@pytest.mark.slow
def test_only_the_process_with_an_error_prints_it(image_folder, tmp_path):
    """The other one loses its peer in a step, and ends without a traceback."""
    images = sorted((image_folder / "train").rglob("*.png"))
    images[5].write_bytes(b"damaged")
    flags = ["--dataset", "imagenet", "--data_dir", image_folder, "--model_type", "ViT-Mini_4", "--img_size", 8]
    flags += ["--name", "run", "--output_dir", tmp_path / "output", "--train_batch_size", 2, "--num_steps", 50]
    failed = script("train.py", *flags, "--num_workers", 0, processes=2)
    assert failed.returncode != 0
    assert re.search(r"error: .* is not a readable image: .*; --skip_broken skips such images", failed.stderr)
    assert "utils/training.py" not in failed.stderr  # a traceback of torchrun itself remains


LONG = [
    *("--dataset", "digits", "--model_type", "ViT-Mini_4", "--img_size", "8", "--train_batch_size", "8"),
    *("--num_steps", "200", "--eval_every", "100", "--warmup_steps", "10", "--dropout_rate", "0.1"),
    *("--eval_batch_size", "360", "--name", "run"),
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a run of two processes that nothing interrupts."""
    folder = tmp_path_factory.mktemp("undisturbed")
    succeed("train.py", *LONG, "--output_dir", folder, processes=2)
    return folder / "run"


def start_agents(count, *command):
    """`torchrun` for two processes, on one machine or on two that find each other; it restarts dead workers."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    meeting = ["--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}", "--rdzv_id=test"]
    machines = ["--standalone", "--nproc_per_node=2"] if count == 1 else ["--nnodes=2", "--nproc_per_node=1", *meeting]
    launcher = [sys.executable, "-m", "torch.distributed.run", *machines, "--max-restarts=3"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    if count > 1:  # otherwise processes would look for each other at the addresses of dead ones
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [subprocess.Popen([*launcher, *map(str, command)], cwd=ROOT, env=environment, **pipes) for _ in range(count)]


def children(process):
    """The process numbers of its children."""
    stats = [path.read_text() for path in Path("/proc").glob("[0-9]*/stat")]
    fields = [(stat[: stat.index(" ")], stat[stat.rindex(")") + 2 :].split()) for stat in stats]
    return [int(number) for number, (_, parent, *_) in fields if int(parent) == process.pid]


def saved_step(run_dir):
    """The step of the last whole checkpoint, 0 before the first. The weights are written after the state."""
    path = run_dir / LAST
    return checkpoint.saved_step(path) if path.exists() else 0


@pytest.mark.slow
@pytest.mark.xdist_group("dead workers")
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds workers in /proc")
@pytest.mark.parametrize("agents", [1, 2], ids=["one machine", "two machines"])
def test_a_dead_worker_costs_only_the_steps_since_the_last_checkpoint(agents, undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    resume = ["--resume"] if agents > 1 else []
    machines = start_agents(agents, "train.py", *LONG, "--output_dir", tmp_path, "--save_every", 5, *resume)
    try:
        deadline = time.monotonic() + 200
        while saved_step(run_dir) < 30:
            assert all(machine.poll() is None for machine in machines), machines[0].communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        saved = saved_step(run_dir)
        victim = 0 if agents == 1 else -1  # the first process is the one whose address the others keep
        os.kill(children(machines[-1])[victim], signal.SIGKILL)
        printed = "".join(machine.communicate(timeout=300)[0] for machine in machines)
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [0] * agents, printed
    resumed = int(re.search(r"resuming at step (\d+) of 200", printed)[1])
    assert saved <= resumed < 200
    assert resumed % 5 == 0
    assert_same_bits(*(load_file(folder / "last.safetensors") for folder in (undisturbed, run_dir)))


@FORKS
def test_no_process_continues_before_the_checkpoint_is_whole(tiny_flags, monkeypatch):
    """Otherwise the launcher, which sees one process end, ends the first one while it writes."""
    make_shallow(monkeypatch)
    save, save_weights = TrainState.save, checkpoint.save_weights

    def write_slowly(path, weights, step, is_first, model_type):
        time.sleep(0.3 * is_first)
        save_weights(path, weights, step, is_first, model_type)

    def save_and_check(run, seconds):
        save(run, seconds)
        assert checkpoint.saved_step(run.run_dir / LAST) == run.step

    monkeypatch.setattr(checkpoint, "save_weights", write_slowly)
    monkeypatch.setattr(TrainState, "save", save_and_check)
    flags = tiny_flags("--num_steps", 1)
    outcome = run_processes(2, flags)
    for status, printed in outcome:
        assert status == 0, printed
