"""Precision: which parameters have 16 bits, that the levels learn, loss scaling, and apex."""

import json
import math
import sys
import types

import pytest
import torch

from helpers import TINY, assert_same_bits, differences, initial_weights, make_shallow, train_run
from models import build_model
from utils.parallel.precision import Precision

CPU = torch.device("cpu")
LEARNING = {"--num_steps": 40, "--eval_every": 40, "--learning_rate": 0.1, "--min_crop_scale": 1}


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    make_shallow(monkeypatch)


@pytest.fixture(scope="module")
def float32_loss(tmp_path_factory):
    """The training loss of LEARNING in float32."""
    flags = [f"{flag}={value}" for flag, value in {**TINY, **LEARNING}.items()]
    with pytest.MonkeyPatch.context() as patch:
        make_shallow(patch)
        _, [row] = train_run([*flags, "--output_dir", str(tmp_path_factory.mktemp("float32"))], patch)
    return row["train_loss"]


@pytest.mark.xdist_group("float32")
@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
def test_16_bit_levels_learn_like_float32(level, float32_loss, tiny_flags, monkeypatch):
    flags = [item for pair in LEARNING.items() for item in pair]
    weights, [row] = train_run(tiny_flags(*flags, "--bf16", "--fp16_opt_level", level), monkeypatch)
    assert row["train_loss"] == pytest.approx(float32_loss, rel=0.06)
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16 if level == "O3" else torch.float32}


def test_on_a_cpu_fp16_means_bfloat16(tiny_flags, monkeypatch):
    flags = ["--num_steps", 3, "--warmup_steps", 0, "--overwrite"]
    float32, by_bf16, by_fp16 = (
        train_run(tiny_flags(*flags, *bits), monkeypatch)[0] for bits in ([], ["--bf16"], ["--fp16"])
    )
    assert_same_bits(by_fp16, by_bf16)
    assert max(differences(by_fp16, float32).values()) > 0


def test_master_weights_take_updates_that_16_bits_would_lose(tiny_flags, monkeypatch):
    flags = ["--bf16", "--learning_rate", 0.01, "--num_steps", 4, "--warmup_steps", 0, "--min_crop_scale", 1]
    masters, _ = train_run(tiny_flags(*flags), monkeypatch)
    changed = differences(masters, initial_weights())
    assert 0 < changed["blocks.0.norm1.weight"] < 1e-3  # bfloat16 has no number between 1 and 1.008
    assert 0 < changed["blocks.0.attn.qkv.weight"] < 1e-3


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
def test_a_static_loss_scale_does_not_change_the_update(level):
    results = []
    for scale in (0.0, 1024.0):
        torch.manual_seed(0)
        model = build_model("ViT-Mini_4", 8, num_layers=1).train()
        torch.nn.init.normal_(model.head.weight)
        before = model.head.weight.detach().clone()
        precision = Precision(level, torch.bfloat16, CPU, scale)
        optimizer = precision.prepare(model, lambda named: torch.optim.SGD([p for _, p in named], lr=0.1))
        images = torch.randn(4, 3, 8, 8)
        with precision.autocast():
            loss = model(precision.inputs(images)).float().square().mean()
        precision.backward(loss)
        precision.step(optimizer, max_grad_norm=1.0)
        results.append(precision.weights()["head.weight"].float())
        assert not torch.equal(results[-1], before)
    torch.testing.assert_close(results[0], results[1], rtol=1e-2, atol=1e-2)


def test_norms_stay_in_float32_at_o2():
    model = build_model("R26-ViT-S_32", 64, num_layers=1)
    Precision("O2", torch.bfloat16, CPU).cast(model)
    for module in model.modules():
        if hasattr(module, "weight"):
            is_norm = isinstance(module, (torch.nn.LayerNorm, torch.nn.GroupNorm))
            assert module.weight.dtype == (torch.float32 if is_norm else torch.bfloat16), module
    assert model(torch.zeros(1, 3, 64, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_step_that_loss_scaling_skips_changes_nothing_and_has_no_gradient_norm():
    """Dynamic scaling: the first gradients overflow, then a step is taken."""
    model = torch.nn.Linear(3, 2)
    precision = Precision("O1", torch.float16, CPU)
    optimizer = precision.prepare(model, lambda named: torch.optim.SGD([p for _, p in named], lr=0.1))
    before = model.weight.detach().clone()
    images, norms = torch.randn(4, 3), []
    for factor in (1e36, 1.0):
        precision.backward(model(images).sum() * factor)
        scale = precision.scaler.get_scale()
        expected = math.sqrt(sum((p.grad.double() / scale).square().sum() for p in model.parameters()))
        norms.append(precision.step(optimizer, max_grad_norm=1.0).item())
        if factor > 1:
            assert torch.equal(model.weight, before)
    assert math.isnan(norms[0])
    assert norms[1] == pytest.approx(expected, rel=1e-5)
    assert not torch.equal(model.weight, before)


@pytest.mark.parametrize("before", ["O0", "O1", "O1 with a static scale"])
@pytest.mark.parametrize("after", ["O0", "O1", "O1 with a static scale"])
def test_a_run_resumes_with_or_without_dynamic_loss_scaling(before, after):
    """A loss scale continues; without one in the checkpoint it begins as in a new run."""

    def scaled(name):
        return Precision(name[:2], torch.float16, CPU, loss_scale=8.0 if "static" in name else 0.0)

    earlier, later = scaled(before), scaled(after)
    if before == "O1":
        earlier.scaler.scale(torch.ones(1))
        earlier.scaler.update(new_scale=2.0)
    later.load_state_dict(json.loads(json.dumps(earlier.state_dict())))
    if after == "O1":
        assert later.scaler.get_scale() == (2.0 if before == "O1" else 2.0**16)


@pytest.mark.parametrize("max_norm", [0.5, 0.0], ids=["clipped", "not clipped"])
@pytest.mark.parametrize("level, bits", [("O0", torch.float32), ("O2", torch.bfloat16)])
def test_the_gradient_norm_is_that_before_clipping(level, bits, max_norm):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    precision = Precision(level, bits, CPU)
    optimizer = precision.prepare(model, lambda named: torch.optim.SGD([p for _, p in named], lr=0.1))
    precision.backward(model(precision.inputs(torch.randn(4, 3))).float().square().sum())
    gradients = torch.cat([p.grad.detach().float().flatten() for p in model.parameters()])
    before = {name: weight.clone() for name, weight in precision.weights().items()}
    assert gradients.norm() > 1
    assert precision.step(optimizer, max_norm).item() == pytest.approx(gradients.norm().item(), rel=1e-3)
    update = torch.cat([(before[name] - weight).flatten() for name, weight in precision.weights().items()])
    assert update.norm().item() == pytest.approx(0.1 * (max_norm or gradients.norm().item()), rel=1e-2)


def test_apex_is_used_where_an_old_build_is_installed(tiny_flags, monkeypatch):
    calls = []

    class ScaledLoss:
        def __init__(self, loss, optimizer):
            self.loss = loss

        def __enter__(self):
            calls.append("scale")
            return self.loss

        def __exit__(self, *error):
            return False

    amp = types.ModuleType("apex.amp")
    amp.initialize = lambda model, optimizer, opt_level, loss_scale: calls.append((opt_level, loss_scale))
    amp.scale_loss = ScaledLoss
    amp.master_params = lambda optimizer: [p for group in optimizer.param_groups for p in group["params"]]
    amp.state_dict = dict
    apex = types.ModuleType("apex")
    apex.amp = amp
    monkeypatch.setitem(sys.modules, "apex", apex)
    monkeypatch.setitem(sys.modules, "apex.amp", amp)
    by_apex, _ = train_run(tiny_flags("--fp16", "--amp_backend", "apex"), monkeypatch)
    assert calls[0] == ("O2", "dynamic")
    assert calls.count("scale") == 12
    plain, _ = train_run(tiny_flags("--overwrite"), monkeypatch)
    assert max(differences(by_apex, plain).values()) < 1e-6
