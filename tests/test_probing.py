"""Private operators of PyTorch that are missing, raise or give other results: ordinary ones are used instead."""

import importlib.util
import logging
import multiprocessing
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.forward_ad import dual_level

from helpers import ROOT
from models import attention, linear
from models.probing import probe, require_same

needs_onednn = pytest.mark.skipif(not linear.ONEDNN_DTYPES, reason="this CPU does not use oneDNN's operators")


def imported_again(module):
    """A second copy of `module`, which probes the operators as they are now."""
    spec = importlib.util.spec_from_file_location("copy_of_" + module.__name__.replace(".", "_"), module.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def mkldnn(**changes):
    """The operators of torch.ops.mkldnn that are used, with `changes`; None removes one."""
    names = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
    operators = {name: getattr(torch.ops.mkldnn, name) for name in names} | changes
    return SimpleNamespace(**{name: operator for name, operator in operators.items() if operator is not None})


def fail(*args, **kwargs):
    raise RuntimeError("this operator\nhas changed")


def changed(change):
    """torch.ops.mkldnn with `change(result, x, activation)` as the result of a linear layer."""
    original = torch.ops.mkldnn._linear_pointwise

    def linear_pointwise(x, weight, bias, activation, *others):
        return change(original(x, weight, bias, activation, *others), x, activation)

    return lambda: mkldnn(_linear_pointwise=linear_pointwise)


WRONG = 1.015625  # in every type a change by 1 % or more
CHANGES = {
    "linear removed": (lambda: mkldnn(_linear_pointwise=None), "AttributeError"),
    "reorder removed": (lambda: mkldnn(_reorder_linear_weight=None), "AttributeError"),
    "bfloat16 query removed": (lambda: mkldnn(_is_mkldnn_bf16_supported=None), "AttributeError"),
    "all removed": (SimpleNamespace, "AttributeError"),
    "linear raises": (lambda: mkldnn(_linear_pointwise=fail), "RuntimeError: this operator;"),
    "reorder raises": (lambda: mkldnn(_reorder_linear_weight=fail), "RuntimeError: this operator;"),
    "bfloat16 query raises": (lambda: mkldnn(_is_mkldnn_bf16_supported=fail), "RuntimeError: this operator;"),
    "wrong layout": (lambda: mkldnn(_reorder_linear_weight=lambda weight, rows: weight.flip(0)), "results differ"),
    "wrong": (changed(lambda result, x, activation: WRONG * result), "results differ"),
    "wrong GELU": (
        changed(lambda result, x, activation: WRONG * result if activation == "gelu" else result),
        "results differ",
    ),
    "slightly other GELU": (  # as by the error function instead of tanh
        changed(lambda result, x, activation: result + 3e-4 * (activation == "gelu")),
        "results differ",
    ),
    "wrong with few rows": (
        changed(lambda result, x, activation: WRONG * result if len(x) < 9 else result),
        "results differ",
    ),
    "wrong in bfloat16": (
        changed(lambda result, x, activation: WRONG * result if x.dtype == torch.bfloat16 else result),
        "results differ",
    ),
    "other type": (changed(lambda result, x, activation: result.double()), "float64"),
    "other shape": (changed(lambda result, x, activation: result[1:]), "(1023, 24)"),
    "not a number": (changed(lambda result, x, activation: torch.nan * result), "nan"),
}


@needs_onednn
@pytest.mark.parametrize("change", CHANGES)
def test_changed_operators_of_onednn_are_not_used(change, monkeypatch, caplog):
    if "bfloat16" in change and torch.bfloat16 not in linear.ONEDNN_DTYPES:
        pytest.skip("this CPU has no bfloat16")
    operators, message = CHANGES[change]
    monkeypatch.setattr(torch.ops, "mkldnn", operators())
    copy = imported_again(linear)
    assert copy.ONEDNN_DTYPES == ()
    (warning,) = warnings_of(caplog)
    assert warning.startswith("oneDNN's linear layers: ") and message in warning and "\n" not in warning
    layer, x = copy.Linear(8, 4), torch.randn(2, copy.MIN_ROWS, 8)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    with torch.no_grad():
        expected = F.gelu(F.linear(x, layer.weight, layer.bias), approximate="tanh")
        assert torch.equal(copy.linear_gelu(x, layer), expected)


@pytest.mark.parametrize("how", ["removed", "raises", "wrong"])
@pytest.mark.parametrize("name", ["_are_functorch_transforms_active", "_current_level", "is_tracing"])
def test_without_the_detection_of_transforms_only_ordinary_operators_are_used(name, how, monkeypatch, caplog):
    if name == "_current_level":  # PyTorch itself needs it, so only the view of models.linear changes
        levels = {"removed": {}, "raises": {"_current_level": None}, "wrong": {"_current_level": -1}}
        monkeypatch.setattr("torch.autograd.forward_ad", SimpleNamespace(dual_level=dual_level, **levels[how]))
    elif how == "removed":
        monkeypatch.delattr(torch.jit if name == "is_tracing" else torch._C, name)
    else:
        wrong = {"raises": fail, "wrong": lambda: name == "is_tracing"}
        monkeypatch.setattr(torch.jit if name == "is_tracing" else torch._C, name, wrong[how])
    copy = imported_again(linear)
    assert (copy.DETECTS_TRANSFORMS, copy.ONEDNN_DTYPES) == (False, ())
    (warning,) = warnings_of(caplog)
    assert warning.startswith("PyTorch's detection of transforms: ")
    for dtype in (torch.float32, torch.bfloat16):
        layer, x = copy.Linear(8, 4).to(dtype), torch.randn(2, copy.MIN_ROWS, 8, dtype=dtype)
        expected = F.gelu(F.linear(x, layer.weight, layer.bias), approximate="tanh")
        assert torch.equal(copy.linear_gelu(x, layer), expected)
        with torch.no_grad():
            assert torch.equal(copy.linear_gelu(x, layer), expected)


@needs_onednn
@pytest.mark.parametrize(
    "owner, name, value",
    [
        (torch.backends.cpu, "get_cpu_capability", fail),
        (torch.backends.mkldnn, "is_available", fail),
        ("torch.utils.flop_counter", "register_flop_formula", fail),
        ("torch.utils.flop_counter", "flop_registry", None),
    ],
    ids=["capability", "availability", "FLOP formula", "FLOP registry"],
)
def test_failing_queries_do_not_break_the_import(owner, name, value, monkeypatch, caplog):
    if isinstance(owner, str):
        monkeypatch.setattr(f"{owner}.flop_registry", {})
        monkeypatch.setattr(f"{owner}.{name}", value)
    else:
        monkeypatch.setattr(owner, name, value)
    assert imported_again(linear).ONEDNN_DTYPES == ()
    assert len(warnings_of(caplog)) == 1


def test_another_cpu_is_no_reason_for_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert imported_again(linear).ONEDNN_DTYPES == ()
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("how", ["removed", "raises", "wrong"])
def test_a_changed_gradient_of_softmax_is_not_used(how, monkeypatch, caplog):
    changed = {"raises": fail, "wrong": lambda grad, weights, dim, dtype: grad * weights}
    if how == "removed":
        monkeypatch.delattr(torch, "_softmax_backward_data")
    else:
        monkeypatch.setattr(torch, "_softmax_backward_data", changed[how])
    copy = imported_again(attention)
    assert not copy.CHUNKED_ATTENTION
    (warning,) = warnings_of(caplog)
    assert warning.startswith("PyTorch's gradient of softmax: ")
    tensors = [torch.randn(2, 3, 5, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    found, expected = copy.attend(*tensors), F.scaled_dot_product_attention(*tensors)
    assert torch.equal(found, expected)
    for a, b in zip(*(torch.autograd.grad(out.sum(), tensors) for out in (found, expected)), strict=True):
        assert torch.equal(a, b)


def test_unchanged_operators_are_used_without_a_warning(caplog):
    assert imported_again(linear).ONEDNN_DTYPES == linear.ONEDNN_DTYPES
    assert imported_again(attention).CHUNKED_ATTENTION and linear.DETECTS_TRANSFORMS
    assert warnings_of(caplog) == []


def test_the_modes_of_the_importing_code_do_not_matter(monkeypatch, caplog):
    """A default device or type, autocast, inference mode, and a counter, which does not count what is probed."""
    from torch.utils.flop_counter import FlopCounterMode

    torch.set_default_dtype(torch.float64)
    try:
        with (
            torch.device("meta"),
            torch.autocast("cpu", torch.bfloat16),
            torch.inference_mode(),
            FlopCounterMode(display=False) as counter,
        ):
            copies = imported_again(linear), imported_again(attention)
    finally:
        torch.set_default_dtype(torch.float32)
    assert copies[0].ONEDNN_DTYPES == linear.ONEDNN_DTYPES and copies[1].CHUNKED_ATTENTION
    assert (counter.get_total_flops(), warnings_of(caplog)) == (0, [])


def test_probing_draws_no_random_numbers():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    imported_again(linear), imported_again(attention)
    assert torch.equal(torch.get_rng_state(), before)


def test_results_must_have_the_same_shape_and_type_and_be_near():
    x = torch.arange(4.0)
    require_same(x + 1e-7, x, 1e-6)
    for other in (x + 1e-3, x[:3], x.double(), x * torch.nan):
        with pytest.raises(ArithmeticError):
            require_same(other, x, 1e-6)
    assert probe("nothing", lambda: 3, 4) == 3


FORK = """
import os, sys, torch
from models.linear import ONEDNN_DTYPES, Linear
torch.set_num_threads(2)
child = os.fork()
if not child:
    Linear(256, 256)(torch.ones(4096, 256)).sin().sum()
    os._exit(0)
sys.exit(os.waitpid(child, 0)[1])
"""


@pytest.mark.slow
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_a_process_forked_after_the_import_computes_with_several_threads():
    """It would wait without end for OpenMP threads that the probe had started in its parent's main thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", FORK], cwd=ROOT, env=environment, check=True, timeout=60)


WITHOUT_PRIVATE_OPERATORS = """
import sys, types
import numpy as np, torch
torch.set_num_threads(1)
torch.ops.mkldnn = types.SimpleNamespace()
del torch._softmax_backward_data

def for_pytorch_only(original=torch._C._are_functorch_transforms_active):
    if sys._getframe(1).f_globals["__name__"].startswith("models"):
        raise AttributeError("_are_functorch_transforms_active")
    return original()

torch._C._are_functorch_transforms_active = for_pytorch_only
sys.path.insert(0, "tests")
from models import build_model
from synthetic import load_fixture, make_checkpoint, make_images
fixture = load_fixture("ViT-Ti_16")
model = build_model(fixture["model"], fixture["img_size"], fixture["num_classes"]).eval()
model.load_from(make_checkpoint(fixture["shapes"]), head="keep")
images = torch.from_numpy(make_images(fixture["img_size"], fixture["batch"]))
expected = torch.tensor(fixture["logits"], dtype=torch.float64)
for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
    model.to(dtype)
    logits = model(images.to(dtype))
    with torch.no_grad():
        for found in (logits, model(images.to(dtype))):
            assert (found.double() - expected).norm() / expected.norm() < bound, dtype
    logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    model.zero_grad()
"""


def test_a_pytorch_without_private_operators_gives_the_official_logits():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PRIVATE_OPERATORS], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("ordinary, slower operators are used instead") == 2, done.stderr
