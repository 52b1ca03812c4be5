"""Errors that a user can fix are one line on stderr, not a traceback."""

import os
import signal
import sys

import torch

from utils.terminal import say_on_stderr

LESS_MEMORY = (
    "less is needed with a smaller --img_size, in training with more --gradient_accumulation_steps, in evaluation with "
    "a smaller --eval_batch_size"
)

DIVERGED = 3  # exit status of a run whose loss or weights are not finite


class UserError(Exception):
    """Wrong flags, files or data. The message names the cause and how to fix it. Exit status 2."""

    only_this_process = False  # whether the other processes of the run may not have met the error


class RunStoppedError(Exception):
    """A run that ended early and keeps its checkpoint. The message says how to continue."""

    def __init__(self, message, status):
        super().__init__(message)
        self.status = status


def run_script(main):
    """Call `main()` and exit with the status of its outcome."""
    # Python starts with SIGINT ignored in background jobs; Ctrl-C forwarded by a launcher must still arrive.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except UserError as error:
        leave(f"error: {error}", 2, first_process_only=not error.only_this_process)
    except RunStoppedError as stop:
        leave(str(stop), stop.status)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "MPS backend out of memory" not in str(error):
            raise
        what = ". ".join(str(error).split(". ")[:2])  # how much of which device; advice for programmers follows
        leave(f"error: {what or 'out of memory'}; {LESS_MEMORY}", 2, first_process_only=False)
    except KeyboardInterrupt:
        leave("interrupted", 130)


def leave(message, status, first_process_only=True):
    """Print the message and exit; if all processes of a run fail alike, only the first one prints."""
    rank = int(os.environ.get("RANK", 0))
    if rank == 0 or not first_process_only:
        process = f"process {rank}: " if rank else ""
        say_on_stderr(f"{os.path.basename(sys.argv[0])}: {process}{message}")
    sys.exit(status)
