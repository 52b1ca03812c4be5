"""Which weights --train trains, how the others are frozen, and the layers of --layer_decay.

Both divide a model into the same parts, in the order of the forward pass: the embedding (of a hybrid with its ResNet
stem), the blocks, the final norm and the head. The blocks are the modules with `is_block`.
"""

from torch import nn

from utils.parallel.precision import NORMS

EMBEDDING, FINAL_NORM, HEAD = "embedding", "final norm", "head"
HEAD_MODULES = ("head", "pre_logits")


def freeze(model, choice):
    """Leave only the weights of --train `choice` trainable. Raises ValueError for a choice that the model lacks.

    Frozen weights do not require gradients. A part without a trained weight stays in evaluation mode: it drops nothing
    out, and its BN uses and keeps the running statistics. A random choice of tokens remains random.
    """
    if choice == "all":
        return
    parts, trained = model_parts(model), trained_weights(model, choice)
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in trained)
    trained_parts = {part_of(name, parts) for name in trained}
    for name, part in parts.items():
        module = model.get_submodule(name)
        if part not in trained_parts and not getattr(module, "stays_random", False):
            keep_in_evaluation_mode(module)


def trained_weights(model, choice):
    """The names of the weights that --train `choice`, other than all, trains. Raises ValueError as `freeze`."""
    parts = model_parts(model)
    if HEAD not in parts.values():
        raise ValueError(f"--train {choice} needs a model with a module named {HEAD}; use --train all")
    trained = {HEAD}
    if choice.startswith("last:"):
        repeated, count = repeated_parts(parts), int(choice.removeprefix("last:"))
        if count > len(repeated):
            has = f"the model has {len(repeated)} blocks or stages"
            raise ValueError(f"--train {choice}: {has}; give at most last:{len(repeated)}")
        trained |= {FINAL_NORM, *repeated[-count:]}
    weights = {name for name, _ in model.named_parameters() if part_of(name, parts) in trained}
    if choice == "norms":
        norms = weights_of_norms(model)
        if not norms:
            raise ValueError("--train norms: the model has no norms with weights; use --train head or last:N")
        weights |= norms
    return weights


def weights_of_norms(model):
    """The names of the weights of all norms, and of the biases and multipliers that replace them in Rescale."""
    norms = [(name, module) for name, module in model.named_modules() if is_norm(module)]
    return {f"{name}.{key}" for name, module in norms for key, _ in module.named_parameters()}


def layer_scales(model, layer_decay):
    """{weight: factor of its learning rate}, layer_decay ** (number of layers after its own), as timm's grouping.

    The embedding is the first layer, each block is one, the final norm belongs to the last block, and the head is the
    last layer. Raises ValueError for a model without blocks.
    """
    parts = model_parts(model)
    repeated = repeated_parts(parts)
    blocks = [name for name, module in model.named_modules() if is_block(module) and part_of(name, parts) in repeated]
    if not blocks:
        raise ValueError("--layer_decay needs a model of blocks; use --layer_decay 1")
    layers = {EMBEDDING: 0, FINAL_NORM: len(blocks), HEAD: len(blocks) + 1}
    numbers = {block: number for number, block in enumerate(blocks, start=1)}

    def layer(name):
        part = part_of(name, parts)
        return layers[part] if part in layers else part_of(name, numbers)

    return {name: layer_decay ** (layers[HEAD] - layer(name)) for name, _ in model.named_parameters()}


def model_parts(model):
    """{module: its part}, in the order of the forward pass, by names; what is not listed belongs to the embedding.

    The part is EMBEDDING, FINAL_NORM, HEAD, or one of the repeated parts by its own name: each element of a ModuleList
    of blocks (a ViT's block, a ResNet's stage), and a Sequential of blocks (the CNN of a Conformer, one stage).
    """
    parts = {}
    for name, module in model.named_children():
        if name in HEAD_MODULES:
            parts[name] = HEAD
        elif not consists_of_blocks(module):
            parts[name] = FINAL_NORM if is_norm(module) else EMBEDDING
        elif isinstance(module, nn.ModuleList):
            parts |= {f"{name}.{i}": f"{name}.{i}" for i in range(len(module))}
        else:
            parts[name] = name
    return parts


def repeated_parts(parts):
    """The names of the blocks or stages among `model_parts`, in the order of the forward pass."""
    return [part for part in parts.values() if part not in (EMBEDDING, FINAL_NORM, HEAD)]


def part_of(name, parts):
    """The value in {module: value} of the module to which a weight or module of this name belongs; else EMBEDDING."""
    return next((part for module, part in parts.items() if f"{name}.".startswith(f"{module}.")), EMBEDDING)


def consists_of_blocks(module):
    """Whether all weights of a module are in its blocks, of which it has at least one."""
    in_blocks = {id(weight) for block in module.modules() if is_block(block) for weight in block.parameters()}
    return bool(in_blocks) and in_blocks == {id(weight) for weight in module.parameters()}


def is_block(module):
    return getattr(module, "is_block", False)


def is_norm(module):
    """Whether a module is a norm of any kind, or what a norm type of tokens consists of (models/norms.py)."""
    return isinstance(module, NORMS) or hasattr(module, "array_names")


def keep_in_evaluation_mode(module):
    """Put a module into evaluation mode, in which `model.train()` leaves it."""
    module.eval()
    module.train = lambda mode=True: module
