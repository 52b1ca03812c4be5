"""An exponential moving average of a model, which is evaluated and saved in its place."""

import contextlib

import torch
from torch.distributed.fsdp import FSDPModule
from torch.optim.swa_utils import get_ema_multi_avg_fn

from utils.parallel.processes import local_parts


class WeightAverage:
    """average <- decay * average + (1 - decay) * weight after each step (Polyak and Juditsky, 1992).

    Buffers, such as the running statistics of BN, are averaged like the weights that they were measured with. In the
    first steps the decay is at most (1 + step) / (10 + step), as in TensorFlow, so that the initial weights lose their
    influence quickly.
    """

    def __init__(self, model, masters, decay):
        """`masters` are {name: parameter} of the model's trained parameters, in float32, whole or sharded."""
        self.decay = decay
        self.sources = {**masters, **floating_buffers(model)}
        self.weights = {name: source.detach().float().clone() for name, source in self.sources.items()}

    def update(self, step):
        """Add the weights and buffers after step number `step`, counted from 1."""
        average = get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)))
        with torch.no_grad():
            sources = [source.float() for source in local_parts(self.sources.values())]
            average(local_parts(self.weights.values()), sources, None)

    @contextlib.contextmanager
    def in_place(self, model):
        """Inside, the model has the averaged weights and buffers."""
        reshard(model)
        tensors = {**dict(model.named_parameters()), **floating_buffers(model)}
        weights = local_parts(tensors[name] for name in self.weights)
        with torch.no_grad():
            kept = [weight.clone() for weight in weights]
            torch._foreach_copy_(weights, local_parts(self.weights.values()))
            yield
            torch._foreach_copy_(weights, kept)
        reshard(model)


def floating_buffers(model):
    """{name: buffer} of the model's persistent buffers that can be averaged."""
    persistent = model.state_dict()
    return {name: b for name, b in model.named_buffers() if name in persistent and b.is_floating_point()}


def reshard(model):
    """Make an FSDP model free what it has gathered outside its blocks, since it does not notice that shards change."""
    if isinstance(model, FSDPModule):
        model.reshard()
