"""Scaled dot-product attention by the kernel that is fastest where the tensors are."""

from itertools import repeat

import torch
import torch.nn.functional as F

SCORES_AT_ONCE = 2**20  # of bfloat16: 2 MiB, which stay in a processor's cache


def attend(q, k, v, bias=None):
    """softmax(q k^T / sqrt(head_dim) + bias) v; q, k and v are (B, heads, N, head_dim), `bias` (B, 1, 1, N).

    Never holds all of the (N, N) weights. No gradient flows into `bias`.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and not torch.compiler.is_compiling():
        return BFloat16Attention.apply(q, k, v, bias)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class BFloat16Attention(torch.autograd.Function):
    """The same by matrix products over a few images at a time; the backward pass forms the weights again.

    PyTorch's fused kernel for processors takes twice the time of this in bfloat16, at 197 tokens, and five
    times at 17 (benchmarks/NOTES.md).
    """

    @staticmethod
    def forward(ctx, q, k, v, bias):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # the products would copy each one several times
        ctx.save_for_backward(q, k, v, bias)
        with torch.autocast("cpu", enabled=False):
            return torch.cat([attention_weights(q, k, bias) @ v for q, k, v, bias in a_few_images(q, k, v, bias)])

    @staticmethod
    def backward(ctx, grad_out):
        grads = []
        for q, k, v, bias, grad in a_few_images(*ctx.saved_tensors, grad_out):
            weights = attention_weights(q, k, bias)
            grad_v = weights.transpose(-2, -1) @ grad
            grad_weights = grad @ v.transpose(-2, -1)
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grad_scores.mul_(q.shape[-1] ** -0.5)
            grads.append((grad_scores @ k, grad_scores.transpose(-2, -1) @ q, grad_v))
        return *(torch.cat(parts) for parts in zip(*grads, strict=True)), None


def attention_weights(q, k, bias=None):
    """(B, heads, N, N), rows sum to 1. At a head_dim of 64 the scaling of q is by a power of two, so it is exact."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return (scores if bias is None else scores + bias).softmax(dim=-1)


def a_few_images(*tensors):
    """The tensors (B, ...), or None, a few images at a time."""
    heads, tokens = tensors[0].shape[1:3]
    size = max(1, SCORES_AT_ONCE // (heads * tokens**2))
    parts = [repeat(None) if tensor is None else tensor.split(size) for tensor in tensors]
    return zip(*parts, strict=False)  # None goes on for ever
