"""Activation checkpointing, and keeping freed memory for reuse."""

import contextlib
import ctypes
import functools
import itertools
import sys

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_activations(model, compiled=False):
    """Make each block of the model (a module with `is_block`) keep only its inputs for the backward pass.

    The backward pass computes the rest again (Chen et al., 2016), to the same bits. `compiled` compiles the blocks,
    because model.compile() no longer reaches them. Frozen blocks before the first trained one keep nothing anyway.
    """
    blocks = [module for module in model.modules() if getattr(module, "is_block", False)]
    for block in itertools.dropwhile(is_frozen, blocks):
        norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm1d)]
        contexts = {"context_fn": functools.partial(checkpoint_contexts, norms)} if norms else {}
        forward = torch.compile(block.forward) if compiled else block.forward
        block.forward = functools.partial(checkpoint, forward, use_reentrant=False, **contexts)


def is_frozen(module):
    """Whether none of the module's weights requires a gradient."""
    return not any(weight.requires_grad for weight in module.parameters())


def checkpoint_contexts(batch_norms):
    """Contexts for a block's forward pass and for its recomputation, which must not update running statistics."""
    return contextlib.nullcontext(), frozen_statistics(batch_norms)


@contextlib.contextmanager
def frozen_statistics(batch_norms):
    """Inside, the norms do not update their running statistics."""
    momenta = [norm.momentum for norm in batch_norms]
    try:
        for norm in batch_norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum in zip(batch_norms, momenta, strict=True):
            norm.momentum = momentum


def keep_freed_memory():
    """Make this process keep the memory that it frees, for its next tensors. Without glibc nothing changes.

    By default glibc returns blocks above 32 MiB to the kernel, which then clears them again, page by page, for each
    large activation (benchmarks/NOTES.md).
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        for option in (-1, -3) if mallopt else ():  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(option, -1)  # the largest value
