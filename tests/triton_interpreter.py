"""Triton kernels in Triton's interpreter, on the CPU: for a process of its own (test_triton_kernels.py).

Triton decides once, when it is imported, if kernels are interpreted: by TRITON_INTERPRET.
"""

import pytest
import torch

from models import facility_location_kernel, group_norm_kernel, norms
from models.facility_location import facility_location
from models.group_norm_kernel import torch_group_norm
from models.token_reduction import similarity


def keys_with_ties(tokens):
    """Keys (2, tokens, 8) of which some are equal, so that several tokens gain the same, or nothing."""
    keys = torch.randn(2, tokens, 8, generator=torch.Generator().manual_seed(tokens))
    keys[:, tokens // 2] = keys[:, 1]
    keys[1, -3:] = keys[1, :1]
    return keys


@pytest.mark.parametrize("kernel", [facility_location_kernel, group_norm_kernel])
def test_the_trial_succeeds_and_finds_wrong_results(kernel, monkeypatch):
    kernel.trial("cpu")
    right = kernel.apply
    monkeypatch.setattr(kernel, "apply", lambda *given: right(*given) + 1)
    with pytest.raises(ArithmeticError):
        kernel.trial("cpu")


@pytest.mark.parametrize("tokens, k, tile", [(16, 4, 8192), (9, 9, 32), (21, 7, 64), (5, 1, 8)])
def test_picks_are_those_of_pytorchs_operators(tokens, k, tile, monkeypatch):
    """Also over several tiles whose size does not divide the tokens."""
    monkeypatch.setattr(facility_location_kernel, "TILE", tile)
    s = similarity(keys_with_ties(tokens))
    expected = facility_location(s.double(), k)
    assert torch.equal(facility_location_kernel.apply(s, k), expected)
    assert torch.equal(facility_location_kernel.apply(s.double(), k), expected)


def test_rows_are_candidates():
    """Of similarities that are neither symmetric nor contiguous."""
    s = torch.rand(2, 12, 12, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
    assert torch.equal(facility_location_kernel.apply(s, 5), facility_location(s.double(), 5))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    "dtype, shape, groups, sizes",
    [
        (torch.float32, (2, 7, 12), 4, (64, 8, 8)),  # two blocks of channels, parts of one tile, the last one shorter
        (torch.float32, (1, 37, 8), 2, (32, 512, 4)),  # parts of several tiles
        (torch.bfloat16, (3, 4, 16), 16, (4096, 512, 1024)),  # groups of one channel
    ],
)
def test_group_norm_is_that_of_float64(dtype, shape, groups, sizes, relu, monkeypatch):
    """Values, and gradients of the input, weight and bias; the input's mean is far from 0."""
    for name, size in zip(("TILE", "MAX_CHANNELS", "PROGRAMS"), sizes, strict=True):
        monkeypatch.setattr(group_norm_kernel, name, size)
    torch.manual_seed(0)
    x = (torch.randn(shape) + 20 * torch.randn(shape[2])).to(dtype)
    weight, bias, gradient = torch.randn(shape[2]), torch.randn(shape[2]), torch.randn(shape).to(dtype)
    inputs = [value.clone().requires_grad_() for value in (x, weight, bias)]
    y = group_norm_kernel.apply(*inputs, groups, 1e-5, relu)
    y.backward(gradient)
    doubles = [value.double().requires_grad_() for value in (x, weight, bias)]
    expected = torch_group_norm(*doubles, groups, 1e-5, relu)
    expected.backward(gradient.double())
    bound = 2e-5 if dtype == torch.float32 else 0.01
    pairs = [(y, expected), *((ours.grad, theirs.grad) for ours, theirs in zip(inputs, doubles, strict=True))]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=bound * theirs.abs().max().item())
    assert y.dtype == inputs[0].grad.dtype == dtype


@pytest.mark.parametrize("relu", [False, True])
def test_group_norm_of_channels_last_maps_uses_the_kernel(relu, monkeypatch):
    used = []

    def apply(*given):
        used.append(given[0].shape)
        return group_norm_kernel.apply(*given)

    torch.manual_seed(0)
    norm = norms.GroupNorm(8, 1e-5, 4)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(2, 8, 3, 5).contiguous(memory_format=torch.channels_last)
    expected = norm(x, relu)
    monkeypatch.setattr(norms, "kernel_for", lambda x: apply)
    y = norm(x, relu)
    assert used == [(2, 15, 8)] and y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(norm(x.contiguous(), relu), expected)
    assert len(used) == 1
