"""Reading checkpoint files, training and evaluating from them, and names at Hugging Face."""

import http.server
import json
import shutil
import sys
import threading

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import evaluate
import train
import train_resnet
from command_line import model_maker, train_parser
from helpers import ROOT, call_main, fails, random_model, read_config, script, succeed, train_run, write_images
from inference import SavedModel
from utils.checkpoint_files import holds_npz, read_checkpoint
from utils.errors import UserError
from utils.hub import is_hub_name, repository
from utils.recipes import parse_with_recipe


class Object:
    """Something that only unpickling code could restore."""


def timm_vit(path, classes=5, **options):
    """A small ViT of timm with random weights, written to `path`; returns it."""
    torch.manual_seed(4)
    options = {"img_size": 8, "patch_size": 4, "depth": 2, "embed_dim": 64, "num_heads": 4, **options}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=classes, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_file(model.state_dict(), path)
    return model.eval()


def parsed(*flags, model_type=None):
    """The flags of a training script, completed by the checkpoint, and the model that they describe."""
    args, _ = parse_with_recipe(train_parser("", model_type), lambda args: 1, ["--name", "x", *map(str, flags)])
    with torch.device("meta"):
        return args, model_maker(args)(num_classes=3)


def test_what_a_file_is_follows_from_its_bytes(tmp_path):
    tensors = {"a": torch.ones(2)}
    save_file(tensors, tmp_path / "a.npz", metadata={"by": "me"})
    torch.save(tensors, tmp_path / "b.safetensors")
    torch.save(tensors, tmp_path / "c.npz", _use_new_zipfile_serialization=False)
    for name in ("a.npz", "b.safetensors", "c.npz"):
        for shapes_only in (False, True):
            found = read_checkpoint(tmp_path / name, shapes_only).tensors["a"]
            assert (found.shape, found.is_meta) == ((2,), shapes_only)
    assert read_checkpoint(tmp_path / "a.npz").metadata == {"by": "me"}
    arrays = shutil.copy(ROOT / "checkpoint/ViT-Nano_4-digits.npz", tmp_path / "weights.pth")
    assert holds_npz(arrays)
    assert not holds_npz(tmp_path / "b.safetensors")


@pytest.mark.parametrize("name", ["a.npz", "c.npz"])
def test_a_file_of_another_format_with_the_name_of_an_npz_file_is_no_npz_file(name, tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a.npz")
    torch.save({"a": torch.ones(2)}, tmp_path / "c.npz")
    assert not holds_npz(tmp_path / name)


def test_pickles_with_objects_are_refused_with_a_way_out(tmp_path):
    torch.save({"model": {"a": torch.ones(2)}, "object": Object()}, tmp_path / "a.pth")
    with pytest.raises(
        UserError, match=r"never loaded; where it was made, write its weights alone by torch.save\("
    ) as e:
        read_checkpoint(tmp_path / "a.pth")
    assert "\n" not in str(e.value)
    torch.save([1, 2], tmp_path / "b.pth")
    with pytest.raises(UserError, match="does not hold a model's weights, a dictionary of tensors"):
        read_checkpoint(tmp_path / "b.pth")
    (tmp_path / "c.pth").write_bytes((tmp_path / "b.pth").read_bytes()[:300])
    with pytest.raises(UserError, match="c.pth is not a readable"):
        read_checkpoint(tmp_path / "c.pth")
    with pytest.raises(UserError, match="has neither model.safetensors nor pytorch_model.bin"):
        read_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    torch.save({"a": torch.ones(2)}, tmp_path / "d.pth")
    with pytest.raises(UserError, match="config.json is not valid JSON"):
        read_checkpoint(tmp_path / "d.pth")


def test_the_checkpoint_sets_the_flags_that_are_not_given(tmp_path):
    timm_vit(tmp_path / "w.safetensors", patch_size=2, num_heads=4)
    weights = ("--img_size", "8", "--pretrained_dir", tmp_path / "w.safetensors")
    args, model = parsed(*weights, "--model_fields", "num_heads=4")
    assert (args.model_type, args.gelu, args.mean_std) == ("ViT-Nano_4", "exact", "half")
    assert args.model_fields == ["num_layers=2", "patch_size=2", "num_heads=4"]
    assert (model.config.num_heads, model.config.patch_size, model.config.gelu) == (4, 2, "exact")
    args, model = parsed(*weights, "--gelu", "tanh", "--mean_std", "imagenet", "--model_fields", "num_heads=2")
    assert (model.config.gelu, args.mean_std, model.config.num_heads) == ("tanh", "imagenet", 2)
    args, model = parsed(*weights, "--model_type", "Conformer-Mini_4", "--img_size", "32")
    assert (args.model_fields, model.config.gelu, model.config.standardisation) == (None, "exact", "var")
    args, model = parsed("--img_size", "224")
    assert (args.model_fields, args.gelu, model.config.gelu, args.model_type) == (None, None, "tanh", "ViT-B_16")


def test_numeric_fields_of_a_bit_reach_the_cnn_that_is_cut_from_it(tmp_path, monkeypatch, capsys):
    theirs = timm.create_model("resnetv2_50x1_bit", num_classes=3)
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    args, model = parsed("--pretrained_dir", tmp_path / "w.safetensors", model_type="ResNet50x3_Params")
    assert (args.model_type, args.model_fields) == ("ResNet50x3_Params", ["standardisation_eps=1e-08"])
    assert model.stages[0].blocks[0].conv1.eps == 1e-8
    timm_vit(tmp_path / "vit.safetensors")
    message = fails(
        train_resnet,
        [
            "--name",
            "x",
            "--dataset",
            "digits",
            "--output_dir",
            tmp_path,
            "--pretrained_dir",
            tmp_path / "vit.safetensors",
        ],
        monkeypatch,
        capsys,
    )
    assert "vit.safetensors does not fit ResNet50x3_Params: it holds a ViT" in message


def test_fine_tuning_from_timm_is_recorded_and_evaluated(tmp_path, tiny_flags, monkeypatch, capsys):
    """The model is built again from config.json alone, also when the file is gone."""
    path = tmp_path / "w.safetensors"
    theirs = timm_vit(path)
    flags = [text for text in tiny_flags("--output_dir", tmp_path, "--pretrained_dir", path) if text != "--model_type"]
    flags = [text for text in flags if text != "ViT-Mini_4"] + [
        "--model_fields",
        "num_heads=4",
        "--learning_rate",
        "1e-9",
    ]
    train_run(flags, monkeypatch)
    assert "weights of timm, --model_type ViT-Nano_4 --model_fields num_layers=2 num_heads=4 --gelu exact" in (
        capsys.readouterr().out
    )
    recorded = read_config(tmp_path / "run")["flags"]
    assert (recorded["model_type"], recorded["gelu"]) == ("ViT-Nano_4", "exact")
    saved = SavedModel.load(tmp_path / "run" / "last.safetensors")
    assert (saved.model.config.gelu, saved.model.config.num_layers) == ("exact", 2)
    for name, weight in saved.model.state_dict().items():
        if not name.startswith("head"):
            torch.testing.assert_close(weight, theirs.state_dict()[name], rtol=1e-4, atol=1e-5)
    path.unlink()
    call_main(train, [*flags, "--resume", "--num_steps", "13"], monkeypatch)
    assert read_config(tmp_path / "run")["flags"]["model_fields"] == ["num_layers=2", "num_heads=4"]
    assert "warning: resuming with --model" not in capsys.readouterr().out
    timm_vit(path)
    call_main(
        train, ["--config", tmp_path / "run/config.json", "--output_dir", tmp_path, "--name", "again"], monkeypatch
    )
    again = read_config(tmp_path / "again")["flags"]
    assert {name: again[name] for name in ("gelu", "model_fields")} == {
        name: recorded[name] for name in ("gelu", "model_fields")
    }


def test_fine_tuning_from_a_run_of_another_task(tmp_path, tiny_flags, monkeypatch):
    """Another number of classes, image size and norm; the run's model type, GELU and mean are taken over."""
    train_run(tiny_flags("--output_dir", tmp_path, "--gelu", "exact", "--mean_std", "imagenet"), monkeypatch)
    best = tmp_path / "run" / "best.safetensors"
    metadata = read_checkpoint(best, shapes_only=True).metadata
    assert (metadata["format"], metadata["model_type"]) == ("vision-transformers", "ViT-Mini_4")
    args, model = parsed("--pretrained_dir", best, "--img_size", "16", "--norm_type", "BN")
    assert (args.model_type, args.gelu, args.mean_std, args.norm_type) == ("ViT-Mini_4", "exact", "imagenet", "BN")
    target = random_model("ViT-Mini_4", 16, num_classes=3, norm_type="BN")
    loaded = target.load_checkpoint(read_checkpoint(best))
    assert "arrays of another norm are left out" in str(loaded)
    weights = load_file(best)
    assert torch.equal(target.blocks[3].attn.qkv.weight, weights["blocks.3.attn.qkv.weight"])
    assert not target.head.weight.any()
    assert target.pos_embed.shape[1] == 17


def test_evaluate_takes_the_files_of_other_libraries(tmp_path, monkeypatch, capsys):
    timm_vit(tmp_path / "w.safetensors", classes=10)
    flags = [
        "--checkpoint",
        tmp_path / "w.safetensors",
        "--dataset",
        "digits",
        "--json",
        "--model_fields",
        "num_heads=4",
    ]
    call_main(evaluate, flags, monkeypatch)
    printed = capsys.readouterr()
    assert json.loads(printed.out)["images"] == 360
    assert "weights of timm" in printed.err
    timm_vit(tmp_path / "w.safetensors", classes=0)
    assert "w.safetensors has no head, so it can't classify" in fails(evaluate, flags, monkeypatch, capsys)


def test_names_at_hugging_face():
    assert repository("timm:vit_tiny_patch16_224.augreg_in21k") == "timm/vit_tiny_patch16_224.augreg_in21k"
    assert repository("hf:google/vit-base-patch16-224") == "google/vit-base-patch16-224"
    assert not any(map(is_hub_name, ("checkpoint/ViT-B_16.npz", "C:/weights.pth", "hf:", "hf:a/b/c")))


def test_a_name_at_hugging_face_is_read_from_the_cache(tmp_path, monkeypatch, capsys):
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--timm--vit_tiny.mine"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    timm_vit(folder / "snapshots" / ("0" * 40) / "model.safetensors", num_heads=1)
    assert SavedModel.load("timm:vit_tiny.mine").model.config.num_layers == 2
    args, _ = parsed("--pretrained_dir", "timm:vit_tiny.mine", "--img_size", "8")
    assert (args.model_type, args.model_fields) == ("ViT-Nano_4", ["num_heads=1", "num_layers=2"])
    capsys.readouterr()
    flags = ["--checkpoint", "hf:nobody/nothing", str(ROOT / "img" / "digits" / "9.png")]
    assert "hf:nobody/nothing is not downloaded yet; add --download" in fails(evaluate, flags, monkeypatch, capsys)


def test_a_missing_huggingface_hub_is_explained(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    flags = ["--checkpoint", "hf:nobody/nowhere", "--download", str(ROOT / "img" / "digits" / "9.png")]
    expected = "hf:nobody/nowhere needs huggingface_hub: pip install huggingface_hub"
    assert expected in fails(evaluate, flags, monkeypatch, capsys)


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as huggingface.co for the repository tiny/vit, whose files are in the attribute `folder`."""

    commit = "1" * 40

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        path = self.path.partition("?")[0]
        names = sorted(file.name for file in self.folder.iterdir())
        status, body, etag = 200, b"", None
        if path.startswith("/api/models/tiny/vit/revision/") or path == "/api/models/tiny/vit":
            files = [{"rfilename": name} for name in names]
            body = json.dumps({"id": "tiny/vit", "modelId": "tiny/vit", "sha": self.commit, "siblings": files}).encode()
        elif path.startswith("/api/models/tiny/vit/tree/"):
            sizes = {name: (self.folder / name).stat().st_size for name in names}
            files = [{"type": "file", "path": name, "size": size, "oid": name} for name, size in sizes.items()]
            body = json.dumps(files).encode()
        elif path.startswith("/tiny/vit/resolve/") and path.rpartition("/")[2] in names:
            body, etag = (self.folder / path.rpartition("/")[2]).read_bytes(), f'"{path.rpartition("/")[2]}"'
        else:
            status = 404
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", self.commit)
        if etag:
            self.send_header("ETag", etag)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.mark.slow
def test_download_from_hugging_face(tmp_path, monkeypatch):
    """From a local server, by a process of its own, as the address is read when huggingface_hub is imported."""
    pytest.importorskip("huggingface_hub")
    files = tmp_path / "files"
    files.mkdir()
    timm_vit(files / "model.safetensors", classes=10, num_heads=1)
    write_images(tmp_path / "images", [(8, 8)])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Served", (Hub,), {"folder": files}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    image = tmp_path / "images" / "000.png"
    try:
        found = succeed("evaluate.py", "--checkpoint", "hf:tiny/vit", "--download", "--json", image)
        assert len(json.loads(found)[0]["classes"]) == 5
        missing = script("evaluate.py", "--checkpoint", "hf:tiny/none", "--download", image)
        assert missing.returncode == 2
        assert missing.stderr.count("\n") == 1
        assert "hf:tiny/none could not be downloaded" in missing.stderr
    finally:
        server.shutdown()
    assert json.loads(succeed("evaluate.py", "--checkpoint", "hf:tiny/vit", "--json", image)) == json.loads(found)
