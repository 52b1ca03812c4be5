"""Readable names of ImageNet's classes."""

import hashlib

from utils.terminal import say_on_stderr

# SHA-256 of ImageNet-1k's sorted class ids (wnids), joined by spaces; torchvision lists the names in this order.
IMAGENET_WNIDS_SHA256 = "791ce0333040dd249d13133f90d28ef0263ffc01e5de0afd85b3e32048d7d456"
IMAGENET_21K_CLASSES = 21843  # of Google's and timm's models


def class_names(num_classes):
    """ImageNet's names for 1000 classes, from torchvision; ImageNet-21k's for 21,843, from timm, if it is installed.

    Other classes are "class 0", "class 1", ...
    """
    if num_classes == 1000:
        from torchvision.models import ResNet50_Weights

        return ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    if num_classes == IMAGENET_21K_CLASSES:
        try:
            from timm.data import ImageNetInfo

            return ImageNetInfo("imagenet-21k-goog").label_descriptions()
        except ImportError:
            say_on_stderr("the classes of ImageNet-21k are numbers; timm has their names: pip install timm")
    return [f"class {number}" for number in range(num_classes)]


def readable_names(classes):
    """ImageNet's 1000 class ids with their names, such as "tench (n01440764)"; other classes are returned unchanged."""
    if hashlib.sha256(" ".join(classes).encode()).hexdigest() != IMAGENET_WNIDS_SHA256:
        return classes
    return [f"{name} ({wnid})" for name, wnid in zip(class_names(1000), classes, strict=True)]
