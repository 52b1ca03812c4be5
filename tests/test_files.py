"""Writing a file so that it is whole or not there."""

import errno
import os
import stat

import pytest

from utils.records.files import replace_file


def test_a_file_is_replaced_at_once_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("ne")
        raise OSError

    with pytest.raises(OSError):
        replace_file(path, fail)
    assert path.read_text() == "old"
    replace_file(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    if os.name == "posix":
        os.umask(umask := os.umask(0))
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_a_file_system_that_can_not_sync_folders_is_tolerated(tmp_path, monkeypatch):
    """As some network and FUSE file systems; any other error is one."""
    real = os.fsync

    def fail_for_folders(number):
        def fsync(file):
            if stat.S_ISDIR(os.fstat(file).st_mode):
                raise OSError(number, os.strerror(number))
            real(file)

        return fsync

    monkeypatch.setattr(os, "fsync", fail_for_folders(errno.EINVAL))
    replace_file(tmp_path / "file", lambda path: path.write_text("new"))
    assert (tmp_path / "file").read_text() == "new"
    monkeypatch.setattr(os, "fsync", fail_for_folders(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        replace_file(tmp_path / "file", lambda path: path.write_text("newer"))
