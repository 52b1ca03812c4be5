"""Mixed precision: the apex levels O0 to O3, done by torch.amp, or by an old build of apex where there is one.

O0  float32
O1  float32 weights, autocast, dynamic loss scaling
O2  16-bit weights with float32 master weights, norms in float32, dynamic loss scaling
O3  16-bit throughout

16-bit is float16 on a GPU unless bfloat16 is asked for, and bfloat16 on a CPU. Loss scaling is for float16.
"""

import contextlib
import importlib

import torch
from torch import nn

from utils.errors import UserError

OPT_LEVELS = ("O0", "O1", "O2", "O3")
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d)
AMP_BACKENDS = ("torch", "apex")


def make_precision(args, device, amp_backend="torch", loss_scale=0.0, sharded=False):
    """The precision that the flags --fp16, --bf16 and --fp16_opt_level ask for; `sharded` as in Precision."""
    level = args.fp16_opt_level if args.fp16 or args.bf16 else "O0"
    if amp_backend == "apex" and level != "O0":
        return ApexPrecision(level, loss_scale)
    dtype = torch.float16 if device.type == "cuda" and not args.bf16 else torch.bfloat16
    return Precision(level, dtype, device, loss_scale, sharded)


class Precision:
    """The float types of a model's weights and activations, its loss scale, and the update that fits them."""

    def __init__(self, level, dtype, device, loss_scale=0.0, sharded=False):
        """`loss_scale` 0 is dynamic at O1 and O2 in float16, and 1 otherwise.

        Of a `sharded` model the shards are the masters of O2: the weights are cast, norms too, where a block gathers
        them.
        """
        self.level = level
        self.sharded = sharded
        self.dtype = dtype
        self.device = device
        dynamic = dtype == torch.float16 and level in ("O1", "O2") and not loss_scale
        self.scaler = torch.amp.GradScaler(device.type, enabled=dynamic)
        self.static_scale = loss_scale or 1.0 if level != "O0" else 1.0

    def cast(self, model):
        """Give the float32 `model` the level's types in place."""
        for module in model.modules():
            if self.level == "O3" or (self.level == "O2" and not self.sharded and not isinstance(module, NORMS)):
                for p in module.parameters(recurse=False):
                    p.data = p.data.to(self.dtype)

    def prepare(self, model, make_optimizer):
        """Cast `model` for training; returns `make_optimizer([(name, parameter), ...])` over its master weights,
        which `named` holds by their names.
        """
        float32 = {name: p.detach() for name, p in model.named_parameters()}
        self.cast(model)
        self.model = model
        self.masters = {}  # {name: float32 master} of the 16-bit parameters
        if self.level == "O2" and not self.sharded:
            self.masters = {name: float32[name] for name, p in model.named_parameters() if p.dtype == self.dtype}
            for master in self.masters.values():
                master.grad = torch.zeros_like(master)
        self.named = {name: self.masters.get(name, p) for name, p in model.named_parameters()}
        self.parameters = list(self.named.values())
        return make_optimizer(self.named.items())

    def autocast(self):
        if self.level == "O1":
            return torch.autocast(self.device.type, self.dtype)
        return contextlib.nullcontext()

    def inputs(self, images):
        """Images in the type of the model's first layer."""
        return images.to(self.dtype) if self.level in ("O2", "O3") else images

    def backward(self, loss):
        self.scaler.scale(loss * self.static_scale).backward()

    def step(self, optimizer, max_grad_norm):
        """Clip the gradients by their global norm (0: not at all), update the weights, forget the gradients."""
        model_weights = [p for name, p in self.model.named_parameters() if name in self.masters]
        masters = list(self.masters.values())
        with torch.no_grad():
            if masters:
                torch._foreach_copy_([m.grad for m in masters], [p.grad for p in model_weights])
            self.scaler.unscale_(optimizer)  # does nothing where scaling is not dynamic
            if self.static_scale != 1.0:
                torch._foreach_mul_([p.grad for p in self.parameters], 1 / self.static_scale)
            if max_grad_norm:
                nn.utils.clip_grad_norm_(self.parameters, max_grad_norm)
            self.scaler.step(optimizer)
            self.scaler.update()
            if masters:
                torch._foreach_copy_(model_weights, masters)
        self.model.zero_grad(set_to_none=True)

    def weights(self):
        """The model's state dict with the float32 masters in it."""
        return {**self.model.state_dict(), **self.masters}

    def state_dict(self):
        return {"scaler": self.scaler.state_dict()}

    def load_state_dict(self, state):
        self.scaler.load_state_dict(state["scaler"])


class ApexPrecision:
    """The same by `apex.amp`, which NVIDIA has removed from apex: only for those who keep an old build."""

    def __init__(self, level, loss_scale):
        self.amp = import_apex_amp()
        self.level = level
        self.loss_scale = loss_scale or "dynamic"

    def prepare(self, model, make_optimizer):
        self.model = model
        self.named = dict(model.named_parameters())
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
        if max_grad_norm:
            nn.utils.clip_grad_norm_(self.amp.master_params(optimizer), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    def weights(self):
        return self.model.state_dict()

    def state_dict(self):
        return {"apex": self.amp.state_dict()}

    def load_state_dict(self, state):
        self.amp.load_state_dict(state["apex"])


def import_apex_amp():
    """apex.amp with its `initialize`. Raises UserError that says why there is none."""
    why = "NVIDIA has removed apex.amp; leave --amp_backend away and torch.amp does the same"
    try:
        amp = importlib.import_module("apex.amp")
    except ImportError as error:
        raise UserError(f"--amp_backend apex: no apex.amp in this environment ({error}). {why}") from error
    if not hasattr(amp, "initialize"):
        raise UserError(f"--amp_backend apex: this apex has no amp.initialize. {why}")
    return amp
