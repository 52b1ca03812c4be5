"""Printing to a pipe without a reader, and to a full disk."""

import os
import subprocess
import sys

import pytest

from helpers import ROOT, metrics, run_dir
from utils.terminal import say, say_on_stderr


@pytest.fixture
def streams(tmp_path, monkeypatch):
    """A function that replaces stdout and stderr by the given descriptors or files, with a buffer as in a script."""
    opened = []

    def replace(**targets):
        for name, target in targets.items():
            opened.append(open(target, "w"))  # noqa: SIM115
            monkeypatch.setattr(sys, name, opened[-1])

    yield replace
    for stream in opened:
        stream.close()  # raises an error if something is left to write to a closed pipe


@pytest.fixture
def pipe():
    """The end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def test_after_stdout_is_closed_lines_go_to_stderr(streams, pipe, tmp_path):
    streams(stdout=pipe, stderr=tmp_path / "errors")
    say("first")
    say("second")
    print("third", flush=True)
    lines = (tmp_path / "errors").read_text().splitlines()
    assert lines == ["warning: stdout is closed, so what follows is printed on stderr", "first", "second", "third"]


def test_without_a_reader_nothing_is_printed(streams, pipe):
    """As in `train.py 2>&1 | head`."""
    streams(stdout=os.dup(pipe), stderr=pipe)
    for _ in range(3):
        say("line")
        say_on_stderr("line")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_lines_for_a_full_disk_go_to_stderr(streams, tmp_path):
    sys_stdout = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    log = os.dup(sys_stdout)
    streams(stdout=sys_stdout, stderr=tmp_path / "errors")
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, sys_stdout)
    os.close(full)
    say("first")
    assert (tmp_path / "errors").read_text() == "first\n"
    os.dup2(log, sys_stdout)
    say("second")
    assert (tmp_path / "errors").read_text() == "first\n"
    assert (tmp_path / "log").read_text() == "first\nsecond\n"  # the stream's buffer had kept the first one
    os.close(log)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="pipes")
@pytest.mark.parametrize("redirected", [False, True])
def test_a_run_whose_output_nobody_reads_is_complete(redirected, tiny_flags):
    """`train.py | head -0`, and `train.py 2>&1 | head -0`."""
    flags = tiny_flags()
    reading, writing = os.pipe()
    os.close(reading)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "train.py", *flags],
        cwd=ROOT,
        env=environment,
        stdout=writing,
        stderr=subprocess.STDOUT if redirected else subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writing)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in metrics(flags)] == ["6", "12"]
    assert (run_dir(flags) / "curves.png").exists()
    if not redirected:
        assert done.stderr.startswith("warning: stdout is closed, so what follows is printed on stderr\n")
        assert "step 12/12" in done.stderr
        assert "best.safetensors" in done.stderr
