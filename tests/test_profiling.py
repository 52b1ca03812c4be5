"""What models cost: the counts against closed forms, and the scripts that compare models."""

import re

import torch
from PIL import Image
from torch import nn

from helpers import script, succeed
from utils.profiling import activation_bytes, count_flops, count_parameters

TINY = ("--img_size", 32, "--batch_size", 2, "--precision", "fp32", "--rounds", 1)


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


def test_comparing_models_with_the_accuracy_of_a_run(tiny_flags, tmp_path):
    flags = tiny_flags("--num_steps", 2, "--img_size", 8)
    succeed("train.py", *flags)
    run = tmp_path / "output" / "run"
    picture = tmp_path / "costs.png"
    command = ["benchmarks/compare_models.py", "ViT-Mini_4", "ResNet-Mini_Flops", *TINY, "--runs", run]
    printed = succeed(*command, "--picture", picture)
    vit, resnet = printed.splitlines()[-2:]
    assert re.fullmatch(r"\| ViT-Mini_4 \| 1.206 \| 0.1671 \| [\d.]+ \| [\d.]+ \| [\d.]+ \| [\d.]+ \|", vit)
    assert re.fullmatch(r"\| ResNet-Mini_Flops \| 0.255 \| 0.1197 \| [\d.]+ \| [\d.]+ \| [\d.]+ \|  \|", resnet)
    with Image.open(picture) as image:
        assert image.width > 1000
    done = script("benchmarks/compare_models.py", "ViT-B_16", *TINY, "--runs", run)
    assert done.returncode == 2
    assert "output/run is a run of ViT-Mini_4, which is not among the models to compare" in done.stderr
    done = script("benchmarks/compare_models.py", "ViT-B_16", "--img_size", 100)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_the_throughput_of_a_resnet_beside_timms():
    printed = succeed("benchmarks/throughput.py", "--model_type", "BiT-M-R50x1", *TINY)
    assert len(re.findall(r"\| (forward|training step) \| (this project|timm) \| [\d.]+ \| [\d.]+ \|", printed)) == 4


def test_the_experiment_of_hybrid_and_cnns_goes_on_where_it_stopped(tmp_path):
    command = ["scripts/hybrid_vs_cnn.py", "--dataset", "digits", "--examples_per_class", 2, "--num_steps", 2]
    command += ["--output_dir", tmp_path / "runs", "--figure", tmp_path / "figure.png"]
    command += ["--img_size", 8, "--train_batch_size", 4]
    printed = succeed(*command)
    assert printed.count("20 training and 360 test images") == 3
    rows = re.findall(r"\| (\S+), (hybrid ViT|CNN of [\w ]+) \| [\d.]+ M \| ([\d.]+) G \| [\d.]+ % \|", printed)
    assert [name for name, _, _ in rows] == ["R26-ViT-Mini_4", "ResNet-Mini_Params", "ResNet-Mini_Flops"]
    (tmp_path / "figure.png").unlink()
    first, table = succeed(*command).split("\n", 1)
    assert first == "3 runs, 3 of them finished before"
    assert printed.endswith(table)  # no run is repeated
    assert (tmp_path / "figure.png").exists()
    for flag, value in (("--examples_per_class", 3), ("--num_steps", 4)):
        done = script(*command, flag, value)  # other runs than those that are there
        assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, "")
        assert f"was made with {flag} 2, not {value}; give another --output_dir" in done.stderr
