"""The Triton kernel of facility location without a GPU: what it picks, and that it compiles."""

import os
import subprocess
import sys

import pytest
import torch

from helpers import ROOT
from models.facility_location import facility_location, picks_on_gpu, triton_kernel

triton = pytest.importorskip("triton")


def test_it_picks_the_same_in_tritons_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "tests/triton_interpreter.py"]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout


@pytest.mark.parametrize("tokens, k, capability", [(196, 147, 90), (1024, 256, 80)])
def test_it_compiles_for_nvidias_gpus(tokens, k, capability, monkeypatch, tmp_path):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from models import facility_location_kernel as module

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    sizes = module.tile_sizes(tokens, k)
    assert sizes["columns"] >= tokens and sizes["ranks"] >= k and sizes["rows"] * sizes["columns"] <= module.TILE
    types = {"s": "*fp32", "picks": "*i64", "tokens": "i32", "k": "i32", **dict.fromkeys(sizes, "constexpr")}
    source = ASTSource(module.pick_greedily, signature=types, constexprs=sizes)
    compiled = triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": module.WARPS})
    assert compiled.asm["cubin"]


def test_where_it_does_not_run_pytorchs_operators_pick():
    """On the CPU, Triton can't start a compiled kernel."""
    s = torch.rand(3, 14, 14, generator=torch.Generator().manual_seed(0))
    triton_kernel.cache_clear()
    with pytest.warns(UserWarning, match="without its Triton kernel, which is slower: ."):
        picks = picks_on_gpu(s, 6)
    triton_kernel.cache_clear()
    assert torch.equal(picks, facility_location(s.double(), 6))
