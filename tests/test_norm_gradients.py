"""Gradients by depth: the numbers against finite differences, the table and the figure from the file of results."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from helpers import ROOT, random_model
from models import NORM_TYPES
from utils.gradients import block_gradient_norms

sys.path.insert(0, str(ROOT / "scripts"))
import norm_gradients

STEP = 3e-3  # along the unit vector of a gradient
TOY = ["--dataset", "digits", "--img_size", 8, "--batch_size", 6, "--depths", 1, 3, "--seeds", 0, 4]


@pytest.mark.parametrize("norm", NORM_TYPES)
def test_the_norm_of_a_block_is_the_slope_of_the_loss_along_its_gradient(norm):
    """By a central difference, in float32 as the norms compute."""
    model = random_model("ViT-Mini_4", 8, 3, norm, num_layers=2).train()
    torch.manual_seed(0)
    images, labels = torch.randn(5, 3, 8, 8), torch.tensor([0, 1, 2, 1, 0])
    norms = block_gradient_norms(model, images, labels)
    assert len(norms) == 2
    for block, expected in zip(model.blocks, norms, strict=True):
        weights = list(block.parameters())
        gradients = torch.autograd.grad(F.cross_entropy(model(images), labels), weights)
        directions = [(weight, gradient / expected) for weight, gradient in zip(weights, gradients, strict=True)]
        losses = []
        for step in (STEP, -2 * STEP):
            for weight, direction in directions:
                weight.data += step * direction
            losses.append(F.cross_entropy(model(images), labels).item())
        for weight, direction in directions:
            weight.data += STEP * direction
        assert (losses[0] - losses[1]) / (2 * STEP) == pytest.approx(expected, rel=0.02)


def test_the_results_are_drawn_again_without_data(run_main, tmp_path):
    flags = [*TOY, "--results", tmp_path / "new" / "results"]
    run_main(norm_gradients, *flags)
    results = tmp_path / "new" / "results"
    runs = json.loads((results / "gradients.json").read_text())["runs"]
    assert [(run["depth"], run["norm"], run["seed"]) for run in runs] == [
        (depth, norm, number) for depth in (1, 3) for norm in NORM_TYPES for number in (0, 4)
    ]
    assert all(len(run["gradients"]) == run["depth"] and min(run["gradients"]) > 0 for run in runs)
    table = (results / "table.md").read_text()
    assert "6 training images of digits at 8x8, float32, seeds 0, 4; torch" in table
    first, last = (norm_gradients.mean_and_span([run["gradients"][i] for run in runs[8:10]]) for i in (0, -1))
    assert f"| 3 | {NORM_TYPES[0]} | {first} | {last} | " in table
    (results / "gradients.png").unlink()
    assert table in run_main(norm_gradients, *flags, "--draw", "--data_dir", "/nowhere")
    with Image.open(results / "gradients.png") as image:
        assert min(image.size) > 300


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--img_size", 9], "image size 9 is not a multiple"),
        (["--depths", 0], "0 is not a whole number above 0"),
        (["--draw"], "gradients.json does not exist; omit --draw to measure"),
        (["--dataset", "imagefolder", "--data_dir", "/nowhere"], "/nowhere is not a folder"),
    ],
)
def test_mistakes_are_one_line(flags, message, main_fails, tmp_path):
    assert message in main_fails(norm_gradients, *TOY, *flags, "--results", tmp_path / "results")
    assert not (tmp_path / "results").exists()
