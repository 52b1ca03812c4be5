"""Linear layers and GELU by a CPU's own kernels, against float64."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from models import build_model, linear
from models.linear import GELUWithDerivative, Linear, gelu

BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 6e-3}  # of relative errors in the Euclidean norm
ROWS = (2, linear.MIN_ROWS // 2)


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("rows, min_weights", [((3, 7), 1), (ROWS, 1), (ROWS, 2**18)])
def test_linear_and_its_gradients(dtype, rows, min_weights, monkeypatch):
    """With few rows and with many, with weights that are so large that they are reordered and with smaller ones."""
    monkeypatch.setattr(linear, "MIN_WEIGHTS_TO_REORDER", min_weights)
    by_onednn = count_calls(monkeypatch, linear.OneDNNLinear, "apply")
    torch.manual_seed(0)
    layer = Linear(48, 80).to(dtype)
    x = torch.randn(*rows, 48, dtype=dtype, requires_grad=True)
    grad = torch.randn(*rows, 80, dtype=dtype)
    exact_layer, exact_x = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    exact = F.linear(exact_x, exact_layer.weight, exact_layer.bias)
    exact.backward(grad.double())

    out = layer(x)
    out.backward(grad)
    assert len(by_onednn) == (rows == ROWS and dtype in linear.ONEDNN_DTYPES)
    pairs = [(out, exact), (x.grad, exact_x.grad)]
    pairs += [(p.grad, q.grad) for p, q in zip(layer.parameters(), exact_layer.parameters(), strict=True)]
    for found, wanted in pairs:
        assert found.dtype == dtype
        assert error(found.detach(), wanted.detach()) < BOUNDS[dtype]


def test_a_frozen_layer_gets_no_gradients():
    layer = Linear(48, 80).requires_grad_(False)
    x = torch.randn(*ROWS, 48, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is layer.bias.grad is None
    assert torch.allclose(x.grad, layer.weight.sum(0).expand_as(x), atol=1e-5)


def test_second_derivatives_and_transforms_in_float32():
    """As in any PyTorch model: the product of a Hessian, and per-sample gradients of torch.func."""
    torch.manual_seed(0)
    layer = Linear(8, 4)
    x = torch.randn(*ROWS, 8, requires_grad=True)
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)  # of |Wx + b|^2: 2 W^T W, summed over its rows
    expected = 2 * (layer.weight.T @ layer.weight).sum(0)
    assert torch.allclose(second, expected.expand_as(second), atol=1e-4)

    each = torch.func.vmap(torch.func.grad(lambda sample: gelu(layer(sample)).sum()))(x.detach())
    (together,) = torch.autograd.grad(gelu(layer(x)).sum(), x)
    assert torch.allclose(each, together, atol=1e-5)

    out = layer(x)
    (batched,) = torch.autograd.grad(out, x, torch.stack([out, 2 * out]).detach(), is_grads_batched=True)
    assert torch.allclose(batched, torch.stack([first, 2 * first]) / 2, atol=1e-5)

    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        direction = torch.randn_like(x)
        dual = torch.autograd.forward_ad.make_dual(x.detach(), direction)
        tangent = torch.autograd.forward_ad.unpack_dual(linear.linear_gelu(dual, layer)).tangent
    _, expected = torch.func.jvp(
        lambda x: F.gelu(F.linear(x, layer.weight, layer.bias), approximate="tanh"), (x,), (direction,)
    )
    assert torch.allclose(tangent, expected, atol=1e-5)


def test_flops_and_traces_with_many_rows_are_those_with_few():
    """By torch.utils.flop_counter and torch.jit.trace."""
    torch.manual_seed(0)
    layer, few, many = Linear(8, 4), torch.randn(3, 8), torch.randn(*ROWS, 8)
    for x in (few, many):
        with FlopCounterMode(display=False) as counter:
            layer(x)
            with torch.no_grad():
                linear.linear_gelu(x, layer)
        assert counter.get_total_flops() == 2 * 2 * x.numel() * 4
    traced = torch.jit.trace(layer, many)
    assert torch.allclose(traced(few), layer(few), atol=1e-6)


def test_a_wrong_size_raises_the_error_of_pytorch():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Linear(8, 4)(torch.randn(*ROWS, 9))


@pytest.mark.parametrize("at_once", [linear.CHUNK_SIZE, 100])
def test_gelu_and_its_derivative_in_bfloat16(at_once, monkeypatch):
    """Every bfloat16 number up to a million, rounded once, against float64 by tanh."""
    monkeypatch.setattr(linear, "CHUNK_SIZE", at_once)
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    x = numbers[numbers.abs() < 1e6].requires_grad_()
    assert len(x) > 30_000
    exact = x.detach().double().requires_grad_()
    gelu_by_tanh(exact).sum().backward()
    out = gelu(x)
    out.sum().backward()
    for found, wanted in ((out, gelu_by_tanh(exact)), (x.grad, exact.grad)):
        found, wanted = found.detach().double(), wanted.detach()
        # half a unit in the last of bfloat16's 8 binary digits, or what float32 leaves of a difference of almost equals
        assert ((found - wanted).abs() <= wanted.abs() * 2**-8 + 1e-6).all()


def test_gelu_in_bfloat16_has_no_second_derivative():
    """An error, not a wrong number: the derivative is saved as a constant."""
    x = torch.randn(5, dtype=torch.bfloat16, requires_grad=True)
    (slope,) = torch.autograd.grad(GELUWithDerivative.apply(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("rows", [(3, 65), ROWS])
def test_mlps_are_the_same_with_and_without_gradients(dtype, rows):
    """Without gradients, a CPU computes the first layer and the GELU in one kernel."""
    torch.manual_seed(0)
    mlp = build_model("ViT-Mini_4", 32, hidden_size=32, mlp_dim=64, num_heads=2, num_layers=1).blocks[0].mlp.to(dtype)
    x = torch.randn(*rows, 32, dtype=dtype)
    exact_mlp = copy.deepcopy(mlp).double()
    exact = exact_mlp.fc2(gelu_by_tanh(exact_mlp.fc1(x.double()))).detach()
    with_gradients = mlp(x)
    with torch.no_grad():
        without = mlp(x)
    for found in (with_gradients, without):
        assert found.dtype == dtype
        assert error(found.detach(), exact) < BOUNDS[dtype]


def gelu_by_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def count_calls(monkeypatch, owner, name):
    """A list that grows by one item per call of `owner.name`, which still does what it did."""
    calls = []
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args: (calls.append(args), original(*args))[1])
    return calls
