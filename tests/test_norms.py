"""LN, BN, GN and Rescale, and a toy norm: closed forms, several processes, checkpoints, incomplete declarations."""

import copy
import json
import math
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import evaluate
import train
from helpers import call_main, make_shallow, metrics, succeed
from inference import SavedModel
from models import CheckpointError, build_model
from models import norms as norms_module
from models.norms import (
    TOKEN_NORMS,
    LayerNorm,
    RescaledResidual,
    Residual,
    TokenBatchNorm,
    TokenGroupNorm,
    TokenNorm,
    is_token_norm,
    token_norm,
)
from synthetic import make_checkpoint, make_images, randomised, shapes_of, with_random_state
from utils.records.run_folder import read_metrics

TINY = {"hidden_size": 32, "mlp_dim": 64, "num_heads": 2, "num_layers": 2}


def tiny(norm_type, **overrides):
    return build_model("ViT-Mini_4", 16, norm_type=norm_type, **{**TINY, **overrides})


def random_affine(norm):
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    return norm


def test_batch_norm_is_that_of_each_channel_over_batch_and_tokens():
    torch.manual_seed(0)
    norm = random_affine(TokenBatchNorm(8))
    x = 3 + 2 * torch.randn(5, 7, 8)
    reference = torch.nn.BatchNorm1d(8)
    reference.load_state_dict(norm.state_dict(), strict=False)
    expected = reference(x.transpose(1, 2)).transpose(1, 2)  # PyTorch's has channels second
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm.running_mean, reference.running_mean)
    torch.testing.assert_close(norm.running_var, reference.running_var)
    torch.testing.assert_close(norm.eval()(x), reference.eval()(x.transpose(1, 2)).transpose(1, 2))


def test_group_norm_is_that_of_four_groups_of_channels_over_the_tokens():
    torch.manual_seed(0)
    norm = random_affine(TokenGroupNorm(8))
    x = 1 + torch.randn(5, 7, 8)
    expected = F.group_norm(x.transpose(1, 2).contiguous(), 4, norm.weight, norm.bias, 1e-6).transpose(1, 2)
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm.over_groups(x), expected)


@pytest.mark.parametrize("norm_type", ["BN", "GN"])
def test_the_output_is_contiguous(norm_type):
    """In memory the output is ordered as the tokens are, so nothing after it has to copy."""
    x = torch.randn(3, 5, 32)
    assert token_norm(norm_type, 32)(x).is_contiguous()


@pytest.mark.parametrize("norm_type", TOKEN_NORMS)
def test_evaluation_does_not_depend_on_the_batch(norm_type):
    model = randomised(tiny(norm_type)).eval()
    images = torch.from_numpy(make_images(16, 6))
    with torch.no_grad():
        together = model(images)
        alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_training_moves_the_running_statistics_and_evaluation_does_not():
    model = tiny("BN")
    before = model.blocks[1].norm2.running_var.clone()
    model.eval()(torch.randn(4, 3, 16, 16))
    assert torch.equal(model.blocks[1].norm2.running_var, before)
    model.train()(torch.randn(4, 3, 16, 16))
    assert not torch.equal(model.blocks[1].norm2.running_var, before)


@pytest.mark.parametrize("norm_type", TOKEN_NORMS)
def test_a_state_dict_without_version_loads(norm_type):
    """As one that was read from a file."""
    model, other = randomised(tiny(norm_type)), tiny(norm_type)
    other.load_state_dict(dict(model.state_dict()))
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


@torch.no_grad()
@pytest.mark.parametrize("depth", [12, 24, 32])
def test_rescale_keeps_the_variance_of_the_residual_stream(depth):
    """With two branches of variance 1 per block; the variance of a simple sum grows with their number."""
    torch.manual_seed(0)
    x = simple = torch.randn(100_000, dtype=torch.float64)
    for k in range(1, 2 * depth + 1):
        branch = torch.randn_like(x)
        simple = simple + branch
        x = RescaledResidual(k).double()(x, branch)
        assert x.var() == pytest.approx(1, abs=0.03)
    assert simple.var() == pytest.approx(2 * depth + 1, rel=0.05)


@torch.no_grad()
def test_rescale_keeps_the_variance_in_sixteen_bits():
    """The errors of an x that is scaled and rounded before the sum would add up to 0.7 % after 32 blocks."""
    torch.manual_seed(0)
    start = torch.randn(200_000)
    x, exact = start.bfloat16(), start.double()
    for k in range(1, 65):
        branch = torch.randn_like(x)
        residual = RescaledResidual(k)
        x, exact = residual(x, branch), residual.double()(exact, branch.double())
    assert x.double().var().item() == pytest.approx(exact.var().item(), rel=0.003)


def test_rescale_is_its_formula():
    model = randomised(tiny("Rescale")).eval()
    x = torch.randn(2, 5, 32)
    k = 0
    expected = x
    with torch.no_grad():
        for block in model.blocks:
            for bias, branch, multiplier in (
                (block.norm1.bias, block.attn, block.add1.weight),
                (block.norm2.bias, block.mlp, block.add2.weight),
            ):
                k += 1
                identity = math.sqrt(k / (k + 1)) * expected
                expected = identity + math.sqrt(1 / (k + 1)) * multiplier * branch(expected + bias)
            x = block(x)
    assert k == 4
    torch.testing.assert_close(x, expected)
    assert not any(isinstance(module, torch.nn.LayerNorm) for module in model.modules())
    fresh = tiny("Rescale")
    assert all(block.add1.weight == block.add2.weight == 1 for block in fresh.blocks)
    assert all(block.norm1.bias.abs().max() == 0 for block in fresh.blocks)


@pytest.mark.parametrize(
    "model_type", ["ViT-Ti_16", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ViT-B_16", "ViT-L_32"))]
)
def test_rescale_stays_finite_in_float16(model_type):
    """A newly initialised model, on images in [-1, 1]."""
    model = build_model(model_type, 64, norm_type="Rescale").half().eval()
    with torch.no_grad():
        x = model.embed(torch.from_numpy(make_images(64, 2)).half())
        for block in model.blocks:
            x = block(x)
            assert x.isfinite().all()
            assert x.abs().max() < 1000


class RMSNorm(TokenNorm, torch.nn.Module):
    """A fifth norm as a user would add it, of two modules, with a parameter and a buffer."""

    block_key, final_key = "RMSNorm", "encoder_rms_norm"
    array_names = {"inner.weight": "scale", "shift": "bias"}
    stays_float32 = True
    per_token = True
    residual = Residual

    def __init__(self, hidden_size):
        super().__init__()
        self.inner = torch.nn.RMSNorm(hidden_size)
        self.register_buffer("shift", torch.zeros(hidden_size))

    def forward(self, x):
        return self.inner(x.float()).to(x.dtype) + self.shift.to(x.dtype)


@pytest.fixture
def rms(monkeypatch):
    """RMSNorm as the norm type "RMS"."""
    monkeypatch.setitem(TOKEN_NORMS, "RMS", RMSNorm)


@pytest.mark.usefixtures("rms")
@pytest.mark.parametrize("norm_type", [*TOKEN_NORMS, "RMS"])
@pytest.mark.parametrize("model_type", ["ViT-Mini_4", "R26-ViT-Mini_4", "Conformer-Mini_4"])
def test_export_and_load_give_the_same_model_with_every_norm(norm_type, model_type):
    model = with_random_state(build_model(model_type, 32, norm_type=norm_type, num_layers=2))
    loaded_model = build_model(model_type, 32, norm_type=norm_type, num_layers=2)
    assert all(not torch.equal(weight, loaded_model.state_dict()[name]) for name, weight in model.state_dict().items())
    loaded = loaded_model.load_from(model.export_npz(), head="keep")
    assert (loaded, str(loaded)) == (([], []), "everything is loaded")
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded_model.state_dict()[name]), name
    images = torch.from_numpy(make_images(32))
    assert torch.equal(model.eval()(images), loaded_model.eval()(images))


@pytest.mark.usefixtures("rms")
@pytest.mark.parametrize("norm_type", [*TOKEN_NORMS, "RMS"])
def test_a_resized_model_keeps_the_weights_of_every_norm(norm_type):
    """From one image size to another by export and load, as evaluate.py resizes; only position embeddings change."""
    model = with_random_state(tiny(norm_type))
    resized = build_model("ViT-Mini_4", 32, norm_type=norm_type, **TINY)
    resized.load_from(model.export_npz(), head="keep")
    for name, weight in model.state_dict().items():
        assert name == "pos_embed" or torch.equal(weight, resized.state_dict()[name]), name


@pytest.mark.usefixtures("rms")
@pytest.mark.parametrize("norm_type", [*TOKEN_NORMS, "RMS"])
def test_a_norm_declares_its_keys_and_its_precision(norm_type):
    """`is_token_norm` finds the keys of every norm, and no other one; each part of a norm has the norm's precision."""
    model = tiny(norm_type)
    norms = {key for key in model.export_npz() if is_token_norm(key)}
    others = {key for key in model.export_npz() if not is_token_norm(key)}
    assert {re.search(r"Block|Attention|head|embed|cls|$", key)[0] for key in others} == {
        *("Block", "Attention", "head", "embed", "cls")
    }
    state = {name for name in model.state_dict() if re.search(r"norm|add", name)}
    assert len(norms) == len(state) > 0
    for module in model.blocks[0].norm1.modules():
        assert module.stays_float32 == (norm_type != "Rescale")


@pytest.mark.usefixtures("rms")
@pytest.mark.parametrize("norm_type", [*TOKEN_NORMS, "RMS"])
def test_a_norm_declares_whether_it_treats_each_token_alone(norm_type):
    """In training: only then the final norm can be applied to the class token alone."""
    norm = with_random_state(token_norm(norm_type, 8))
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    alone, together = norm(x[:, :1]), norm(x)[:, :1]
    assert torch.allclose(alone, together, atol=1e-6) == norm.per_token


@pytest.mark.usefixtures("rms")
def test_a_new_norm_starts_from_a_checkpoint_with_layer_norms():
    source = randomised(tiny("LN")).export_npz()
    model = with_random_state(tiny("RMS"))
    before = model.export_npz()
    loaded = model.load_from(source)
    assert "10 arrays of another norm are left out, 10 of the model's own keep their initial values" in str(loaded)
    assert {key.split("/")[-2] for key in loaded.left_out} == {"LayerNorm_0", "LayerNorm_2", "encoder_norm"}
    assert {key.split("/")[-2] for key in loaded.initialised} == {"RMSNorm_0", "RMSNorm_2", "encoder_rms_norm"}
    assert all(np.array_equal(model.export_npz()[key], before[key]) for key in loaded.initialised)
    assert str(tiny("LN").load_from(before)) == str(loaded)


def test_a_norm_without_weights_leaves_out_those_of_the_checkpoint(monkeypatch):
    class NoWeights(RMSNorm):
        block_key, final_key, array_names = "NoWeights", None, {}

        def __init__(self, hidden_size):
            super().__init__(hidden_size)
            del self.shift
            self.inner = torch.nn.RMSNorm(hidden_size, elementwise_affine=False)

    monkeypatch.setitem(TOKEN_NORMS, "none", NoWeights)
    loaded = tiny("none").load_from(tiny("LN").export_npz())
    assert str(loaded) == "10 arrays are left out, everything else is loaded"


class SubclassOfLayerNorm(LayerNorm):
    """Would be exported as a LayerNorm."""


class WithoutDeclarations(torch.nn.RMSNorm):
    pass


class WithoutResidual(torch.nn.RMSNorm):
    block_key, final_key, array_names, stays_float32, per_token = "R", "encoder_r", {"weight": "scale"}, True, True


class TooFewArrays(RMSNorm):
    array_names = {"inner.weight": "scale"}


class TooManyArrays(RMSNorm):
    array_names = {**RMSNorm.array_names, "bias": "bias"}


class UnnamedResidual(RMSNorm):
    class residual(Residual):  # noqa: N801
        def __init__(self, k):
            super().__init__(k)
            self.gate = torch.nn.Parameter(torch.ones(1))


@pytest.mark.parametrize(
    "norm, message",
    [
        (SubclassOfLayerNorm, "norm types 'new' and 'LN' have the same block_key 'LayerNorm'"),
        (
            WithoutDeclarations,
            "'new': WithoutDeclarations does not declare block_key, final_key, array_names, stays_float32, per_token, "
            "residual",
        ),
        (WithoutResidual, "'new': WithoutResidual does not declare residual"),
        (TooFewArrays, "'new': TooFewArrays.array_names does not name its 'shift'"),
        (TooManyArrays, "'new': TooManyArrays.array_names names a missing 'bias'"),
        (UnnamedResidual, "'new': residual.array_names does not name its 'gate'"),
    ],
)
def test_an_incomplete_norm_is_an_error_when_the_model_is_built(norm, message, monkeypatch):
    monkeypatch.setitem(TOKEN_NORMS, "new", norm)
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny("new")


@pytest.mark.usefixtures("rms")
def test_two_weights_with_one_key_are_an_error(monkeypatch):
    monkeypatch.setattr(RMSNorm, "array_names", {"inner.weight": "scale", "shift": "scale"})
    with pytest.raises(CheckpointError, match="two weights .* key Transformer/encoder_rms_norm/scale .and 4 m"):
        tiny("RMS").export_npz()


@pytest.mark.parametrize("norm_type", [name for name in TOKEN_NORMS if name != "LN"])
def test_pretrained_weights_of_another_norm(norm_type):
    """The LayerNorms' own arrays are left out, everything else is loaded; and the reverse."""
    arrays = make_checkpoint(shapes_of(tiny("LN")))
    model = tiny(norm_type)
    before = model.export_npz()
    loaded = model.load_from(arrays, head="keep")
    assert len(loaded.left_out) == 2 * 2 * 2 + 2
    assert all("norm" in key.lower() for key in loaded.left_out)
    after = model.export_npz()
    for key, array in after.items():
        assert np.array_equal(array, before[key] if key in loaded.initialised else arrays[key]), key
    assert set(loaded.initialised) == set(after) - set(arrays)
    assert f"10 arrays of another norm are left out, {len(loaded.initialised)} of the model's own" in str(loaded)
    assert set(tiny("LN").load_from(after).left_out) == set(loaded.initialised)


def test_a_checkpoint_with_a_part_of_a_norm_is_an_error():
    arrays = tiny("BN").export_npz()
    del arrays["Transformer/encoderblock_1/BatchNorm_0/mean"]
    with pytest.raises(CheckpointError, match="encoderblock_1/BatchNorm_0/mean is missing"):
        tiny("BN").load_from(arrays)
    arrays = {key: array for key, array in tiny("LN").export_npz().items() if "norm" not in key.lower()}
    with pytest.raises(CheckpointError, match="BatchNorm_0/scale is missing"):
        tiny("BN").load_from(arrays)


class ThreadsAsProcesses:
    """Replaces torch.distributed in a test whose threads stand for processes."""

    def __init__(self, size):
        self.size = size
        self.barrier = threading.Barrier(size, timeout=30)
        self.tensors = []

    def is_initialized(self):
        return True

    def get_world_size(self):
        return self.size

    def all_reduce(self, x):
        self.tensors.append(x.clone())
        self.barrier.wait()
        x.copy_(sum(self.tensors))
        if self.barrier.wait() == 0:  # one thread clears the list when all have read it
            self.tensors.clear()
        self.barrier.wait()


def test_batch_norm_over_two_processes_is_that_of_one_batch(monkeypatch):
    """Outputs, gradients and running statistics, with different images in each process."""
    torch.manual_seed(0)
    norm = random_affine(TokenBatchNorm(8))
    x, grad = 3 + 2 * torch.randn(6, 7, 8), torch.randn(6, 7, 8)
    norms = [copy.deepcopy(norm) for _ in range(2)]
    inputs = [half.clone().requires_grad_() for half in x.split(3)]
    x.requires_grad_()
    expected = norm(x)
    expected.backward(grad)
    monkeypatch.setattr(norms_module, "dist", ThreadsAsProcesses(2))

    def process(norm, images, grad):
        out = norm(images)
        out.backward(grad)
        return out

    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(process, norms, inputs, grad.split(3)))
    torch.testing.assert_close(torch.cat(outputs), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([images.grad for images in inputs]), x.grad, rtol=1e-4, atol=1e-5)
    for own in norms:
        torch.testing.assert_close(own.running_mean, norm.running_mean)
        torch.testing.assert_close(own.running_var, norm.running_var)
    for name in ("weight", "bias"):
        summed = sum(getattr(own, name).grad for own in norms)
        torch.testing.assert_close(summed, getattr(norm, name).grad, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_training_with_batch_norm_in_two_processes_is_that_in_one(tiny_flags, monkeypatch):
    """Statistics over the batches of both: the losses, which use them, are those of one process."""
    one, two = (tiny_flags("--norm_type", "BN", "--name", name, "--learning_rate", 0.1) for name in ("one", "two"))
    call_main(train, one, monkeypatch)
    succeed("train.py", *two, processes=2)
    for mine, theirs in zip(metrics(two), metrics(one), strict=True):
        assert float(mine["train_loss"]) == pytest.approx(float(theirs["train_loss"]), rel=1e-5)
        assert float(mine["test_loss"]) == pytest.approx(float(theirs["test_loss"]), rel=1e-4)


def test_training_from_weights_of_another_norm_reports_it(tiny_flags, tmp_path, monkeypatch, capsys):
    make_shallow(monkeypatch, 2)
    weights = tmp_path / "ViT-Mini_4.npz"
    np.savez(weights, **make_checkpoint(shapes_of(build_model("ViT-Mini_4", 8))))
    flags = ["--pretrained_dir", weights, "--norm_type", "GN", "--fp16", "--num_steps", 2]
    call_main(train, tiny_flags(*flags), monkeypatch)
    assert f"{weights}: 10 arrays of another norm are left out, 10 of the model's own keep" in capsys.readouterr().out
    call_main(evaluate, ["--checkpoint", tmp_path / "output" / "run" / "last.safetensors"], monkeypatch)
    assert "top-1" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        call_main(train, tiny_flags("--norm_type", "RN"), monkeypatch)
    assert "unknown norm type 'RN'; there is LN, BN, GN, Rescale" in capsys.readouterr().err


@pytest.mark.usefixtures("rms")
def test_a_new_norm_is_trained_resumed_exported_and_resized(tiny_flags, monkeypatch, tmp_path, capsys):
    """By its name in train.py and evaluate.py, at level O2, where its own weights stay float32."""
    make_shallow(monkeypatch, 2)
    flags = ["--norm_type", "RMS", "--bf16", "--learning_rate", 0.1]
    call_main(train, tiny_flags(*flags), monkeypatch)
    call_main(train, tiny_flags(*flags, "--num_steps", 6, "--name", "resumed"), monkeypatch)
    call_main(train, tiny_flags(*flags, "--name", "resumed", "--resume"), monkeypatch)
    path = tmp_path / "output" / "run" / "last.safetensors"
    capsys.readouterr()
    call_main(evaluate, ["--checkpoint", path, "--json"], monkeypatch)
    accuracy = json.loads(capsys.readouterr().out)["top1_accuracy"]
    saved, resized = SavedModel.load(path).model, SavedModel.load(path, img_size=16).model
    fresh = build_model("ViT-Mini_4", 8, norm_type="RMS").state_dict()
    trained = dict(saved.named_parameters())
    for name, weight in saved.state_dict().items():
        if "norm" in name:
            assert weight.dtype == torch.float32
            assert name not in trained or not torch.equal(weight, fresh[name]), name
            assert torch.equal(weight, resized.state_dict()[name]), name
    assert not torch.equal(saved.norm.inner.weight, saved.norm.inner.weight.bfloat16().float())
    np.savez(tmp_path / "ViT-Mini_4.npz", **saved.export_npz())
    copy = build_model("ViT-Mini_4", 8, norm_type="RMS")
    copy.load_from(np.load(tmp_path / "ViT-Mini_4.npz"), head="keep")
    assert all(torch.equal(weight, copy.state_dict()[name]) for name, weight in saved.state_dict().items())
    assert accuracy == pytest.approx(read_metrics(path.parent)["test_accuracy"][-1], abs=0.01)
