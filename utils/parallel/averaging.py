"""A moving average of the weights, to be evaluated and kept in their place."""

import contextlib

import torch
from torch.distributed.fsdp import FSDPModule
from torch.optim.swa_utils import get_ema_multi_avg_fn

from utils.parallel.processes import local_parts


class WeightAverage:
    """average <- decay * average + (1 - decay) * weight after each step (Polyak and Juditsky, 1992).

    In the first steps the decay is (1 + step) / (10 + step) at most, as in TensorFlow, so that the weights at the start
    are soon forgotten.
    """

    def __init__(self, weights, decay):
        """`weights` are {name: parameter}, whole or sharded, in the order of the model's parameters."""
        self.decay = decay
        self.weights = {name: weight.detach().float().clone() for name, weight in weights.items()}

    def update(self, weights, step):
        """Take in the weights that step number `step`, counted from 1, has led to."""
        average = get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)))
        with torch.no_grad():
            average(local_parts(self.weights.values()), [w.float() for w in local_parts(weights.values())], None)

    @contextlib.contextmanager
    def in_place(self, model):
        """Inside, the model computes with the average."""
        reshard(model)
        weights = local_parts(model.parameters())
        with torch.no_grad():
            kept = [weight.clone() for weight in weights]
            torch._foreach_copy_(weights, local_parts(self.weights.values()))
            yield
            torch._foreach_copy_(weights, kept)
        reshard(model)


def reshard(model):
    """Let an FSDP model forget what it has gathered outside of its blocks: it would not see that its shards change."""
    if isinstance(model, FSDPModule):
        model.reshard()
