"""Linear layers and GELU by the kernels that are fastest where the tensors are; benchmarks/NOTES.md has the times."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

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
    """x (..., in), weight (out, in), bias (out) -> (..., out); of many rows on a CPU with weights reordered."""
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
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.requires_grad and is_plain(x):
        return GELUWithSlope.apply(x.contiguous())
    return F.gelu(x, approximate="tanh")


def by_onednn(x, weight):
    """Whether oneDNN's own operators take x @ weight.T."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype
        and ((ONEDNN and x.dtype == torch.float32) or (BFLOAT16 and x.dtype == torch.bfloat16))
        and is_plain(x, weight)
        and not torch.is_autocast_enabled("cpu")
        and x.shape[-1] == weight.shape[1]  # else PyTorch's error is the clearer one
    )


def is_plain(*tensors):
    """Whether nothing else looks on that only PyTorch's own operators answer: a compiler or tracer, fake and
    distributed tensors, torch.func, forward-mode differentiation.
    """
    return (
        not torch.compiler.is_compiling()
        and all(type(tensor) in (torch.Tensor, nn.Parameter) for tensor in tensors)
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def onednn_linear(x, weight, bias, activation="none"):
    """activation(x @ weight.T + bias), shaped as by `linear`; for many rows the weights take the kernel's own order."""
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
        rows = grad_out.reshape(-1, grad_out.shape[-1])  # (B * N, out)
        grad_x = grad_out @ weight if ctx.needs_input_grad[0] else None
        grad_weight = rows.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        grad_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias


class GELUWithSlope(torch.autograd.Function):
    """GELU of x (any shape, contiguous) that keeps its slope for the backward pass, in place of x; both of one sigmoid.

    PyTorch's kernels for processors are slow by tanh: forward they take as long as this, and backward once more.
    """

    @staticmethod
    def forward(ctx, x):
        out, slope = torch.empty_like(x), torch.empty_like(x)
        parts = zip(*(tensor.view(-1).split(ELEMENTS_AT_ONCE) for tensor in (x, out, slope)), strict=True)
        slope_at_0, one = torch.tensor(SLOPE_AT_0), torch.tensor(1.0)
        for x_part, out_part, slope_part in parts:
            values = x_part.float()
            sigmoid = torch.addcmul(slope_at_0, values, values, value=CUBIC).mul_(values).sigmoid_()
            result = values * sigmoid
            out_part.copy_(result)
            dz = torch.addcmul(slope_at_0, values, values, value=3 * CUBIC)
            slope_part.copy_(result.mul_(dz).lerp_(one, sigmoid))  # sigmoid + result z'(x) (1 - sigmoid)
        ctx.save_for_backward(slope)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        (slope,) = ctx.saved_tensors
        return grad_out * slope


if ONEDNN:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def linear_flops(x_shape, *others, out_shape=None, **keywords):
        """For torch.utils.flop_counter, which knows PyTorch's own operators only; 2 a multiply-add."""
        return 2 * math.prod(out_shape) * x_shape[-1]
