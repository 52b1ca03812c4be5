"""Google's files: their addresses, the download from a local server, and errors for damaged or wrong files."""

import functools
import http.server
import threading

import numpy as np
import pytest

from models import MODEL_TYPES, build_model
from synthetic import make_checkpoint
from utils.errors import UserError
from utils.pretrained import check_exists, download, load_pretrained, model_type_of, open_npz, published_url

STORAGE = "https://storage.googleapis.com"
AUGREG = "B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0.npz"


@pytest.mark.parametrize(
    "path, url",
    [
        ("checkpoint/ViT-B_16.npz", "vit_models/imagenet21k/ViT-B_16.npz"),
        ("checkpoint/ViT-H_14.npz", "vit_models/imagenet21k/ViT-H_14.npz"),
        ("R50+ViT-B_16.npz", "vit_models/imagenet21k/R50+ViT-B_16.npz"),
        ("R50-ViT-B_16.npz", "vit_models/imagenet21k/R50+ViT-B_16.npz"),
        ("checkpoint/ViT-L_16-224.npz", "vit_models/imagenet21k+imagenet2012/ViT-L_16-224.npz"),
        ("checkpoint/imagenet21k+imagenet2012/ViT-B_16.npz", "vit_models/imagenet21k+imagenet2012/ViT-B_16.npz"),
        (f"checkpoint/{AUGREG}", f"vit_models/augreg/{AUGREG}"),
        ("checkpoint/R_Ti_16-i1k-300ep.npz", "vit_models/augreg/R_Ti_16-i1k-300ep.npz"),
        ("checkpoint/BiT-M-R50x3.npz", "bit_models/BiT-M-R50x3.npz"),
    ],
)
def test_each_published_file_has_its_address(path, url):
    assert published_url(path) == f"{STORAGE}/{url}"


def test_an_unpublished_name_has_no_address():
    assert published_url("checkpoint/mine.npz") is None
    assert published_url("checkpoint/ViT-B_17.npz") is None


@pytest.mark.parametrize(
    "path, model_type",
    [
        ("ViT-B_16.npz", "ViT-B_16"),
        ("ViT-B_16-224.npz", "ViT-B_16"),
        ("R50+ViT-B_16.npz", "R50-ViT-B_16"),
        ("ViT-Mini_4.npz", "ViT-Mini_4"),
        ("R-ViT-Ti_16.npz", "R-ViT-Ti_16"),
        ("ViT-S_8.npz", None),
        ("mine.npz", None),
        (AUGREG, "ViT-B_16"),
        ("R_Ti_16-i21k-300ep.npz", "R-ViT-Ti_16"),
        ("R26_S_32-i21k-300ep.npz", "R26-ViT-S_32"),
        ("R50_L_32-i1k.npz", "R50-ViT-L_32"),
    ],
)
def test_the_name_of_a_file_gives_the_model_type(path, model_type):
    assert model_type_of(path, MODEL_TYPES) == model_type


def test_the_error_for_a_missing_file_has_its_download_command():
    with pytest.raises(UserError) as error:
        check_exists("checkpoint/ViT-B_16.npz")
    message = str(error.value)
    assert "does not exist" in message
    assert "--download" in message
    assert f"curl --create-dirs -o 'checkpoint/ViT-B_16.npz' '{STORAGE}/vit_models/imagenet21k/ViT-B_16.npz'" in message
    with pytest.raises(UserError, match="publishes no file of that name"):
        check_exists("checkpoint/mine.npz")


def test_position_embeddings_in_float16_are_resized():
    arrays = {key: array.astype(np.float16) for key, array in tiny_vit().export_npz().items()}
    model = build_model("ViT-Ti_16", 96, num_layers=1, hidden_size=32, mlp_dim=32, num_heads=2)
    model.load_from(arrays, head="keep")
    assert model.pos_embed.shape == (1, 37, 32)


def tiny_vit():
    return build_model("ViT-Ti_16", num_layers=1, hidden_size=32, mlp_dim=32, num_heads=2)


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "ViT-Ti_16.npz"
    arrays = make_checkpoint({key: array.shape for key, array in tiny_vit().export_npz().items()})
    np.savez(path, **arrays)
    return path


def test_a_valid_file_loads(weights):
    model = tiny_vit()
    load_pretrained(model, weights, "ViT-Ti_16")
    assert np.array_equal(model.cls_token.detach().numpy(), np.load(weights)["cls"])


def damage(weights, fault):
    content = weights.read_bytes()
    if fault == "truncated":
        weights.write_bytes(content[: len(content) // 2])
        return "truncated or damaged"
    if fault == "empty":
        weights.write_bytes(b"")
        return "not an .npz"
    if fault == "web page":
        weights.write_text("\n<!DOCTYPE html><html><body>Sign in</body></html>")
        return "is a web page saved as .npz"
    if fault == "flipped bytes":
        middle = content.index(b"Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel") + 5000
        weights.write_bytes(content[:middle] + bytes(64) + content[middle + 64 :])
        return "is damaged at Transformer/encoderblock_0/MlpBlock_3/Dense_[01]/kernel"
    if fault == "pickle":
        np.savez(weights, **{**np.load(weights), "cls": np.array([{"a": 1}], dtype=object)})
        return "Python objects at cls, which are never loaded"
    np.savez(weights, **{**np.load(weights), "Transformer/encoderblock_0/LayerNorm_0/bias": np.zeros(64, np.float32)})
    return r"does not fit ViT-Ti_16: .*LayerNorm_0/bias has shape \(64,\), expected \(32,\)"


@pytest.mark.parametrize("fault", ["truncated", "empty", "web page", "flipped bytes", "pickle", "other architecture"])
def test_a_damaged_or_wrong_file_is_an_error_in_one_line(fault, weights):
    message = damage(weights, fault)
    with pytest.raises(UserError, match=message) as error:
        load_pretrained(tiny_vit(), weights, "ViT-Ti_16")
    assert "\n" not in str(error.value)
    assert str(weights) in str(error.value)


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content`; ends the connection once after `break_after` bytes; answers Range if `ranges`."""

    def __init__(self, *arguments, state, **keywords):
        self.state = state
        super().__init__(*arguments, **keywords)

    def do_GET(self):
        content, start = self.state["content"], 0
        wanted = self.headers.get("Range")
        self.state["requests"].append(wanted)
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
        self.end_headers()
        end = self.state.pop("break_after", len(content))
        self.wfile.write(content[start:end])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(content, **options):
        state = {"content": content, "ranges": True, "requests": [], **options}
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, state=state))
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/ViT-B_16.npz", state

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_download_gives_the_file_and_nothing_else(serve, weights, tmp_path):
    url, _ = serve(weights.read_bytes())
    target = tmp_path / "new" / "ViT-B_16.npz"
    download(target, url)
    assert target.read_bytes() == weights.read_bytes()
    assert [path.name for path in target.parent.iterdir()] == ["ViT-B_16.npz"]


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_continues_or_starts_again(ranges, serve, weights, tmp_path):
    content = weights.read_bytes()
    url, state = serve(content, ranges=ranges, break_after=10000)
    target = tmp_path / "ViT-B_16.npz"
    with pytest.raises(UserError, match=f"broke after 10000 of {len(content)} bytes"):
        download(target, url)
    assert not target.exists()
    download(target, url)
    assert target.read_bytes() == content
    assert state["requests"] == [None, "bytes=10000-"]


def test_a_partial_file_that_is_too_long_is_downloaded_again(serve, weights, tmp_path):
    url, _ = serve(weights.read_bytes())
    (tmp_path / "ViT-B_16.npz.part").write_bytes(bytes(len(weights.read_bytes()) + 5))
    download(tmp_path / "ViT-B_16.npz", url)
    assert (tmp_path / "ViT-B_16.npz").read_bytes() == weights.read_bytes()


def test_a_download_that_is_not_an_npz_is_deleted(serve, tmp_path):
    url, _ = serve(b"<html>not here</html>")
    with pytest.raises(UserError, match="did not send an .npz"):
        download(tmp_path / "ViT-B_16.npz", url)
    assert list(tmp_path.iterdir()) == []


def test_an_unreachable_server_is_an_error(tmp_path):
    with pytest.raises(UserError, match="could not be downloaded"):
        download(tmp_path / "ViT-B_16.npz", "http://127.0.0.1:9/ViT-B_16.npz")


def test_an_open_npz_is_a_mapping(weights):
    arrays = open_npz(weights)
    assert set(arrays) == set(np.load(weights).files)
    assert len(arrays) == len(np.load(weights).files)
    assert "cls" in arrays
