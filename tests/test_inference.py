"""SavedModel: which model, classes and image size it finds, and how it prepares an image."""

from pathlib import Path

import numpy as np
import pytest
import torch
from timm.data import ImageNetInfo
from torchvision.transforms import v2

import inference
from helpers import DIGITS_RUN, ROOT, random_model, write_run
from inference import SavedModel
from models import build_model
from utils.class_names import readable_names
from utils.errors import UserError


def write_npz(path, *arguments, **keywords):
    model = random_model(*arguments, **keywords)
    np.savez(path, **model.export_npz())
    return model


def random_image(height, width):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, height, width), dtype=np.uint8))


def assert_same_logits(saved, model):
    images = torch.randn(2, 3, saved.img_size, saved.img_size)
    with torch.no_grad():
        torch.testing.assert_close(saved.model(images), model(images))


@pytest.mark.parametrize("norm_type", ["LN", "BN", "GN", "Rescale"])
def test_a_run_is_loaded_with_the_flags_of_its_model(norm_type, tmp_path):
    flags = {**DIGITS_RUN, "norm_type": norm_type}
    model, path = write_run(tmp_path / "cats", flags)
    saved = SavedModel.load(path)
    assert (saved.classes, saved.img_size, saved.flags) == (["cat", "dog"], 16, flags)
    assert saved.title == "cats/best.safetensors"
    assert not saved.model.training
    assert_same_logits(saved, model)


def test_a_run_can_be_loaded_for_another_image_size(tmp_path):
    model, path = write_run(tmp_path / "run")
    saved = SavedModel.load(path, img_size=24)
    assert saved.img_size == 24
    resized = build_model("ViT-Mini_4", 24, 2).eval()
    resized.load_from(model.export_npz(), head="keep")
    assert_same_logits(saved, resized)


def test_a_run_keeps_its_token_reduction_unless_another_one_is_given(tmp_path):
    reduction = {"token_reduction": "facility", "keep_tokens": 0.5, "reduction_layer": 2}
    model, path = write_run(tmp_path / "run", {**DIGITS_RUN, **reduction}, **reduction)
    assert_same_logits(SavedModel.load(path), model)
    other = SavedModel.load(path, token_reduction={"token_reduction": "tome", "keep_tokens": 3}).model
    assert other.reduction == ("tome", 3, 2)
    assert SavedModel.load(path, token_reduction={"token_reduction": "none"}).model.reduction is None


def test_an_npz_file_has_the_model_of_its_name_and_the_size_of_its_position_embeddings(tmp_path):
    model = write_npz(tmp_path / "ViT-Mini_4-digits.npz", "ViT-Mini_4", 40, 5)
    saved = SavedModel.load(tmp_path / "ViT-Mini_4-digits.npz")
    assert (saved.img_size, saved.flags) == (40, {})
    assert saved.classes == [f"class {number}" for number in range(5)]
    assert_same_logits(saved, model)
    reduction = {"token_reduction": "tome", "keep_tokens": 4, "reduction_layer": 1}
    saved = SavedModel.load(tmp_path / "ViT-Mini_4-digits.npz", img_size=16, token_reduction=reduction)
    assert (saved.img_size, saved.model.reduction) == (16, ("tome", 4, 1))


def test_an_npz_file_without_position_embeddings_is_for_224_pixels(tmp_path):
    write_npz(tmp_path / "some.npz", "ResNet-Mini_Flops", num_classes=1000)
    saved = SavedModel.load(tmp_path / "some.npz", model_type="ResNet-Mini_Flops")
    assert saved.img_size == 224
    assert (saved.classes[0], saved.classes[999]) == ("tench", "toilet tissue")


def test_a_missing_npz_file_is_downloaded_only_on_request(tmp_path, monkeypatch):
    fetched = []

    def download(path):
        fetched.append(path)
        write_npz(path, "ViT-Mini_4", 16, 2)

    monkeypatch.setattr(inference, "download_published", download)
    path = tmp_path / "ViT-Mini_4.npz"
    with pytest.raises(UserError, match="ViT-Mini_4.npz does not exist"):
        SavedModel.load(path)
    for _ in range(2):  # the second time the file is there
        assert len(SavedModel.load(path, download=True).classes) == 2
    assert fetched == [path]


def test_files_that_are_not_a_saved_model_are_errors(tmp_path):
    model, path = write_run(tmp_path / "run")
    arrays = model.export_npz()
    np.savez(tmp_path / "mine.npz", **arrays)
    with pytest.raises(UserError, match="mine.npz is not named after a model; name it with --model_type"):
        SavedModel.load(tmp_path / "mine.npz")
    with pytest.raises(UserError, match="does not fit ViT-Ti_16: "):
        SavedModel.load(tmp_path / "mine.npz", model_type="ViT-Ti_16")
    with pytest.raises(UserError, match="image size 18 is not a multiple of the model's patch size 4"):
        SavedModel.load(path, img_size=18)
    np.savez(tmp_path / "ViT-Mini_4.npz", **{k: array for k, array in arrays.items() if not k.startswith("head/")})
    with pytest.raises(UserError, match="ViT-Mini_4.npz has no head, so it can't classify"):
        SavedModel.load(tmp_path / "ViT-Mini_4.npz")
    with pytest.raises(UserError, match="nothing.safetensors does not exist"):
        SavedModel.load(tmp_path / "nothing.safetensors")
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(UserError, match="has no config.json of a run, so the model of best.safetensors is unknown"):
        SavedModel.load(path)


def test_an_image_is_stretched_to_the_size_of_the_model(tmp_path):
    """Of a data set without crops and of an .npz file; pixels are in [-1, 1]."""
    _, run = write_run(tmp_path / "run")
    write_npz(tmp_path / "ViT-Mini_4.npz", "ViT-Mini_4", 16, 2)
    image = random_image(30, 50)
    expected = v2.functional.resize(image, [16, 16], antialias=True) / 127.5 - 1
    for path in (run, tmp_path / "ViT-Mini_4.npz"):
        saved = SavedModel.load(path)
        torch.testing.assert_close(saved.prepare(image), expected[None])
        assert torch.equal(saved.visible_part(image), image)


def test_an_image_is_cropped_and_normalised_as_in_the_evaluation_of_its_run(tmp_path):
    """ImageNet's rule: the shorter side to 256 / 224 of the size, then the centre; ImageNet's mean and deviation."""
    _, path = write_run(tmp_path / "run", {**DIGITS_RUN, "img_size": 28, "dataset": "imagenet", "mean_std": "imagenet"})
    image = random_image(64, 90)
    saved = SavedModel.load(path)
    usual = v2.Compose([v2.Resize(32, antialias=True), v2.CenterCrop(28), v2.ToDtype(torch.float32, scale=True)])
    expected = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(usual(image))
    torch.testing.assert_close(saved.prepare(image), expected[None], rtol=1e-5, atol=1e-5)
    assert torch.equal(saved.visible_part(image), image[:, 4:60, 17:73])


def test_only_the_class_ids_of_imagenet_get_readable_names():
    wnids = sorted(ImageNetInfo("imagenet-1k").label_names())
    assert readable_names(wnids)[0] == "tench (n01440764)"
    assert readable_names(wnids)[999] == "toilet tissue (n15075141)"
    others = [*wnids[:999], "n99999999"]
    assert readable_names(others) == others


@pytest.mark.parametrize("name", ["R26-ViT-Mini_4", "ResNet-Mini_Params"])
def test_the_models_of_the_repository_recognise_its_photographs(name):
    """The class is the beginning of a picture's name."""
    found = SavedModel.load(ROOT / "checkpoint" / f"{name}-cifar10.npz").predict(ROOT / "img" / "cifar10")
    correct = [Path(each["image"]).name.startswith(each["classes"][0]["class"]) for each in found]
    assert len(correct) == 20
    assert sum(correct) >= 17
