"""How a run computes on a CPU: its threads, and what --compile compiles."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from helpers import ROOT, make_shallow, train_run
from models import build_model
from utils.parallel import cpu
from utils.parallel.cpu import compile_in_place, is_compiled, restore_threads

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    "model_type, bits, device, expected",
    [
        ("ViT-Nano_4", "bf16", CPU, True),
        ("ViT-Nano_4", "fp16", CPU, True),  # which is bfloat16 there
        ("ViT-Nano_4", None, CPU, False),
        ("Conformer-Mini_4", "bf16", CPU, True),
        ("ResNet-Mini_Flops", "bf16", CPU, False),
        ("ResNet-Mini_Flops", None, GPU, True),
        ("ViT-Nano_4", None, GPU, True),
    ],
)
def test_a_cpu_compiles_transformers_in_16_bits(model_type, bits, device, expected):
    model = build_model(model_type, 32)
    for asked in (True, False):
        args = SimpleNamespace(compile=asked, fp16=bits == "fp16", bf16=bits == "bf16")
        assert is_compiled(args, model, device) == (asked and expected)


def test_a_cpu_compiles_the_blocks_only(monkeypatch):
    model = build_model("R26-ViT-Mini_4", 32, num_layers=2)
    compile_in_place(model, CPU)
    compiled = {name for name, module in model.named_modules() if module._compiled_call_impl is not None}
    assert compiled == {"blocks.0", "blocks.1"}


def test_a_run_that_a_cpu_does_not_compile_says_so_and_has_the_bits_of_an_eager_one(
    tiny_flags, tmp_path, monkeypatch, capsys
):
    make_shallow(monkeypatch, num_layers=1)
    eager, _ = train_run(tiny_flags("--num_steps", 2), monkeypatch)
    capsys.readouterr()
    asked, _ = train_run(tiny_flags("--num_steps", 2, "--compile", "--overwrite"), monkeypatch)
    assert "--compile: on a CPU only transformer blocks in bfloat16" in capsys.readouterr().out
    assert all(torch.equal(eager[name], asked[name]) for name in eager)
    [path] = (tmp_path / "output").glob("*/config.json")
    config = json.loads(path.read_text())
    assert (config["compiled"], config["threads"]) == (False, torch.get_num_threads())


def test_a_resumed_run_uses_the_threads_of_its_start(monkeypatch):
    present = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    used = []
    monkeypatch.setattr(cpu.torch, "set_num_threads", used.append)
    assert restore_threads(None) is restore_threads(present) is None
    assert f"{present + 1} CPU threads, as when the run was started, not {present}" in restore_threads(present + 1)
    monkeypatch.setenv("OMP_NUM_THREADS", str(present))
    assert restore_threads(present + 1) is None
    assert used == [present + 1]


@pytest.mark.parametrize(
    "given, expected",
    [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active"), ({"GOMP_SPINCOUNT": "5"}, None)],
)
def test_threads_wait_without_spinning_unless_the_environment_has_a_setting(given, expected):
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    code = "import sys, os, utils.parallel.waiting; print(os.environ.get('OMP_WAIT_POLICY'), 'torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**environment, **given}, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == [str(expected), "False"]
