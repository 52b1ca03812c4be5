"""Google's files: their addresses, and errors for damaged or wrong files."""

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
        ("checkpoint/imagenet21k/BiT-M-R50x3.npz", "bit_models/BiT-M-R50x3.npz"),
        ("checkpoint/imagenet21k/ViT-B_16.npz", "vit_models/imagenet21k/ViT-B_16.npz"),
        ("checkpoint/sam/ViT-B_16.npz", "vit_models/sam/ViT-B_16.npz"),
        ("checkpoint/gsam/ViT-S_32.npz", "vit_models/gsam/ViT-S_32.npz"),
    ],
)
def test_each_published_file_has_its_address(path, url):
    assert published_url(path) == f"{STORAGE}/{url}"


def test_an_unpublished_name_has_no_address():
    assert published_url("checkpoint/mine.npz") is None
    assert published_url("checkpoint/ViT-B_17.npz") is None


@pytest.mark.parametrize("path", ["sam/ViT-H_14.npz", "lit/ViT-B_16.npz", "imagenet1k/ViT-B_16.npz", f"sam/{AUGREG}"])
def test_a_file_that_the_published_folder_of_that_name_lacks_is_never_fetched_from_another(path):
    assert published_url(path) is None
    with pytest.raises(UserError, match=f"publishes no file of that name in {path.split('/')[0]}/; see "):
        download(path)


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


def test_an_open_npz_is_a_mapping(weights):
    arrays = open_npz(weights)
    assert set(arrays) == set(np.load(weights).files)
    assert len(arrays) == len(np.load(weights).files)
    assert "cls" in arrays
