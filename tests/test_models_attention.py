"""Attention in bfloat16 on a CPU, which is computed a few images at a time, against float64."""

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
