"""What a user can put right is one line on stderr, not a traceback."""

import os
import signal
import sys


class UserError(Exception):
    """Wrong flags, files or data; the message names the thing and the way out. Exit status 2."""


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
        leave(f"error: {error}", 2)
    except RunStoppedError as stop:
        leave(str(stop), stop.status)
    except KeyboardInterrupt:
        leave("interrupted; nothing was saved since the last checkpoint", 130)


def leave(message, status):
    """Every process of a run fails alike; the first one says why."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
    sys.exit(status)
