"""A lock between processes, on one machine or on several that share a file system that supports it."""

import contextlib
import errno
import math
import os
import socket
import sys
import threading
import time
from datetime import datetime

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

POLL = 0.05  # seconds between two attempts
PATIENCE = 0.2  # seconds until a lock counts as held, since holder_of may hold it for an instant
FAR = 2**30  # the byte that Windows locks; it hides locked bytes from readers, and the holder's line must stay readable

GUARD = threading.Lock()
HELD = {}  # the lock files that this process holds: {real path: (pid, holder's line)}


class LockedError(Exception):
    """Another process, or another part of this one, holds the lock. `holder` is its line, or "" if it is unreadable."""

    def __init__(self, path, holder):
        super().__init__(f"{path} is locked by {holder or 'another process'}")
        self.holder = holder


@contextlib.contextmanager
def exclusive_lock(path, wait=False):
    """Hold the lock on the file `path` inside; the file is created and contains one line about its holder.

    The operating system releases the lock when the process ends, in whatever way. The file stays; only the holder may
    delete it. While the lock is held, this process must not open and close the file elsewhere: that would release it.
    Raises LockedError if the lock is held, or waits for it without a time limit. On a file system without locks it
    prints a warning and continues. Raises OSError if the file can't be opened.
    """
    key = os.path.realpath(path)
    holder = f"process {os.getpid()} on {socket.gethostname()} since {datetime.now().isoformat(' ', 'seconds')}"
    deadline = math.inf if wait else time.perf_counter() + PATIENCE
    while (file := attempt(path, key, holder)) is None:
        if time.perf_counter() > deadline:
            raise LockedError(path, line_of(path, key))
        time.sleep(POLL)
    try:
        with contextlib.suppress(OSError):  # a full disk: the line only informs others
            file.truncate(0)
            file.write(f"{holder}\n".encode())
        yield
    finally:
        with GUARD:
            del HELD[key]
            file.close()


def holder_of(path):
    """The line of the other process that holds the lock on `path` now; None if there is none."""
    key = os.path.realpath(path)
    with GUARD:
        if held_here(key):
            return None
        try:
            with open(path, "rb") as file:
                return None if lock(file, path, shared=True) else read_line(file)
        except FileNotFoundError:
            return None


def attempt(path, key, holder):
    """The open lock file if this process now holds the lock, else None."""
    with GUARD:
        if held_here(key):
            return None
        file = open(path, "ab+", buffering=0)  # noqa: SIM115
        try:
            if lock(file, path) and is_at(path, file):
                HELD[key] = (os.getpid(), holder)
                return file
        except BaseException:
            file.close()
            raise
        file.close()
        return None


def held_here(key):
    """Whether this process holds the lock; a forked process inherits HELD, but not the locks."""
    return HELD.get(key, (None,))[0] == os.getpid()


def is_at(path, file):
    """Whether the open file is still the one at `path`; its last holder may have deleted it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def line_of(path, key):
    """The holder's line in the lock file, or "" if it can't be read."""
    with GUARD:
        if held_here(key):
            return HELD[key][1]
        try:
            with open(path, "rb") as file:
                return read_line(file)
        except OSError:
            return ""


def read_line(file):
    """The first line of the open file, as text."""
    file.seek(0)
    return file.readline(1000).decode(errors="replace").strip()


def lock(file, path, shared=False):
    """Lock the open file; whether that succeeded. True, with a warning, on a file system without locks."""
    try:
        if sys.platform == "win32":
            file.seek(FAR)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            # A record lock belongs to one process. flock's lock would live on in forked workers after a crash.
            fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        print(
            f"warning: {path} can't be locked ({error.strerror}); make sure that no other process uses its folder",
            file=sys.stderr,
        )
    return True
