"""Sizes, initial weights, attention, loading and its errors."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from models import CheckpointError, attention, build_model
from models.configs import VITS
from synthetic import make_checkpoint, make_images
from utils.profiling import count_flops

SIZES = {  # millions of parameters at 224x224 and 10 classes
    "ViT-Ti_16": 5.53,
    "ViT-S_16": 21.67,
    "ViT-B_16": 85.81,
    "ViT-B_32": 87.46,
    "ViT-L_16": 303.31,
    "ViT-L_32": 305.52,
    "ViT-H_14": 630.78,
    "R50-ViT-B_16": 97.90,
    "R26-ViT-S_32": 36.05,
    "R-ViT-Ti_16": 6.15,
    "Conformer-B_16": 43.42,
}
TINY = {"hidden_size": 32, "mlp_dim": 64, "num_heads": 2, "num_layers": 2}


def tiny(model_type="ViT-Mini_4", img_size=32, **overrides):
    return build_model(model_type, img_size, **{**TINY, **overrides})


def randomised(model):
    """The model with all weights random, the head's too."""
    model.load_from(make_checkpoint({key: array.shape for key, array in model.export_npz().items()}), head="keep")
    return model.eval()


@pytest.mark.parametrize("model_type", SIZES)
def test_number_of_parameters(model_type):
    with torch.device("meta"):
        model = build_model(model_type)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == SIZES[model_type]


@pytest.mark.parametrize("model_type", VITS)
def test_every_vit_maps_images_to_logits(model_type):
    img_size = 42 if model_type == "ViT-H_14" else 64
    model = build_model(model_type, img_size, num_classes=7, num_layers=1)
    assert model(torch.zeros(2, 3, img_size, img_size)).shape == (2, 7)


def test_flops_of_vit_b_16_and_the_hybrid():
    for model_type, gflops in (("ViT-B_16", 35.13), ("R50-ViT-B_16", 43.0)):
        with torch.device("meta"):
            model = build_model(model_type)
        assert count_flops(model, 224) / 1e9 == pytest.approx(gflops, rel=0.003)


def test_the_published_spelling_of_hybrids_is_known():
    with torch.device("meta"):
        assert build_model("R50+ViT-B_16").config == build_model("R50-ViT-B_16").config


@pytest.mark.parametrize("model_type", ["ViT-Mini_4", "R26-ViT-S_32"])
def test_attention_rows_sum_to_one_and_leave_the_logits_alone(model_type):
    model = randomised(tiny(model_type, img_size=64))
    images = torch.from_numpy(make_images(64))
    with torch.no_grad():
        logits, attention = model.forward_with_attention(images)
        torch.testing.assert_close(logits, model(images), rtol=1e-5, atol=1e-5)
    tokens = model.pos_embed.shape[1]
    assert [weights.shape for weights in attention] == [(2, 2, tokens, tokens)] * 2
    torch.testing.assert_close(torch.stack(attention).sum(-1), torch.ones(2, 2, 2, tokens))


def test_non_square_images():
    model = randomised(tiny(img_size=(16, 32)))
    assert model(torch.zeros(1, 3, 16, 32)).shape == (1, 10)
    with pytest.raises(ValueError, match="the model was built for"):
        model(torch.zeros(1, 3, 32, 16))


def test_initial_weights():
    torch.manual_seed(0)
    model = build_model("ViT-Ti_16", num_layers=1).requires_grad_(False)
    block = model.blocks[0]
    assert model.cls_token.abs().max() == model.head.weight.abs().max() == model.head.bias.abs().max() == 0
    assert model.pos_embed.std() == pytest.approx(0.02, rel=0.02)
    for weight, fan_in, fan_out in (
        (block.mlp.fc1.weight, 192, 768),
        (block.mlp.fc2.weight, 768, 192),
        (block.attn.qkv.weight, 192, 192),  # each of the three projections has its own fans
        (block.attn.proj.weight, 192, 192),
    ):
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert weight.abs().max() <= bound
        assert weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert block.mlp.fc1.bias.std() == pytest.approx(1e-6, rel=0.1)
    assert model.patch_embed.proj.weight.std() == pytest.approx(1 / math.sqrt(3 * 16 * 16), rel=0.02)
    assert block.norm1.eps == 1e-6


def test_dropout_rates_of_the_published_configs():
    with torch.device("meta"):
        rates = {name: build_model(name).config.dropout_rate for name in VITS}
        assert build_model("ViT-B_16", dropout_rate=0.3).blocks[0].mlp.drop1.rate == 0.3
    with_dropout = {"ViT-L_16", "ViT-H_14", "R50-ViT-B_16", "R50-ViT-L_32"}
    assert rates == {name: 0.1 if name in with_dropout else 0.0 for name in VITS}


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: build_model("ViT-B16"), "unknown model type 'ViT-B16'; did you mean ViT-B_16"),
        (lambda: build_model("ViT-B_16", img_size=225), "225 is not a multiple of the model's patch size 16"),
        (lambda: build_model("R50-ViT-B_16", img_size=200), "200 is not a multiple of the model's patch size 16"),
        (lambda: build_model("ViT-B_16", norm_type="XN"), "unknown norm type 'XN'"),
        (lambda: build_model("ViT-B_16", depth=3), "ViT-B_16 has no field 'depth'; it has .*num_layers"),
    ],
)
def test_wrong_arguments_name_the_thing(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("model_type", ["ViT-Mini_4", "R26-ViT-S_32"])
def test_export_and_load_give_the_same_model(model_type):
    model = randomised(tiny(model_type, img_size=64))
    copy = tiny(model_type, img_size=64).eval()
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
        model.load_from(arrays)  # a new task does without it
    assert model.pre_logits is None


def encoded(model, images):
    x = model.embed(images)
    for block in model.blocks:
        x = block(x)
    return x


def broken_checkpoints():
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
    arrays, message = broken_checkpoints()[fault]
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


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's ru_maxrss")
def test_loading_vit_b_16_needs_little_memory(tmp_path):
    with torch.device("meta"):
        shapes = {row_key: view.shape for row_key, view in table_of("ViT-B_16")}
    np.savez(tmp_path / "ViT-B_16.npz", **{key: np.zeros(shape, np.float32) for key, shape in shapes.items()})
    size = (tmp_path / "ViT-B_16.npz").stat().st_size
    done = subprocess.run(
        [sys.executable, "-c", LOAD_B16, str(tmp_path / "ViT-B_16.npz")], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 1.5 * size


def table_of(model_type):
    from models.npz import vit_rows

    return vit_rows(build_model(model_type))


@pytest.mark.parametrize("shape", [(3, 2, 17, 64), (5, 4, 200, 32)])
def test_bfloat16_attention_on_a_cpu_is_as_exact_as_the_fused_kernel(shape, monkeypatch):
    """Outputs and gradients against float64, in one piece and a few images at a time."""
    torch.manual_seed(0)
    exact = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    grad = torch.randn(shape, dtype=torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(*exact)
    expected.backward(grad)
    for at_once in (2**20, 1):
        monkeypatch.setattr(attention, "MAX_SCORES", at_once)
        errors = []
        for function in (attention.attend, torch.nn.functional.scaled_dot_product_attention):
            inputs = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
            out = function(*inputs)
            out.backward(grad.bfloat16())
            found = [out, *(tensor.grad for tensor in inputs)]
            wanted = [expected, *(tensor.grad for tensor in exact)]
            errors.append([((a - b).norm() / b.norm()).item() for a, b in zip(found, wanted, strict=True)])
        assert all(ours < 1.5 * fused < 0.02 for ours, fused in zip(*errors, strict=True))
