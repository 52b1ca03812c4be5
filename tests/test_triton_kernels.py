"""Triton kernels without a GPU: what they compute, that they compile, and what replaces them."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from helpers import ROOT
from models.facility_location import facility_location, picks_on_gpu
from models.probing import load_kernel

triton = pytest.importorskip("triton")
KERNELS = ("pick_greedily", "channel_moments", "group_statistics", "normalise", "channel_sums", "group_means")
KERNELS += ("input_gradient",)
TYPES = {"picks": "*i64", "eps": "fp32", "x": "*bf16", "y": "*bf16", "gradient": "*bf16", "of_x": "*bf16"}
TYPES |= dict.fromkeys(("s", "weight", "bias", "of_parts", "statistics", "means"), "*fp32")


def test_they_compute_what_pytorchs_operators_compute():
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "tests/triton_interpreter.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout


def launched(name):
    """(the kernel, the constants of its launches at sizes of large models)."""
    from models import facility_location_kernel, group_norm_kernel

    if name == "pick_greedily":
        sizes = [facility_location_kernel.tile_sizes(tokens, k) for tokens, k in ((196, 147), (1024, 256))]
        return facility_location_kernel.pick_greedily, sizes
    rows = [(128, 112 * 112, 64, 32), (128, 14 * 14, 3072, 32), (128, 197, 768, 4)]  # a stem, a ResNet, tokens
    number = int(name.startswith("group"))
    sizes = [group_norm_kernel.launches(*shape)[number].sizes for shape in rows]
    return getattr(group_norm_kernel, name), [{"relu": True, **each} for each in sizes]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_they_compile_for_nvidias_gpus(name, capability, monkeypatch, tmp_path):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, launches = launched(name)
    constant = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    ones = {"k", "count", "tiles", "num_parts"} & set(kernel.arg_names)  # Triton makes a number that is 1 a constant
    for sizes, also in itertools.product(launches, (set(), ones)):
        constants = {name: sizes[name] for name in constant} | dict.fromkeys(also, 1)
        types = {name: TYPES.get(name, "i32") for name in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, types, constants)
        compiled = triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": 8})
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
