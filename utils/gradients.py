"""The size of a model's gradients by depth."""

import torch
import torch.nn.functional as F


def block_gradient_norms(model, images, labels):
    """The norm of the gradient of the cross-entropy for the weights of each block of a ViT, first block first.

    `images` are (B, 3, H, W), `labels` (B,). In training mode, BN uses the statistics of this batch.
    """
    loss = F.cross_entropy(model(images), labels)
    weights = [weight for block in model.blocks for weight in block.parameters()]
    gradients = iter(torch.autograd.grad(loss, weights))
    norms = [[next(gradients).norm() for _ in block.parameters()] for block in model.blocks]
    return [torch.stack(of_block).norm().item() for of_block in norms]
