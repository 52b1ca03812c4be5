"""Scaled dot-product attention by the fastest kernel for the tensors' device and type."""

from itertools import repeat

import torch
import torch.nn.functional as F

from models.probing import probe, require_same

MAX_SCORES = 2**20  # in a chunk of images: 2 MiB of bfloat16, which stay in a processor's cache


def attend(q, k, v, bias=None):
    """softmax(q k^T / sqrt(head_dim) + bias) v; q, k and v are (B, heads, N, head_dim), `bias` (B, 1, 1, N).

    Never holds all of the (N, N) weights. No gradient flows into `bias`.
    """
    if CHUNKED_ATTENTION and q.device.type == "cpu" and q.dtype == torch.bfloat16 and not torch.compiler.is_compiling():
        return BFloat16Attention.apply(q, k, v, bias)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class BFloat16Attention(torch.autograd.Function):
    """`attend` by matrix products over a few images at a time; the backward pass computes the weights again.

    In bfloat16 on a CPU, PyTorch's fused kernel takes twice as long at 197 tokens, and five times as long at 17
    (benchmarks/NOTES.md).
    """

    @staticmethod
    def forward(ctx, q, k, v, bias):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # otherwise each product would copy them
        ctx.save_for_backward(q, k, v, bias)
        with torch.autocast("cpu", enabled=False):
            return torch.cat([attention_weights(q, k, bias) @ v for q, k, v, bias in chunks_of_images(q, k, v, bias)])

    @staticmethod
    def backward(ctx, grad_out):
        grads = []
        for q, k, v, bias, grad in chunks_of_images(*ctx.saved_tensors, grad_out):
            weights = attention_weights(q, k, bias)
            grad_v = weights.transpose(-2, -1) @ grad
            grad_weights = grad @ v.transpose(-2, -1)
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grad_scores.mul_(q.shape[-1] ** -0.5)
            grads.append((grad_scores @ k, grad_scores.transpose(-2, -1) @ q, grad_v))
        return *(torch.cat(parts) for parts in zip(*grads, strict=True)), None


def attention_weights(q, k, bias=None):
    """(B, heads, N, N), rows sum to 1. With a head_dim of 64, q is scaled by a power of two, which is exact."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return (scores if bias is None else scores + bias).softmax(dim=-1)


def chunks_of_images(*tensors):
    """Iterate over tensors (B, heads, N, ...), each of which may be None, a few images at a time."""
    heads, tokens = tensors[0].shape[1:3]
    size = max(1, MAX_SCORES // (heads * tokens**2))
    parts = [repeat(None) if tensor is None else tensor.split(size) for tensor in tensors]
    return zip(*parts, strict=False)  # None repeats without end


def probe_softmax_backward():
    """Compare the private operator that BFloat16Attention uses with the formula."""
    x = torch.linspace(-20, 20, 48, device="cpu", dtype=torch.float32).view(2, 3, 8)
    weights, grad = x.cos().softmax(dim=-1).bfloat16(), x.sin().bfloat16()
    product = weights.double() * grad.double()
    expected = product - weights.double() * product.sum(dim=-1, keepdim=True)
    found = torch._softmax_backward_data(grad, weights, -1, weights.dtype)
    require_same(found, expected.bfloat16(), 1e-2)
    return True


CHUNKED_ATTENTION = probe("PyTorch's gradient of softmax", probe_softmax_backward, False)
