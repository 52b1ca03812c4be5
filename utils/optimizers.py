"""The optimizers, one line of OPTIMIZERS each, their parameter groups, and their state in checkpoints.

An entry is called with parameter groups, whose "params" are (name, parameter) pairs, and a learning rate, and returns a
torch.optim.Optimizer. All of its state must be tensors in `optimizer.state`; then it is saved and resumed. A group that
sets its own "lr" keeps its ratio to --learning_rate through the whole schedule.
"""

import torch
from torch.distributed.tensor import DTensor

NOT_DECAYED = ("cls_token", "pos_embed")  # in addition to all weights of one dimension: biases and norms
STACKED_MATRICES = {"attn.qkv.weight": 3}  # weights that hold several matrices, one below the other


def make_optimizer(args, named_parameters):
    """The optimizer of the flags for [(name, parameter), ...]; raises ValueError if it does not suit the model.

    Biases, norms, the class token and position embeddings are not decayed.
    """
    groups = [{"params": [], "weight_decay": args.weight_decay}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in named_parameters:
        is_decayed = parameter.ndim > 1 and name not in NOT_DECAYED
        groups[0 if is_decayed else 1]["params"].append((name, parameter))
    optimizer = OPTIMIZERS[args.optimizer]([group for group in groups if group["params"]], args.learning_rate)
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return optimizer


def sgd(groups, lr):
    """SGD with momentum 0.9."""
    # The fused SGD of torch 2.9 does not update bfloat16 weights on a CPU (level O3), and does not support shards.
    has_shards = any(isinstance(parameter, DTensor) for group in groups for _, parameter in group["params"])
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, fused=supports_fused(groups) and not has_shards)


def adam(groups, lr):
    """Adam with PyTorch's defaults."""
    return torch.optim.Adam(groups, lr=lr, fused=supports_fused(groups))


def adamw(groups, lr):
    """AdamW with PyTorch's defaults."""
    return torch.optim.AdamW(groups, lr=lr, fused=supports_fused(groups))


def supports_fused(groups):
    """Whether all parameters are float32 on a CPU or CUDA device."""
    parameters = [parameter for group in groups for _, parameter in group["params"]]
    return all(p.dtype == torch.float32 and p.device.type in ("cpu", "cuda") for p in parameters)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) for the 2-D weights of the blocks, AdamW for all other weights.

    Muon's updates are scaled to the size of AdamW's ("match_rms_adamw"), so one learning rate serves both. Query, key
    and value, which are stacked in one weight, are three matrices. Raises ValueError for a model without such weights
    and for sharded ones.
    """

    def __init__(self, groups, lr):
        if any(isinstance(parameter, DTensor) for group in groups for _, parameter in group["params"]):
            raise ValueError("muon needs whole matrices, not shards; use --parallel ddp")
        matrices = select(groups, lambda pair: is_matrix_of_block(*pair))
        if not matrices:
            raise ValueError("muon needs a model whose blocks have 2-D weights, such as a ViT; use --optimizer adamw")
        self.adamw = adamw(select(groups, lambda pair: not is_matrix_of_block(*pair)), lr)
        super().__init__([*({**group, "by_muon": True} for group in matrices), *self.adamw.param_groups], {"lr": lr})
        parts = [{"params": [torch.nn.Parameter(p) for p in split_weights(group)]} for group in self.muon_groups()]
        self.muon = torch.optim.Muon(parts, lr=lr, adjust_lr_fn="match_rms_adamw")

    def muon_groups(self):
        """The groups that Muon updates."""
        return [group for group in self.param_groups if group.get("by_muon")]

    @torch.no_grad()
    def step(self, closure=None):
        """Both optimizers work on this one's groups and state, which are what is scheduled, saved and resumed."""
        for group, parts in zip(self.muon_groups(), self.muon.param_groups, strict=True):
            parts.update(lr=group["lr"], weight_decay=group["weight_decay"])
            for weight in group["params"]:
                self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
            gradients = split_weights(group, lambda weight: weight.grad)
            buffers = split_weights(group, lambda weight: self.state[weight]["momentum_buffer"])
            for part, gradient, buffer in zip(parts["params"], gradients, buffers, strict=True):
                part.grad = gradient
                self.muon.state[part]["momentum_buffer"] = buffer
        self.muon.step()
        self.muon.zero_grad()  # the views would keep the gradients in memory
        self.adamw.param_groups = [group for group in self.param_groups if not group.get("by_muon")]
        self.adamw.state = self.state
        self.adamw.step()


def is_matrix_of_block(name, parameter):
    """Whether it is a 2-D weight of a transformer block."""
    return name.startswith("blocks.") and parameter.ndim == 2


def select(groups, condition):
    """The groups with only those (name, parameter) pairs that fulfil the condition; no empty ones."""
    selected = [{**group, "params": [pair for pair in group["params"] if condition(pair)]} for group in groups]
    return [group for group in selected if group["params"]]


def split_weights(group, tensor_of=lambda weight: weight.detach()):
    """A tensor of each weight in a group, stacked matrices as views of each: [(out, in), ...]."""
    parts = []
    for name, weight in zip(group["param_names"], group["params"], strict=True):
        count = next((count for suffix, count in STACKED_MATRICES.items() if name.endswith(suffix)), 1)
        parts += tensor_of(weight).chunk(count)
    return parts


OPTIMIZERS = {"sgd": sgd, "adam": adam, "adamw": adamw, "muon": MuonWithAdamW}


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
