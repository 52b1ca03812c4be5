"""Mixed precision: the apex levels O0 to O3 by torch.amp, or by an old build of apex if one is installed.

O0  float32
O1  float32 weights, autocast, dynamic loss scaling
O2  16-bit weights with float32 master weights, norms in float32, dynamic loss scaling
O3  16-bit throughout

16-bit is float16 on a GPU unless --bf16 is given, and bfloat16 on a CPU. Loss scaling is for float16. On Apple's GPUs
each level but O0 is autocast in bfloat16.
"""

import contextlib
import importlib

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from utils.errors import UserError

OPT_LEVELS = ("O0", "O1", "O2", "O3")
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d)  # in float32 at O2, unless a module has its own `stays_float32`
AMP_BACKENDS = ("torch", "apex")


def make_precision(args, device, amp_backend="torch", loss_scale=0.0, sharded=False):
    """The precision of the flags --fp16, --bf16 and --fp16_opt_level; `sharded` as in Precision."""
    level = args.fp16_opt_level if args.fp16 or args.bf16 else "O0"
    if device.type == "mps" and level != "O0":
        level = "O1"
    if amp_backend == "apex" and level != "O0":
        return ApexPrecision(level, loss_scale)
    dtype = torch.float16 if device.type == "cuda" and not args.bf16 else torch.bfloat16
    return Precision(level, dtype, device, loss_scale, sharded)


class Precision:
    """The data types of a model's weights and activations, its loss scale, and the matching update."""

    def __init__(self, level, dtype, device, loss_scale=0.0, sharded=False):
        """A `loss_scale` of 0 means dynamic scaling at O1 and O2 in float16, and 1 otherwise.

        The shards of a `sharded` model are the masters of O2; a block casts the weights, norms included, when it
        gathers them.
        """
        self.level = level
        self.sharded = sharded
        self.dtype = dtype
        self.device = device
        dynamic = dtype == torch.float16 and level in ("O1", "O2") and not loss_scale
        self.scaler = torch.amp.GradScaler(device.type, enabled=dynamic)
        self.static_scale = loss_scale or 1.0 if level != "O0" else 1.0

    def cast(self, model):
        """Cast the float32 `model` in place to the data types of the level."""
        for module in model.modules():
            if self.level == "O3" or (self.level == "O2" and not self.sharded and not stays_float32(module)):
                for p in module.parameters(recurse=False):
                    p.data = p.data.to(self.dtype)

    def prepare(self, model, make_optimizer):
        """Cast `model` for training; return `make_optimizer([(name, parameter), ...])` over its trained master weights.

        `self.named` then holds the master weights by name. Weights that do not require gradients are not trained.
        """
        float32 = {name: p.detach() for name, p in model.named_parameters()}
        self.cast(model)
        self.model = model
        trained = trained_parameters(model)
        self.masters = {}  # {name: float32 master} of the 16-bit parameters
        self.frozen = {}  # {name: float32 original} of the others that have 16 bits; only for files, so on the host
        if self.level == "O2" and not self.sharded:
            in_16_bits = {name for name, p in model.named_parameters() if p.dtype == self.dtype}
            self.masters = {name: float32[name] for name in trained if name in in_16_bits}
            self.frozen = {name: weight.cpu() for name, weight in float32.items() if name in in_16_bits - set(trained)}
            for master in self.masters.values():
                master.grad = torch.zeros_like(master)
        self.named = {name: self.masters.get(name, p) for name, p in trained.items()}
        self.parameters = list(self.named.values())
        return make_optimizer(self.named.items())

    def autocast(self):
        if self.level == "O1":
            return torch.autocast(self.device.type, self.dtype)
        return contextlib.nullcontext()

    def inputs(self, images):
        """The images in the data type of the model's first layer."""
        return images.to(self.dtype) if self.level in ("O2", "O3") else images

    def backward(self, loss):
        self.scaler.scale(loss * self.static_scale).backward()

    def step(self, optimizer, max_grad_norm):
        """Clip the gradients by their global norm (0: never), update the weights, free the gradients.

        Returns the norm before clipping, a 0-dim tensor: NaN for a step that dynamic loss scaling skips.
        """
        model_weights = [p for name, p in self.model.named_parameters() if name in self.masters]
        masters = list(self.masters.values())
        with torch.no_grad():
            if masters:
                torch._foreach_copy_([m.grad for m in masters], [p.grad for p in model_weights])
            self.scaler.unscale_(optimizer)  # does nothing where scaling is not dynamic
            if self.static_scale != 1.0:
                torch._foreach_mul_([p.grad for p in self.parameters], 1 / self.static_scale)
            norm = clip_gradients(self.parameters, max_grad_norm)
            self.scaler.step(optimizer)
            self.scaler.update()
            if masters:
                torch._foreach_copy_(model_weights, masters)
        self.model.zero_grad(set_to_none=True)
        return norm.where(norm.isfinite(), torch.nan) if self.scaler.is_enabled() else norm

    def weights(self):
        """The model's state dict with float32 weights, on the host if frozen, in place of the 16-bit ones of O2."""
        return {**self.model.state_dict(), **self.masters, **self.frozen}

    def state_dict(self):
        return {"scaler": self.scaler.state_dict()}

    def load_state_dict(self, state):
        """Continue with the loss scale of a checkpoint, if its run had a dynamic one."""
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])


class ApexPrecision:
    """The same by `apex.amp`, for old builds of apex: NVIDIA has removed it."""

    def __init__(self, level, loss_scale):
        self.amp = import_apex_amp()
        self.level = level
        self.loss_scale = loss_scale or "dynamic"

    def prepare(self, model, make_optimizer):
        self.model = model
        self.named = trained_parameters(model)
        self.optimizer = make_optimizer(self.named.items())
        self.amp.initialize(model, self.optimizer, opt_level=self.level, loss_scale=self.loss_scale)
        return self.optimizer

    def autocast(self):
        return contextlib.nullcontext()

    def inputs(self, images):
        return images

    def backward(self, loss):
        with self.amp.scale_loss(loss, self.optimizer) as scaled_loss:
            scaled_loss.backward()

    def step(self, optimizer, max_grad_norm):
        norm = clip_gradients(list(self.amp.master_params(optimizer)), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return norm

    def weights(self):
        return self.model.state_dict()

    def state_dict(self):
        return {"apex": self.amp.state_dict()}

    def load_state_dict(self, state):
        if "apex" in state:
            self.amp.load_state_dict(state["apex"])


def trained_parameters(model):
    """{name: parameter} of those that require gradients."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def stays_float32(module):
    """Whether the module's own parameters stay float32 at level O2."""
    return getattr(module, "stays_float32", isinstance(module, NORMS))


def clip_gradients(parameters, max_norm):
    """Scale the gradients so that their global norm is at most `max_norm` (0: leave them); returns the norm before."""
    if max_norm:
        norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    else:
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def import_apex_amp():
    """The module apex.amp with its `initialize`. Raises UserError if it is missing."""
    why = "NVIDIA has removed apex.amp; omit --amp_backend and torch.amp does the same"
    try:
        amp = importlib.import_module("apex.amp")
    except ImportError as error:
        raise UserError(f"--amp_backend apex: no apex.amp in this environment ({error}). {why}") from error
    if not hasattr(amp, "initialize"):
        raise UserError(f"--amp_backend apex: this apex has no amp.initialize. {why}")
    return amp
