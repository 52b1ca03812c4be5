"""Convolutions and pooling of feature maps."""

import pytest
import torch

from models.convolution import conv2d, max_pool


@pytest.mark.parametrize("channels, kernel_size", [((5, 7), 1), ((40, 50), 1), ((5, 7), 3)])
@pytest.mark.parametrize("stride", [1, 2])
def test_every_way_to_compute_a_convolution_gives_the_same(channels, kernel_size, stride):
    """Outputs and gradients, with fewer channels than the 6 x 5 pixels and with more."""
    torch.manual_seed(0)
    images = torch.randn(3, channels[0], 6, 5, dtype=torch.float64, requires_grad=True)
    kernels = torch.randn(channels[1], channels[0], kernel_size, kernel_size, dtype=torch.float64, requires_grad=True)
    found = conv2d(images, kernels, stride, kernel_size // 2)
    expected = torch.nn.functional.conv2d(images, kernels, stride=stride, padding=kernel_size // 2)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad(out, (images, kernels), grad) for out in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_pooling_keeps_the_memory_format(memory_format):
    images = torch.randn(2, 3, 9, 8).contiguous(memory_format=memory_format)
    pooled = max_pool(images)
    assert pooled.is_contiguous(memory_format=memory_format)
    assert torch.equal(pooled, torch.nn.functional.max_pool2d(images, 3, 2))
