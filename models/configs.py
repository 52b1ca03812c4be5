"""One ConfigDict per published architecture, as in google-research/vision_transformer `configs/models.py`."""

from ml_collections import ConfigDict


def vit(patch_size, hidden_size, mlp_dim, num_heads, num_layers, dropout_rate=0.0, resnet_layers=None):
    """A ViT; with `resnet_layers` a hybrid, whose patches are taken from the ResNet stem's feature map.

    `resnet_layers` counts the bottleneck units of each stage; an empty tuple is the root block alone.
    """
    return ConfigDict(
        {
            "patch_size": patch_size,
            "hidden_size": hidden_size,
            "mlp_dim": mlp_dim,
            "num_heads": num_heads,
            "num_layers": num_layers,
            "dropout_rate": dropout_rate,
            "resnet_layers": resnet_layers,
        },
        convert_dict=False,
    )


MINI = {"hidden_size": 128, "mlp_dim": 512, "num_heads": 4, "num_layers": 6}
TI = {"hidden_size": 192, "mlp_dim": 768, "num_heads": 3, "num_layers": 12}
S = {"hidden_size": 384, "mlp_dim": 1536, "num_heads": 6, "num_layers": 12}
B = {"hidden_size": 768, "mlp_dim": 3072, "num_heads": 12, "num_layers": 12}
L = {"hidden_size": 1024, "mlp_dim": 4096, "num_heads": 16, "num_layers": 24}
H = {"hidden_size": 1280, "mlp_dim": 5120, "num_heads": 16, "num_layers": 32}

CONFIGS = {
    "ViT-Mini_4": vit(4, **MINI),  # this project's own, for 32x32 images from scratch
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
