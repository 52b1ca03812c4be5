"""What models cost: the counts against closed forms, and timing."""

import torch
from torch import nn

from models import build_model
from utils.profiling import (
    activation_bytes,
    count_flops,
    count_parameters,
    count_training_flops,
    markdown_table,
    speed_cells,
    speedup,
    time_interleaved,
    token_reduction_cells,
)

CPU = torch.device("cpu")


def test_flops_and_parameters_of_a_convolution():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(8 * 16, 5))
    assert count_parameters(model) == 8 * 3 * 9 + 8 + 5 * 128 + 5
    assert count_flops(model, 8) == 2 * (16 * 8 * 3 * 9 + 5 * 128)


def test_a_training_step_has_three_times_the_flops_of_a_forward_pass_but_for_what_is_skipped():
    """The backward pass of a layer costs twice its forward pass, without the gradient of the images."""
    with torch.device("meta"):
        layers = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.Linear(32, 10))
        cnn = build_model("ResNet-Mini_Params", 32)
        whole, skipping = (build_model("ViT-Mini_4", 32, norm_type=norm) for norm in ("GN", "LN"))
    assert count_training_flops(layers, 8) == 3 * count_flops(layers, 8) - 2 * 192 * 32
    for model, least, most in ((cnn, 2.9, 3), (whole, 2.9, 3), (skipping, 2.5, 2.7)):
        ratio = count_training_flops(model.train(), 32) / count_flops(model.eval(), 32)
        assert least < ratio <= most


def test_activations_are_what_the_backward_pass_needs():
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(inplace=True), nn.Linear(10, 4), nn.Linear(4, 1))
    x = torch.randn(7, 6)
    # The input, the hidden layer (once, though ReLU and the next layer keep it), the layer after it.
    assert activation_bytes(model, lambda: model(x).sum().backward()) == 4 * 7 * (6 + 10 + 4)


def test_functions_are_timed_interleaved():
    calls, now = [], [0.0]

    def function(name, seconds):
        def call():
            calls.append(name)
            now[0] += seconds

        return call

    functions = {"a": function("a", 1.0), "b": function("b", 3.0)}
    assert time_interleaved(functions, 2, CPU, clock=lambda: now[0]) == {"a": [1.0, 1.0], "b": [3.0, 3.0]}
    assert calls == ["a", "b"] + 2 * ["a", "b"]  # the first calls are the warm-up


def test_speedup_compares_the_times_of_the_same_round():
    assert speedup([1.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == 2.0
    assert speed_cells(12, [3.0, 2.0, 4.0]) == ["4.0", "3.0 to 6.0"]


def test_the_table_of_token_reduction_has_speed_ups_and_the_share_of_the_choice():
    names = [("none", "all"), ("tome", 0.5)]
    seconds = {(names[0], "step"): [4.0, 4.0], (names[1], "step"): [2.0, 2.0], (names[1], "choice"): [0.1, 0.3]}
    titles, cells = token_reduction_cells(names, seconds, batch_size=8)
    assert cells[names[0]] == ["none", "all", "1.00", "2.0", "2.0 to 2.0", "", ""]
    assert cells[names[1]] == ["tome", "0.5", "2.00", "4.0", "4.0 to 4.0", "200.00", "10.0 %"]
    assert len(titles) == 7
    assert markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n|---|---|\n| 1 | 2 |"
