"""Memory: activations that are recomputed instead of kept, and freed memory that is kept."""

import platform
import subprocess
import sys

import pytest
import torch

from helpers import ROOT, assert_same_bits, make_shallow, train_run
from models import build_model
from utils.parallel.cpu import compile_in_place
from utils.parallel.memory import recompute_activations
from utils.profiling import activation_bytes


@pytest.mark.parametrize(
    "model_type, norm_type",
    [
        *(("ViT-Mini_4", norm_type) for norm_type in ("LN", "BN")),
        *(("R26-ViT-Mini_4", norm_type) for norm_type in ("LN", "BN")),
        *(("Conformer-Mini_4", norm_type) for norm_type in ("LN", "BN")),
        ("ResNet-Mini_Flops", None),
    ],
)
def test_recomputed_activations_give_the_same_bits(model_type, norm_type, tiny_flags, monkeypatch):
    """And the running statistics of BN count each batch once."""
    make_shallow(monkeypatch)
    flags = ["--model_type", model_type, "--img_size", 16, "--num_steps", 3, "--eval_every", 3]
    if norm_type:
        flags += ["--norm_type", norm_type, "--dropout_rate", 0.1, "--drop_path_rate", 0.2]
    plain, _ = train_run(tiny_flags(*flags), monkeypatch)
    recomputed, _ = train_run(tiny_flags(*flags, "--grad_checkpointing", "--overwrite"), monkeypatch)
    assert_same_bits(plain, recomputed)


@pytest.mark.parametrize("model_type", ["ViT-Mini_4", "R26-ViT-Mini_4", "ResNet-Mini_Flops"])
def test_recomputed_activations_are_not_kept(model_type):
    model, images = build_model(model_type, 32), torch.randn(2, 3, 32, 32)
    kept = []
    for _ in range(2):
        kept.append(activation_bytes(model, lambda: model(images).sum().backward()))
        recompute_activations(model)
    assert kept[1] < kept[0] / 2


@pytest.mark.slow
def test_all_recomputed_blocks_share_one_compiled_graph():
    """One graph for the patch embedding, one for the last block, which computes the class token only, and one for all
    other blocks; the gradients stay the same."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    model, images = build_model("ViT-Mini_4", 8, num_layers=3), torch.randn(2, 3, 8, 8)
    torch.nn.init.normal_(model.head.weight)
    gradients = []
    for compiled in (False, True):
        if compiled:
            recompute_activations(model, compiled)
            compile_in_place(model, torch.device("cuda"))  # as on a GPU: all of it
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4 * gradients[0].abs().max().item())


PAGE_FAULTS = """
import resource
import torch
from utils.parallel.memory import keep_freed_memory

def page_faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.zeros(2**26, dtype=torch.uint8)  # 64 MiB, 16384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

mapped_again = page_faults(4)
keep_freed_memory()
page_faults(20)  # until the small objects of the process have found their places
print(mapped_again, page_faults(4))
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_large_tensors_reuse_the_memory_of_earlier_ones():
    done = subprocess.run([sys.executable, "-c", PAGE_FAULTS], cwd=ROOT, capture_output=True, text=True, check=True)
    mapped_again, kept = map(int, done.stdout.split())
    assert mapped_again > 10 * kept + 100
