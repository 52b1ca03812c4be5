"""Locks between processes: who holds one, what releases it, and file systems without locks."""

import contextlib
import errno
import os
import re
import signal
import socket
import subprocess
import sys
import threading

import pytest

from utils import locks
from utils.locks import LockedError, exclusive_lock, holder_of

HOLD = """
import sys
from utils.locks import exclusive_lock
with exclusive_lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""
FORK = """
import os, sys, time
from utils.locks import exclusive_lock
with exclusive_lock(sys.argv[1]):
    if os.fork() == 0:  # a reading worker that outlives its training process
        os.close(0)
        time.sleep(60)
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def held_elsewhere(path, code=HOLD):
    """Another process that holds the lock inside, in a process group of its own."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
    )
    try:
        assert process.stdout.readline() == b"held\n"
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdin.close()
        process.stdout.close()


@pytest.fixture
def path(tmp_path):
    return tmp_path / ".lock"


def test_a_second_process_learns_who_holds_the_lock(path):
    with held_elsewhere(path) as process:
        with pytest.raises(LockedError) as error, exclusive_lock(path):
            pass
        who = rf"process {process.pid} on {re.escape(socket.gethostname())} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
        assert re.fullmatch(who, error.value.holder)
        assert error.value.holder in str(error.value)
        assert holder_of(path) == error.value.holder


@pytest.mark.parametrize("code", [HOLD, FORK], ids=["alone", "with a forked child"])
def test_a_killed_holder_releases_the_lock(code, path):
    with held_elsewhere(path, code) as process:
        process.kill()
        process.wait()
        assert holder_of(path) is None
        with exclusive_lock(path):
            assert path.read_text().startswith(f"process {os.getpid()} ")


def test_a_forked_child_does_not_hold_the_lock(path):
    with exclusive_lock(path):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                with exclusive_lock(path):
                    pass
            except LockedError:
                status = 0 if holder_of(path).startswith(f"process {os.getppid()} ") else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert in_another_process(path) == "locked"


def in_another_process(path):
    """What another process finds: "free" or "locked"."""
    code = "import sys; from utils.locks import holder_of; print('locked' if holder_of(sys.argv[1]) else 'free')"
    with_utils = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return subprocess.run(
        [sys.executable, "-c", code, path], cwd=with_utils, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_the_same_process_neither_takes_nor_releases_its_own_lock(path):
    assert holder_of(path) is None
    with exclusive_lock(path):
        with pytest.raises(LockedError, match=f"locked by process {os.getpid()} "), exclusive_lock(path):
            pass
        assert holder_of(path) is None
        assert in_another_process(path) == "locked"
    assert in_another_process(path) == "free"


def test_waiting_ends_when_the_lock_is_released(path):
    with held_elsewhere(path) as process:
        timer = threading.Timer(0.5, process.stdin.close)
        timer.start()
        with exclusive_lock(path, wait=True):
            assert not timer.is_alive()
            assert process.wait(5) == 0


def test_a_lock_file_that_its_holder_deletes_does_not_admit_two(path, monkeypatch):
    real, deleted = locks.lock, []

    def delete_first(file, *arguments, **keywords):
        if not deleted:
            deleted.append(path.unlink())  # between the opening of the file and its lock
        return real(file, *arguments, **keywords)

    monkeypatch.setattr(locks, "lock", delete_first)
    with exclusive_lock(path):
        assert deleted
        assert in_another_process(path) == "locked"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks_gives_a_warning(number, path, monkeypatch, capsys):
    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "lockf", refuse)
    with exclusive_lock(path):
        pass
    warning = capsys.readouterr().err
    assert warning == f"warning: {path} can't be locked ({os.strerror(number)}); " + (
        "make sure that no other process uses its folder\n"
    )


def test_an_error_inside_releases_the_lock_and_keeps_the_file(path):
    with pytest.raises(ZeroDivisionError), exclusive_lock(path):
        raise ZeroDivisionError
    assert in_another_process(path) == "free"
    assert path.exists()
