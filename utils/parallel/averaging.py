"""An exponential moving average of the weights, which is evaluated and saved instead of them."""

import contextlib

import torch
from torch.distributed.fsdp import FSDPModule
from torch.optim.swa_utils import get_ema_multi_avg_fn

from utils.parallel.processes import local_parts


class WeightAverage:
    """average <- decay * average + (1 - decay) * weight after each step (Polyak and Juditsky, 1992).

    In the first steps the decay is at most (1 + step) / (10 + step), as in TensorFlow, so that the initial weights
    lose their influence quickly.
    """

    def __init__(self, weights, decay):
        """`weights` are {name: parameter}, whole or sharded, in the order of the model's parameters."""
        self.decay = decay
        self.weights = {name: weight.detach().float().clone() for name, weight in weights.items()}

    def update(self, weights, step):
        """Add the weights after step number `step`, counted from 1."""
        average = get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)))
        with torch.no_grad():
            average(local_parts(self.weights.values()), [w.float() for w in local_parts(weights.values())], None)

    @contextlib.contextmanager
    def in_place(self, model):
        """Inside, the model has the averaged weights."""
        reshard(model)
        weights = local_parts(model.parameters())
        with torch.no_grad():
            kept = [weight.clone() for weight in weights]
            torch._foreach_copy_(weights, local_parts(self.weights.values()))
            yield
            torch._foreach_copy_(weights, kept)
        reshard(model)


def reshard(model):
    """Make an FSDP model free what it has gathered outside its blocks, since it does not notice that shards change."""
    if isinstance(model, FSDPModule):
        model.reshard()
