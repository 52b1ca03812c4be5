"""Several processes: copies and shards train alike, go on with each other's checkpoints, and survive deaths."""

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from helpers import ROOT, call_main, script, succeed
from models import build_model
from utils.parallel.averaging import WeightAverage
from utils.parallel.processes import StopSignal

STEPS, MORE_STEPS = 20, 26
SMALL = [
    *("--dataset", "digits", "--model_type", "ViT-Mini_4", "--img_size", "8", "--train_batch_size", "16"),
    *("--eval_batch_size", "100", "--eval_every", "100", "--warmup_steps", "3", "--optimizer", "adamw"),
    *("--learning_rate", "1e-3", "--dropout_rate", "0.1", "--drop_path_rate", "0.1", "--ema_decay", "0.9"),
]


def losses(run_dir):
    """The losses of all steps."""
    events = EventAccumulator(str(run_dir)).Reload()
    return [event.value for event in events.Scalars("train/loss")]


def last_line(printed):
    """The losses and accuracies of the last evaluation."""
    line = [line for line in printed.splitlines() if line.startswith("step ")][-1]
    return line[: line.index("  lr")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(folder, what it printed) of a run of one process, then of its continuation."""
    folder = tmp_path_factory.mktemp("alone")
    flags = [*SMALL, "--output_dir", folder, "--name", "run", "--resume"]
    printed = [succeed("train.py", *flags, "--num_steps", steps) for steps in (STEPS, MORE_STEPS)]
    return folder / "run", printed


@pytest.fixture(scope="module")
def four_shards(tmp_path_factory):
    """(folder, what it printed) of the same run, by four processes with a shard of the weights each."""
    folder = tmp_path_factory.mktemp("shards")
    flags = [*SMALL, "--output_dir", folder, "--name", "run", "--num_steps", STEPS]
    return folder / "run", succeed("train.py", *flags, "--parallel", "fsdp", processes=4)


@pytest.mark.parametrize("processes, parallel", [(2, "ddp"), (2, "fsdp"), (4, "ddp")])
def test_copies_and_shards_give_the_losses_of_one_process(processes, parallel, alone, tmp_path):
    flags = [*SMALL, "--output_dir", tmp_path, "--name", "run", "--num_steps", STEPS, "--parallel", parallel]
    printed = succeed("train.py", *flags, processes=processes)
    assert losses(tmp_path / "run") == pytest.approx(losses(alone[0])[:STEPS], rel=1e-5)
    assert last_line(printed) == last_line(alone[1][0])


def test_four_shards_give_the_losses_of_one_process(alone, four_shards):
    folder, printed = four_shards
    assert "4 processes on cpu, each with its shard of the weights" in printed
    assert losses(folder) == pytest.approx(losses(alone[0])[:STEPS], rel=1e-5)
    assert last_line(printed) == last_line(alone[1][0])
    assert len(list((folder / f"state-{STEPS}").glob("*.distcp"))) == 4


@pytest.mark.parametrize("processes, parallel", [(1, "ddp"), (2, "ddp"), (2, "fsdp")])
def test_the_checkpoint_of_four_shards_goes_on_with_fewer_processes(processes, parallel, alone, four_shards, tmp_path):
    (tmp_path / "output").mkdir()
    subprocess.run(["cp", "-r", four_shards[0], tmp_path / "output" / "run"], check=True)
    flags = [*SMALL, "--output_dir", tmp_path / "output", "--name", "run", "--num_steps", MORE_STEPS, "--resume"]
    printed = succeed("train.py", *flags, "--parallel", parallel, processes=processes)
    assert f"resuming at step {STEPS} of {MORE_STEPS}" in printed
    assert losses(tmp_path / "output" / "run") == pytest.approx(losses(alone[0]), rel=1e-5)
    assert last_line(printed) == last_line(alone[1][1])


def test_shards_of_a_hybrid_with_everything(image_folder, tmp_path):
    """Three processes with 3, 3 and 2 test pictures: one of them evaluates fewer batches than the others."""
    flags = [
        *("--dataset", "imagefolder", "--data_dir", image_folder, "--model_type", "R26-ViT-Mini_4", "--img_size", 32),
        *("--norm_type", "BN", "--token_reduction", "facility", "--keep_tokens", 4, "--reduction_layer", 1),
        *("--train_batch_size", 12, "--gradient_accumulation_steps", 2, "--grad_checkpointing", "--num_workers", 0),
        *("--num_steps", 5, "--eval_every", 2, "--eval_batch_size", 1, "--warmup_steps", 1, "--output_dir", tmp_path),
    ]
    one = succeed("train.py", *flags, "--name", "one")
    many = succeed("train.py", *flags, "--name", "many", "--parallel", "fsdp", processes=3)
    assert losses(tmp_path / "many") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert last_line(many) == last_line(one)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--bf16", "--fp16_opt_level", "O3"], "--parallel fsdp knows no level O3; use O2"),
        (["--log_attention_every", 5], "--log_attention_every needs the whole model in one process"),
        (["--parallel", "zero"], "unknown way to share the work 'zero'; did you mean ddp, fsdp?"),
    ],
)
def test_what_shards_cannot_do(flags, message, tiny_flags, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        call_main(train, tiny_flags("--parallel", "fsdp", *flags), monkeypatch)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_average_is_a_weighted_sum_of_the_weights():
    """Against the closed form, with the decay of the first steps, and evaluated in the weights' place."""
    model = build_model("ViT-Mini_4", 8, num_layers=1)
    named = dict(model.named_parameters())
    average = WeightAverage(named, decay=0.3)
    expected = {name: weight.detach().clone() for name, weight in named.items()}
    for step in range(1, 6):
        decay = min(0.3, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, weight in named.items():
                weight.add_(torch.randn_like(weight))
                expected[name] = decay * expected[name] + (1 - decay) * weight
        average.update(named, step)
    assert [min(0.3, (1 + step) / (10 + step)) for step in (1, 2, 5)] == [2 / 11, 0.25, 0.3]
    for name, weight in average.weights.items():
        torch.testing.assert_close(weight, expected[name])
    before = {name: weight.detach().clone() for name, weight in named.items()}
    with average.in_place(model):
        assert all(torch.equal(weight, average.weights[name]) for name, weight in model.named_parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_the_average_is_what_is_evaluated_and_kept_as_the_best(tiny_flags, monkeypatch, tmp_path):
    folder = tmp_path / "output" / "run"
    call_main(train, tiny_flags("--ema_decay", 0.5, "--num_steps", 6), monkeypatch)
    best, last = load_file(folder / "best.safetensors"), load_file(folder / "last.safetensors")
    assert not torch.equal(best["head.weight"], last["head.weight"])
    monkeypatch.setattr(WeightAverage, "update", lambda self, weights, step: None)
    call_main(train, tiny_flags("--ema_decay", 0.5, "--num_steps", 6, "--overwrite"), monkeypatch)
    untouched = load_file(folder / "best.safetensors")
    torch.manual_seed(42)
    start = build_model("ViT-Mini_4", img_size=8).state_dict()
    assert all(torch.equal(untouched[name], start[name]) for name in start)
    assert torch.equal(load_file(folder / "last.safetensors")["head.weight"], last["head.weight"])


def test_a_worker_that_reads_pictures_leaves_signals_to_its_training_process(monkeypatch, capsys):
    stop = StopSignal()
    monkeypatch.setattr(os, "getpid", lambda: -1)  # as in a process that was forked since
    stop.receive(signal.SIGINT, None)
    assert (stop.number, capsys.readouterr().err) == (0, "")
    monkeypatch.undo()
    stop.receive(signal.SIGINT, None)
    assert stop.number == signal.SIGINT


def full_disk(*arguments, **keywords):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files")
def test_a_checkpoint_that_can_not_be_written_leaves_the_one_before(tiny_flags, monkeypatch, capsys, tmp_path):
    import resource

    flags = tiny_flags("--num_steps", 2)
    succeed("train.py", *flags)
    before = load_file(tmp_path / "output" / "run" / "last.safetensors")
    size = max(path.stat().st_size for path in (tmp_path / "output" / "run" / "state-2").iterdir())

    def limit_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    failed = script("train.py", *flags, "--num_steps", 4, "--resume", preexec_fn=limit_files)
    assert failed.returncode == 1
    error = failed.stderr.splitlines()[-1]
    assert "the checkpoint of step 4 can't be written to" in error
    assert error.endswith("last.safetensors of step 2 is whole")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):  # the state still fits, the weights do not
        patch.setattr("utils.records.checkpoint.save_file", full_disk)
        call_main(train, [*flags, "--num_steps", 4, "--resume"], patch)
    assert "No space left on device (" in capsys.readouterr().err
    after = load_file(tmp_path / "output" / "run" / "last.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "resuming at step 2 of 4" in succeed("train.py", *flags, "--num_steps", 4, "--resume")
    assert [path.name for path in (tmp_path / "output" / "run").glob("state-*")] == ["state-4"]


LONG = [
    *("--dataset", "digits", "--model_type", "ViT-Mini_4", "--img_size", "8", "--train_batch_size", "8"),
    *("--num_steps", "200", "--eval_every", "100", "--warmup_steps", "10", "--dropout_rate", "0.1"),
    *("--eval_batch_size", "360", "--name", "run"),
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a run of two processes that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    succeed("train.py", *LONG, "--output_dir", folder, processes=2)
    return folder / "run"


def start_agents(count, *command):
    """`torchrun` for two processes, on one machine or on two that meet each other; one worker's death is survived."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    meeting = ["--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}", "--rdzv_id=test"]
    machines = ["--standalone", "--nproc_per_node=2"] if count == 1 else ["--nnodes=2", "--nproc_per_node=1", *meeting]
    launcher = [sys.executable, "-m", "torch.distributed.run", *machines, "--max-restarts=3"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    # Else processes would look for each other at what dead ones of the same restart count have left in the store.
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [subprocess.Popen([*launcher, *map(str, command)], cwd=ROOT, env=environment, **pipes) for _ in range(count)]


def children(process):
    """The process numbers of its children."""
    stats = [path.read_text() for path in Path("/proc").glob("[0-9]*/stat")]
    fields = [(stat[: stat.index(" ")], stat[stat.rindex(")") + 2 :].split()) for stat in stats]
    return [int(number) for number, (_, parent, *_) in fields if int(parent) == process.pid]


def saved_step(run_dir):
    """The step of the last whole checkpoint, 0 before the first."""
    names = [path.parent.name for path in run_dir.glob("state-*/state.json")]
    return max((int(name.removeprefix("state-")) for name in names), default=0)


def test_restarts_on_several_machines_need_resume(tiny_flags, monkeypatch, capsys):
    for name, value in (("WORLD_SIZE", 4), ("LOCAL_WORLD_SIZE", 2), ("TORCHELASTIC_MAX_RESTARTS", 3)):
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit) as stopped:
        call_main(train, tiny_flags(), monkeypatch)
    assert stopped.value.code == 2
    assert "torchrun --max-restarts on several machines needs --resume" in capsys.readouterr().err


def test_a_restart_goes_on_with_what_the_same_torchrun_began_and_with_no_other_run(tiny_flags, monkeypatch, capsys):
    """The worker's parent is torchrun, which counts its restarts from 0."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    call_main(train, tiny_flags("--num_steps", 4), monkeypatch)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    call_main(train, tiny_flags("--num_steps", 6, "--overwrite"), monkeypatch)
    assert "resuming at step 4 of 6" in capsys.readouterr().out
    monkeypatch.setattr(os, "getppid", lambda: -1)
    with pytest.raises(SystemExit):
        call_main(train, tiny_flags("--num_steps", 8), monkeypatch)
    assert "holds a run already; give --resume" in capsys.readouterr().err
    call_main(train, tiny_flags("--num_steps", 8, "--overwrite"), monkeypatch)
    assert "resuming" not in capsys.readouterr().out


def test_processes_that_do_not_see_the_same_folder_end_before_work(tiny_flags, monkeypatch, capsys):
    """As on two machines without a common disk, of which one has a checkpoint."""
    monkeypatch.setattr("utils.training.union_over_processes", lambda items: {True, False})
    with pytest.raises(SystemExit) as stopped:
        call_main(train, tiny_flags("--resume"), monkeypatch)
    assert stopped.value.code == 2
    assert "must be on a disk that all machines share" in capsys.readouterr().err


def test_one_process_with_an_error_is_the_one_that_speaks(image_folder, tmp_path):
    """The other one loses its peer in a step, and ends without a traceback."""
    pictures = sorted((image_folder / "train").rglob("*.png"))
    pictures[5].write_bytes(b"broken")
    flags = ["--dataset", "imagenet", "--data_dir", image_folder, "--model_type", "ViT-Mini_4", "--img_size", 8]
    flags += ["--name", "run", "--output_dir", tmp_path / "output", "--train_batch_size", 2, "--num_steps", 50]
    failed = script("train.py", *flags, "--num_workers", 0, processes=2)
    assert failed.returncode != 0
    assert re.search(r"error: .* is not a readable picture: .*; --skip_broken leaves such pictures out", failed.stderr)
    assert "utils/training.py" not in failed.stderr  # torchrun's own traceback stands there


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds workers in /proc")
@pytest.mark.parametrize("agents", [1, 2], ids=["one machine", "two machines"])
def test_a_worker_that_dies_costs_the_steps_since_the_last_checkpoint(agents, undisturbed, tmp_path):
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
        os.kill(children(machines[-1])[-1], signal.SIGKILL)
        printed = "".join(machine.communicate(timeout=300)[0] for machine in machines)
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [0] * agents, printed
    resumed = int(re.search(r"resuming at step (\d+) of 200", printed)[1])
    assert saved <= resumed < 200
    assert resumed % 5 == 0
    whole, hit = load_file(undisturbed / "last.safetensors"), load_file(run_dir / "last.safetensors")
    assert all(torch.equal(whole[name], hit[name]) for name in whole)
