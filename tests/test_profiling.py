"""What models cost: the counts against closed forms, and timing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from command_line import train_parser
from models import build_model
from utils.profiling import (
    TimedStep,
    activation_bytes,
    count_flops,
    count_parameters,
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


def test_a_timed_step_is_a_training_step_without_dropout():
    """Two steps of momentum SGD, clipped; a forward pass between them changes nothing."""
    torch.manual_seed(0)
    model = build_model("ViT-Nano_4", 8, num_classes=3, dropout_rate=0.5, drop_path_rate=0.5, num_layers=2)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    reference = copy.deepcopy(model).eval()  # no dropout either
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    flags = ["--name", "run", "--learning_rate", "0.1", "--warmup_steps", "0", "--max_grad_norm", "0.5"]
    step = TimedStep(model, train_parser().parse_args(flags), 3, CPU)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        loss = F.cross_entropy(reference(images), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        optimizer.step()
        step.train(images, labels)
        torch.testing.assert_close(step.forward(images), reference(images))
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_table_of_token_reduction():
    names = [("none", "all"), ("tome", 0.5)]
    seconds = {(names[0], "step"): [4.0, 4.0], (names[1], "step"): [2.0, 2.0], (names[1], "choice"): [0.1, 0.3]}
    titles, cells = token_reduction_cells(names, seconds, batch_size=8)
    assert cells[names[0]] == ["none", "all", "1.00", "2.0", "2.0 to 2.0", "", ""]
    assert cells[names[1]] == ["tome", "0.5", "2.00", "4.0", "4.0 to 4.0", "200.00", "10.0 %"]
    assert len(titles) == 7
    assert markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n|---|---|\n| 1 | 2 |"


@pytest.mark.parametrize("name", ["ViT-Nano_4", "ResNet-Mini_Flops"])
def test_activations_of_a_timed_step_can_be_counted(name):
    """A batch of three keeps more than one of two by the same as two more than one."""
    step = TimedStep(build_model(name, 32), train_parser().parse_args(["--name", "run"]), 10, CPU)
    images, labels = torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 2])
    one, two, three = (activation_bytes(step.model, lambda n=n: step.train(images[:n], labels[:n])) for n in (1, 2, 3))
    assert three - two == two - one > 0
