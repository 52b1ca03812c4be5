"""What image decoders print to stderr about a damaged file. It names no file; a file that is unreadable is an error."""

import contextlib
import functools
import os
import re
import sys
import threading
import warnings

# Of libjpeg and libtiff.
MESSAGE = re.compile(
    rb"Corrupt JPEG data|Premature end of JPEG|Inconsistent progression|Invalid SOS parameters|Unknown Adobe color"
    rb"|Warning: unknown JFIF|(_?TIFF\w*|\w+Decode\w*|JPEGLib|MissingRequired|tempfile\.tif): "
)


@contextlib.contextmanager
def decoder_messages_discarded():
    """Discard the messages of decoders in C. What signal handlers and other threads print meanwhile is passed on."""
    main_thread = threading.current_thread() is threading.main_thread()  # two threads would mix up their redirections
    if sys.stderr is None or not main_thread or not hasattr(os, "memfd_create"):  # only Linux has it
        yield
        return
    stderr, printed = os.dup(2), memory_file(os.getpid())
    try:
        os.dup2(printed, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        if size := os.lseek(printed, 0, os.SEEK_CUR):
            os.lseek(printed, 0, os.SEEK_SET)
            lines = os.read(printed, size).splitlines(keepends=True)
            os.lseek(printed, 0, os.SEEK_SET)
            os.write(2, b"".join(line for line in lines if not MESSAGE.match(line)))
        os.close(stderr)


@functools.cache
def memory_file(process):
    """The descriptor of a file in memory; each process has its own, because a forked one would share the position."""
    return os.memfd_create("stderr")


def ignore_warnings_of_pillow():
    """Ignore Pillow's warnings, such as those about damaged EXIF data, but not that an image is suspiciously large."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
