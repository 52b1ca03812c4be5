"""Linear layers and GELU by the fastest kernel for the tensors' device and type; benchmarks/NOTES.md has the times.

On CPUs with AVX-512 these are private operators of PyTorch. They are compared with the ordinary ones when this module
is imported, and used only if they give the same results.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from models.probing import probe, require_same

MIN_ROWS = 1024  # with fewer, oneDNN's own operator is not faster than PyTorch's in training
MIN_WEIGHTS_TO_REORDER = 2**18  # of as many rows; reordering smaller matrices for oneDNN takes longer than it saves
CHUNK_SIZE = 2**18  # of GELU: its float32 intermediates, 1 MiB each, stay in a processor's cache

# gelu(x) = x sigmoid(z) with z = LINEAR x + CUBIC x^3: the tanh approximation, since 1 + tanh(u) = 2 sigmoid(2 u)
LINEAR = 2 * math.sqrt(2 / math.pi)
CUBIC = 0.044715 * LINEAR


class Linear(nn.Linear):
    """nn.Linear by `linear`."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


def linear(x, weight, bias):
    """x (..., in), weight (out, in), bias (out) -> (..., out); for many rows on a CPU by oneDNN's operator."""
    if uses_onednn(x, weight) and num_rows(x) >= MIN_ROWS:
        return OneDNNLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def linear_gelu(x, layer):
    """gelu(layer(x)); on a CPU in one kernel if nothing needs a gradient."""
    if uses_onednn(x, layer.weight) and not needs_gradient(x, layer.weight, layer.bias):
        return onednn_linear(x, layer.weight, layer.bias, "gelu")
    return gelu(layer(x))


def linear_exact_gelu(x, layer):
    """The GELU without approximation, PyTorch's default, of layer(x)."""
    return F.gelu(layer(x))


GELUS = {"tanh": linear_gelu, "exact": linear_exact_gelu}


def gelu(x):
    """The tanh approximation of GELU, Flax's default."""
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        # compiled exponentials are faster than tanh; exported graphs keep the operator
        return x * torch.sigmoid(LINEAR * x + CUBIC * x**3)
    if (
        DETECTS_TRANSFORMS
        and x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and x.requires_grad
        and runs_eagerly(x)
    ):
        return GELUWithDerivative.apply(x.contiguous())
    return F.gelu(x, approximate="tanh")


def uses_onednn(x, weight):
    """Whether x @ weight.T is computed by oneDNN's own operators."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in ONEDNN_DTYPES
        and runs_eagerly(x, weight)
        and not torch.is_autocast_enabled("cpu")
        and x.shape[-1] == weight.shape[1]  # otherwise F.linear raises the clearer error
    )


def needs_gradient(*tensors):
    """Whether what is computed from the tensors becomes part of a graph."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def runs_eagerly(*tensors):
    """Whether ordinary tensors are computed on at once: not in a compiler or tracer, for fake or distributed tensors,
    in torch.func or in forward-mode differentiation. These support only PyTorch's public operators.
    """
    return (
        not torch.compiler.is_compiling()
        and all(type(tensor) in (torch.Tensor, nn.Parameter) for tensor in tensors)
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def onednn_linear(x, weight, bias, activation="none"):
    """activation(x @ weight.T + bias), shapes as in `linear`; large weights are reordered for many rows."""
    if num_rows(x) >= MIN_ROWS and weight.numel() >= MIN_WEIGHTS_TO_REORDER:
        weight = torch.ops.mkldnn._reorder_linear_weight(weight, num_rows(x))
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "tanh")


def num_rows(x):
    return x.numel() // x.shape[-1]


class OneDNNLinear(torch.autograd.Function):
    """`onednn_linear` with a backward pass of ordinary products: reordering transposed weights takes too long."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)  # a frozen weight needs no x
        return onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad_out):
        x, weight = ctx.saved_tensors
        rows = grad_out.reshape(-1, grad_out.shape[-1])  # (B * N, out)
        grad_x = grad_out @ weight if ctx.needs_input_grad[0] else None
        grad_weight = rows.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        grad_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias


class GELUWithDerivative(torch.autograd.Function):
    """GELU of x (any shape, contiguous) that saves its derivative for the backward pass; both need one sigmoid.

    PyTorch's CPU kernels with tanh are slow: their forward pass takes as long as this, and their backward pass again.
    """

    @staticmethod
    def forward(ctx, x):
        out, derivative = torch.empty_like(x), torch.empty_like(x)
        chunks = zip(*(tensor.view(-1).split(CHUNK_SIZE) for tensor in (x, out, derivative)), strict=True)
        linear_term, one = torch.tensor(LINEAR), torch.tensor(1.0)
        for x_part, out_part, derivative_part in chunks:
            values = x_part.float()
            sigmoid = torch.addcmul(linear_term, values, values, value=CUBIC).mul_(values).sigmoid_()
            result = values * sigmoid
            out_part.copy_(result)
            dz = torch.addcmul(linear_term, values, values, value=3 * CUBIC)
            derivative_part.copy_(result.mul_(dz).lerp_(one, sigmoid))  # sigmoid + result z'(x) (1 - sigmoid)
        ctx.save_for_backward(derivative)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        (derivative,) = ctx.saved_tensors
        return grad_out * derivative


def detects_transforms():
    """Whether `runs_eagerly` answers correctly, in and outside of torch.func and forward-mode differentiation."""
    x = torch.zeros(1, device="cpu")
    answers = []
    torch.func.vmap(lambda row: answers.append(runs_eagerly(x)) or row)(x)
    with forward_ad.dual_level():
        answers.append(runs_eagerly(x))
    if not runs_eagerly(x) or any(answers):
        raise RuntimeError("transforms of torch.func are not detected")
    return True


def probe_onednn():
    """The types in which oneDNN's operators are used on this CPU."""
    if not DETECTS_TRANSFORMS or not torch.backends.mkldnn.is_available():
        return ()
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return ()
    bounds = {torch.float32: 1e-5}  # of relative errors
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        bounds[torch.bfloat16] = 1e-2
    on_cpu = {"device": "cpu", "dtype": torch.float32}
    x = torch.linspace(-40, 40, 16 * MIN_ROWS, **on_cpu).sin().view(-1, 16)
    weight, bias = torch.linspace(-70, 70, 24 * 16, **on_cpu).cos().view(24, 16), torch.linspace(-1, 1, 24, **on_cpu)
    for dtype, bound in bounds.items():
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
        reordered = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
        for rows, ordered in ((x, reordered), (x, weight), (x[:5], weight)):
            expected = F.linear(rows, weight, bias)
            require_same(onednn_linear(rows, ordered, bias), expected, bound)
            require_same(onednn_linear(rows, ordered, bias, "gelu"), F.gelu(expected, approximate="tanh"), bound)
    register_flops()
    return tuple(bounds)


def register_flops():
    """Let torch.utils.flop_counter count oneDNN's linear layers: 2 FLOPs per multiply-add."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    if torch.ops.mkldnn._linear_pointwise not in flop_registry:

        @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
        def linear_flops(x_shape, *args, out_shape=None, **kwargs):
            return 2 * math.prod(out_shape) * x_shape[-1]


DETECTS_TRANSFORMS = probe("PyTorch's detection of transforms", detects_transforms, False)
ONEDNN_DTYPES = probe("oneDNN's linear layers", probe_onednn, ())
