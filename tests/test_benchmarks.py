"""The benchmarks through the shell, as small as they go, and the check that the others compute what ours does."""

import json
import re
import sys

import pytest
import torch
from torch import nn

from helpers import ROOT, call_main, succeed
from models import build_model
from models.configs import VITS
from utils.errors import UserError
from utils.records.run_folder import read_metrics

sys.path.insert(0, str(ROOT / "benchmarks"))
import kernels
import peers
import scaling
import steps
import throughput

SMALL = ("--img_size", 32, "--batch_size", 2, "--rounds", 1)


def test_throughput_of_several_models_and_levels(tmp_path):
    command = ["benchmarks/throughput.py", "--model_type", "ViT-Ti_16", "ViT-S_32", *SMALL, "--precision", "bf16"]
    files = ["--json", tmp_path / "speed.json", "--output", tmp_path / "speed.md"]
    printed = succeed(*command, "--batch_size", 1, 2, "--fp16_opt_level", "O1", "O2", *files)
    results = json.loads((tmp_path / "speed.json").read_text())
    assert [(result["model_type"], result["batch_size"]) for result in results] == [
        (model_type, batch_size) for model_type in ("ViT-Ti_16", "ViT-S_32") for batch_size in (1, 2)
    ]
    for result in results:
        rows = {(row["model"], row["pass"]): row for row in result["rows"]}
        assert {("this project, O1", "training step"), ("this project, O2", "forward")} < set(rows)
        assert rows["timm", "forward"]["x_timm"] == rows["timm", "training step"]["x_timm"] == 1
        ours = rows["this project, O2", "training step"]
        # the FLOPs of ours and of the product are counted alike, so shares are as images/s
        for other in (rows["timm", "training step"], rows["this project, O1", "training step"]):
            shares = ours["share_of_matrix_product"] / other["share_of_matrix_product"]
            assert shares == pytest.approx(ours["images_per_second"] / other["images_per_second"])
    assert (tmp_path / "speed.md").read_text().strip() == printed.strip()
    assert len(re.findall(r"^\| training step \| timm \| 1\.00 \| [\d.]+ \|", printed, re.MULTILINE)) == 4


def test_throughput_refuses_what_a_cpu_can_not_measure(tmp_path, monkeypatch, capsys):
    for flags, what in (
        (("--precision", "bf16", "fp16"), "--precision fp16 needs a GPU"),
        (("--batch_size", "max"), "no --batch_size is left"),
        (("--json", tmp_path / "nowhere" / "speed.json"), "can't be written"),
        (("--img_size", 100), "image size 100"),
    ):
        with pytest.raises(SystemExit, match="2"):
            call_main(throughput, flags, monkeypatch)
        printed = capsys.readouterr()
        assert printed.out == ""
        assert what in printed.err.splitlines()[-1]


@pytest.mark.parametrize("name, package", [("timm", "timm"), ("transformers", None), ("vit-pytorch", "vit_pytorch")])
def test_a_peer_that_computes_something_else_is_named(name, package):
    """The right one passes, and one change that its speed would not show is an error."""
    pytest.importorskip(package or name)
    model = build_model("ViT-Ti_16", 32, num_layers=2)
    makers = {"timm": peers.timms, "transformers": peers.transformers_vit, "vit-pytorch": peers.lucidrains_vit}
    peers.randomise(model)
    try:
        theirs, reference = with_fitting_depth(makers[name], model)
    except ImportError as error:
        pytest.skip(str(error))
    peers.check(name, theirs, reference, 32)
    norms = [module for module in theirs.modules() if isinstance(module, nn.LayerNorm)]
    norms[1].eps = 1e-3
    with pytest.raises(UserError, match=f"^{name} does not compute what ours does"):
        peers.check(name, theirs, reference, 32)


def with_fitting_depth(make, model):
    """timm's name stands for twelve blocks; ours has fewer to be quick."""
    if make is not peers.timms:
        return make("ViT-Ti_16", model, 32)
    gelu = {"act_layer": lambda: nn.GELU(approximate="tanh")}
    theirs = peers.timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=10, **gelu)
    theirs.load_state_dict(model.state_dict())
    return theirs, model


def test_every_weight_is_checked():
    """A weight of zeros would hide what it is multiplied with."""
    model = build_model("R26-ViT-S_32", 64, num_layers=1)
    peers.randomise(model)
    assert all(parameter.count_nonzero() > 0.99 * parameter.numel() for parameter in model.parameters())


def test_the_memory_of_a_level():
    """O2 keeps weights and their gradients in 16 bits, masters, their gradients and momenta in 32."""
    for level, precision, (weights, gradients, optimizer) in (
        (None, "fp32", (4, 4, 4)),
        ("O2", "bf16", (2, 6, 8)),
    ):
        model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 10))
        step = steps.OurStep(model, precision, level, torch.device("cpu"))
        batch = steps.random_batch(2, 4, torch.device("cpu"))
        step.train(*batch)
        count = 10 * 3 * 4 * 4 + 10
        expected = {"weights": weights * count, "gradients": gradients * count, "optimizer": optimizer * count}
        assert steps.state_bytes(model, step.optimizer) == expected
        assert steps.training_memory(step, *batch) > sum(expected.values())


def test_end_to_end():
    flags = ["--img_size", 32, "--batch_size", 4, "--num_steps", 4, "--first_steps", 2, "--rounds", 1]
    printed = succeed("benchmarks/end_to_end.py", *flags, "--pictures", 20, "--num_workers", 1)
    rows = re.findall(r"^\| (the model's step alone|train.py|timm's loop) \| [\d.]+ \|", printed, re.MULTILINE)
    assert len(rows) == 3
    assert re.search(r"^\| train.py \| .* \| [\d.]+% \(.*\) \| [\d.]+ \(.*\) \|$", printed, re.MULTILINE)


def test_growth(tmp_path):
    """Parts add up to the floor, checkpointing keeps fewer activations and nothing else, and a figure is drawn."""
    sizes = ["--model_type", "ViT-Mini_4", "--model_types", "ViT-Nano_4", "--batch_sizes", 1, "--img_sizes", 64]
    picture = tmp_path / "growth.png"
    printed = succeed("benchmarks/growth.py", *SMALL, *sizes, "--precision", "fp32", "--picture", picture)
    number = r"\| ([\d,]+) "
    rows = re.findall(r"^\| \S+ \| \d+ \| \d+ \| (training step|with --\w+) \| .*? to \S+ " + 5 * number, printed, re.M)
    memory = [[int(cell.replace(",", "")) for cell in cells] for _, *cells in rows]
    assert len(rows) == 6
    for plain, checkpointing in zip(memory[::2], memory[1::2], strict=True):
        assert plain[:3] == checkpointing[:3]
        assert plain[3] > checkpointing[3]
        for *parts, floor in (plain, checkpointing):
            assert floor == pytest.approx(sum(parts), abs=2)  # each is rounded
    assert picture.stat().st_size > 10000


def test_the_fast_path_beside_float32(tmp_path):
    flags = ["--dataset", "digits", "--model_type", "ViT-Mini_4", "--img_size", 8, "--train_batch_size", 4]
    flags += ["--num_steps", 2, "--seeds", 3, "--output_dir", tmp_path, "--figure", tmp_path / "figure.png"]
    printed = succeed("scripts/fast_path.py", *flags)
    assert "\nViT-Mini_4 on 1000 images a class of digits, 2 steps of 4 at 8x8, seeds 3; the fast path is" in printed
    assert (tmp_path / "figure.png").stat().st_size > 10000
    rows = re.findall(r"^\| (float32|the fast path) \| ([\d.]+) \(.*?\) \| ([\d.]+) \(", printed, re.MULTILINE)
    assert [name for name, _, _ in rows] == ["float32", "the fast path"]
    losses = [read_metrics(tmp_path / f"{name}-seed3")["test_loss"][-1] for name in ("float32", "fast")]
    assert 0 < abs(losses[0] - losses[1]) < 0.05  # other numbers, but not very
    assert [float(loss) for _, loss, _ in rows] == [round(loss, 4) for loss in losses]
    difference = float(re.search(r"^test loss: .* means differ by (\S+),", printed, re.MULTILINE)[1])
    assert difference == pytest.approx(losses[1] - losses[0], abs=2e-4)


@pytest.mark.parametrize("task, shown", [("training", 6), ("forward", 500)])
def test_the_table_of_kernels_is_the_whole_step(task, shown):
    size = ["--model_type", "ViT-Mini_4", "--img_size", 32, "--batch_size", 4]
    printed = succeed("benchmarks/kernels.py", *size, "--rounds", 2, "--task", task, "--rows", shown)
    of_a_step = float(re.search(r", ([\d.]+) ms of them here", printed)[1])
    rows = re.findall(r"^\| (.+) \| ([\d.]+)% \| ([\d.]+) \| (\d+) \|$", printed, re.MULTILINE)
    names, shares, milliseconds, calls = zip(*rows, strict=True)
    assert sum(map(float, shares)) == pytest.approx(100, abs=0.1 * len(rows))
    assert sum(map(float, milliseconds)) == pytest.approx(of_a_step, abs=0.1 + 0.01 * len(rows))
    if task == "training":
        assert len(rows) == shown + 1
        assert names[-1].endswith(" others")
    else:  # two norms a block, and the last one
        assert int(calls[names.index("aten.native_layer_norm.default")]) == 2 * VITS["ViT-Mini_4"].num_layers + 1


def test_compiled_operators_of_a_cpu_are_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        call_main(kernels, ["--compile"], monkeypatch)
    assert "--compile needs a GPU here" in capsys.readouterr().err.splitlines()[-1]


def test_startup_tells_all_of_the_time():
    flags = ["--model_type", "ViT-Mini_4", "--img_size", 8, "--dataset", "digits", "--rounds", 1]
    phases, imports = succeed("benchmarks/startup.py", *flags).split("\n\n")[1:3]
    for table in (phases, imports):
        seconds = {name: float(value) for name, value in re.findall(r"^\| (.+?) \| ([\d.]+) \|", table, re.MULTILINE)}
        total = seconds.pop("total")
        assert sum(seconds.values()) == pytest.approx(total, abs=0.01 * len(seconds))
    assert "| checkpoint |" in phases
    assert "| torch |" in imports


def test_the_input_pipeline_beside_timms():
    flags = ["--pictures", 16, "--batch_size", 4, "--img_size", 32, "--rounds", 1, "--num_workers", 0, 1]
    printed = succeed("benchmarks/data_loading.py", *flags)
    rows = re.findall(r"^\| ([01]) \| (this project|timm) \| ([\d.]+) \| ([\d.]+) \|", printed, re.MULTILINE)
    assert [row[:2] for row in rows] == [(n, name) for n in "01" for name in ("this project", "timm")]
    assert all(float(speed) > 0 for *_, speed in rows)
    assert [ratio for _, name, ratio, _ in rows if name == "timm"] == ["1.00", "1.00"]


def test_what_many_gpus_take_is_a_closed_form(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--latency", "0", "--nvlink", "100"])
    args = scaling.parse_flags()
    inside = 2 * 7 / 8 * 8e9 / 100e9
    assert scaling.all_reduce_seconds(args, 8e9, 8, None) == pytest.approx(inside)
    # Between 4 machines each GPU sends its eighth: 1 GB by 80 Gbit/s.
    assert scaling.all_reduce_seconds(args, 8e9, 32, 80) == pytest.approx(inside + 2 * 3 / 4 * 1e9 / 10e9)
    reduce, exposed, step = scaling.step_seconds(args, 32, 128, 80)
    assert step == pytest.approx(128 / args.images_per_second + exposed)
    assert reduce / 7 <= exposed < reduce
    share = scaling.smallest_share(args, 32, 80)
    costs = [scaling.step_seconds(args, 32, n, 80)[1] * args.images_per_second / n for n in (share - 1, share)]
    assert costs[1] <= 0.05 < costs[0]
