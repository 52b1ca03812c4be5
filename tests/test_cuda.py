"""What only a GPU can show: float32 logits, the 16-bit levels, compilation. Skipped where there is none."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers import ROOT, load_data, stop_after, train_run
from models import NORM_TYPES, build_model
from models.attention import attend, attention_weights
from models.facility_location import greedy_picks
from models.norms import GroupNorm, TokenGroupNorm
from models.probing import load_kernel
from models.token_reduction import REDUCTION_METHODS, Reduction, cluster_tokens, similarity
from synthetic import load_fixture, make_checkpoint, make_images
from test_reference_logits import relative_error
from utils.data.augmentation import Augmentation
from utils.data.loading import TensorImages
from utils.data.stream import stream_positions
from utils.parallel.precision import Precision
from utils.parallel.processes import choose_device, one_process
from utils.records.run_folder import read_metrics

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture
def device():
    return choose_device()


def official_model(name):
    """The model of a fixture with its weights, its images, and the official logits."""
    fixture = load_fixture(name)
    model = build_model(fixture["model"], fixture["img_size"], fixture["num_classes"])
    model.load_from(make_checkpoint(fixture["shapes"]), head="keep")
    return model.eval(), torch.from_numpy(make_images(fixture["img_size"], fixture["batch"])), fixture["logits"]


@torch.no_grad()
@pytest.mark.parametrize("name, bound", [("ViT-Ti_16", 1e-5), ("R50_ViT-B_16", 5e-5), ("BiT-M-R50x1", 1e-5)])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_logits_are_the_official_ones(name, bound, compiled, device):
    model, images, logits = official_model(name)
    model.to(device)
    if compiled:
        model.compile()
    assert relative_error(model(images.to(device)).cpu(), logits) < bound


@torch.no_grad()
@pytest.mark.parametrize("name", ["ViT-Ti_16", "R50_ViT-B_16", "BiT-M-R50x1"])
@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
@pytest.mark.parametrize("dtype, bound", [("float16", 0.01), ("bfloat16", 0.05)])
def test_sixteen_bits_keep_the_logits(name, level, dtype, bound, device):
    model, images, logits = official_model(name)
    precision = Precision(level, DTYPES[dtype], device)
    precision.cast(model.to(device))
    with precision.autocast():
        ours = model(precision.inputs(images.to(device)))
    assert relative_error(ours.float().cpu(), logits) < bound


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("model_type", ["ViT-Mini_4", "R26-ViT-Mini_4", "ResNet-Mini_Params"])
def test_gradients_are_those_of_the_cpu(model_type, norm_type, device):
    if model_type.startswith("ResNet") and norm_type != "LN":
        pytest.skip("a ResNet has one norm")
    torch.manual_seed(0)
    model = build_model(model_type, 32, norm_type=norm_type).train()
    torch.nn.init.normal_(getattr(model.head, "fc", model.head).weight)  # zeros would stop every gradient
    images, labels = torch.from_numpy(make_images(32, 8)), torch.arange(8)
    gradients = []
    for place in (torch.device("cpu"), device):
        model.to(place).zero_grad()
        F.cross_entropy(model(images.to(place)), labels.to(place)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]).cpu())
    # A ReLU whose input rounds to the other side of 0 changes a gradient by more than rounding does.
    assert relative_error(gradients[1], gradients[0]) < 5e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_group_norm_of_tokens_in_16_bits_is_near_float64(dtype, device):
    norm = TokenGroupNorm(16).to(device)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    x = torch.randn(3, 7, 16, device=device, dtype=DTYPES[dtype], requires_grad=True)
    out = norm(x)
    expected = F.group_norm(x.double().transpose(1, 2), 4, norm.weight.double(), norm.bias.double(), 1e-6)
    assert out.dtype == x.dtype
    assert relative_error(out.detach().cpu().double(), expected.transpose(1, 2).detach().cpu()) < 0.01


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape, groups", [((3, 64, 57, 57), 32), ((2, 768, 14, 14), 32), ((2, 12, 1, 5), 4)])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_group_norm_of_maps_is_near_float64(dtype, bound, shape, groups, relu, device):
    """By the kernel: values and the gradients of the map, weight and bias."""
    assert load_kernel("group_norm_kernel", device), "Triton does not work here"
    norm = GroupNorm(shape[1], 1e-5, groups).to(device)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    x = (3 + torch.randn(shape, device=device)).to(dtype, memory_format=torch.channels_last).requires_grad_()
    gradient = torch.randn(shape, device=device)
    y = norm(x, relu)
    ours = [y, *torch.autograd.grad(y, (x, norm.weight, norm.bias), gradient.to(dtype))]
    assert y.is_contiguous(memory_format=torch.channels_last)
    doubles = [value.detach().double().requires_grad_() for value in (x, norm.weight, norm.bias)]
    expected = F.group_norm(doubles[0], groups, *doubles[1:], 1e-5)
    expected = F.relu(expected) if relu else expected
    theirs = [expected, *torch.autograd.grad(expected, doubles, gradient.double())]
    for value, wanted in zip(ours, theirs, strict=True):
        assert relative_error(value.detach().double().cpu(), wanted.detach().cpu()) < bound


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_in_16_bits_is_near_float64(dtype, device):
    q, k, v = torch.randn(3, 2, 4, 50, 16, device=device, dtype=DTYPES[dtype]).unbind(0)
    expected = attention_weights(q.double(), k.double()) @ v.double()
    assert relative_error(attend(q, k, v).cpu().double(), expected.cpu()) < 0.01


def test_a_step_that_overflows_is_skipped_and_halves_the_scale(device):
    model = torch.nn.Linear(4, 2).to(device)
    precision = Precision("O2", torch.float16, device)
    optimizer = precision.prepare(model, lambda named: torch.optim.SGD([p for _, p in named], lr=0.1, fused=True))
    before = {name: weight.clone() for name, weight in precision.weights().items()}
    scale = precision.scaler.get_scale()
    precision.backward(model(torch.full((1, 4), 6e4, device=device).half()).float().sum())
    precision.step(optimizer, max_grad_norm=1.0)
    assert precision.scaler.get_scale() == scale / 2
    assert all(torch.equal(weight, before[name]) for name, weight in precision.weights().items())
    precision.scaler.update(1.0)
    precision.backward(model(torch.ones(1, 4, device=device).half()).float().sum())
    precision.step(optimizer, max_grad_norm=1.0)
    assert not torch.equal(model.weight.float(), before["weight"])


def train_on_the_gpu(tiny_flags, *flags):
    """The metrics of a run of train.py."""
    flags = tiny_flags("--num_steps", 40, "--eval_every", 20, "--learning_rate", 0.05, "--min_crop_scale", 0.8, *flags)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0"}
    command = [sys.executable, "train.py", *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "cuda" in done.stdout
    return read_metrics(os.path.join(flags[flags.index("--output_dir") + 1], "run"))


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
@pytest.mark.parametrize("bits", ["--fp16", "--bf16"])
@pytest.mark.parametrize("compiled", [[], ["--compile"]], ids=["eager", "compiled"])
def test_train_learns_at_every_level(level, bits, compiled, tiny_flags):
    metrics = train_on_the_gpu(tiny_flags, bits, "--fp16_opt_level", level, *compiled)
    assert metrics["train_loss"][1] < metrics["train_loss"][0] < 2.5


@pytest.mark.parametrize("model_type", ["ViT-Mini_4", "R26-ViT-Mini_4", "ResNet-Mini_Params"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_sixteen_bits_train_like_float32(model_type, optimizer, tiny_flags):
    flags = ["--model_type", model_type, "--optimizer", optimizer, "--learning_rate", 0.001, "--dropout_rate", 0.1]
    if model_type.startswith("ResNet"):
        flags = flags[:-2]
    losses = [train_on_the_gpu(tiny_flags, "--overwrite", *flags, *bits)["test_loss"][1] for bits in ([], ["--fp16"])]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_every_norm_trains_in_sixteen_bits(norm_type, tiny_flags):
    metrics = train_on_the_gpu(tiny_flags, "--bf16", "--norm_type", norm_type, "--compile")
    assert metrics["train_loss"][1] < metrics["train_loss"][0] < 2.5


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
def test_a_part_of_the_weights_trains_and_is_saved_in_sixteen_bits(level, tiny_flags):
    flags = ["--fp16", "--fp16_opt_level", level, "--ema_decay", 0.5, "--layer_decay", 0.75]
    metrics = train_on_the_gpu(tiny_flags, "--train", "last:2", *flags)
    assert metrics["train_loss"][1] < metrics["train_loss"][0] < 2.5


def test_a_stopped_run_resumes_with_the_same_losses(tiny_flags, monkeypatch):
    """Adam's moments, the loss scale and the stream of samples are those of the run that was not stopped."""
    flags = ["--fp16", "--optimizer", "adamw", "--learning_rate", 0.001, "--num_steps", 24, "--eval_every", 8]
    _, rows = train_run(tiny_flags(*flags), monkeypatch)
    stop_after(12, monkeypatch)
    with pytest.raises(SystemExit):
        train_run(tiny_flags(*flags, "--name", "stopped"), monkeypatch)
    _, resumed = train_run(tiny_flags(*flags, "--name", "stopped", "--resume"), monkeypatch, "stopped")
    assert [row["step"] for row in resumed] == [row["step"] for row in rows]
    losses, expected = ([row["test_loss"] for row in part] for part in (resumed, rows))
    assert losses == pytest.approx(expected, rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("method", REDUCTION_METHODS)
def test_tokens_are_chosen_as_on_the_cpu(method, device):
    keys = torch.randn(3, 4, 1 + 196, 64, dtype=torch.float64).float()
    on_cpu, on_gpu = (cluster_tokens(keys.to(place), Reduction(method, 49, 4)) for place in ("cpu", device))
    assert torch.equal(on_gpu.kept.cpu(), on_cpu.kept)
    assert torch.equal(on_gpu.assignment.cpu(), on_cpu.assignment)


@pytest.mark.parametrize("tokens, k", [(196, 147), (577, 9), (3, 1)])
def test_one_kernel_chooses_as_pytorchs_operators(tokens, k, device):
    kernel = load_kernel("facility_location_kernel", device)
    assert kernel, "Triton does not work here"
    s = similarity(torch.randn(5, tokens, 64, device=device))
    assert torch.equal(kernel(s, k), greedy_picks(s.double(), k))


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_with_token_sizes_in_16_bits_is_near_float64(dtype, device):
    q, k, v = torch.randn(3, 2, 4, 50, 16, device=device, dtype=DTYPES[dtype]).unbind(0)
    bias = torch.randint(1, 9, (2, 1, 1, 50), device=device).log().to(DTYPES[dtype])
    expected = attention_weights(q.double(), k.double(), bias.double()) @ v.double()
    assert relative_error(attend(q, k, v, bias).cpu().double(), expected.cpu()) < 0.01


@pytest.mark.parametrize("model_type", ["ViT-Mini_4", "Conformer-Mini_4"])
@pytest.mark.parametrize("method", REDUCTION_METHODS)
def test_fewer_tokens_train_in_sixteen_bits(method, model_type, tiny_flags):
    flags = ["--model_type", model_type, "--img_size", 16, "--token_reduction", method, "--keep_tokens", 4]
    metrics = train_on_the_gpu(tiny_flags, *flags, "--reduction_layer", 2, "--bf16", "--compile")
    assert metrics["train_loss"][1] < metrics["train_loss"][0] < 2.5


@pytest.mark.parametrize("flag", ["--compile", "--grad_checkpointing"])
def test_merging_in_every_block_trains_in_sixteen_bits(flag, tiny_flags):
    flags = ["--model_type", "ViT-Mini_4", "--img_size", 16, "--token_reduction", "tome", "--tome_r", 3, "--bf16", flag]
    metrics = train_on_the_gpu(tiny_flags, *flags)
    assert metrics["train_loss"][1] < metrics["train_loss"][0] < 2.5


def test_images_arrive_on_the_gpu_as_on_the_cpu(image_folder, device):
    """With the next batch copied on a stream of its own while the GPU is busy with the last one."""
    augmentation = Augmentation(0, (16, 16), 0.1, flip=True, random_erasing=0.5)
    batches = []
    for processes in (one_process(), one_process(device)):
        data = load_data("imagenet", "train", image_folder, processes, num_workers=2)
        positions = stream_positions(8, 1, processes, 0, 12)
        batches.append([])
        for images, labels in data.train_batches(positions, augmentation):
            if processes.device.type == "cuda":
                torch.cuda._sleep(10**7)  # the copies run ahead of the work
            batches[-1].append((images * 1, labels * 1))
    assert len(batches[1]) == 12
    for (images, labels), (others, other_labels) in zip(*batches, strict=True):
        torch.testing.assert_close(others.cpu(), images)
        assert torch.equal(other_labels.cpu(), labels)


@pytest.mark.parametrize("policy", [{"rand_augment": (2, 9)}, {"auto_augment": "trivial"}, {"auto_augment": "cifar10"}])
def test_images_in_gpu_memory_are_augmented_there(policy, device):
    """Rounding may differ from a CPU's in single pixels, by a level or at the edge of a moved image."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 3, 16, 16), dtype=np.uint8)
    augmentation = Augmentation(0, (16, 16), 1.0, flip=True, color_jitter=0.3, **policy)
    sets = [TensorImages(pixels, range(64), map(str, range(64)), place) for place in (torch.device("cpu"), device)]
    positions = [np.arange(64)]
    (images, labels), (others, other_labels) = (next(data.train_batches(positions, augmentation)) for data in sets)
    assert others.device.type == "cuda"
    assert torch.equal(other_labels.cpu(), labels)
    assert ((others.cpu() - images).abs() > 0.1).float().mean() < 0.01


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_run_of_two_gpus_finishes_and_resumes(parallel, tiny_flags):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    flags = tiny_flags("--parallel", parallel, "--bf16", "--ema_decay", 0.9, "--mixup", 0.2)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for resume in ([], ["--resume", "--num_steps", "14"]):
        done = subprocess.run([sys.executable, *launcher, "train.py", *flags, *resume], cwd=ROOT, check=False)
        assert done.returncode == 0


def test_averaged_and_mixed_training_learns(tiny_flags, monkeypatch):
    flags = ["--fp16", "--ema_decay", 0.9, "--mixup", 0.2, "--cutmix", 1, "--num_steps", 60, "--eval_every", 60]
    _, rows = train_run(tiny_flags(*flags, "--learning_rate", 0.1), monkeypatch)
    assert rows[-1]["test_loss"] < 2.25  # 2.30 is that of a uniform guess
