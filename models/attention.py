"""Scaled dot-product attention by the kernel that is fastest where the tensors are."""

import torch
import torch.nn.functional as F

SCORES_AT_ONCE = 2**20  # of bfloat16: 2 MiB, which stay in a processor's cache


def attend(q, k, v):
    """softmax(q k^T / sqrt(head_dim)) v; all (B, heads, N, head_dim). Never holds all of the (N, N) weights."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and not torch.compiler.is_compiling():
        return BFloat16Attention.apply(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


class BFloat16Attention(torch.autograd.Function):
    """The same by matrix products over a few images at a time; the backward pass forms the weights again.

    PyTorch's fused kernel for processors takes twice the time of this in bfloat16, at 197 tokens, and five
    times at 17 (benchmarks/NOTES.md).
    """

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        with torch.autocast("cpu", enabled=False):
            return torch.cat([attention_weights(q, k) @ v for q, k, v in a_few_images(q, k, v)])

    @staticmethod
    def backward(ctx, grad_out):
        grads = []
        for q, k, v, grad in a_few_images(*ctx.saved_tensors, grad_out):
            weights = attention_weights(q, k)
            grad_v = weights.transpose(-2, -1) @ grad
            grad_weights = grad @ v.transpose(-2, -1)
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grad_scores.mul_(q.shape[-1] ** -0.5)
            grads.append((grad_scores @ k, grad_scores.transpose(-2, -1) @ q, grad_v))
        return tuple(torch.cat(parts) for parts in zip(*grads, strict=True))


def attention_weights(q, k):
    """(B, heads, N, N), rows sum to 1. At a head_dim of 64 the scaling of q is by a power of two, so it is exact."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)


def a_few_images(*tensors):
    heads, tokens = tensors[0].shape[1:3]
    size = max(1, SCORES_AT_ONCE // (heads * tokens**2))
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)
