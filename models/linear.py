"""Linear layers and GELU by the kernels that are fastest where the tensors are; benchmarks/NOTES.md has the times."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

ONEDNN = torch.backends.mkldnn.is_available() and "AVX512" in torch.backends.cpu.get_cpu_capability()
BFLOAT16 = ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
ROWS_WORTH_REORDERING = 1024  # with fewer, putting the weights into oneDNN's order costs more than it saves
ELEMENTS_AT_ONCE = 2**18  # of GELU: its float32 intermediates, 1 MiB each, stay in a processor's cache

# gelu(x) = x sigmoid(z) with z = SLOPE_AT_0 x + CUBIC x^3: the approximation by tanh, as 1 + tanh(u) is 2 sigmoid(2 u)
SLOPE_AT_0 = 2 * math.sqrt(2 / math.pi)
CUBIC = 0.044715 * SLOPE_AT_0


class Linear(nn.Linear):
    """nn.Linear by `linear`."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


def linear(x, weight, bias):
    """x (..., in), weight (out, in), bias (out) -> (..., out); of many rows on a CPU with the weights reordered."""
    if by_onednn(x, weight) and rows_of(x) >= ROWS_WORTH_REORDERING:
        return OneDNNLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def linear_gelu(x, layer):
    """gelu(layer(x)); on a CPU without gradients by one kernel."""
    if by_onednn(x, layer.weight) and not torch.is_grad_enabled():
        return onednn_linear(x, layer.weight, layer.bias, "gelu")
    return gelu(layer(x))


def gelu(x):
    """The tanh approximation of GELU, Flax's default."""
    if torch.compiler.is_compiling():  # compiled exponentials are faster than tanh
        return x * torch.sigmoid(SLOPE_AT_0 * x + CUBIC * x**3)
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.requires_grad:
        return GELUWithSlope.apply(x.contiguous())
    return F.gelu(x, approximate="tanh")


def by_onednn(x, weight):
    """Whether oneDNN's own operators, which autocast, torch.compile and torch.func don't know, take x @ weight.T."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype
        and ((ONEDNN and x.dtype == torch.float32) or (BFLOAT16 and x.dtype == torch.bfloat16))
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
    )


def onednn_linear(x, weight, bias, activation="none"):
    """activation(x @ weight.T + bias); if rows are many, the weights are put into the kernel's own order first."""
    if rows_of(x) >= ROWS_WORTH_REORDERING:
        weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows_of(x))
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "tanh")


def rows_of(x):
    return x.numel() // x.shape[-1]


class OneDNNLinear(torch.autograd.Function):
    """`onednn_linear`, backward by plain products: the transposed weights would cost more to reorder than it saves."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad_out):
        x, weight = ctx.saved_tensors
        rows = grad_out.flatten(0, -2)  # (B * N, out)
        grad_x = grad_out @ weight if ctx.needs_input_grad[0] else None
        grad_weight = rows.t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        grad_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias


class GELUWithSlope(torch.autograd.Function):
    """GELU that keeps its slope for the backward pass, in place of its input; both of one sigmoid, in float32.

    PyTorch's kernels for processors are slow by tanh: forward they take as long as this, and backward once more.
    """

    @staticmethod
    def forward(ctx, x):
        out, slope = torch.empty_like(x), torch.empty_like(x)
        parts = zip(*(tensor.view(-1).split(ELEMENTS_AT_ONCE) for tensor in (x, out, slope)), strict=True)
        slope_at_0, one = torch.tensor(SLOPE_AT_0), torch.tensor(1.0)
        for x, out_part, slope_part in parts:
            x = x.float()
            sigmoid = torch.addcmul(slope_at_0, x, x, value=CUBIC).mul_(x).sigmoid_()
            gelu = x * sigmoid
            out_part.copy_(gelu)
            dz = torch.addcmul(slope_at_0, x, x, value=3 * CUBIC)
            slope_part.copy_(gelu.mul_(dz).lerp_(one, sigmoid))  # sigmoid + gelu z'(x) (1 - sigmoid)
        ctx.save_for_backward(slope)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        (slope,) = ctx.saved_tensors
        return grad_out * slope
