"""The Conformer's grid, its weights from a ViT's checkpoint, and its training through train.py."""

import numpy as np
import pytest
import torch

import evaluate
import train
from helpers import call_main, read_config
from inference import SavedModel
from models import CheckpointError, build_model
from models.configs import CONFORMERS
from models.token_reduction import Clusters, Reduction
from synthetic import make_images, randomised
from utils.profiling import count_flops


@pytest.mark.parametrize("model_type, img_size, side", [("Conformer-B_16", 224, 7), ("Conformer-Mini_4", 32, 4)])
def test_a_conformer_costs_less_than_its_vit(model_type, img_size, side):
    with torch.device("meta"):
        model, whole = (build_model(name, img_size) for name in (model_type, model_type.replace("Conformer", "ViT")))
    assert model.grid_size == (side, side)
    assert model.reduction.keep == side**2 == len(whole.pos_embed[0, 1:]) // 4
    assert len(model.blocks) == len(whole.blocks) // 3
    assert count_flops(model, img_size) < 0.5 * count_flops(whole, img_size)


@pytest.mark.parametrize("model_type", CONFORMERS)
@pytest.mark.parametrize("method", ["none", "facility", "tome"])
def test_every_conformer_maps_images_to_logits(model_type, method):
    model = build_model(model_type, 64, num_classes=7, token_reduction=method, reduction_layer=1)
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


def test_the_grid_keeps_the_spatial_order():
    """Compared with the definition in pure Python: from top to bottom, in each row from left to right."""
    model = build_model("Conformer-Mini_4", (24, 40), keep_tokens=9)  # patches: 6 x 10
    kept = torch.rand(5, 60, generator=torch.Generator().manual_seed(0)).topk(9).indices.sort(dim=1).values
    clusters = Clusters(torch.nn.functional.pad(kept + 1, (1, 0)), None)
    grid = model.to_grid(kept[..., None].float(), [clusters])[:, 0].long()  # each cell holds its patch's number
    assert grid.shape == (5, 3, 3)
    for found, patches in zip(grid.tolist(), kept.tolist(), strict=True):
        ranked = sorted(patches, key=lambda patch: (patch // 10, patch % 10))
        assert found == [sorted(ranked[i : i + 3], key=lambda patch: patch % 10) for i in (0, 3, 6)]
    rows, columns = grid // 10, grid % 10
    assert (rows[:, 1:].amin(dim=2) >= rows[:, :-1].amax(dim=2)).all()
    assert (columns.diff(dim=2) >= 0).all()


def test_the_order_does_not_change_if_all_patches_are_kept():
    """With a token reduction that keeps all patches and without one."""
    model = randomised(build_model("Conformer-Mini_4", 32, token_reduction="none"))
    assert (model.reduction, model.grid_size) == (None, (8, 8))
    images = torch.from_numpy(make_images(32))
    with torch.no_grad():
        expected = model(images)
        model.reduction = Reduction("facility", 64, 2)
        torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
    patches = torch.arange(64.0).view(1, 64, 1)
    assert torch.equal(model.to_grid(patches, None).flatten(), patches.flatten())


@pytest.mark.parametrize("method", ["none", "facility", "tome"])
def test_training_reaches_every_weight(method):
    model = randomised(build_model("Conformer-Mini_4", 32, token_reduction=method)).train()
    images = torch.from_numpy(make_images(32))
    model(images).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name


@pytest.mark.slow
def test_a_compiled_conformer_gives_the_same():
    model = randomised(build_model("Conformer-Mini_4", 32))
    images = torch.from_numpy(make_images(32))
    with torch.no_grad():
        expected = model(images)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(images), expected, rtol=1e-5, atol=1e-5)


def test_attention_is_that_of_the_vit_part():
    model = randomised(build_model("Conformer-Mini_4", 32))
    images = torch.from_numpy(make_images(32))
    with torch.no_grad():
        logits, attention, [clusters] = model.forward_with_clusters(images)
        torch.testing.assert_close(logits, model(images), rtol=1e-5, atol=1e-5)
    assert [weights.shape for weights in attention] == [(2, 4, 65, 65)] * 2
    assert clusters.kept.shape == (2, 17)


@pytest.mark.parametrize("norm_type", ["LN", "GN"])
def test_the_vit_part_loads_from_a_vits_checkpoint(norm_type):
    source = randomised(build_model("ViT-Mini_4", 16))
    model = build_model("Conformer-Mini_4", 32, norm_type=norm_type)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    loaded = model.load_from(source.export_npz())
    theirs = source.state_dict()
    norms = 0
    for name, weight in model.state_dict().items():
        if name.startswith(("cnn", "head")):
            assert torch.equal(weight, before[name]), name
        elif norm_type == "GN" and ".norm" in name:
            assert torch.equal(weight, before[name]), name
            norms += 1
        elif name != "pos_embed":  # of another grid
            assert torch.equal(weight, theirs[name]), name
    assert not torch.equal(model.pos_embed, before["pos_embed"])
    assert len(loaded.initialised) == 21 + norms
    assert "21 arrays of conformer/group_norm, conformer/unit01, conformer/unit02: initialised" in str(loaded)
    assert ("8 of the model's own keep their initial values" in str(loaded)) == (norm_type == "GN")
    assert {key.split("/")[1] for key in loaded.left_out} >= {f"encoderblock_{i}" for i in range(2, 6)}


def test_export_and_load_give_the_same_model():
    model = randomised(build_model("Conformer-Mini_4", 32))
    copy = build_model("Conformer-Mini_4", 32)
    assert str(copy.load_from(model.export_npz(), head="keep")) == "everything is loaded"
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, copy.state_dict()[name]), name


def test_a_checkpoint_that_does_not_fit_names_the_key():
    vit = randomised(build_model("ViT-Mini_4", 32)).export_npz()
    own = randomised(build_model("Conformer-Mini_4", 32)).export_npz()
    missing = {key: array for key, array in vit.items() if key != "Transformer/encoderblock_1/MlpBlock_3/Dense_0/bias"}
    half = {key: array for key, array in own.items() if key != "conformer/unit02/b/group_norm/beta"}
    for arrays, head, message in (
        (missing, "zero", "Transformer/encoderblock_1/MlpBlock_3/Dense_0/bias is missing"),
        (half, "zero", "conformer/unit02/b/group_norm/beta is missing"),
        ({**vit, "other": np.zeros(1, np.float32)}, "zero", "other is left over"),
        (vit, "keep", "head/conv2d/kernel is missing"),
        (randomised(build_model("ViT-Nano_4", 32)).export_npz(), "zero", r"cls has shape \(1, 1, 64\), expected"),
    ):
        with pytest.raises(CheckpointError, match=message):
            build_model("Conformer-Mini_4", 32).load_from(arrays, head=head)


@pytest.mark.parametrize(
    "keywords, message",
    [
        ({"keep_tokens": 10}, "keep_tokens 10 is not a square number, which a Conformer needs; 9 is one"),
        ({"keep_tokens": 81}, "keep_tokens 81 is neither a count from 1 to the model's 64 patches"),
        ({"reduction_layer": 7}, "reduction_layer 7 is not one of the model's 1 to 6"),
        ({"reduction_layer": 0}, "reduction_layer 0 is not one of the model's 1 to 6"),
        ({"reduction_layer": 7, "token_reduction": "none"}, "reduction_layer 7 is not one of the model's 1 to 6"),
        ({"keep_tokens": 9, "token_reduction": "none"}, "keep_tokens 9 needs a token_reduction"),
        ({"token_reduction": "topk"}, "unknown token reduction 'topk'"),
    ],
)
def test_wrong_keywords_are_named_in_the_error(keywords, message):
    with pytest.raises(ValueError, match=message):
        build_model("Conformer-Mini_4", 32, **keywords)


@pytest.mark.parametrize("keep_tokens, side", [(0.5, 6), (0.25, 4), (1.0, 8), (1, 1), (49, 7), (0.001, 1)])
def test_shares_are_rounded_to_squares(keep_tokens, side):
    with torch.device("meta"):
        assert build_model("Conformer-Mini_4", 32, keep_tokens=keep_tokens).grid_size == (side, side)
        assert build_model("Conformer-Mini_4", (8, 12), keep_tokens=1.0).grid_size == (2, 2)


def test_a_conformer_is_trained_from_a_vit_and_evaluated(tiny_flags, tmp_path, monkeypatch, capsys):
    """From a ViT's checkpoint, through the training loop; evaluate.py restores the run with its grid."""
    np.savez(tmp_path / "ViT-Mini_4.npz", **randomised(build_model("ViT-Mini_4", 16)).export_npz())
    flags = ["--model_type", "Conformer-Mini_4", "--pretrained_dir", tmp_path / "ViT-Mini_4.npz", "--img_size", 16]
    flags += ["--keep_tokens", 9, "--bf16", "--num_steps", 4, "--eval_every", 2, "--log_attention_every", 4]
    call_main(train, tiny_flags(*flags), monkeypatch)
    assert "arrays of conformer/group_norm, conformer/unit01, conformer/unit02: initialised" in capsys.readouterr().out
    run_dir = tmp_path / "output" / "run"
    assert read_config(run_dir)["flags"]["keep_tokens"] == 9
    model = SavedModel.load(run_dir / "last.safetensors").model
    assert model.grid_size == (3, 3)
    call_main(evaluate, ["--checkpoint", run_dir / "last.safetensors"], monkeypatch)
    assert "360 test images" in capsys.readouterr().out
    resized = SavedModel.load(run_dir / "last.safetensors", img_size=32).model
    assert resized.reduction == Reduction("facility", 9, 2)
