"""The models of timm, transformers and lucidrains' vit-pytorch with our weights, checked to compute the same.

By default all three compute another function than Google's models. For the check and the timing they get:

timm               the GELU by tanh instead of the exact one; Google's epsilons in GroupNorm and in the weight
                   standardisation. A hybrid's kernels are scaled by 100 in both models: timm divides by
                   sqrt(variance + epsilon), Google by the standard deviation + 1e-5.
transformers       the GELU by tanh, LayerNorm's epsilon 1e-6.
vit-pytorch        the same two, and no LayerNorms around the patch embedding, which ours does not have (they would
                   take time). It has no biases of query, key and value, so our model is checked without them.
"""

import contextlib
import copy
import functools
import importlib.metadata
import os
import sys
import tempfile

import numpy as np
import timm
import torch
import torch.nn.functional as F
from steps import DTYPES, LEARNING_RATE, NUM_CLASSES, compile_for_fixed_shapes
from timm.layers import GroupNormAct, StdConv2d, StdConv2dSame
from timm.models.resnetv2 import ResNetV2
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import HybridEmbed
from torch import nn

from models.bit_resnet import BiTResNet
from models.configs import VITS
from utils.errors import UserError
from utils.parallel.cpu import set_up_compiler

TIMM_HYBRIDS = {
    "R-ViT-Ti_16": "vit_tiny_r_s16_p8_224",
    "R26-ViT-S_32": "vit_small_r26_s32_224",
    "R26-ViT-B_32": "vit_base_r26_s32_224",
    "R50-ViT-B_16": "vit_base_r50_s16_224",
    "R50-ViT-L_32": "vit_large_r50_s32_224",
}
PACKAGES = ("timm", "transformers", "vit-pytorch")  # their names in a package index
MAX_ERROR = 5e-5  # relative error of the logits; that of the exact GELU instead of the one by tanh is 2e-4

# Parts of transformers' parameter names: ours. Older versions have longer names.
TRANSFORMERS = (
    ("vit.embeddings.", ""),
    ("vit.", ""),
    ("encoder.layer.", "blocks."),
    ("layers.", "blocks."),
    ("patch_embeddings.projection.", "patch_embed.proj."),
    ("position_embeddings", "pos_embed"),
    ("classifier.", "head."),
    ("layernorm.", "norm."),
    ("layernorm_before.", "norm1."),
    ("layernorm_after.", "norm2."),
    ("attention.attention.query.", "attn.q."),
    ("attention.attention.key.", "attn.k."),
    ("attention.attention.value.", "attn.v."),
    ("attention.output.dense.", "attn.proj."),
    ("attention.q_proj.", "attn.q."),
    ("attention.k_proj.", "attn.k."),
    ("attention.v_proj.", "attn.v."),
    ("attention.o_proj.", "attn.proj."),
    ("intermediate.dense.", "mlp.fc1."),
    ("output.dense.", "mlp.fc2."),
)


def peers(model_type, model, img_size):
    """{package: module} for the packages that have such a model, each with our weights and checked on the CPU.

    First all weights of `model` become random: zeros would hide what they are multiplied with. Raises UserError for a
    module that computes something else.
    """
    randomise(model)
    found = {}
    for name, make in zip(PACKAGES, (timm_model, transformers_vit, lucidrains_vit), strict=True):
        try:
            made = make(model_type, model, img_size)
        except ImportError as error:
            print(f"{name} is omitted ({error}); pip install -r benchmarks/requirements.txt", file=sys.stderr)
            continue
        except (KeyError, RuntimeError) as error:
            message = f"{name}: our weights do not fit its parameters ({error}); its version is not supported here"
            raise UserError(message) from error
        if made:
            found[name], reference = made
            check(name, found[name], reference, img_size)
    return found


def versions():
    """`timm 1.0.31, transformers 5.23.0`: the versions of the packages that are installed."""
    found = []
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)


@torch.no_grad()
def randomise(model):
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.02)
    if not isinstance(model, BiTResNet) and model.patch_embed.stem:
        for module in model.patch_embed.stem.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(100)


@torch.no_grad()
def check(name, module, reference, img_size):
    """Raises UserError where the float32 logits of `module` differ from those of `reference`."""
    images = torch.randn(2, 3, img_size, img_size, generator=torch.Generator().manual_seed(1))
    theirs, ours = logits_of(module.eval()(images)).double(), reference.eval()(images).double()
    error = ((theirs - ours).norm() / ours.norm()).item()
    if not error < MAX_ERROR:
        raise UserError(
            f"{name} does not compute the same function: with the same weights the relative error of its logits is "
            f"{error:.1e}, more than {MAX_ERROR:.0e}, so the speeds can't be compared"
        )


def logits_of(output):
    """The logits in a model's output; transformers returns an object that holds them."""
    return output if torch.is_tensor(output) else output.logits


def timm_model(model_type, model, img_size):
    """(timm's model, the model of ours that it must equal); None where timm has no such model."""
    if isinstance(model, BiTResNet):
        return timm_resnet(model)
    theirs = timm_transformer(model_type, model.config, img_size)
    if theirs is None:
        return None
    if model.patch_embed.stem is None:
        theirs.load_state_dict(model.state_dict())  # the names are timm's
        return theirs, model
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "weights.npz")
        np.savez(path, **model.export_npz())
        theirs.load_pretrained(path)
    set_epsilon(theirs.patch_embed.backbone, nn.GroupNorm, 1e-6)
    return theirs, model


def tanh_gelu():
    """The `act_layer` with which timm computes Google's GELU."""
    return functools.partial(nn.GELU, approximate="tanh")


def timm_transformer(model_type, config, img_size, num_classes=NUM_CLASSES):
    """timm's ViT or hybrid with the shapes of `config`; None where timm has no such model."""
    options = {"img_size": img_size, "num_classes": num_classes, "act_layer": tanh_gelu()}
    if model_type in TIMM_HYBRIDS:
        return timm.create_model(TIMM_HYBRIDS[model_type], **options)
    if model_type not in VITS:
        return None
    if config.resnet_layers is not None:
        stem = timm_resnetv2(config, StdConv2dSame, 1e-8, stem_type="same", num_classes=0, preact=False)
        options["embed_layer"] = functools.partial(HybridEmbed, backbone=stem)
    return VisionTransformer(
        patch_size=config.patch_size,
        embed_dim=config.hidden_size,
        depth=config.num_layers,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_dim / config.hidden_size,
        **options,
    )


def timm_resnet(model):
    """timm's resnetv2_*_bit with the layers and channels of `model`; None where timm rounds them to a multiple of 8."""
    config = model.config
    if any(width // 4 % 8 for width in config.stage_widths):
        return None
    theirs = timm_resnetv2(config, StdConv2d, 1e-10, stem_type="fixed", num_classes=NUM_CLASSES)
    theirs.load_state_dict(model.state_dict())
    return theirs, model


def timm_resnetv2(config, convolution, eps, stem_type, num_classes, **options):
    """timm's ResNetV2 with the shapes of a `config`; for small images its root has a convolution of stride 1 only."""
    convolution = functools.partial(convolution, eps=eps)
    widths = config.get("stage_widths") or [4 * config.root_width * 2**i for i in range(len(config.resnet_layers))]
    model = ResNetV2(
        config.resnet_layers,
        channels=widths,
        num_classes=num_classes,
        global_pool="avg" if num_classes else "",
        stem_chs=config.root_width,
        stem_type=stem_type,
        norm_layer=functools.partial(GroupNormAct, num_groups=config.num_groups),
        conv_layer=convolution,
        **options,
    )
    if config.root_stride == 1:
        model.stem.conv = convolution(3, config.root_width, kernel_size=3)
        for name in {"pad", "pool"} & dict(model.stem.named_children()).keys():
            setattr(model.stem, name, nn.Identity())
    return model


def transformers_vit(model_type, model, img_size):
    ours = model.config
    if not is_plain_vit(model_type, model):
        return None
    from transformers import ViTConfig, ViTForImageClassification

    theirs = ViTForImageClassification(
        ViTConfig(
            hidden_size=ours.hidden_size,
            intermediate_size=ours.mlp_dim,
            num_attention_heads=ours.num_heads,
            num_hidden_layers=ours.num_layers,
            patch_size=ours.patch_size,
            image_size=img_size,
            num_labels=NUM_CLASSES,
            hidden_act="gelu_pytorch_tanh",
            layer_norm_eps=1e-6,
        )
    )
    weights = model.state_dict()
    for key in list(weights):
        if ".qkv." in key:
            for part, weight in zip("qkv", weights.pop(key).chunk(3), strict=True):
                weights[key.replace(".qkv.", f".{part}.")] = weight
    theirs.load_state_dict({key: weights[our_name(key)] for key in theirs.state_dict()})
    return theirs, model


def our_name(key):
    """Our name of one of transformers' parameters, with `attn.qkv` as three."""
    for theirs, ours in TRANSFORMERS:
        key = key.replace(theirs, ours)
    return key


def lucidrains_vit(model_type, model, img_size):
    ours = model.config
    if not is_plain_vit(model_type, model) or ours.num_heads == 1:
        return None
    from vit_pytorch import ViT

    theirs = ViT(
        image_size=img_size,
        patch_size=ours.patch_size,
        num_classes=NUM_CLASSES,
        dim=ours.hidden_size,
        depth=ours.num_layers,
        heads=ours.num_heads,
        dim_head=ours.hidden_size // ours.num_heads,
        mlp_dim=ours.mlp_dim,
    )
    embedding = theirs.to_patch_embedding
    embedding[1], embedding[3] = nn.Identity(), nn.Identity()
    set_epsilon(theirs, nn.LayerNorm, 1e-6)
    for module in theirs.modules():
        if isinstance(module, nn.GELU):
            module.approximate = "tanh"
    weights = lucidrains_weights(model.state_dict(), ours.num_layers)
    theirs.load_state_dict({key: value.view_as(theirs.state_dict()[key]) for key, value in weights.items()})
    reference = copy.deepcopy(model)
    for block in reference.blocks:
        nn.init.zeros_(block.attn.qkv.bias)
    return theirs, reference


def lucidrains_weights(weights, num_layers):
    """Our state dict under vit-pytorch's names, without the biases of query, key and value."""
    mapped = {
        # a patch is flattened as (row, column, channel) there, as (channel, row, column) here
        "to_patch_embedding.2.weight": weights["patch_embed.proj.weight"].permute(0, 2, 3, 1).flatten(1),
        "to_patch_embedding.2.bias": weights["patch_embed.proj.bias"],
        "cls_token": weights["cls_token"][0],
        "pos_embedding": weights["pos_embed"][0],
        "transformer.norm.weight": weights["norm.weight"],
        "transformer.norm.bias": weights["norm.bias"],
        "mlp_head.weight": weights["head.weight"],
        "mlp_head.bias": weights["head.bias"],
    }
    for number in range(num_layers):
        attention, mlp = f"transformer.layers.{number}.0", f"transformer.layers.{number}.1.net"
        mapped[f"{attention}.to_qkv.weight"] = weights[f"blocks.{number}.attn.qkv.weight"]
        layers = {f"{attention}.norm": "norm1", f"{attention}.to_out.0": "attn.proj"}
        layers |= {f"{mlp}.0": "norm2", f"{mlp}.1": "mlp.fc1", f"{mlp}.4": "mlp.fc2"}
        for their_layer, our_layer in layers.items():
            for kind in ("weight", "bias"):
                mapped[f"{their_layer}.{kind}"] = weights[f"blocks.{number}.{our_layer}.{kind}"]
    return mapped


def is_plain_vit(model_type, model):
    return not isinstance(model, BiTResNet) and model_type.startswith("ViT-")


def set_epsilon(model, kind, eps):
    for module in model.modules():
        if isinstance(module, kind):
            module.eps = eps


class PeerStep:
    """The counterpart of TimedStep in ordinary PyTorch: autocast, clipping by norm, momentum SGD with its defaults."""

    def __init__(self, model, precision, device, compile=False):
        self.model = model.to(device)
        self.dtype = None if precision == "fp32" else DTYPES[precision]
        self.optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        if compile:
            compile_for_fixed_shapes()
            set_up_compiler()
            model.compile()

    def autocast(self, images):
        return torch.autocast(images.device.type, self.dtype) if self.dtype else contextlib.nullcontext()

    @torch.no_grad()
    def forward(self, images):
        self.model.eval()
        with self.autocast(images):
            return logits_of(self.model(images))

    def train(self, images, labels):
        self.model.train()
        with self.autocast(images):
            loss = F.cross_entropy(logits_of(self.model(images)), labels)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
