"""Memory for time: activations that are computed again instead of kept."""

import contextlib
import functools

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
