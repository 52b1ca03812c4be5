"""Downloading a published .npz file: resumed, compared with what the server announces, by one process at a time."""

import base64
import contextlib
import hashlib
import http.client
import json
import os
import re
import sys
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from utils.errors import UserError
from utils.locks import LockedError, exclusive_lock

CHUNK = 2**20  # bytes
TIMEOUT = 60  # seconds without an answer


class Version(NamedTuple):
    """What the server announces about the file: its ETag, size in bytes and MD5 in hexadecimal; None if it does not."""

    etag: str | None = None
    size: int | None = None
    md5: str | None = None


def download_npz(url, path):
    """Download the .npz file at `url` to `path`, unless another process has done so meanwhile.

    The bytes go to `<path>.part`, which is renamed once it is complete, so an interrupted download is continued. Raises
    UserError, also if size or MD5 are not those that the server announces.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with only_process(path):
            if path.exists():
                return
            print(f"downloading {url} to {path}", file=sys.stderr)
            check(url, part, fetch(url, part))
            os.replace(part, path)
            discard(part)
    except urllib.error.HTTPError as error:
        if error.code == 404:
            raise UserError(f"{url} does not exist; check the names of the file and of its folder") from error
        raise failure(url, error) from error
    except (OSError, http.client.HTTPException) as error:
        raise failure(url, error) from error


def failure(url, error):
    """The UserError for a download that the same command can continue."""
    return UserError(f"{url} could not be downloaded: {error}; the same command continues where it stopped")


@contextlib.contextmanager
def only_process(path):
    """Inside, no other process downloads to `path`, on this or another machine; waits for one without a time limit."""
    lock = path.with_name(path.name + ".lock")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(exclusive_lock(lock))
        except LockedError as error:
            print(f"{path} is being downloaded by {error.holder or 'another process'}; waiting", file=sys.stderr)
            stack.enter_context(exclusive_lock(lock, wait=True))
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows does not delete an open file
                lock.unlink()


def fetch(url, part):
    """Append the missing bytes of `url` to the file `part`; returns the Version of the file.

    Starts again if the file has changed since, or if the server can't continue.
    """
    known = read_version(part)
    have = part.stat().st_size if known.etag and part.exists() else 0
    if have and have == known.size:
        return known
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:  # 416: the part is longer than the file
            raise
        discard(part)
        return fetch(url, part)
    with response:
        start, version = announced(response)
        continues = response.status == 206
        if continues and (start != have or version.etag != known.etag):
            discard(part)
            return fetch(url, part)
        with open(part, "ab" if continues else "wb") as file:
            if continues:
                version = known
            else:
                have = 0
                version_file(part).write_text(json.dumps(version._asdict()))
            bar = tqdm(total=version.size, initial=have, unit="B", unit_scale=True, unit_divisor=1024, desc=part.stem)
            with bar:
                while chunk := response.read(CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
    size = part.stat().st_size
    if version.size is not None and size != version.size:
        raise OSError(f"the connection broke after {size} of {version.size} bytes")
    return version


def announced(response):
    """(the first byte that the response contains, the Version of the whole file), from its headers."""
    headers = response.headers
    etag = headers["ETag"]
    if etag and etag.startswith("W/"):  # a weak ETag may belong to files with different bytes
        etag = None
    found = re.match(r"bytes (\d+)-\d+/(\d+|\*)", headers["Content-Range"] or "")
    start, size = found.groups() if found else (0, headers["Content-Length"])
    size = int(size) if size and size != "*" else None
    # x-goog-hash: crc32c=<base64>,md5=<base64>; possibly one header for each.
    hashes = ",".join(headers.get_all("x-goog-hash", [])).replace(" ", "").split(",")
    md5 = next((base64.b64decode(each[len("md5=") :]).hex() for each in hashes if each.startswith("md5=")), None)
    return int(start), Version(etag, size, md5)


def check(url, part, version):
    """Raises UserError, and deletes the file `part`, if it is not the announced .npz file."""
    fault = None
    if version.md5:
        with open(part, "rb") as file:
            md5 = hashlib.file_digest(file, "md5").hexdigest()
        if md5 != version.md5:
            fault = f"arrived damaged: its MD5 is {md5}, the server announces {version.md5}"
    if not fault and not zipfile.is_zipfile(part):
        fault = "did not send an .npz file"
    if fault:
        discard(part)
        raise UserError(f"{url} {fault}; nothing is kept")


def version_file(part):
    """Where the Version is kept that the bytes of `part` belong to."""
    return part.with_name(part.name + ".json")


def read_version(part):
    """The Version that the bytes of `part` belong to; an empty one if that is unknown."""
    try:
        return Version(**json.loads(version_file(part).read_text()))
    except (OSError, ValueError, TypeError):
        return Version()


def discard(part):
    """Delete what is downloaded so far."""
    part.unlink(missing_ok=True)
    version_file(part).unlink(missing_ok=True)
