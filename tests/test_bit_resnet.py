"""BiT ResNets and the two cut from R50x3: sizes, comparison with the hybrid, loading and its errors."""

import numpy as np
import pytest
import torch

from models import CheckpointError, build_model
from models.configs import RESNETS
from synthetic import make_checkpoint, make_images
from utils.profiling import count_flops, count_parameters

# R50x3 and the cuts, at a sixth of their width; a bottleneck's inner width must still hold 32 groups.
SMALL = {"root_width": 32, "stage_widths": (128, 256, 512, 1024)}
SMALL_PARAMS = {"root_width": 32, "stage_widths": (128, 256, 512, 512)}
SMALL_FLOPS = {"root_width": 32, "stage_widths": (128, 256, 512)}


def randomised(model):
    """The model with all weights random, the head's too, and the arrays that they came from."""
    arrays = make_checkpoint({key: array.shape for key, array in model.export_npz().items()})
    model.load_from(arrays, head="keep")
    return model.eval(), arrays


def tiny(**overrides):
    return build_model(
        "BiT-M-R50x1", **{"resnet_layers": (1, 2), "root_width": 32, "stage_widths": (128, 256)} | overrides
    )


def size(model_type, img_size):
    """(parameters, FLOPs per image) with 10 classes."""
    with torch.device("meta"):
        model = build_model(model_type, img_size, num_classes=10)
    return count_parameters(model), count_flops(model, img_size)


@pytest.mark.parametrize("model_type", RESNETS)
def test_every_resnet_maps_images_of_any_size_to_logits(model_type):
    with torch.device("meta"):
        model = build_model(model_type, (50, 33), num_classes=7)
        for img_size in ((8, 8), (50, 33)):
            assert model(torch.zeros(2, 3, *img_size)).shape == (2, 7)


@pytest.mark.parametrize(
    "hybrid, cnn, img_size",
    [("R50-ViT-B_16", "ResNet50x3", 224), ("R26-ViT-Mini_4", "ResNet-Mini", 32)],
    ids=["full size", "mini"],
)
def test_the_cuts_have_the_parameters_or_flops_of_the_hybrid(hybrid, cnn, img_size):
    hybrid_parameters, hybrid_flops = size(hybrid, img_size)
    parameters, _ = size(f"{cnn}_Params", img_size)
    _, flops = size(f"{cnn}_Flops", img_size)
    assert parameters == pytest.approx(hybrid_parameters, rel=0.02)
    assert flops == pytest.approx(hybrid_flops, rel=0.03)


def test_the_mini_pair_keeps_the_proportions():
    """An eighth of the width in all parts; half the depth, up to one unit."""
    with torch.device("meta"):
        large, mini = build_model("R50-ViT-B_16").config, build_model("R26-ViT-Mini_4", 32).config
        for field in ("hidden_size", "mlp_dim", "root_width", "num_groups"):
            assert large[field] == 8 * mini[field]
        assert large.num_layers == 2 * mini.num_layers
        halved(large.resnet_layers, mini.resnet_layers)
        for cut in ("Params", "Flops"):
            large, mini = build_model(f"ResNet50x3_{cut}").config, build_model(f"ResNet-Mini_{cut}").config
            assert large.root_width == 8 * mini.root_width
            assert large.stage_widths[:-1] == tuple(8 * width for width in mini.stage_widths[:-1])
            halved(large.resnet_layers, mini.resnet_layers)


def halved(units, fewer):
    assert len(units) == len(fewer)
    assert all(abs(many / 2 - few) <= 0.5 for many, few in zip(units, fewer, strict=True))


def test_initial_weights():
    torch.manual_seed(0)
    model = tiny().requires_grad_(False)
    assert model.head.fc.weight.abs().max() == model.head.fc.bias.abs().max() == 0
    weight = model.stages[1].blocks[0].conv2.weight  # 3x3 of 64 channels
    assert weight.std() == pytest.approx((9 * 64) ** -0.5, rel=0.02)
    assert {module.eps for module in model.modules() if isinstance(module, torch.nn.GroupNorm)} == {1e-5}


def test_kernels_are_standardised():
    """Scale and mean of a kernel do not matter."""
    model, _ = randomised(tiny())
    images = torch.from_numpy(make_images(32))
    with torch.no_grad():
        logits = model(images)
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d) and module.bias is None:
                module.weight.mul_(3).add_(0.5)
        torch.testing.assert_close(model(images), logits, rtol=1e-4, atol=1e-4)


def test_export_and_load_give_the_same_model():
    model, arrays = randomised(tiny())
    exported = model.export_npz()
    assert set(exported) == set(arrays)
    assert all(np.array_equal(exported[key], arrays[key]) for key in arrays)
    copy = tiny()
    assert copy.load_from(exported, head="keep") == ([], [])
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, copy.state_dict()[name]), name


def test_loading_for_a_new_task_zeroes_the_head():
    _, arrays = randomised(tiny(num_classes=5))
    model, _ = randomised(tiny(num_classes=3))
    model.load_from(arrays)
    assert model.head.fc.weight.abs().max() == model.head.fc.bias.abs().max() == 0
    with pytest.raises(CheckpointError, match=r"resnet/head/conv2d/kernel has shape .* 5 classes, the model 3"):
        model.load_from(arrays, head="keep")


def without(arrays, *ends):
    return {key: array for key, array in arrays.items() if not key.endswith(ends)}


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda a: without(a, "root_block/standardized_conv2d/kernel"),
            r"root_block/.*kernel is missing, .*7, 7, 3, 32",
        ),
        (lambda a: a | {"resnet/block3/unit01/a/x": np.zeros(1, np.float32)}, "block3/unit01/a/x is left over"),
        (
            lambda a: a | {"resnet/group_norm/beta": np.zeros(3, np.float32)},
            r"beta has shape \(3,\), expected \(256,\)",
        ),
        (lambda a: a | {"resnet/group_norm/beta": np.zeros(256, np.int64)}, "beta holds int64"),
    ],
)
def test_a_checkpoint_that_does_not_fit_names_the_key(spoil, message):
    model, arrays = randomised(tiny())
    with pytest.raises(CheckpointError, match=message):
        model.load_from(spoil(arrays))


@pytest.fixture(scope="module")
def r50x3():
    """The arrays of an uncut R50x3 of small width, with the 21843 classes of ImageNet-21k."""
    return randomised(build_model("BiT-M-R50x3", num_classes=21843, **SMALL))[1]


FRESH = {
    "Params": {
        "resnet/group_norm/gamma",
        "resnet/group_norm/beta",
        "resnet/block4/unit01/a/standardized_conv2d/kernel",
        "resnet/block4/unit01/a/proj/standardized_conv2d/kernel",
        *(f"resnet/block4/unit01/{part}/group_norm/{leaf}" for part in "bc" for leaf in ("gamma", "beta")),
        *(f"resnet/block4/unit01/{part}/standardized_conv2d/kernel" for part in "bc"),
    },
    "Flops": {"resnet/group_norm/gamma", "resnet/group_norm/beta"},
}


@pytest.mark.xdist_group("small R50x3")
@pytest.mark.parametrize("cut, overrides", [("Params", SMALL_PARAMS), ("Flops", SMALL_FLOPS)])
def test_the_cuts_load_all_weights_of_r50x3_that_they_have(cut, overrides, r50x3):
    model = build_model(f"ResNet50x3_{cut}", **overrides)
    before = model.export_npz()
    loaded = model.load_from(r50x3)
    assert set(loaded.initialised) == FRESH[cut]
    assert not FRESH[cut].intersection(r50x3).difference(loaded.left_out)
    for key, array in model.export_npz().items():
        if not key.startswith("resnet/head/"):
            assert np.array_equal(array, before[key] if key in FRESH[cut] else r50x3[key]), key
    other = build_model(f"ResNet50x3_{cut}", **overrides)
    assert other.load_from(model.export_npz(), head="keep").initialised == []  # its own checkpoint is complete
    assert all(np.array_equal(array, other.export_npz()[key]) for key, array in model.export_npz().items())


@pytest.mark.xdist_group("small R50x3")
@pytest.mark.parametrize("cut, overrides", [("Params", SMALL_PARAMS), ("Flops", SMALL_FLOPS)])
def test_another_checkpoint_than_r50x3_is_an_error_for_the_cuts(cut, overrides, r50x3):
    model = build_model(f"ResNet50x3_{cut}", **overrides)
    deeper = r50x3 | {"resnet/block3/unit07/a/group_norm/beta": np.zeros(512, np.float32)}
    with pytest.raises(CheckpointError, match="block3/unit07/a/group_norm/beta is left over"):
        model.load_from(deeper)
    wider = r50x3 | {"resnet/group_norm/beta": np.zeros(2048, np.float32)}
    with pytest.raises(CheckpointError, match=r"group_norm/beta has shape \(2048,\), expected \(512,\)"):
        model.load_from(wider)
    with pytest.raises(CheckpointError, match="block2/unit03/b/standardized_conv2d/kernel is missing"):
        model.load_from(without(r50x3, "block2/unit03/b/standardized_conv2d/kernel"))
    with pytest.raises(CheckpointError, match="head/conv2d/kernel has shape .* the checkpoint has 21843 classes"):
        build_model(f"ResNet50x3_{cut}", num_classes=21843, **overrides).load_from(r50x3, head="keep")


def test_wrong_arguments_are_named_in_the_error():
    with pytest.raises(ValueError, match="BiT-M-R50x1 always has GroupNorm; the norm type 'BN' is for ViTs"):
        build_model("BiT-M-R50x1", norm_type="BN")
    with pytest.raises(ValueError, match="ResNet50x3_Flops has no field 'dropout_rate'; it has .*resnet_layers"):
        build_model("ResNet50x3_Flops", dropout_rate=0.1)
    with pytest.raises(ValueError, match="unknown model type 'BiT-M-R50x2'; did you mean .*BiT-M-R50x"):
        build_model("BiT-M-R50x2")
