"""Scaled dot-product attention by the fastest kernel for the tensors' device and type."""

from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor

from models.probing import probe, require_same

MAX_SCORES = 2**20  # in a chunk of images: 2 MiB of bfloat16, which stay in a processor's cache
MAX_SAVED_TOKENS = 128  # in sequences up to this length the weights take less memory than the other activations


def attend(q, k, v, bias=None):
    """softmax(q k^T / sqrt(head_dim) + bias) v; k and v are (B, heads, N, head_dim), `bias` (B, 1, 1, N).

    The queries q are as many, or one of each image.

    Holds all of the (N, N) weights only in bfloat16 training on a CPU, and only if N is at most MAX_SAVED_TOKENS. No
    gradient flows into `bias`.
    """
    if CHUNKED_ATTENTION and q.device.type == "cpu" and q.dtype == torch.bfloat16:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # otherwise each product would copy them
        if torch.compiler.is_compiling():
            return bfloat16_attention(q, k, v, bias, saves_weights(k) and torch.is_grad_enabled())[0]
        return BFloat16Attention.apply(q, k, v, bias)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class BFloat16Attention(torch.autograd.Function):
    """`attend` by matrix products of contiguous tensors, whose backward pass computes the weights of long sequences
    again.

    In bfloat16 on a CPU, PyTorch's fused kernel takes twice as long at 197 tokens, and five times as long at 17
    (benchmarks/NOTES.md).
    """

    @staticmethod
    def forward(ctx, q, k, v, bias):
        out, weights = attention_forward(q, k, v, bias, saves_weights(k) and any(ctx.needs_input_grad))
        ctx.save_for_backward(q, k, v, bias, weights)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        return *attention_backward(*ctx.saved_tensors, grad_out), None


def saves_weights(k):
    """Whether the weights are kept for the backward pass."""
    return k.shape[2] <= MAX_SAVED_TOKENS


def attention_forward(q, k, v, bias, save):
    """(output, weights (B, heads, N, N) if they are to be saved or None)."""
    with torch.autocast("cpu", enabled=False):
        if save:
            weights = attention_weights(q, k, bias)
            return weights @ v, weights
        return torch.cat([attention_weights(q, k, bias) @ v for q, k, v, bias in chunks_of_images(q, k, v, bias)]), None


def attention_backward(q, k, v, bias, saved, grad_out):
    """The gradients of q, k and v; `saved` are the weights or None."""
    if saved is not None:
        return gradients(q, k, v, saved, grad_out)
    chunks = chunks_of_images(q, k, v, bias, grad_out)
    grads = [gradients(q, k, v, attention_weights(q, k, bias), grad) for q, k, v, bias, grad in chunks]
    return tuple(torch.cat(parts) for parts in zip(*grads, strict=True))


def gradients(q, k, v, weights, grad_out):
    """Those of q, k and v."""
    grad_v = weights.transpose(-2, -1) @ grad_out
    grad_weights = grad_out @ v.transpose(-2, -1)
    grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
    grad_scores.mul_(q.shape[-1] ** -0.5)
    return grad_scores @ k, grad_scores.transpose(-2, -1) @ q, grad_v


def attention_weights(q, k, bias=None):
    """(B, heads, N, N), rows sum to 1. With a head_dim of 64, q is scaled by a power of two, which is exact."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return (scores if bias is None else scores + bias).softmax(dim=-1)


def chunks_of_images(*tensors):
    """Iterate over tensors (B, heads, N, ...), each of which may be None, a few images at a time."""
    heads, tokens = tensors[1].shape[1:3]
    size = max(1, MAX_SCORES // (heads * tokens**2))
    parts = [repeat(None) if tensor is None else tensor.split(size) for tensor in tensors]
    return zip(*parts, strict=False)  # None repeats without end


# The compiler calls the same code as one operator. It would unroll the chunks, and PyTorch's fused kernel is slower.
@torch.library.custom_op("vit::bfloat16_attention", mutates_args=())
def bfloat16_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, save: bool) -> tuple[Tensor, Tensor]:
    out, weights = attention_forward(q, k, v, bias, save)
    return out, q.new_empty(0) if weights is None else weights


@torch.library.custom_op("vit::bfloat16_attention_backward", mutates_args=())
def bfloat16_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, weights: Tensor, grad_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    saved = weights if len(weights) else None
    return attention_backward(q, k, v, bias, saved, grad_out.contiguous())


@bfloat16_attention.register_fake
def _(q, k, v, bias, save):
    return torch.empty_like(q), q.new_empty((*q.shape[:3], k.shape[2]) if save else 0)


@bfloat16_attention_backward.register_fake
def _(q, k, v, bias, weights, grad_out):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


bfloat16_attention.register_autograd(
    lambda ctx, grad_out, _: (*bfloat16_attention_backward(*ctx.saved_tensors, grad_out), None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:4], output[1]),
)


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
