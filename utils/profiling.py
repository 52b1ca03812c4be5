"""What a model costs whatever the machine: parameters, FLOPs, and the memory of its activations."""

import torch
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model):
    return sum(p.numel() for p in model.parameters())


def count_flops(model, img_size):
    """FLOPs of one image's forward pass, 2 a multiply-add, of a model built on the meta device."""
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, img_size, img_size, device="meta"))
    return counter.get_total_flops()


def activation_bytes(model, step):
    """Bytes that a training step, forward and backward, keeps in between beside the model's parameters and buffers.

    Memory that several tensors share counts once. `step()` must not save tensors after its backward pass has begun.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return sum(kept.values())
