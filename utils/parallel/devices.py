"""How Apple's GPUs (MPS) differ from other devices: they lack float64, and some copies to them are wrong.

None of this has run on such a GPU.
"""

import os

import torch

HIDDEN = ("", "-1")  # values of CUDA_VISIBLE_DEVICES by which the user wants the CPU


def has_apple_gpu():
    """Whether this process may compute on an Apple GPU.

    An empty CUDA_VISIBLE_DEVICES hides it, as it hides those of NVIDIA. Several processes can't share it: gloo, by
    which they communicate, does not support it.
    """
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in HIDDEN or "RANK" in os.environ
    return torch.backends.mps.is_available() and not is_hidden


def widest_float(device):
    """torch.float64, or torch.float32 for an Apple GPU."""
    return torch.float32 if device.type == "mps" else torch.float64


def device_of_sums(device):
    """Where sums in float64 are computed: on `device`, or on the CPU for an Apple GPU."""
    return torch.device("cpu") if device.type == "mps" else device


def to_device(tensor, device):
    """A copy of a CPU tensor on `device`, for which the CPU does not wait if the device is one of CUDA.

    Without waiting, an Apple GPU may read the memory of a tensor that is deleted (github.com/pytorch/pytorch/issues/
    189690).
    """
    return tensor.to(device, non_blocking=device.type == "cuda")
