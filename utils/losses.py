"""The training loss: cross-entropy, with a weight per class or without."""

import torch
import torch.nn.functional as F

from utils.errors import UserError

CLASS_WEIGHTS = ("none", "balanced")


def class_weights(kind, labels, classes, device):
    """float32 (classes,) for a `kind` of CLASS_WEIGHTS, or None without weights.

    balanced: n / (k * count), as in scikit-learn, for n training images of k classes. So the mean weight of the
    training images is 1. Raises UserError for a class without images.
    """
    if kind == "none":
        return None
    counts = torch.as_tensor(labels).bincount(minlength=len(classes)).cpu()
    if not counts.all():
        empty = classes[counts.argmin()]
        raise UserError(f"--class_weights {kind}: class {empty!r} has no training images; remove it, or omit the flag")
    return (counts.sum() / (len(classes) * counts.double())).float().to(device)


def cross_entropy(logits, targets, label_smoothing=0.0, weights=None):
    """The mean over the images of -sum_c weight_c * target_c * log p_c, a 0-dim tensor.

    Targets are labels (B,) or probabilities (B, classes), which `label_smoothing` mixes with the uniform distribution.
    The sum is divided by the number of images and not by the sum of their weights, which depends on the division into
    micro-batches and processes.
    """
    if weights is None:
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    options = {"weight": weights, "label_smoothing": label_smoothing, "reduction": "sum"}
    return F.cross_entropy(logits, targets, **options) / len(logits)
