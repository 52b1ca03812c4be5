"""Logits against the official code: the fixtures, and timm's port of it for models without one."""

import re
from functools import partial

import numpy as np
import pytest
import timm
import torch
from scipy import ndimage

from models import build_model, linear
from models.npz import resnet_rows
from synthetic import load_fixture, make_checkpoint, make_images, shapes_of

TIMM_OPTIONS = {"num_classes": 10, "act_layer": partial(torch.nn.GELU, approximate="tanh")}


def relative_error(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@torch.no_grad()
def logits_of(model, images):
    return model.eval()(torch.from_numpy(images)).numpy()


def later_spelling(key):
    for released, later in (
        ("MultiHeadDotProductAttention_1", "MultiHeadDotProductAttention_0"),
        ("LayerNorm_2", "LayerNorm_1"),
        ("MlpBlock_3", "MlpBlock_0"),
    ):
        key = key.replace(released, later)
    return key


BOUNDS = {"ViT-Ti_16": 1e-5, "R50_ViT-B_16": 5e-5, "BiT-M-R50x1": 1e-5}  # of the relative error


def by_name(*names):
    """Parameters for `official`; the tests of one model share its fixture in one process."""
    return [pytest.param(name, marks=pytest.mark.xdist_group(f"official {name}")) for name in names]


@pytest.fixture(scope="module", params=by_name(*BOUNDS))
def official(request):
    """(model with the official weights, images, official logits, bound)"""
    fixture = load_fixture(request.param)
    model = build_model(fixture["model"], fixture["img_size"], fixture["num_classes"])
    assert sum(p.numel() for p in model.parameters()) == fixture["params"]
    model.load_from(make_checkpoint(fixture["shapes"]), head="keep")
    return model, make_images(fixture["img_size"], fixture["batch"]), fixture["logits"], BOUNDS[request.param]


def test_logits_are_the_official_ones(official):
    model, images, expected, bound = official
    assert relative_error(logits_of(model, images), expected) < bound


@pytest.mark.parametrize("official", by_name("ViT-Ti_16", "R50_ViT-B_16"), indirect=True)
def test_logits_are_the_official_ones_if_weights_are_reordered(official, monkeypatch):
    """As on a CPU for many images, in evaluation and with the gradients of training."""
    model, images, expected, bound = official
    monkeypatch.setattr(linear, "MIN_ROWS", 1)
    monkeypatch.setattr(linear, "MIN_WEIGHTS_TO_REORDER", 1)
    with_gradients = model.eval()(torch.from_numpy(images))
    assert with_gradients.requires_grad
    for logits in (logits_of(model, images), with_gradients.detach()):
        assert relative_error(logits, expected) < bound


@pytest.mark.parametrize("spelling", ["released", "later", "flat group norms"])
def test_every_spelling_loads_the_same_weights(spelling):
    shapes = {k: s for k, s in load_fixture("R50_ViT-B_16")["shapes"].items() if "encoderblock_1" not in k}
    shapes = {key: shape for key, shape in shapes.items() if not re.search(r"encoderblock_[2-9]|unit[2-9]", key)}
    arrays = make_checkpoint(shapes)
    variant = arrays
    if spelling == "later":
        variant = {later_spelling(key): array for key, array in arrays.items()}
    if spelling == "flat group norms":
        variant = {key: array.reshape(array.shape[-1:]) if "gn" in key else array for key, array in arrays.items()}
        assert any(variant[key].shape != arrays[key].shape for key in arrays)
    model = build_model("R50-ViT-B_16", num_layers=1, resnet_layers=(1, 1, 1))
    model.load_from(variant, head="keep")
    exported = model.export_npz()
    assert set(exported) == set(arrays)
    assert all(np.array_equal(exported[key], arrays[key]) for key in arrays)


# Names, timm's names, and the depths compared: all blocks of a model are alike.
TIMM = [
    ("ViT-Ti_16", "vit_tiny_patch16_224", 12),
    ("ViT-S_16", "vit_small_patch16_224", 3),
    ("ViT-S_32", "vit_small_patch32_224", 3),
    ("ViT-B_8", "vit_base_patch8_224", 1),
    ("ViT-B_16", "vit_base_patch16_224", 2),
    ("ViT-B_32", "vit_base_patch32_224", 2),
    ("ViT-L_16", "vit_large_patch16_224", 1),
    ("ViT-L_32", "vit_large_patch32_224", 1),
    ("ViT-H_14", "vit_huge_patch14_224", 1),
]
DEEPER = [(name, timm_name, 12 if "-S_" in name else depth + 1) for name, timm_name, depth in TIMM[1:]]


@pytest.mark.parametrize(
    "name, timm_name, depth",
    [
        *(pytest.param(*case, id=case[0]) for case in TIMM),
        *(pytest.param(*case, id=f"{case[0]}-{case[2]}-blocks", marks=pytest.mark.slow) for case in DEEPER),
    ],
)
def test_vit_agrees_with_timm(name, timm_name, depth, tmp_path):
    ours = build_model(name, num_layers=depth)
    arrays = make_checkpoint(shapes_of(ours))
    np.savez(tmp_path / "weights.npz", **arrays)
    ours.load_from(arrays, head="keep")
    theirs = timm.create_model(timm_name, depth=depth, **TIMM_OPTIONS)
    theirs.load_pretrained(str(tmp_path / "weights.npz"))
    images = make_images(224, 1)
    assert relative_error(logits_of(ours, images), logits_of(theirs, images)) < 1e-5


def test_state_dict_has_timms_names():
    ours, theirs = build_model("ViT-Ti_16"), timm.create_model("vit_tiny_patch16_224", num_classes=10)
    theirs.load_state_dict(ours.state_dict())


HYBRIDS = [
    ("R-ViT-Ti_16", "vit_tiny_r_s16_p8_224", 12),
    ("R26-ViT-S_32", "vit_small_r26_s32_224", 3),
    ("R26-ViT-B_32", "vit_base_r26_s32_224", 1),
    ("R50-ViT-L_32", "vit_large_r50_s32_224", 1),
]


@pytest.mark.parametrize(
    "name, timm_name, depth, img_size",
    [
        *(pytest.param(*HYBRIDS[0], img_size, id=f"{HYBRIDS[0][0]}-{img_size}") for img_size in (224, 384)),
        *(pytest.param(*hybrid, 96, id=f"{hybrid[0]}-96") for hybrid in HYBRIDS[1:]),
        *(
            pytest.param(*hybrid, img_size, id=f"{hybrid[0]}-{img_size}", marks=pytest.mark.slow)
            for hybrid in HYBRIDS[1:]
            for img_size in (224, 384)
        ),
    ],
)
def test_hybrid_agrees_with_timm(name, timm_name, depth, img_size, tmp_path):
    """timm divides by sqrt(var + 1e-8), Google by std + 1e-5; kernels scaled by 100 make the two the same.

    At other sizes than 224 timm gets the position embeddings that were resized here.
    """
    arrays = make_checkpoint(shapes_of(build_model(name, 224, num_layers=depth)))
    for key in arrays:
        if re.search(r"conv\w*/kernel", key):
            arrays[key] = 100 * arrays[key]
    ours = build_model(name, img_size, num_layers=depth)
    ours.load_from(arrays, head="keep")
    np.savez(tmp_path / "weights.npz", **ours.export_npz())
    theirs = timm.create_model(timm_name, depth=depth, img_size=img_size, **TIMM_OPTIONS)
    theirs.load_pretrained(str(tmp_path / "weights.npz"))
    set_group_norm_epsilon(theirs, 1e-6)
    images = make_images(img_size, 1)
    assert relative_error(logits_of(ours, images), logits_of(theirs, images)) < 5e-5


def set_group_norm_epsilon(model, eps):
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.eps = eps


@pytest.mark.parametrize("name, timm_name", [("ViT-Ti_16", "vit_tiny_patch16_224")])
def test_vit_at_384_agrees_with_timm_on_position_embeddings_resized_the_official_way(name, timm_name):
    ours = build_model(name, img_size=384)
    arrays = make_checkpoint(load_fixture("ViT-Ti_16")["shapes"])
    ours.load_from(arrays, head="keep")
    pos_embed = arrays["Transformer/posembed_input/pos_embedding"]
    grid = ndimage.zoom(pos_embed[0, 1:].reshape(14, 14, -1), (24 / 14, 24 / 14, 1), order=1)
    expected = np.concatenate([pos_embed[0, :1], grid.reshape(576, -1)])
    np.testing.assert_array_equal(ours.pos_embed[0].detach().numpy(), expected)
    theirs = timm.create_model(timm_name, img_size=384, **TIMM_OPTIONS)
    theirs.load_state_dict(ours.state_dict())
    images = make_images(384, 1)
    assert relative_error(logits_of(ours, images), logits_of(theirs, images)) < 1e-5


@pytest.mark.parametrize("grid_size", [(24, 24), (7, 7), (10, 20)])
def test_position_embeddings_are_interpolated_linearly_between_the_corners(grid_size):
    """Against numpy's one-dimensional interpolation along each axis."""
    model = build_model("ViT-Ti_16", img_size=(16 * grid_size[0], 16 * grid_size[1]), num_layers=1)
    arrays = make_checkpoint(shapes_of(build_model("ViT-Ti_16", num_layers=1)))
    model.load_from(arrays)
    pos_embed = arrays["Transformer/posembed_input/pos_embedding"][0]
    grid = pos_embed[1:].reshape(14, 14, -1)
    for axis, size in enumerate(grid_size):
        points = np.linspace(0, 13, size)
        grid = np.apply_along_axis(lambda line, at=points: np.interp(at, np.arange(14), line), axis, grid)
    found = model.pos_embed[0].detach().numpy()
    np.testing.assert_array_equal(found[0], pos_embed[0])
    np.testing.assert_allclose(found[1:], grid.reshape(-1, 192), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, timm_name", [("BiT-M-R50x3", "resnetv2_50x3_bit"), ("BiT-S-R101x1", "resnetv2_101x1_bit")]
)
def test_resnet_agrees_with_timm(name, timm_name, tmp_path):
    """On a size that no stride divides; timm's weight standardisation gets Google's epsilon."""
    with torch.device("meta"):
        shapes = {row.key: row.view.shape for row in resnet_rows(build_model(name))}
    np.savez(tmp_path / "weights.npz", **make_checkpoint(shapes))
    ours = build_model(name)
    ours.load_from(np.load(tmp_path / "weights.npz"), head="keep")
    theirs = timm.create_model(timm_name, num_classes=10)
    theirs.load_pretrained(str(tmp_path / "weights.npz"))
    for module in theirs.modules():
        if isinstance(module, timm.layers.StdConv2d):
            module.eps = 1e-10
    images = make_images(130, 1)[:, :, :97]
    assert relative_error(logits_of(ours, images), logits_of(theirs, images)) < 1e-5


@pytest.mark.parametrize("name", ["R50x1", "R50x3", "R101x1", "R101x3", "R152x2", "R152x4"])
def test_state_dicts_of_resnets_have_timms_names(name):
    with torch.device("meta"):
        theirs = timm.create_model(f"resnetv2_{name[1:]}_bit", num_classes=10).state_dict()
        for size in ("M", "S"):
            ours = build_model(f"BiT-{size}-{name}").state_dict()
            assert {key: value.shape for key, value in ours.items()} == {k: value.shape for k, value in theirs.items()}
