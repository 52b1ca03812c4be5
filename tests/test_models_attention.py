"""Attention in bfloat16 on a CPU, whose weights are saved or computed again a few images at a time, against float64."""

import pytest
import torch

from models import attention
from models.attention import attend


@pytest.mark.parametrize("shape", [(3, 2, 17, 64), (5, 4, 200, 32)])
def test_bfloat16_attention_on_a_cpu_is_as_exact_as_the_fused_kernel(shape, monkeypatch):
    """Outputs and gradients against float64, in one piece and a few images at a time."""
    torch.manual_seed(0)
    exact = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    grad = torch.randn(shape, dtype=torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(*exact)
    expected.backward(grad)
    for at_once, max_saved in ((2**20, 0), (1, 0), (1, 200)):
        monkeypatch.setattr(attention, "MAX_SCORES", at_once)
        monkeypatch.setattr(attention, "MAX_SAVED_TOKENS", max_saved)
        errors = []
        for function in (attention.attend, torch.nn.functional.scaled_dot_product_attention):
            inputs = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
            out = function(*inputs)
            out.backward(grad.bfloat16())
            found = [out, *(tensor.grad for tensor in inputs)]
            wanted = [expected, *(tensor.grad for tensor in exact)]
            errors.append([((a - b).norm() / b.norm()).item() for a, b in zip(found, wanted, strict=True)])
        assert all(ours < 1.5 * fused < 0.02 for ours, fused in zip(*errors, strict=True))


def test_bfloat16_attention_with_sizes_is_exact():
    """Output and gradients of the CPU's own path against the fused kernel in float64."""
    torch.manual_seed(0)
    exact = [torch.randn(3, 2, 17, 64, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    bias = torch.randint(1, 9, (3, 1, 1, 17)).double().log()
    short = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    for inputs in (exact, short):
        attend(*inputs, bias.to(inputs[0].dtype)).square().sum().backward()
    for one, other in zip(exact, short, strict=True):
        assert ((one.grad - other.grad).norm() / one.grad.norm()).item() < 0.02


def test_saved_weights_give_the_bits_of_recomputed_ones(monkeypatch):
    monkeypatch.setattr(attention, "MAX_SCORES", 1)
    recomputed, saved = gradients_of(attend, 0, monkeypatch), gradients_of(attend, 65, monkeypatch)
    assert all(torch.equal(one, other) for one, other in zip(recomputed, saved, strict=True))


@pytest.mark.parametrize("max_saved", [0, 65])
def test_a_compiled_model_calls_attention_as_one_operator_with_the_same_bits(max_saved, monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    compiled = torch.compile(attend, backend=backend, fullgraph=True)
    found, expected = (gradients_of(function, max_saved, monkeypatch) for function in (compiled, attend))
    assert any("bfloat16_attention" in name for name in graphs[0])
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("save", [False, True])
def test_the_operator_of_attention_is_declared_as_it_computes(save):
    """Shapes, gradients and no changed inputs, as torch.library.opcheck tests them."""
    inputs = [torch.randn(3, 2, 5, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    bias = torch.randn(3, 1, 1, 5, dtype=torch.bfloat16)
    torch.library.opcheck(attention.bfloat16_attention, (*inputs, bias, save))


def gradients_of(function, max_saved, monkeypatch):
    """Output and gradients of attention, whose weights are saved for up to `max_saved` tokens."""
    monkeypatch.setattr(attention, "MAX_SAVED_TOKENS", max_saved)
    torch.manual_seed(0)
    inputs = [torch.randn(3, 65, 4, 32).bfloat16().requires_grad_() for _ in range(3)]
    out = function(*(tensor.transpose(1, 2) for tensor in inputs))
    out.backward(torch.randn(3, 65, 4, 32).bfloat16().transpose(1, 2))
    return [out, *(tensor.grad for tensor in inputs)]
