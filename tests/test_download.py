"""Downloads from a local server: interrupted, changed, damaged, and by several processes at once."""

import base64
import functools
import hashlib
import http.server
import io
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import utils.pretrained
from helpers import ROOT, run_processes
from utils import checks
from utils.errors import UserError
from utils.pretrained import download

CODE = "import sys; from utils.download import download_npz; download_npz(*sys.argv[1:])"


def npz(seed, size=40000):
    """The content of an .npz file."""
    file = io.BytesIO()
    np.savez(file, array=np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8))
    return file.getvalue()


CONTENT = npz(seed=1)


def google_hashes(content):
    """The values of Google's header x-goog-hash."""
    return ["crc32c=AAAAAA==", f"md5={base64.b64encode(hashlib.md5(content).digest()).decode()}"]


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content` as Google does, with `hashes` and `etag` if they are not None.

    Ends the connection once after `break_after` bytes; waits after half of the content for the event `gate`; answers
    Range if `ranges`.
    """

    def __init__(self, *arguments, state, **keywords):
        self.state = state
        super().__init__(*arguments, **keywords)

    def do_GET(self):
        content, start = self.state["content"], 0
        wanted = self.headers.get("Range")
        self.state["requests"].append(wanted)
        if content is None:
            self.send_error(404)
            return
        if wanted and self.state["ranges"]:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        if self.state["etag"]:
            self.send_header("ETag", f'"{hashlib.md5(content).hexdigest()}"')
        for value in self.state["hashes"]:
            self.send_header("x-goog-hash", value)
        self.end_headers()
        end = self.state.pop("break_after", len(content))
        middle = len(content) // 2
        self.wfile.write(content[start : min(middle, end)])
        self.state["gate"].wait(20)
        self.wfile.write(content[max(middle, start) : end])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(content=CONTENT, **options):
        gate = threading.Event()
        gate.set()
        state = {
            "content": content,
            "ranges": True,
            "requests": [],
            "etag": True,
            "hashes": [],
            "gate": gate,
            **options,
        }
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, state=state))
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/ViT-B_16.npz", state

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def target(tmp_path):
    return tmp_path / "checkpoint" / "ViT-B_16.npz"


def files(target):
    return sorted(path.name for path in target.parent.iterdir())


@pytest.mark.parametrize("hashes", [[], google_hashes(CONTENT), [",".join(google_hashes(CONTENT))]])
def test_a_download_gives_the_file_and_nothing_else(hashes, serve, target, capsys):
    url, _ = serve(hashes=hashes)
    download(target, url)
    assert target.read_bytes() == CONTENT
    assert files(target) == ["ViT-B_16.npz"]
    printed = capsys.readouterr()
    assert f"downloading {url} to {target}\n" in printed.err
    assert printed.out == ""  # where a script may print its report in JSON


def interrupt(url, target, state):
    """Leave the first 10,000 bytes of the file."""
    state["break_after"] = 10000
    with pytest.raises(UserError, match=f"broke after 10000 of {len(state['content'])} bytes"):
        download(target, url)
    assert not target.exists()


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_continues_or_starts_again(ranges, serve, target):
    url, state = serve(ranges=ranges)
    interrupt(url, target, state)
    download(target, url)
    assert target.read_bytes() == CONTENT
    assert state["requests"] == [None, "bytes=10000-"]
    assert files(target) == ["ViT-B_16.npz"]


def test_a_file_that_changed_since_the_interruption_is_not_spliced(serve, target):
    url, state = serve()
    interrupt(url, target, state)
    state["content"] = npz(seed=2)
    download(target, url)
    assert target.read_bytes() == state["content"]
    assert state["requests"] == [None, "bytes=10000-", None]


@pytest.mark.parametrize("etag", [True, False])
def test_bytes_of_an_unknown_version_are_not_continued(etag, serve, target):
    url, state = serve(etag=etag)
    if etag:
        target.parent.mkdir()
        target.with_suffix(".npz.part").write_bytes(bytes(10000))
    else:
        interrupt(url, target, state)
    download(target, url)
    assert target.read_bytes() == CONTENT
    assert set(state["requests"]) == {None}


def test_a_partial_file_that_is_too_long_is_downloaded_again(serve, target):
    url, state = serve()
    interrupt(url, target, state)
    target.with_suffix(".npz.part").write_bytes(bytes(len(CONTENT) + 5))
    download(target, url)
    assert target.read_bytes() == CONTENT


def test_a_complete_file_that_was_not_renamed_is_not_requested_again(serve, target):
    url, state = serve()
    interrupt(url, target, state)
    target.with_suffix(".npz.part").write_bytes(CONTENT)
    download(target, url)
    assert target.read_bytes() == CONTENT
    assert state["requests"] == [None]


def test_an_interrupted_download_is_compared_with_the_checksum_too(serve, target):
    """Its first bytes were damaged on the disk."""
    url, state = serve(hashes=google_hashes(CONTENT))
    interrupt(url, target, state)
    part = target.with_suffix(".npz.part")
    part.write_bytes(bytes(100) + part.read_bytes()[100:])
    with pytest.raises(UserError, match=f"the server announces {hashlib.md5(CONTENT).hexdigest()}; nothing is kept"):
        download(target, url)
    assert files(target) == []
    download(target, url)
    assert target.read_bytes() == CONTENT


def test_a_file_with_another_checksum_is_deleted(serve, target):
    url, _ = serve(hashes=google_hashes(npz(seed=2)))
    with pytest.raises(UserError, match=f"arrived damaged: its MD5 is {hashlib.md5(CONTENT).hexdigest()}, the server"):
        download(target, url)
    assert files(target) == []


def test_a_download_that_is_not_an_npz_is_deleted(serve, target):
    url, _ = serve(b"<html>not here</html>")
    with pytest.raises(UserError, match="did not send an .npz"):
        download(target, url)
    assert files(target) == []


def test_an_unreachable_server_is_an_error(target):
    with pytest.raises(UserError, match="could not be downloaded"):
        download(target, "http://127.0.0.1:9/ViT-B_16.npz")


def test_a_file_that_the_server_lacks_is_an_error(serve, target):
    url, _ = serve(None)
    with pytest.raises(UserError, match=f"{url} does not exist; check the names"):
        download(target, url)


# Several processes


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_two_runs_that_download_the_same_file_at_once_download_it_once(serve, target):
    url, state = serve()
    state["gate"].clear()
    command = [sys.executable, "-c", CODE, url, str(target)]
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: state["requests"])
    second = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    waiting = second.stderr.readline()
    assert waiting.startswith(f"{target} is being downloaded by process {first.pid} on ")
    assert waiting.endswith("; waiting\n")
    state["gate"].set()
    assert [process.communicate(timeout=20)[0] for process in (first, second)] == [None, None]
    assert (first.returncode, second.returncode) == (0, 0)
    assert target.read_bytes() == CONTENT
    assert state["requests"] == [None]
    assert files(target) == ["ViT-B_16.npz"]


def test_a_run_that_waits_continues_the_download_of_one_that_was_killed(serve, target):
    url, state = serve()
    state["gate"].clear()
    first = subprocess.Popen([sys.executable, "-c", CODE, url, str(target)], cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_until(lambda: target.with_suffix(".npz.part").exists())
    second = threading.Thread(target=download, args=(target, url))
    second.start()
    first.kill()
    first.wait()
    state["gate"].set()
    second.join(20)
    assert target.read_bytes() == CONTENT


@pytest.mark.skipif(sys.platform != "linux", reason="forks processes that compute")
def test_a_download_that_breaks_is_not_repeated_by_the_other_processes(serve, target, tiny_flags, monkeypatch):
    url, state = serve(break_after=10000)
    for module in (utils.pretrained, checks):
        monkeypatch.setattr(module, "published_url", lambda path: url)
    (status, printed), others = run_processes(2, tiny_flags("--pretrained_dir", target, "--download"))
    assert status == 2
    assert f"train.py: error: {url} could not be downloaded: the connection broke after 10000 of" in printed
    assert others == (1, "")
    assert state["requests"] == [None]
    assert target.with_suffix(".npz.part").read_bytes() == CONTENT[:10000]
