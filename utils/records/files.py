"""Writing a file so that it is whole or not there, and checksums."""

import errno
import os

import xxhash

NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP}  # from some network and FUSE file systems


def replace_file(path, write):
    """Write a file atomically: `write` fills a temporary file, which is synced to the disk and renamed."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    move_file(temporary, path)


def move_file(temporary, path):
    """Sync a file to the disk and rename it, within a folder or a file system."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    if os.name == "posix":
        os.umask(umask := os.umask(0))
        os.chmod(temporary, 0o666 & ~umask)  # safetensors makes its files readable by their owner only
    os.replace(temporary, path)
    if os.name == "posix":  # the new name is durable once its folder is
        sync_folder(path.parent)


def sync_folder(path):
    """Write a folder's entries to the disk, where its file system can do that."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
    finally:
        os.close(folder)


def file_checksum(path):
    """The XXH3 of a file's bytes."""
    hashed = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(2**24):
            hashed.update(chunk)
    return hashed.hexdigest()


def text_checksum(text):
    """The XXH3 of a text."""
    return xxhash.xxh3_128(text.encode()).hexdigest()
