"""What models cost: the counts against closed forms, and timing."""

import torch
from torch import nn

from utils.profiling import activation_bytes, count_flops, count_parameters


def test_flops_and_parameters_of_a_convolution():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(8 * 16, 5))
    assert count_parameters(model) == 8 * 3 * 9 + 8 + 5 * 128 + 5
    assert count_flops(model, 8) == 2 * (16 * 8 * 3 * 9 + 5 * 128)


def test_activations_are_what_the_backward_pass_needs():
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(inplace=True), nn.Linear(10, 4), nn.Linear(4, 1))
    x = torch.randn(7, 6)
    # The input, the hidden layer (once, though ReLU and the next layer keep it), the layer after it.
    assert activation_bytes(model, lambda: model(x).sum().backward()) == 4 * 7 * (6 + 10 + 4)
