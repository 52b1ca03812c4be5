"""The optimizers, one line of OPTIMIZERS each, their parameter groups, and their state in checkpoints.

An entry is called with parameter groups, whose "params" are (name, parameter) pairs, the learning rate and the model,
and returns a torch.optim.Optimizer. Its state must be tensors in `optimizer.state`, which are saved and restored.
A group that sets its own "lr" keeps its ratio to --learning_rate through the whole schedule.
"""

from operator import itemgetter

import torch
from torch.distributed.tensor import DTensor

from utils.errors import UserError
from utils.freezing import layer_scales

NOT_DECAYED = ("cls_token", "pos_embed")  # in addition to all weights of one dimension: biases and norms


def make_optimizer(args, model, named_parameters):
    """The optimizer of the flags for the trained [(name, parameter), ...] of a model.

    Biases, norms, the class token and position embeddings are not decayed. With --layer_decay each layer has groups
    with a learning rate of their own. Raises ValueError if the flags do not suit the model.
    """
    scales = layer_scales(model, args.layer_decay) if args.layer_decay != 1 else {}
    groups = {}
    for name, parameter in named_parameters:
        is_decayed = parameter.ndim > 1 and name not in NOT_DECAYED
        groups.setdefault((is_decayed, scales.get(name, 1.0)), []).append((name, parameter))
    groups = [
        {"params": pairs, "weight_decay": args.weight_decay * is_decayed, "lr": args.learning_rate * scale}
        for (is_decayed, scale), pairs in sorted(groups.items(), key=itemgetter(0), reverse=True)
    ]
    optimizer = OPTIMIZERS[args.optimizer](groups, args.learning_rate, model)
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return optimizer


def sgd(groups, lr, model):
    """SGD with momentum 0.9.

    The momenta start at zero, which gives the same first step. Otherwise the fused SGD would create them without values
    in a first step that dynamic loss scaling skips, and the second step would use these.
    """
    # The fused SGD of torch 2.9 does not update bfloat16 weights on a CPU (level O3), and does not support shards.
    has_shards = any(isinstance(parameter, DTensor) for group in groups for _, parameter in group["params"])
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, fused=supports_fused(groups) and not has_shards)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def adam(groups, lr, model):
    """Adam with PyTorch's defaults."""
    return torch.optim.Adam(groups, lr=lr, fused=supports_fused(groups))


def adamw(groups, lr, model):
    """AdamW with PyTorch's defaults."""
    return torch.optim.AdamW(groups, lr=lr, fused=supports_fused(groups))


def supports_fused(groups):
    """Whether all parameters are float32 on a CPU or CUDA device."""
    parameters = [parameter for group in groups for _, parameter in group["params"]]
    return all(p.dtype == torch.float32 and p.device.type in ("cpu", "cuda") for p in parameters)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) for the matrices and convolution kernels of the blocks, AdamW for all other weights.

    Muon's updates are scaled to the size of AdamW's ("match_rms_adamw"), so one learning rate serves both. Query, key
    and value, which are stacked in one weight, are three matrices; a kernel is a matrix with a row for each output
    channel. Raises ValueError for sharded weights.
    """

    def __init__(self, groups, lr, model):
        if any(isinstance(parameter, DTensor) for group in groups for _, parameter in group["params"]):
            raise ValueError("muon needs whole matrices, not shards; use --parallel ddp")
        self.counts = count_block_matrices(model)
        matrices = select(groups, lambda name: name in self.counts)
        self.adamw = adamw(select(groups, lambda name: name not in self.counts), lr, model)
        super().__init__([*({**group, "by_muon": True} for group in matrices), *self.adamw.param_groups], {"lr": lr})
        matrices = [self.split(group, torch.Tensor.detach) for group in self.muon_groups()]
        parts = [{"params": [torch.nn.Parameter(matrix) for matrix in group]} for group in matrices]
        self.muon = torch.optim.Muon(parts, lr=lr, adjust_lr_fn="match_rms_adamw")

    def load_state_dict(self, state_dict):
        """Raises UserError for the state of a version in which AdamW updated convolution kernels."""
        super().load_state_dict(state_dict)
        if any("exp_avg" in self.state[weight] for group in self.muon_groups() for weight in group["params"]):
            raise UserError(
                "the run is of an earlier version, in which --optimizer muon did not update convolution kernels; it "
                "can't be resumed"
            )

    def muon_groups(self):
        """The groups that Muon updates."""
        return [group for group in self.param_groups if group.get("by_muon")]

    def split(self, group, tensor_of):
        """A tensor of each weight in a group, stacked matrices as separate views: [(out, in), ...]."""
        pairs = zip(group["param_names"], group["params"], strict=True)
        parts = [part for name, weight in pairs for part in tensor_of(weight).chunk(self.counts[name])]
        return [part.view(len(part), -1) for part in parts]

    @torch.no_grad()
    def step(self, closure=None):
        """Both optimizers work on this one's groups and state, which are what is scheduled, saved and resumed."""
        for group, parts in zip(self.muon_groups(), self.muon.param_groups, strict=True):
            parts.update(lr=group["lr"], weight_decay=group["weight_decay"])
            for weight in group["params"]:
                if "momentum_buffer" not in self.state[weight]:  # contiguous, so that its parts are views
                    momentum = torch.zeros_like(weight, memory_format=torch.contiguous_format)
                    self.state[weight]["momentum_buffer"] = momentum
            gradients = self.split(group, lambda weight: weight.grad.contiguous())
            buffers = self.split(group, lambda weight: self.state[weight]["momentum_buffer"])
            for part, gradient, buffer in zip(parts["params"], gradients, buffers, strict=True):
                part.grad = gradient
                self.muon.state[part]["momentum_buffer"] = buffer
        self.muon.step()
        self.muon.zero_grad()  # the views would keep the gradients in memory
        self.adamw.param_groups = [group for group in self.param_groups if not group.get("by_muon")]
        self.adamw.state = self.state
        self.adamw.step()


def muon(groups, lr, model):
    """MuonWithAdamW, or AdamW alone where all matrices of the blocks are frozen."""
    counts = count_block_matrices(model)
    all_frozen = counts and not select(groups, lambda name: name in counts)
    return (adamw if all_frozen else MuonWithAdamW)(groups, lr, model)


def count_block_matrices(model):
    """{name: number of stacked matrices} of the weights and kernels in the model's blocks, modules with `is_block`."""
    blocks = [(name, module) for name, module in model.named_modules() if getattr(module, "is_block", False)]
    weights = [(f"{name}.{key}", p) for name, block in blocks for key, p in block.named_parameters()]
    stacked = {
        f"{name}.{key}": count
        for name, module in model.named_modules()
        for key, count in getattr(module, "stacked_weights", {}).items()
    }
    return {name: stacked.get(name, 1) for name, weight in weights if weight.ndim in (2, 4)}


def select(groups, condition):
    """The groups with only the parameters whose names fulfil the condition; no empty ones."""
    selected = [{**group, "params": [pair for pair in group["params"] if condition(pair[0])]} for group in groups]
    return [group for group in selected if group["params"]]


OPTIMIZERS = {"sgd": sgd, "adam": adam, "adamw": adamw, "muon": muon}


def state_tensors(optimizer):
    """{"<weight>/<quantity>": tensor}: the state of each weight, whole or sharded. Raises TypeError for non-tensors."""
    tensors = {}
    for group in optimizer.param_groups:
        for name, weight in zip(group["param_names"], group["params"], strict=True):
            for quantity, value in optimizer.state[weight].items():
                if not torch.is_tensor(value):
                    raise TypeError(f"the optimizer's {quantity} of {name} is not a tensor, so it can't be saved")
                tensors[f"{name}/{quantity}"] = value
    return tensors


def empty_state(weights):
    """The `like` of `load_tensors` for `state_tensors` of the weights {name: tensor}, whole or sharded as they are."""

    def like(key, shape, dtype):
        weight = weights[key.rpartition("/")[0]]
        return torch.zeros_like(weight, dtype=dtype) if weight.shape == shape else torch.zeros(shape, dtype=dtype)

    return like


def restore_state(optimizer, tensors):
    """Load `state_tensors` of a checkpoint; learning rates and weight decay stay those of the flags."""
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    state = {number: {} for number in range(len(names))}
    for key, tensor in tensors.items():
        name, _, quantity = key.rpartition("/")
        state[names.index(name)][quantity] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
