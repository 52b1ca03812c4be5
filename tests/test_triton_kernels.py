"""Triton kernels without a GPU: what they compute, that they compile, and what replaces them."""

import os
import subprocess
import sys

import pytest
import torch

from helpers import ROOT
from models.facility_location import facility_location, picks_on_gpu
from models.probing import load_kernel

triton = pytest.importorskip("triton")
CONSTANTS = {"relu": True, "rows": 8, "columns": 256, "parts": 8, "ranks": 64}


def test_they_compute_what_pytorchs_operators_compute():
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "tests/triton_interpreter.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout


def entry_points():
    """(module, name) of the kernels that are launched: those with a pointer, which end without a value."""
    from models import facility_location_kernel, group_norm_kernel

    names = ("channel_moments", "group_statistics", "normalise", "channel_sums", "group_means", "input_gradient")
    return [(facility_location_kernel, "pick_greedily"), *((group_norm_kernel, name) for name in names)]


@pytest.mark.parametrize("number", range(7))
def test_they_compile_for_nvidias_gpus(number, monkeypatch, tmp_path):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    module, name = entry_points()[number]
    kernel = getattr(module, name)
    constants = {name: CONSTANTS[name] for name in kernel.arg_names if name in CONSTANTS}
    types = {"picks": "*i64", "eps": "fp32", "x": "*bf16", "y": "*bf16", "gradient": "*bf16", "of_x": "*bf16"}
    types |= dict.fromkeys(("s", "weight", "bias", "of_parts", "statistics", "means"), "*fp32")
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    compiled = triton.compile(ASTSource(kernel, signature, constants), GPUTarget("cuda", 90, 32), {"num_warps": 8})
    assert compiled.asm["cubin"]


def test_where_they_do_not_run_pytorchs_operators_do(caplog):
    """On the CPU, Triton can't start a compiled kernel."""
    s = torch.rand(3, 14, 14, generator=torch.Generator().manual_seed(0))
    load_kernel.cache_clear()
    for _ in range(2):
        assert torch.equal(picks_on_gpu(s, 6), facility_location(s.double(), 6))
    load_kernel.cache_clear()
    (record,) = caplog.records
    assert record.getMessage().startswith("models/facility_location_kernel.py: ")
