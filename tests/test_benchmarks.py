"""The benchmarks: their flags, their tables, small runs of each, and the check of what they are compared with."""

import argparse
import copy
import json
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from command_line import train_parser
from helpers import ROOT, call_main, succeed
from models import NORM_TYPES, build_model
from models.configs import VITS
from models.token_reduction import REDUCTION_METHODS
from test_docs import parse
from utils.errors import UserError
from utils.profiling import activation_bytes

sys.path.insert(0, str(ROOT / "benchmarks"))
import augmentation
import data_loading
import end_to_end
import freezing
import growth
import kernels
import peers
import steps
import throughput
import token_reduction_speed

CPU = torch.device("cpu")
SMALL = ("--img_size", 32, "--batch_size", 2, "--rounds", 1)
ALL = (augmentation, data_loading, end_to_end, freezing, growth, kernels, throughput, token_reduction_speed)


@pytest.mark.parametrize("module", ALL, ids=lambda module: module.__name__)
def test_every_benchmark_prints_its_help(module, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        call_main(module, ["--help"], monkeypatch)
    assert stopped.value.code == 0
    assert "--rounds" in capsys.readouterr().out


def test_every_benchmark_is_tested():
    found = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert found == {module.__name__ for module in ALL} | {"__init__", "steps", "peers"}


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--precision", "bf16", "fp16"), "--precision fp16 needs an NVIDIA GPU"),
        (("--batch_size", "max"), "--batch_size max needs an NVIDIA GPU"),
        (("--json", "nowhere/speed.json"), "can't be written"),
        (("--img_size", 100), "image size 100"),
        (("--compare", "norms", "--model_type", "BiT-M-R50x1"), "BiT-M-R50x1 always has GroupNorm"),
        (("--compare", "models", "--batch_size", 1, 2), "--compare models needs one --precision"),
        (("--figure", "costs.png"), "--runs and --figure need --compare models"),
        (("--compare", "models", "--figure", "nowhere/costs.png"), "--figure nowhere/costs.png can't be written"),
        (("--compare", "peer"), "did you mean peers"),
    ],
)
def test_wrong_flags_of_throughput_are_errors(flags, message, main_fails):
    assert message in main_fails(throughput, *flags)


@pytest.mark.slow
def test_throughput_measures_every_model_batch_size_and_level(tmp_path, run_main):
    flags = ["--model_type", "ViT-Ti_16", "ViT-S_32", *SMALL, "--precision", "bf16"]
    flags += ["--batch_size", 1, 2, "--fp16_opt_level", "O1", "O2", "--json", tmp_path / "speed.json"]
    printed = run_main(throughput, *flags)
    results = json.loads((tmp_path / "speed.json").read_text())
    assert [(result["model_type"], result["batch_size"]) for result in results] == [
        (model_type, batch_size) for model_type in ("ViT-Ti_16", "ViT-S_32") for batch_size in (1, 2)
    ]
    for result in results:
        rows = {(row["model"], row["pass"]): row for row in result["rows"]}
        assert {("this project, O1", "training step"), ("this project, O2", "forward")} < set(rows)
        assert rows["timm", "forward"]["x_reference"] == rows["timm", "training step"]["x_reference"] == 1
        ours = rows["this project, O2", "training step"]
        # FLOPs of all are counted alike, so shares of the product's are as images/s
        for other in (rows["timm", "training step"], rows["this project, O1", "training step"]):
            shares = ours["share_of_matrix_product"] / other["share_of_matrix_product"]
            assert shares == pytest.approx(ours["images_per_second"] / other["images_per_second"])
    assert len(re.findall(r"^\| training step \| timm \| 1\.00 \| [\d.]+ \|", printed, re.MULTILINE)) == 4


@pytest.mark.slow
def test_throughput_compares_a_resnet_with_timm(run_main):
    printed = run_main(throughput, "--model_type", "BiT-M-R50x1", *SMALL, "--precision", "fp32")
    assert len(re.findall(r"\| (forward|training step) \| (this project|timm) \| [\d.]+ \| [\d.]+ \|", printed)) == 4


@pytest.mark.slow
def test_throughput_compares_all_norms(run_main):
    printed = run_main(throughput, "--compare", "norms", "--model_type", "ViT-Nano_4", "--img_size", 8, *SMALL[2:])
    rows = re.findall(r"^\| (forward|training step) \| (\w+) \| ([\d.]+) \| [\d.]+ \|", printed, re.MULTILINE)
    assert sorted(row[:2] for row in rows) == sorted(
        (task, norm) for task in ("forward", "training step") for norm in NORM_TYPES
    )
    assert [ratio for _, norm, ratio in rows if norm == "LN"] == ["1.00", "1.00"]
    assert "| relative to LN |" in printed


@pytest.mark.slow
def test_throughput_compares_models_and_shows_the_accuracy_of_their_runs(tmp_path, run_main, main_fails):
    finished = tmp_path / "run"
    finished.mkdir()
    (finished / "config.json").write_text(json.dumps({"flags": {"model_type": "ViT-Mini_4"}}))
    columns = "step,train_loss,train_accuracy,test_loss,test_accuracy,images_per_second,seconds"
    (finished / "metrics.csv").write_text(f"{columns}\n1,1,0,1,0.25,9,1\n2,1,0,1,0.125,9,2\n")
    flags = ["--compare", "models", *SMALL, "--precision", "fp32", "--runs", finished]
    figure = tmp_path / "costs.png"
    printed = run_main(throughput, *flags, "--model_type", "ViT-Mini_4", "ResNet-Mini_Flops", "--figure", figure)
    vit, resnet = printed.splitlines()[-2:]
    assert re.fullmatch(r"\| ViT-Mini_4 \| 1.206 \| 0.1671 \| [\d.]+ \| [\d.]+ \| [\d.]+ \| 25.00 \|", vit)
    assert re.fullmatch(r"\| ResNet-Mini_Flops \| 0.255 \| 0.1197 \| [\d.]+ \| [\d.]+ \| [\d.]+ \|  \|", resnet)
    with Image.open(figure) as image:
        assert image.width > 1000
    error = main_fails(throughput, *flags, "--model_type", "ViT-B_16")
    assert "run is a run of ViT-Mini_4, which is not among the models to compare" in error


def test_the_best_accuracy_of_a_run_with_a_single_test(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"flags": {"model_type": "ViT-Mini_4"}}))
    columns = "step,train_loss,train_accuracy,test_loss,test_accuracy,images_per_second,seconds"
    (tmp_path / "metrics.csv").write_text(f"{columns}\n1,1,0,nan,nan,9,1\n2,1,0,1,0.125,9,2\n")
    assert throughput.best_accuracies([tmp_path], ["ViT-Mini_4"]) == {"ViT-Mini_4": 0.125}


@pytest.mark.parametrize("name, package", [("timm", "timm"), ("transformers", None), ("vit-pytorch", "vit_pytorch")])
def test_a_peer_that_computes_something_else_is_an_error(name, package):
    """The right one passes; one change that its speed would not show is an error."""
    pytest.importorskip(package or name)
    model = build_model("ViT-Ti_16", 32, num_layers=2)
    makers = {"timm": peers.timm_model, "transformers": peers.transformers_vit, "vit-pytorch": peers.lucidrains_vit}
    peers.randomise(model)
    try:
        theirs, reference = makers[name]("ViT-Ti_16", model, 32)
    except ImportError as error:
        pytest.skip(str(error))
    peers.check(name, theirs, reference, 32)
    norms = [module for module in theirs.modules() if isinstance(module, nn.LayerNorm)]
    norms[1].eps = 1e-3
    with pytest.raises(UserError, match=f"^{name} does not compute the same function"):
        peers.check(name, theirs, reference, 32)


@pytest.mark.parametrize("model_type", ["R26-ViT-Mini_4", "ResNet-Mini_Flops"])
def test_timm_computes_the_small_hybrid_and_cnn(model_type):
    pytest.importorskip("timm")
    model = build_model(model_type, 32)
    assert set(peers.peers(model_type, model, 32)) == {"timm"}  # which checks the logits
    wrong = peers.timm_model(model_type, model, 32)[0]
    peers.set_epsilon(wrong, nn.GroupNorm, 1e-2)
    with pytest.raises(UserError, match="^timm does not compute the same function"):
        peers.check("timm", wrong, model, 32)


def test_no_weight_of_a_compared_model_is_zero():
    """A weight of zeros would hide what it is multiplied with."""
    model = build_model("R26-ViT-S_32", 64, num_layers=1)
    peers.randomise(model)
    assert all(parameter.count_nonzero() > 0.99 * parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "level, precision, expected_bytes", [(None, "fp32", (4, 4, 4)), ("O2", "bf16", (2, 6, 8))], ids=["fp32", "O2"]
)
def test_the_bytes_of_weights_gradients_and_optimizer_at_a_level(level, precision, expected_bytes):
    """O2 keeps weights and their gradients in 16 bits, and masters, their gradients and momenta in 32."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 10))
    step = steps.our_step(model, CPU, precision, level)
    batch = steps.random_batch(2, 4, CPU)
    step.train(*batch)
    count = 10 * 3 * 4 * 4 + 10
    expected = dict(zip(("weights", "gradients", "optimizer"), (n * count for n in expected_bytes), strict=True))
    assert steps.state_bytes(step) == expected
    assert steps.training_memory(step, *batch) > sum(expected.values())


def test_freezing_compares_the_parts_that_are_trained(run_main, main_fails):
    printed = run_main(freezing, "--model_type", "ViT-Nano_4", *SMALL, "--precision", "fp32", "--img_size", 16)
    rows = re.findall(r"^\| `(\S+)` \| ([\d.e-]+) \| ([\d.]+) \| ([\d.]+) \| [\d.]+ \|", printed, re.MULTILINE)
    assert [row[0] for row in rows] == ["all", "norms", "last:2", "head"]
    trained, memory = ({row[0]: float(row[column]) for row in rows} for column in (1, 2))
    assert trained["all"] > trained["last:2"] > trained["norms"] > trained["head"]
    assert memory["all"] > memory["norms"] > memory["last:2"] > memory["head"]
    assert rows[0][3] == "1.00"
    assert "the model has 12 blocks" in main_fails(freezing, "--model_type", "ViT-Nano_4", "--train", "last:13")


def test_a_timed_step_is_a_training_step_without_dropout():
    """Two steps of momentum SGD, clipped; a forward pass between them changes nothing."""
    torch.manual_seed(0)
    model = build_model("ViT-Nano_4", 8, num_classes=3, dropout_rate=0.5, drop_path_rate=0.5, num_layers=2)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    reference = copy.deepcopy(model).eval()  # no dropout either
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    flags = ["--name", "run", "--learning_rate", "0.1", "--warmup_steps", "0", "--max_grad_norm", "0.5"]
    step = steps.TimedStep(model, train_parser().parse_args(flags), 3, CPU)
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


@pytest.mark.parametrize("name", ["ViT-Nano_4", "ResNet-Mini_Flops"])
def test_activations_of_a_timed_step_can_be_counted(name):
    """A batch of three keeps more than one of two by the same as two more than one."""
    step = steps.TimedStep(build_model(name, 32), train_parser().parse_args(["--name", "run"]), 10, CPU)
    images, labels = torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 2])
    one, two, three = (activation_bytes(step.model, lambda n=n: step.train(images[:n], labels[:n])) for n in (1, 2, 3))
    assert three - two == two - one > 0


@pytest.mark.slow
def test_growth_adds_up_the_parts_of_the_memory(tmp_path, run_main):
    """Parts add up to the floor, checkpointing keeps fewer activations and nothing else, and a figure is drawn."""
    sizes = ["--model_type", "ViT-Mini_4", "--model_types", "ViT-Nano_4", "--batch_sizes", 1, "--img_sizes", 64]
    figure = tmp_path / "growth.png"
    printed = run_main(growth, *SMALL, *sizes, "--precision", "fp32", "--figure", figure)
    number = r"\| ([\d,]+) "
    rows = re.findall(r"^\| \S+ \| \d+ \| \d+ \| (training step|with --\w+) \| .*? to \S+ " + 5 * number, printed, re.M)
    memory = [[int(cell.replace(",", "")) for cell in cells] for _, *cells in rows]
    assert len(rows) == 6
    for plain, checkpointing in zip(memory[::2], memory[1::2], strict=True):
        assert plain[:3] == checkpointing[:3]
        assert plain[3] > checkpointing[3]
        for *parts, floor in (plain, checkpointing):
            assert floor == pytest.approx(sum(parts), abs=2)  # each is rounded
    assert figure.stat().st_size > 10000


@pytest.mark.parametrize("task, shown", [("training", 6), ("forward", 500)])
def test_the_table_of_kernels_adds_up_to_the_step(task, shown, run_main):
    size = ["--model_type", "ViT-Mini_4", "--img_size", 32, "--batch_size", 4]
    printed = run_main(kernels, *size, "--rounds", 2, "--task", task, "--rows", shown)
    per_step = float(re.search(r", ([\d.]+) ms with the times below", printed)[1])
    rows = re.findall(r"^\| (.+) \| ([\d.]+)% \| ([\d.]+) \| (\d+) \|$", printed, re.MULTILINE)
    names, shares, milliseconds, calls = zip(*rows, strict=True)
    assert sum(map(float, shares)) == pytest.approx(100, abs=0.1 * len(rows))
    assert sum(map(float, milliseconds)) == pytest.approx(per_step, abs=0.1 + 0.01 * len(rows))
    if task == "training":
        assert len(rows) == shown + 1
        assert names[-1].endswith(" others")
    else:  # two norms per block, and the last one
        assert int(calls[names.index("aten.native_layer_norm.default")]) == 2 * VITS["ViT-Mini_4"].num_layers + 1


def test_kernels_refuses_compiled_operators_of_a_cpu(main_fails):
    assert "--compile needs a GPU here" in main_fails(kernels, "--compile")


@pytest.mark.slow
def test_token_reduction_speed_has_all_methods_and_facility_location_covers_best(run_main, main_fails):
    """Each row is there, and facility location covers the tokens best."""
    flags = ["--model_type", "ViT-Mini_4", "--img_size", 16, "--batch_size", 2, "--rounds", 1]
    printed = run_main(token_reduction_speed, *flags, "--reduction_layer", 2, "--keep_tokens", 0.5, 4, "--tome_r", 2)
    name = r"(none|facility|tome|random|tome in every block|Conformer-Mini_4)"
    rows = re.findall(rf"^\| {name} \| ([^|]+) \| [\d.]+ \| [\d.]+ \|", printed, re.MULTILINE)
    reduced = [(name, keep) for keep in ("0.5", "4") for name in REDUCTION_METHODS]
    assert rows == [("none", "all"), *reduced, ("tome in every block", "r=2"), ("Conformer-Mini_4", "0.25")]
    ratios = re.findall(r"\| (\d+) of 64 " + 4 * r"\| ([\d.]+) \(.*?\) ", printed)
    assert [row[0] for row in ratios] == ["32", "4"]
    for _, facility, *others in ratios:
        assert 1 >= float(facility) > max(map(float, others))


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--model_type", "ViT-Mini_4", "--img_size", 16, "--reduction_layer", 6), "reduction_layer 6"),
        (("--model_type", "ViT-S_16", "--keep_tokens", 98), "digits.npz: keep_tokens 98 is neither a count from 1"),
    ],
)
def test_wrong_flags_of_token_reduction_speed_are_errors(flags, message, main_fails):
    assert message in main_fails(token_reduction_speed, *flags)


@pytest.mark.slow
def test_data_loading_compares_the_input_pipeline_with_timm():
    flags = ["--images", 16, "--batch_size", 4, "--img_size", 32, "--rounds", 1, "--num_workers", 0, 1]
    printed = succeed("benchmarks/data_loading.py", *flags)
    rows = re.findall(r"^\| ([01]) \| (this project|timm) \| ([\d.]+) \| ([\d.]+) \|", printed, re.MULTILINE)
    assert [row[:2] for row in rows] == [(n, name) for n in "01" for name in ("this project", "timm")]
    assert all(float(speed) > 0 for *_, speed in rows)
    assert [ratio for _, name, ratio, _ in rows if name == "timm"] == ["1.00", "1.00"]


def test_augmentation_compares_each_kind_with_torchvisions(run_main):
    printed = run_main(augmentation, "--img_size", 8, "--batch_size", 4, "--batches", 1, "--rounds", 1)
    rows = re.findall(r"^\| (.*) \| (this project|torchvision, image by image) \| \d+ \|", printed, re.MULTILINE)
    assert rows == [(name, "this project") for name in augmentation.KINDS] + [
        (name, "torchvision, image by image") for name in augmentation.IMAGE_BY_IMAGE
    ]


def test_data_loading_needs_two_batches(main_fails):
    assert "--images 7 is less than two batches, 8" in main_fails(data_loading, "--images", 7, "--batch_size", 4)


@pytest.mark.slow
def test_end_to_end_compares_train_py_with_its_step_and_with_timm():
    flags = ["--img_size", 32, "--batch_size", 4, "--num_steps", 4, "--first_steps", 2, "--rounds", 1]
    printed = succeed("benchmarks/end_to_end.py", *flags, "--images", 20, "--num_workers", 1)
    rows = re.findall(r"^\| (the model's step alone|train.py|timm's loop) \| [\d.]+ \|", printed, re.MULTILINE)
    assert len(rows) == 3
    assert re.search(r"^\| train.py \| .* \| [\d.]+% \(.*\) \| [\d.]+ \(.*\) \|$", printed, re.MULTILINE)


def test_the_ratios_of_end_to_end_are_those_of_the_same_round():
    args = argparse.Namespace(
        model_type="ViT-Ti_16",
        img_size=32,
        batch_size=4,
        precision="fp32",
        fp16_opt_level="O2",
        compile=False,
        num_steps=4,
        first_steps=2,
        rounds=3,
    )
    speeds = {
        end_to_end.MODEL: [10.0, 20.0, 40.0],
        end_to_end.OURS: [9.0, 19.0, 42.0],
        end_to_end.TIMM_LOOP: [6.0, 10.0, 21.0],
    }
    lines = end_to_end.report(args, speeds, "images").splitlines()
    assert lines[-2] == "| train.py | 19.0 | 9.0 to 42.0 | 95.0% (90.0% to 105.0%) | 1.90 (1.50 to 2.00) |"


def gpu_sh(*flags, **environment):
    """What benchmarks/gpu.sh prints, without a GPU."""
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **environment}
    command = ["bash", "benchmarks/gpu.sh", *flags]
    return subprocess.run(command, cwd=ROOT, env={"HOME": "/tmp", **environment}, capture_output=True, text=True)


@pytest.mark.slow  # each part is a process
def test_every_part_of_gpu_sh_starts_and_is_done_once(tmp_path):
    """Only whether each part starts: its flags are known and its files exist. What is done is not repeated."""
    flags = ("--dry", "--train", "--minutes", "60")
    done = gpu_sh(*flags, OUT=str(tmp_path))
    parts = re.findall(r"^(\S+) +\d+ s  (.*)$", done.stdout, re.MULTILINE)
    assert len(parts) >= 16
    assert {end for _, end in parts} == {"done"}, done.stdout
    summary = tmp_path / "summary.txt"
    lines = summary.read_text().splitlines()
    assert [line.split()[0] for line in lines] == [name for name, _ in parts]
    lines[-1] = lines[-1].replace("done", "stopped at its limit of 2 s")
    summary.write_text("\n".join([*lines, ""]))
    again = gpu_sh(*flags, OUT=str(tmp_path))
    assert re.findall(r"^(\S+) +\d+ s  (.*)$", again.stdout, re.MULTILINE) == parts[-1:]
    assert len(summary.read_text().splitlines()) == len(parts)


def test_the_commands_of_gpu_sh_parse(tmp_path, monkeypatch):
    """Those for a GPU, with a Python that only writes down its arguments."""
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\n[ "$1" = -c ] && echo GPU || echo "$@" >>{tmp_path}/commands\n')
    fake.chmod(0o755)
    done = gpu_sh("--train", PYTHON=str(fake), OUT=str(tmp_path / "out"), PRETRAINED="weights.npz")
    commands = [line.split() for line in (tmp_path / "commands").read_text().splitlines()]
    assert len(commands) == done.stdout.count(" done\n") > 25
    assert commands[0] == ["-m", "pytest", "-q", "tests/test_cuda.py"]
    for script, *arguments in commands[1:]:
        assert parse(script, arguments, monkeypatch) == []


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--fast"], "unknown flag --fast; the flags are --minutes N, --train and --dry"),
        (["--minutes", "x"], "--minutes needs a whole number above 0"),
        ([], "no GPU that PyTorch can use; --dry tests the script on a CPU"),
    ],
)
def test_gpu_sh_without_a_gpu_or_with_wrong_flags_is_one_line(flags, message):
    done = gpu_sh(*flags)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"gpu.sh: {message}\n")
