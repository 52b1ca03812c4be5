"""Checkpoints in Google's format: the same model after export and load, every weight once, clear errors."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from models import CheckpointError, build_model, npz
from models.npz import Row
from synthetic import make_images, randomised

MODELS = {"ViT-Mini_4": {"num_layers": 1}, "Conformer-Mini_4": {}, "ResNet-Mini_Flops": {}}
TINY = {"hidden_size": 32, "mlp_dim": 64, "num_heads": 2, "num_layers": 2}


def tiny(model_type="ViT-Mini_4", img_size=32, **overrides):
    return build_model(model_type, img_size, **{**TINY, **overrides})


@pytest.mark.parametrize("model_type, overrides", [("ViT-Mini_4", {}), ("R26-ViT-S_32", {"root_width": 32})])
def test_export_and_load_give_the_same_model(model_type, overrides):
    model = randomised(tiny(model_type, 64, **overrides))
    copy = tiny(model_type, 64, **overrides).eval()
    copy.load_from(model.export_npz(), head="keep")
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, copy.state_dict()[name]), name


def test_loading_for_a_new_task_zeroes_the_head():
    source = randomised(tiny(num_classes=5))
    model = randomised(tiny(num_classes=3))
    model.load_from(source.export_npz())
    assert model.head.weight.shape == (3, 32)
    assert model.head.weight.abs().max() == model.head.bias.abs().max() == 0
    assert torch.equal(model.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)


def test_a_kept_head_brings_its_pre_logits_layer():
    arrays = randomised(tiny()).export_npz()
    random = np.random.default_rng(0)
    arrays["pre_logits/kernel"] = random.normal(size=(32, 32)).astype(np.float32)
    arrays["pre_logits/bias"] = random.normal(size=32).astype(np.float32)
    model = tiny().eval()
    images = torch.from_numpy(make_images(32))
    with torch.no_grad():
        model.load_from(arrays, head="keep")
        kept = model(images)
        assert set(model.export_npz()) == set(arrays)
        hidden = torch.tanh(
            model.norm(encoded(model, images)[:, 0]) @ torch.from_numpy(arrays["pre_logits/kernel"])
            + torch.from_numpy(arrays["pre_logits/bias"])
        )
        torch.testing.assert_close(kept, model.head(hidden))
        model.load_from(arrays)  # a new task has no such layer
    assert model.pre_logits is None


def encoded(model, images):
    x = model.embed(images)
    for block in model.blocks:
        x = block(x)
    return x


def checkpoints_with_faults():
    arrays = randomised(tiny()).export_npz()
    missing = {key: array for key, array in arrays.items() if key != "cls"}
    extra = {**arrays, "Transformer/encoderblock_2/LayerNorm_0/bias": np.zeros(32, np.float32)}
    shape = {**arrays, "Transformer/encoder_norm/scale": np.zeros(31, np.float32)}
    grid = {**arrays, "Transformer/posembed_input/pos_embedding": np.zeros((1, 8, 32), np.float32)}
    integers = {**arrays, "cls": np.zeros((1, 1, 32), np.int64)}
    return {
        "missing": (missing, r"cls is missing, expected shape \(1, 1, 32\)"),
        "left over": (extra, "Transformer/encoderblock_2/LayerNorm_0/bias is left over"),
        "shape": (shape, r"Transformer/encoder_norm/scale has shape \(31,\), expected \(32,\)"),
        "grid": (grid, r"pos_embedding has shape \(1, 8, 32\).* not square"),
        "integers": (integers, "cls holds int64"),
    }


@pytest.mark.parametrize("fault", ["missing", "left over", "shape", "grid", "integers"])
def test_a_checkpoint_that_does_not_fit_names_the_key(fault):
    arrays, message = checkpoints_with_faults()[fault]
    with pytest.raises(CheckpointError, match=message) as error:
        tiny().load_from(arrays)
    assert "\n" not in str(error.value)


def test_a_kept_head_must_fit():
    arrays = randomised(tiny(num_classes=5)).export_npz()
    with pytest.raises(CheckpointError, match="head/kernel has shape .32, 5., expected .32, 10.: .* 5 classes"):
        tiny().load_from(arrays, head="keep")


LOAD_B16 = """
import resource, sys
import numpy as np
from models import build_model

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = build_model("ViT-B_16", num_classes=10)
model.load_from(np.load(sys.argv[1]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's ru_maxrss")
def test_loading_vit_b_16_needs_little_memory(tmp_path):
    with torch.device("meta"):
        shapes = {row.key: row.view.shape for row in npz.vit_rows(build_model("ViT-B_16"))}
    np.savez(tmp_path / "ViT-B_16.npz", **{key: np.zeros(shape, np.float32) for key, shape in shapes.items()})
    size = (tmp_path / "ViT-B_16.npz").stat().st_size
    done = subprocess.run(
        [sys.executable, "-c", LOAD_B16, str(tmp_path / "ViT-B_16.npz")], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 1.5 * size


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("add", ["parameter", "buffer"])
def test_a_weight_without_a_key_is_an_error(model_type, add):
    """Also in export: the arrays would be those of another model."""
    model = build_model(model_type, 32, **MODELS[model_type])
    arrays = model.export_npz()
    block = next(module for module in model.modules() if getattr(module, "is_block", False))
    if add == "parameter":
        block.gate = torch.nn.Parameter(torch.ones(3))
    else:
        block.register_buffer("gate", torch.ones(3))
    for call in (model.export_npz, lambda: model.load_from(arrays), lambda: model.load_from(arrays, head="keep")):
        with pytest.raises(CheckpointError, match=r"\.gate is not at all in the model's table of checkpoint keys"):
            call()


def test_a_buffer_that_is_not_persistent_needs_no_key():
    model = build_model("ViT-Mini_4", 32, num_layers=1)
    model.register_buffer("gate", torch.ones(3), persistent=False)
    assert not any("gate" in key for key in model.export_npz())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda rows, bias: [row for row in rows if row.view is not bias], "head.bias is not at all in"),
        (lambda rows, bias: [*rows, Row("again", bias)], "head.bias is more than once in"),
        (lambda rows, bias: [*rows[:-1], Row("half", bias[:5])], "head.bias is in part in"),
        (lambda rows, bias: [*rows[:-1], Row("one", bias[:5]), Row("two", bias[:5])], "head.bias is more than once in"),
        (lambda rows, bias: [*rows, Row("cls", bias)], "two weights of the model have the checkpoint key cls"),
        (lambda rows, bias: [*rows[:-1], Row("half", bias[:5]), Row("rest", bias[5:])], None),
    ],
    ids=["missing", "twice", "half", "one half twice", "key twice", "two halves"],
)
def test_each_weight_is_in_the_table_once(change, message):
    model = build_model("ViT-Mini_4", 32, num_layers=1)
    rows = change(npz.vit_rows(model), model.head.bias)
    if message is None:
        npz.check_rows(model, rows)
    else:
        with pytest.raises(CheckpointError, match=message):
            npz.check_rows(model, rows)
