"""Access to the modules of Triton kernels, which is optional: without it PyTorch's operators compute the same."""

import functools
import importlib
import warnings

import torch


@functools.cache
def load_kernel(name, device):
    """The function `apply` of the module models/`name`.py; None, with a warning, if it does not work on the device.

    The module's `trial(device)` shows whether it does, by an exception. So a kernel is never used before it has
    computed the right result on this GPU.
    """
    try:
        module = importlib.import_module(f"models.{name}")
        with torch.inference_mode(False), torch.enable_grad():
            module.trial(device)
    except Exception as error:  # Triton may be missing, or the C compiler that it needs
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        warnings.warn(f"slower PyTorch operators replace models/{name}.py: {reason}", stacklevel=2)
        return None
    return module.apply
