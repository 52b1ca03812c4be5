"""scripts/train.sbatch with stand-ins for Slurm's commands; docs/distributed.md describes a trial with Slurm itself."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from helpers import ROOT, assert_same_bits, metrics, run_dir, wait_for_checkpoint

pytestmark = pytest.mark.skipif(os.name != "posix" or not shutil.which("pkill"), reason="the script is for clusters")

BATCH = ROOT / "scripts" / "train.sbatch"
FLAGS = [
    *("--dataset", "digits", "--model_type", "ViT-Mini_4", "--img_size", "8", "--train_batch_size", "8"),
    *("--num_steps", "80", "--eval_every", "8", "--warmup_steps", "10", "--dropout_rate", "0.1"),
]
# srun starts one task per node; it dies of TERM, as the real one ends its tasks then. scancel signals the tasks.
COMMANDS = {
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        for ((node = 0; node < SLURM_NNODES; node++)); do
            SLURM_NODEID=$node "$@" &
            echo $! >>"$FAKE/tasks"
            tasks+=($!)
        done
        status=0
        for task in "${tasks[@]}"; do wait "$task" || status=$?; done
        exit $status""",
    "scancel": 'echo "scancel $*" >>"$FAKE/requests"; kill -TERM $(<"$FAKE/tasks")',
    "squeue": 'cat "$FAKE/state"',
    "scontrol": 'if [[ $1 == show ]]; then echo localhost; echo second; else echo "scontrol $*" >>"$FAKE/requests"; fi',
}
# A training whose checkpoint takes longer than torchrun would wait for it.
SLOW_TRAINING = """
import pathlib, signal, sys, time
def save(number, frame):
    time.sleep(6)
    print("saved", flush=True)
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, save)
pathlib.Path("started").touch()
time.sleep(120)
"""


class Cluster:
    """Slurm's commands as stand-ins in a folder."""

    def __init__(self, folder):
        self.folder, self.cwd = folder, ROOT
        for name, body in COMMANDS.items():
            path = folder / name
            path.write_text(f"#!/bin/bash\n{body}\n")
            path.chmod(0o755)
        self.set_state("RUNNING None")

    def set_state(self, state):
        """What squeue answers about the job."""
        (self.folder / "state").write_text(f"{state}\n")

    def start(self, flags, nodes=1, processes=1, restarts=0, **environment):
        """Start the batch script as a job; returns its Popen."""
        (self.folder / "tasks").unlink(missing_ok=True)
        job = {"SLURM_JOB_ID": os.getpid(), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": nodes}
        job |= {"PROCESSES_PER_NODE": processes, "FAKE": self.folder}
        if restarts:
            job["SLURM_RESTART_COUNT"] = restarts
        path = os.pathsep.join([str(self.folder), str(Path(sys.executable).parent), os.environ["PATH"]])
        settings = {"PATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        environment = {**os.environ, **settings, **{name: str(value) for name, value in (job | environment).items()}}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = ["bash", str(BATCH), *map(str, flags)]
        return subprocess.Popen(command, cwd=self.cwd, env=environment, start_new_session=True, **pipes)

    def requests(self):
        """What the script asked Slurm to do."""
        path = self.folder / "requests"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def cluster(tmp_path):
    (tmp_path / "bin").mkdir()
    return Cluster(tmp_path / "bin")


@pytest.fixture
def slow_training(cluster, tmp_path):
    """Start a training whose checkpoint takes 6 seconds under a torchrun that waits for 2; returns its Popen."""
    (tmp_path / "train.py").write_text(SLOW_TRAINING)
    cluster.cwd = tmp_path
    batch = cluster.start([], TORCH_ELASTIC_SHUTDOWN_TIMEOUT=2)
    wait_until((tmp_path / "started").exists, batch)
    return batch


def wait_until(condition, batch):
    deadline = time.monotonic() + 120
    while not condition():
        assert batch.poll() is None, batch.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_script_has_valid_syntax():
    subprocess.run(["bash", "-n", str(BATCH)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--severity=warning", str(BATCH)], check=True)


def test_directives_come_first_and_ask_for_the_signal():
    """sbatch ignores directives below the first command."""
    lines = BATCH.read_text().splitlines()
    commands = [number for number, line in enumerate(lines) if line and not line.startswith("#")]
    directives = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert directives[-1] < commands[0]
    given = {lines[number].split()[1] for number in directives}
    assert given >= {"--signal=B:TERM@120", "--requeue", "--open-mode=append", "--ntasks-per-node=1"}


def test_overwrite_is_an_error(cluster):
    batch = cluster.start([*FLAGS, "--name", "run", "--overwrite"])
    assert batch.communicate()[1].count("\n") == 1
    assert batch.returncode == 2


@pytest.mark.slow
def test_a_stopped_run_is_requeued_and_ends_with_the_same_bits(cluster, tmp_path):
    """On two nodes with one process each."""
    whole, stopped = ([*FLAGS, "--name", name, "--output_dir", str(tmp_path)] for name in ("whole", "stopped"))
    batch = cluster.start(whole, nodes=2)
    printed, errors = batch.communicate()
    assert batch.returncode == 0, errors
    assert "2 processes on cpu" in printed
    assert cluster.requests() == []

    batch = cluster.start(stopped, nodes=2)
    wait_for_checkpoint(batch, stopped, 16)
    batch.send_signal(signal.SIGTERM)
    printed, errors = batch.communicate(timeout=60)
    assert errors.count("stopped by SIGTERM after step") == 1, errors
    assert batch.returncode != 0
    assert "requeueing job" in printed
    assert cluster.requests() == [f"scancel --signal=TERM {os.getpid()}", f"scontrol requeue {os.getpid()}"]
    assert int(metrics(stopped)[-1]["step"]) < 80

    batch = cluster.start(stopped, nodes=2, restarts=1)
    printed, errors = batch.communicate()
    assert batch.returncode == 0, errors
    assert "resuming at step" in printed
    assert len(cluster.requests()) == 2
    assert_same_bits(*(load_file(run_dir(flags) / "last.safetensors") for flags in (whole, stopped)))
    timings = ("seconds", "images_per_second")
    rows = [[{k: v for k, v in row.items() if k not in timings} for row in metrics(f)] for f in (whole, stopped)]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_a_failed_run_keeps_its_status(cluster):
    batch = cluster.start([*FLAGS, "--name", "run", "--learning_rate", "high"])
    _, errors = batch.communicate()
    assert "high is not a number" in errors
    assert batch.returncode == 1
    assert cluster.requests() == []


@pytest.mark.slow
def test_torchrun_does_not_end_a_slow_checkpoint(cluster, slow_training):
    slow_training.send_signal(signal.SIGTERM)
    time.sleep(3)
    slow_training.send_signal(signal.SIGTERM)  # again, at the limit itself: the training receives only one
    printed, errors = slow_training.communicate(timeout=60)
    assert printed.count("saved") == 1, errors
    assert cluster.requests()[-1] == f"scontrol requeue {os.getpid()}"


@pytest.mark.slow
@pytest.mark.parametrize("state, requeued", [("COMPLETING None", False), ("COMPLETING TimeLimit", True)])
def test_slurm_ends_the_job_itself(state, requeued, cluster, slow_training):
    """Cancelled, or at its time limit: Slurm sends TERM to the batch shell and to the tasks."""
    cluster.set_state(state)
    slow_training.send_signal(signal.SIGTERM)
    os.kill(int((cluster.folder / "tasks").read_text()), signal.SIGTERM)
    printed, errors = slow_training.communicate(timeout=60)
    assert printed.count("saved") == 1, errors
    assert cluster.requests() == [f"scontrol requeue {os.getpid()}"] * requeued


@pytest.mark.slow
def test_a_job_that_is_stopped_while_torchrun_starts_is_requeued(cluster):
    batch = cluster.start([*FLAGS, "--name", "run"])
    wait_until((cluster.folder / "tasks").exists, batch)
    batch.send_signal(signal.SIGTERM)
    batch.communicate(timeout=60)
    assert cluster.requests()[-1] == f"scontrol requeue {os.getpid()}"
