"""Memory for time: activations that are computed again instead of kept, and freed memory that is kept."""

import contextlib
import ctypes
import functools
import sys

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_activations(model, compiled=False):
    """Let each block of the model (a module with `is_block`) keep no more than its inputs for the backward pass.

    The rest is computed once more there (Chen et al., 2016), to the same bits. `compiled` compiles the blocks, which
    model.compile() does not reach any more.
    """
    for block in model.modules():
        if getattr(block, "is_block", False):
            norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm1d)]
            contexts = {"context_fn": functools.partial(contexts_of, norms)} if norms else {}
            forward = torch.compile(block.forward) if compiled else block.forward
            block.forward = functools.partial(checkpoint, forward, use_reentrant=False, **contexts)


def contexts_of(batch_norms):
    """Around a block's forward pass, and around its repetition, which must not count into the running statistics."""
    return contextlib.nullcontext(), unmoved(batch_norms)


@contextlib.contextmanager
def unmoved(batch_norms):
    momenta = [norm.momentum for norm in batch_norms]
    try:
        for norm in batch_norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum in zip(batch_norms, momenta, strict=True):
            norm.momentum = momentum


def keep_freed_memory():
    """Have this process keep the memory that it frees, for its next tensors; without glibc nothing changes.

    glibc gives blocks above 32 MiB back to the kernel, which then clears them anew, page by page, for each large
    activation (benchmarks/NOTES.md).
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        for option in (-1, -3) if mallopt else ():  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(option, -1)  # the largest there is
