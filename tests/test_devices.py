"""Apple's GPUs (MPS): what is chosen and avoided there. No such GPU is used: tensors of the CPU pretend to be there."""

import contextlib
import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from helpers import load_data, make_shallow, random_model, train_run
from models import build_model
from utils import errors
from utils.errors import run_script
from utils.evaluation import evaluate
from utils.optimizers import OPTIMIZERS
from utils.parallel.cpu import is_compiled
from utils.parallel.devices import device_of_sums, has_apple_gpu, to_device, widest_float
from utils.parallel.precision import OPT_LEVELS, make_precision
from utils.parallel.processes import choose_device, device_name, join_processes, one_process
from utils.profiling import synchronise
from utils.records.meter import Meter
from utils.training import why_eager

OF_FEATURE_MAPS = ("conv2d", "max_pool2d", "avg_pool2d", "batch_norm", "group_norm")
CPU, CUDA, MPS = map(torch.device, ("cpu", "cuda", "mps"))


@pytest.fixture
def mac(monkeypatch):
    """A machine with an Apple GPU and no other."""
    monkeypatch.setattr(torch.backends.mps, "is_available", functools.cache(lambda: True))  # cached, as it is
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("CUDA_VISIBLE_DEVICES", "RANK"):
        monkeypatch.delenv(name, raising=False)


class PretendMPS(TorchFunctionMode):
    """Tensors of the CPU report the device "mps", and what an Apple GPU lacks or gets wrong is an error.

    That is float64, channels-last feature maps, and copies that nobody waits for. Tensors that are made without another
    tensor or a device, copies by `cpu()`, and what is computed from them alone are on the CPU as usual.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        given = [leaf for leaf in leaves if torch.is_tensor(leaf)]
        device = CPU if all(getattr(tensor, "is_on_cpu", False) for tensor in given) else MPS
        if function == torch.Tensor.device.__get__:
            return device
        if function == torch.Tensor.is_cpu.__get__:
            return device == CPU
        moves = function == torch.Tensor.cpu or any(isinstance(leaf, torch.device) for leaf in leaves)
        if moves:
            device = MPS if MPS in leaves else CPU
            assert device == CPU or not kwargs.get("non_blocking"), "a copy to MPS that is not awaited"
            args, kwargs = tree_map(lambda leaf: CPU if isinstance(leaf, torch.device) else leaf, (args, kwargs))
        elif device == MPS and function.__name__ in OF_FEATURE_MAPS:
            is_channels_last = given[0].ndim == 4 and given[0].is_contiguous(memory_format=torch.channels_last)
            assert given[0].is_contiguous() or not is_channels_last, f"{function.__name__} in channels-last"
        result = function(*args, **kwargs)
        if moves and torch.is_tensor(result):
            result = result.view_as(result)  # another object than the one that was moved
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor):
                assert device == CPU or tensor.dtype != torch.float64, f"{function.__name__} in float64"
                tensor.is_on_cpu = device == CPU
        return result


def on_cpu(tensor):
    tensor.is_on_cpu = True
    return tensor


def test_the_gpu_of_apple_is_chosen_where_there_is_no_other(mac, monkeypatch):
    assert (choose_device(), device_name()) == (MPS, "Apple GPU")
    for name, value in (("CUDA_VISIBLE_DEVICES", ""), ("CUDA_VISIBLE_DEVICES", "-1"), ("RANK", "0")):
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            assert choose_device() == CPU
            assert device_name() != "Apple GPU"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert choose_device() == MPS
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device() == CPU
    assert not has_apple_gpu()


def test_a_gpu_of_nvidia_comes_first(mac, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda rank: None)
    for setting in ("allow_tf32", "benchmark"):  # which choose_device changes
        monkeypatch.setattr(torch.backends.cudnn, setting, getattr(torch.backends.cudnn, setting))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device(1) == torch.device("cuda", 1)


def test_a_process_without_a_gpu_of_its_own_says_so(monkeypatch, capsys):
    """Also if it is not the first one, which prints what all of them would."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("RANK", "1")

    def main():
        with join_processes(1):
            pass

    with pytest.raises(SystemExit, match="2"):
        run_script(main)
    assert "process 1: error: process 1 has no GPU of its own: this machine has 1" in capsys.readouterr().err


@pytest.mark.parametrize("level", OPT_LEVELS)
@pytest.mark.parametrize("flag", ["fp16", "bf16"])
def test_16_bits_on_mps_are_autocast_in_bfloat16(flag, level):
    flags = SimpleNamespace(**{"fp16": False, "bf16": False, flag: True}, fp16_opt_level=level)
    precision = make_precision(flags, MPS)
    assert (precision.level, precision.dtype) == ("O0" if level == "O0" else "O1", torch.bfloat16)
    assert not precision.scaler.is_enabled()
    assert make_precision(flags, CPU).level == level
    with precision.autocast():
        assert torch.is_autocast_enabled("mps") == (level != "O0")
    assert not torch.is_autocast_enabled("mps")


def test_the_default_on_mps_is_float32():
    flags = SimpleNamespace(fp16=False, bf16=False, fp16_opt_level="O2")
    assert make_precision(flags, MPS).level == "O0"


@pytest.mark.parametrize(
    "model_type, keywords",
    [
        ("ViT-Mini_4", {}),
        ("ViT-Mini_4", {"norm_type": "BN", "dropout_rate": 0.1}),
        ("ViT-Mini_4", {"norm_type": "GN"}),
        ("ViT-Mini_4", {"token_reduction": "facility", "keep_tokens": 4, "reduction_layer": 1}),
        ("ViT-Mini_4", {"token_reduction": "tome", "keep_tokens": 4, "reduction_layer": 1}),
        ("ViT-Mini_4", {"token_reduction": "tome", "tome_r": 3}),
        ("ViT-Mini_4", {"token_reduction": "random", "keep_tokens": 4, "reduction_layer": 1}),
        ("R26-ViT-Mini_4", {}),
        ("ResNet-Mini_Flops", {}),
        ("Conformer-Mini_4", {}),
    ],
)
def test_models_avoid_what_mps_lacks(model_type, keywords):
    model, images = random_model(model_type, 16, 10, **keywords), torch.randn(2, 3, 16, 16)
    expected = logits_and_gradients(model, images)
    with PretendMPS():
        assert (images.device, next(model.parameters()).device) == (MPS, MPS)
        found = logits_and_gradients(model, images)
    for tensor, other in zip(found, expected, strict=True):
        assert (tensor - other).norm() <= 1e-5 * other.norm()


def logits_and_gradients(model, images):
    logits = model(images)
    return [logits.detach(), *torch.autograd.grad(logits.square().sum(), list(model.parameters()))]


def test_pretend_mps_finds_what_it_forbids():
    """Otherwise the tests that use it could not fail."""
    images = torch.ones(2, 3, 4, 4)
    with PretendMPS():
        assert (images.device, images.cpu().device, torch.ones(2).device, images.cpu().to(MPS).device) == (
            *(MPS, CPU),
            *(CPU, MPS),
        )
        with pytest.raises(AssertionError, match="double in float64"):
            images.double()
        assert images.cpu().double().dtype == torch.float64
        with pytest.raises(AssertionError, match="conv2d in channels-last"):
            F.conv2d(images.contiguous(memory_format=torch.channels_last), torch.ones(1, 3, 1, 1).to(MPS))
        with pytest.raises(AssertionError, match="not awaited"):
            images.cpu().to(MPS, non_blocking=True)


@pytest.mark.slow
@pytest.mark.parametrize("data", ["digits", "images"])
def test_a_run_on_mps_has_the_losses_of_the_cpu(data, mac, image_folder, tiny_flags, monkeypatch):
    """With every change of the images, dropout and an average; the run is then resumed."""
    make_shallow(monkeypatch)
    augmentation = ["--rand_augment", 2, 9, "--color_jitter", 0.3, "--random_erasing", 0.5, "--mixup", 0.2]
    flags = [*augmentation, "--dropout_rate", 0.1, "--ema_decay", 0.9, "--class_weights", "balanced"]
    flags += ["--num_workers", 0, "--num_steps", 4, "--eval_every", 2, "--optimizer", "adamw"]
    if data == "images":
        flags += ["--dataset", "imagenet", "--data_dir", image_folder]
        flags += ["--learning_rate", 1e-3]  # at 0.03 the loss triples and AdamW amplifies rounding to 1.1e-4
    from_numpy = torch.from_numpy
    monkeypatch.setattr(torch, "from_numpy", lambda array: on_cpu(from_numpy(array)))  # which no mode sees
    losses = {}
    for name, mode in (("cpu", contextlib.nullcontext()), ("mps", PretendMPS())):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0" if name == "mps" else "")
        with mode:
            for more in ([], ["--num_steps", 6, "--resume"]):
                _, rows = train_run(tiny_flags(*flags, "--name", name, *more), monkeypatch, name)
        losses[name] = [[row["train_loss"], row["test_loss" if data == "digits" else "val_loss"]] for row in rows]
    assert len(losses["cpu"]) == 3
    np.testing.assert_allclose(losses["mps"], losses["cpu"], rtol=1e-4)


def test_optimizers_on_mps_are_not_fused():
    for name in ("sgd", "adam", "adamw"):
        fused = {}
        for device, mode in (("cpu", contextlib.nullcontext()), ("mps", PretendMPS())):
            groups = [{"params": [("weight", torch.nn.Parameter(torch.ones(2, 2)))], "lr": 0.1}]
            with mode:
                fused[device] = OPTIMIZERS[name](groups, 0.1, None).param_groups[0]["fused"]
        assert fused == {"cpu": True, "mps": False}


def test_sums_in_float64_are_computed_elsewhere():
    assert [device_of_sums(device) for device in (CPU, CUDA, MPS)] == [CPU, CUDA, CPU]
    assert [widest_float(device) for device in (CPU, CUDA, MPS)] == [torch.float64, torch.float64, torch.float32]


def test_copies_to_mps_are_awaited():
    """An Apple GPU may read the memory of a deleted tensor otherwise."""
    asked = []
    tensor = SimpleNamespace(to=lambda device, non_blocking: asked.append((device, non_blocking)))
    for device in (CUDA, MPS):
        to_device(tensor, device)
    assert asked == [(CUDA, True), (MPS, False)]


def test_an_evaluation_on_mps_has_the_numbers_of_the_cpu():
    model, digits = random_model("ViT-Mini_4", 8), load_data("digits", "test")
    flags = SimpleNamespace(fp16=False, bf16=False, fp16_opt_level="O2")
    results = []
    for device, mode in ((CPU, contextlib.nullcontext()), (MPS, PretendMPS())):
        with mode:
            processes = one_process(device)
            result = evaluate(model, digits, (8, 8), 100, make_precision(flags, device), processes, per_class=True)
        results.append(result)
    assert 0 < results[0]["accuracy"] < 1
    for name, value in results[0].items():
        torch.testing.assert_close(torch.as_tensor(results[1][name]), torch.as_tensor(value), rtol=1e-5, atol=1e-6)


def test_the_meter_reads_the_metrics_of_mps():
    meter = Meter(one_process(MPS))
    for loss in (1.0, 2.0):
        meter.add({"loss": torch.tensor(loss)})
    assert not meter.is_full
    assert meter.read() == {"loss": [1.0, 2.0]}


def test_nothing_is_compiled_on_mps():
    flags, model = SimpleNamespace(compile=True, fp16=False, bf16=True), build_model("ViT-Mini_4", 8)
    assert [is_compiled(flags, model, device) for device in (CPU, CUDA, MPS)] == [True, True, False]
    assert "Apple's GPUs" in why_eager(MPS)
    assert "on a CPU" in why_eager(CPU)


def test_a_timing_waits_for_mps(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append("mps"))
    for device in (CPU, MPS):
        synchronise(device)
    assert waited == ["mps"]


def test_too_little_memory_on_mps_is_an_error_of_one_line(capsys):
    def main():
        raise RuntimeError("MPS backend out of memory (MPS allocated: 7 GB). Tried to allocate 9 GB. Use X=0.0 to ...")

    with pytest.raises(SystemExit) as stopped:
        errors.run_script(main)
    printed = capsys.readouterr().err
    assert (stopped.value.code, printed.count("\n")) == (2, 1)
    assert "Tried to allocate 9 GB; less is needed with a smaller --img_size" in printed

    def faulty():
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        errors.run_script(faulty)
