"""One ConfigDict per model type: published architectures and this project's own.

ViTs and hybrids as in google-research/vision_transformer `configs/models.py`, ResNets as in
google-research/big_transfer `bit_pytorch/models.py`.
"""

import ast

from ml_collections import ConfigDict


def vit(
    patch_size,
    hidden_size,
    mlp_dim,
    num_heads,
    num_layers,
    dropout_rate=0.0,
    drop_path_rate=0.0,
    resnet_layers=None,
    root_width=64,
    root_stride=4,
    num_groups=32,
    group_norm_eps=1e-6,
    standardisation="std",
    standardisation_eps=1e-5,
    layer_norm_eps=1e-6,
    gelu="tanh",
):
    """A ViT; with `resnet_layers` a hybrid, whose patches are those of the ResNet stem's feature map.

    `resnet_layers` is the number of bottleneck units in each stage; an empty tuple is a stem without stages. The stem's
    other fields are those of `resnet`. `layer_norm_eps` is the epsilon of the norm type LN. `gelu` is "tanh", the
    approximation of GELU that is Flax's default, or "exact", PyTorch's default.
    """
    return ConfigDict(
        {
            "patch_size": patch_size,
            "hidden_size": hidden_size,
            "mlp_dim": mlp_dim,
            "num_heads": num_heads,
            "num_layers": num_layers,
            "dropout_rate": dropout_rate,
            "drop_path_rate": drop_path_rate,
            "resnet_layers": resnet_layers,
            "root_width": root_width,
            "root_stride": root_stride,
            "num_groups": num_groups,
            "group_norm_eps": group_norm_eps,
            "standardisation": standardisation,
            "standardisation_eps": standardisation_eps,
            "layer_norm_eps": layer_norm_eps,
            "gelu": gelu,
        },
        convert_dict=False,
    )


def resnet(
    resnet_layers,
    root_width,
    last_width=None,
    cut_from=None,
    root_stride=4,
    num_groups=32,
    group_norm_eps=1e-5,
    standardisation="var",
    standardisation_eps=1e-10,
):
    """A BiT ResNet; `resnet_layers` is the number of bottleneck units in each stage.

    The root has `root_width` channels, the first stage 4 times as many, each later stage twice as many as the previous
    one, the last stage `last_width` if given. `cut_from` is the `resnet_layers` of the larger ResNet whose checkpoint
    provides weights for this one. `root_stride` is 4 (7x7 convolution and pooling, both of stride 2)
    or 1 (3x3 convolution, for small images); GroupNorm has `num_groups` groups and the epsilon `group_norm_eps`.
    Kernels of convolutions are standardised by the rule `standardisation`: "std" divides them by std + eps, "var" by
    sqrt(variance + eps), where eps is `standardisation_eps`.
    """
    stage_widths = [4 * root_width * 2**i for i in range(len(resnet_layers))]
    if last_width:
        stage_widths[-1] = last_width
    return ConfigDict(
        {
            "resnet_layers": resnet_layers,
            "root_width": root_width,
            "stage_widths": tuple(stage_widths),
            "cut_from": cut_from,
            "root_stride": root_stride,
            "num_groups": num_groups,
            "group_norm_eps": group_norm_eps,
            "standardisation": standardisation,
            "standardisation_eps": standardisation_eps,
        },
        convert_dict=False,
    )


def conformer(reduction_layer, keep_tokens, cnn_units, cnn_width, **fields):
    """A Conformer: the first `reduction_layer` blocks of the ViT with these `fields`, then `cnn_units` bottlenecks of
    `cnn_width` channels on a grid of `keep_tokens` patches. The bottlenecks are those of `resnet`."""
    reduction = {"reduction_layer": reduction_layer, "keep_tokens": keep_tokens}
    cnn = {"cnn_units": cnn_units, "cnn_width": cnn_width, **{name: BIT[name] for name in STANDARDISATION}}
    return ConfigDict({**vit(**fields), **reduction, **cnn}, convert_dict=False)


CHOICES = {"gelu": ("tanh", "exact"), "standardisation": ("std", "var")}  # {field: its values}
STANDARDISATION = ("group_norm_eps", "standardisation", "standardisation_eps")
BIT = resnet((), root_width=64)

MINI = {"hidden_size": 128, "mlp_dim": 512, "num_heads": 4, "num_layers": 6}
TI = {"hidden_size": 192, "mlp_dim": 768, "num_heads": 3, "num_layers": 12}
S = {"hidden_size": 384, "mlp_dim": 1536, "num_heads": 6, "num_layers": 12}
B = {"hidden_size": 768, "mlp_dim": 3072, "num_heads": 12, "num_layers": 12}
L = {"hidden_size": 1024, "mlp_dim": 4096, "num_heads": 16, "num_layers": 24}
H = {"hidden_size": 1280, "mlp_dim": 5120, "num_heads": 16, "num_layers": 32}

VITS = {
    # This project's own, for training on 32x32 images from scratch. R26-ViT-Mini_4 is R50-ViT-B_16 with an eighth of
    # the width and half the depth.
    "ViT-Nano_4": vit(4, hidden_size=64, mlp_dim=256, num_heads=4, num_layers=12),
    "ViT-Mini_4": vit(4, **MINI),
    "R26-ViT-Mini_4": vit(1, 96, 384, 3, 6, resnet_layers=(2, 2, 4), root_width=8, root_stride=1, num_groups=4),
    "ViT-Ti_16": vit(16, **TI),
    "ViT-S_16": vit(16, **S),
    "ViT-S_32": vit(32, **S),
    "ViT-B_8": vit(8, **B),
    "ViT-B_16": vit(16, **B),
    "ViT-B_32": vit(32, **B),
    "ViT-L_16": vit(16, **L, dropout_rate=0.1),
    "ViT-L_32": vit(32, **L),
    "ViT-H_14": vit(14, **H, dropout_rate=0.1),
    "R-ViT-Ti_16": vit(8, **TI, resnet_layers=()),
    "R26-ViT-S_32": vit(1, **S, resnet_layers=(2, 2, 2, 2)),
    "R26-ViT-B_32": vit(1, **B, resnet_layers=(2, 2, 2, 2)),
    "R50-ViT-B_16": vit(1, **B, dropout_rate=0.1, resnet_layers=(3, 4, 9)),
    "R50-ViT-L_32": vit(1, **L, dropout_rate=0.1, resnet_layers=(3, 4, 6, 3)),
}

CONFORMERS = {
    # A third of ViT-B_16's blocks, then the last stage of BiT's R50 on 7x7 tokens of 14x14 (at 224x224).
    "Conformer-B_16": conformer(4, 0.25, cnn_units=3, cnn_width=2048, patch_size=16, **B),
    # The same for ViT-Mini_4 and 32x32 images: two units of a quarter of the width on 4x4 tokens of 8x8.
    "Conformer-Mini_4": conformer(2, 0.25, cnn_units=2, cnn_width=512, patch_size=4, **MINI, num_groups=4),
}

R50, R101, R152 = (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3)

RESNETS = {
    **{
        f"BiT-{size}-{depth}x{factor}": resnet(layers, root_width=64 * factor)
        for size in ("M", "S")  # pretrained on ImageNet-21k and on ImageNet-1k
        for depth, layers, factor in (
            ("R50", R50, 1),
            ("R50", R50, 3),
            ("R101", R101, 1),
            ("R101", R101, 3),
            ("R152", R152, 2),
            ("R152", R152, 4),
        )
    },
    "ResNet50x3_Params": resnet((3, 4, 6, 1), root_width=192, last_width=3072, cut_from=R50),
    "ResNet50x3_Flops": resnet((3, 4, 2), root_width=192, cut_from=R50),
    # The same pair for R26-ViT-Mini_4: an eighth of the width, half the depth, and a last unit whose width makes the
    # parameters or the FLOPs equal.
    "ResNet-Mini_Params": resnet((2, 2, 3, 1), root_width=24, last_width=208, root_stride=1, num_groups=4),
    "ResNet-Mini_Flops": resnet((2, 2, 1), root_width=24, last_width=288, root_stride=1, num_groups=4),
}


def config_of(model_type):
    """The config of a published name."""
    return {**VITS, **CONFORMERS, **RESNETS}[model_type]


def parse_fields(texts):
    """{field: value} of texts such as "num_layers=6". Raises ValueError for another text."""
    fields = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise ValueError(f"{text} is not NAME=VALUE, for example num_layers=6")
        try:
            fields[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            fields[name] = value  # as in gelu=exact
    return fields


def format_fields(fields):
    """The texts of {field: value}, the inverse of `parse_fields`."""
    return [f"{name}={value}".replace(" ", "") for name, value in fields.items()]


def fields_of_flags(flags):
    """{field: value} that a run's flags, a dictionary, set in the config of its model type. Raises ValueError."""
    fields = parse_fields(flags.get("model_fields") or ())
    return fields | ({"gelu": flags["gelu"]} if flags.get("gelu") else {})


def total_stride(config):
    """Pixels per cell of the model's coarsest grid and per side: a ViT's patch size, or the stride of a ResNet."""
    stages = config.resnet_layers if "resnet_layers" in config else None
    stem_stride = 1 if stages is None else config.root_stride * 2 ** max(0, len(stages) - 1)
    return stem_stride * config.get("patch_size", 1)
