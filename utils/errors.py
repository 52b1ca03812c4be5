"""What a user can put right is one line on stderr, not a traceback."""

import os
import signal
import sys


class UserError(Exception):
    """Wrong flags, files or data; the message names the thing and the way out. Exit status 2."""

    met_at_work = False  # by one process perhaps, not by all of them in their checks of the same flags


class RunStoppedError(Exception):
    """A run that ended early, with its checkpoint kept; the message says where it stands."""

    def __init__(self, message, status):
        super().__init__(message)
        self.status = status


def run_script(main):
    """Call `main()` and leave with the exit status that fits its end."""
    # Python starts with SIGINT ignored in background jobs; Ctrl-C forwarded by a launcher must still arrive.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except UserError as error:
        leave(f"error: {error}", 2, one_is_enough=not error.met_at_work)
    except RunStoppedError as stop:
        leave(str(stop), stop.status)
    except KeyboardInterrupt:
        leave("interrupted", 130)


def leave(message, status, one_is_enough=True):
    """Where all processes of a run fail alike, only the first one says why."""
    rank = int(os.environ.get("RANK", 0))
    if rank == 0 or not one_is_enough:
        process = f"process {rank}: " if rank else ""
        print(f"{os.path.basename(sys.argv[0])}: {process}{message}", file=sys.stderr)
    sys.exit(status)
