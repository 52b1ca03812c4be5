"""Printing while a run trains: a closed pipe or terminal, or a full disk behind it, does not end the run."""

import contextlib
import errno
import os
import sys

from tqdm import tqdm

CLOSED = (errno.EPIPE, errno.EIO)  # a pipe without a reader, a terminal that is gone: unlike a full disk, permanent


def say(message):
    """Print a line on stdout, above the progress bar, or on stderr if stdout can't be written."""
    try:
        print_line(message, sys.stdout)
    except OSError as error:
        if error.errno in CLOSED:  # as in `train.py | head`
            redirect(sys.stdout, sys.stderr)
            message = f"warning: stdout is closed, so what follows is printed on stderr\n{message}"
        say_on_stderr(message)


def say_on_stderr(message):
    """Print a line on stderr, above the progress bar, if stderr can be written."""
    try:
        print_line(message, sys.stderr)
    except OSError as error:
        if error.errno in CLOSED:
            redirect(sys.stderr)


def print_line(message, stream):
    tqdm.write(message, file=stream)
    stream.flush()


def redirect(stream, other=None):
    """Let a closed stream write where `other` does, by default nowhere. What it has not written yet is discarded."""
    with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:  # a notebook's stream has no descriptor
        os.dup2(nowhere.fileno(), stream.fileno())
        stream.flush()
        if other:
            os.dup2(other.fileno(), stream.fileno())
