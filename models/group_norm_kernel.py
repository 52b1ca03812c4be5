"""GroupNorm of rows (B, N, C) whose channels are last in memory, and a ReLU after it, in Triton kernels for GPUs.

PyTorch's kernel for GPUs moves the channels first, so channels-last feature maps and tokens are copied before and after
it. Here each pass reads the rows once: a program has some of an image's rows, all their statistics are in float32, and
each sum has one order, so results are deterministic.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from models.probing import require_same

TILE = 4096  # values that a program reads at a time, which its registers must hold in float32
MAX_CHANNELS = 512  # of a program
PROGRAMS = 1024  # about as many per pass as keep all processors of a large GPU busy


class GroupNormOfRows(torch.autograd.Function):
    """x (B, N, C), contiguous -> the same type and shape; weight and bias (C,) of any floating-point type."""

    @staticmethod
    def forward(context, x, weight, bias, groups, eps, relu):
        passes, merges = launches(*x.shape, groups)
        of_parts, statistics = buffers(x, passes, merges)
        y = torch.empty_like(x)
        with torch.cuda.device_of(x):
            channel_moments[passes.grid](x, of_parts, *x.shape[1:], **passes.sizes)
            rows_of_part = passes.sizes["tiles"] * passes.sizes["rows"]
            group_statistics[merges.grid](of_parts, statistics, *x.shape[1:], eps, rows_of_part, **merges.sizes)
            normalise[passes.grid](x, statistics, weight, bias, y, *x.shape[1:], groups, relu, **passes.sizes)
        context.save_for_backward(x, statistics, weight, bias)
        context.groups, context.relu = groups, relu
        return y

    @staticmethod
    @once_differentiable
    def backward(context, gradient):
        x, statistics, weight, bias = context.saved_tensors
        inputs = (gradient.contiguous(), x, statistics, weight, bias)
        numbers = (*x.shape[1:], context.groups, context.relu)
        passes, merges = launches(*x.shape, context.groups)
        of_parts, means = buffers(x, passes, merges)
        of_x = torch.empty_like(x)
        with torch.cuda.device_of(x):
            channel_sums[passes.grid](*inputs, of_parts, *numbers, **passes.sizes)
            group_means[merges.grid](of_parts, weight, means, *x.shape[1:], **merges.sizes)
            input_gradient[passes.grid](*inputs, means, of_x, *numbers, **passes.sizes)
        of_bias, of_weight = of_parts.sum(dim=(1, 2))
        return of_x, of_weight.to(weight.dtype), of_bias.to(bias.dtype), None, None, None


apply = GroupNormOfRows.apply


def trial(device):
    """Raises an exception if the kernels do not work on the device, or differ from PyTorch in a value or gradient."""
    x, gradient = torch.linspace(-9, 9, 960, device=device).sin().view(2, 2, 10, 24)
    results = []
    for norm in (apply, torch_group_norm):
        inputs = [value.clone().requires_grad_() for value in (x, 1 + x[0, 0], x[1, 1])]
        y = norm(*inputs, 4, 1e-5, True)
        results.append([y, *torch.autograd.grad(y, inputs, gradient)])
    for ours, theirs in zip(*results, strict=True):
        require_same(ours, theirs, bound=1e-5)


def torch_group_norm(x, weight, bias, groups, eps, relu):
    """As `apply`, by PyTorch's operators."""
    y = F.group_norm(x.transpose(1, 2), groups, weight, bias, eps).transpose(1, 2)
    return F.relu(y) if relu else y


class Launch(NamedTuple):
    """The grid of a kernel, and the keywords that go with it."""

    grid: tuple
    sizes: dict


def launches(batch, count, channels, groups):
    """(Launch of a pass over rows (B, N, C), Launch of a merge of what it leaves).

    The programs of a pass are (images, parts of their rows, blocks of channels), those of a merge (images, groups).
    """
    columns = min(triton.next_power_of_2(channels), MAX_CHANNELS)
    rows, blocks = TILE // columns, triton.cdiv(channels, columns)
    parts = max(1, min(triton.cdiv(count, rows), PROGRAMS // (batch * blocks)))
    tiles = triton.cdiv(triton.cdiv(count, rows), parts)  # of a part
    parts = triton.cdiv(count, tiles * rows)
    passes = Launch((batch, parts, blocks), {"tiles": tiles, "rows": rows, "columns": columns})
    sizes = {"num_parts": parts, "parts": triton.next_power_of_2(parts)}
    return passes, Launch((batch, groups), {**sizes, "columns": triton.next_power_of_2(channels // groups)})


def buffers(x, passes, merges):
    """What a pass and a merge leave, both float32: (2, B, parts, C) and (2, B, groups)."""
    of_parts = x.new_empty(2, *passes.grid[:2], x.shape[2], dtype=torch.float32)
    return of_parts, x.new_empty(2, *merges.grid, dtype=torch.float32)


@triton.jit
def block_of_channels(columns: tl.constexpr):
    """The channels of a pass's program."""
    return tl.program_id(2) * columns + tl.arange(0, columns)


@triton.jit
def place_of_tile(tile, count, channels, tiles, rows: tl.constexpr, columns: tl.constexpr):
    """The offsets (rows, columns) of a tile of a pass's program, and which of them exist."""
    row, column = (tl.program_id(1) * tiles + tile) * rows + tl.arange(0, rows), block_of_channels(columns)
    inside = (row < count)[:, None] & (column < channels)[None, :]
    first = tl.program_id(0).to(tl.int64) * count * channels  # a batch may have more than 2**31 values
    return first + row[:, None] * channels + column[None, :], inside


@triton.jit
def store_of_part(of_parts, channels, first, second, columns: tl.constexpr):
    """Store two values of each channel of a pass's program."""
    column = block_of_channels(columns)
    place = of_parts + (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * channels + column
    tl.store(place, first, mask=column < channels)
    tl.store(place + tl.num_programs(0) * tl.num_programs(1) * channels, second, mask=column < channels)


@triton.jit
def load_of_group(of_parts, channels, num_parts, parts: tl.constexpr, columns: tl.constexpr):
    """What `store_of_part` stored for the group of a merge's program, each (parts, columns), and what of it exists."""
    size = channels // tl.num_programs(1)
    part, column = tl.arange(0, parts)[:, None], tl.arange(0, columns)[None, :]
    inside = (part < num_parts) & (column < size)
    place = of_parts + (tl.program_id(0) * num_parts + part) * channels + tl.program_id(1) * size + column
    first = tl.load(place, mask=inside, other=0.0)
    return first, tl.load(place + tl.num_programs(0) * num_parts * channels, mask=inside, other=0.0), inside


@triton.jit
def store_of_group(of_groups, first, second):
    """Store the two values of a merge's program."""
    place = of_groups + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(place, first)
    tl.store(place + tl.num_programs(0) * tl.num_programs(1), second)


@triton.jit
def load_of_channels(of_groups, channels, groups, columns: tl.constexpr):
    """What `store_of_group` stored for the groups of the channels of a pass's program."""
    column = block_of_channels(columns)
    place = of_groups + tl.program_id(0) * groups + column // (channels // groups)
    first = tl.load(place, mask=column < channels, other=0.0)
    return first, tl.load(place + tl.num_programs(0) * groups, mask=column < channels, other=0.0)


@triton.jit
def load_affine(weight, bias, channels, columns: tl.constexpr):
    """The weight and bias of the channels of a pass's program."""
    column = block_of_channels(columns)
    factor = tl.load(weight + column, mask=column < channels, other=0.0).to(tl.float32)
    return factor, tl.load(bias + column, mask=column < channels, other=0.0).to(tl.float32)


@triton.jit
def load_normalised(x, inside, mean, scale):
    """(x - mean) / std of a tile, without weight and bias."""
    return (tl.load(x, mask=inside, other=0.0).to(tl.float32) - mean[None, :]) * scale[None, :]


@triton.jit
def load_gradient(gradient, inside, values, factor, shift, relu: tl.constexpr):
    """The gradient of a tile before the ReLU, whose normalised values are `values`."""
    slopes = tl.load(gradient, mask=inside, other=0.0).to(tl.float32)
    if relu:
        slopes = tl.where(values * factor[None, :] + shift[None, :] > 0, slopes, 0.0)
    return slopes


@triton.jit
def channel_moments(x, of_parts, count, channels, tiles, rows: tl.constexpr, columns: tl.constexpr):
    """Of a part: each channel's mean, and its sum of squared differences from it, merged tile by tile (Chan et al.)."""
    mean, squares = tl.zeros([columns], tl.float32), tl.zeros([columns], tl.float32)
    first = tl.program_id(1) * tiles * rows
    for tile in range(tiles):
        place, inside = place_of_tile(tile, count, channels, tiles, rows, columns)
        values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        seen = tl.minimum(count - first, tile * rows).to(tl.float32)
        total = tl.minimum(count - first, (tile + 1) * rows).to(tl.float32)
        share = (total - seen) / total
        mean_of_tile = tl.sum(values, axis=0) / tl.maximum(total - seen, 1.0)
        centred = tl.where(inside, values - mean_of_tile[None, :], 0.0)
        difference = mean_of_tile - mean
        squares += tl.sum(centred * centred, axis=0) + difference * difference * seen * share
        mean += difference * share
    store_of_part(of_parts, channels, mean, squares, columns)


@triton.jit
def group_statistics(
    of_parts, statistics, count, channels, eps, rows_of_part, num_parts, parts: tl.constexpr, columns: tl.constexpr
):
    """Merge the moments of a group's channels in all parts: to its mean, and 1 / sqrt(variance + eps)."""
    means, squares, inside = load_of_group(of_parts, channels, num_parts, parts, columns)
    rows = tl.minimum(count - tl.arange(0, parts) * rows_of_part, rows_of_part)
    rows = tl.where(inside, rows[:, None], 0).to(tl.float32)
    total = (count * (channels // tl.num_programs(1))).to(tl.float32)
    mean = tl.sum(rows * means) / total
    differences = means - mean
    variance = tl.sum(squares + rows * differences * differences) / total
    store_of_group(statistics, mean, 1.0 / tl.sqrt_rn(variance + eps))


@triton.jit
def normalise(
    x,
    statistics,
    weight,
    bias,
    y,
    count,
    channels,
    groups,
    relu: tl.constexpr,
    tiles,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """y = (x - mean) / std * weight + bias, with `relu` at least 0."""
    mean, scale = load_of_channels(statistics, channels, groups, columns)
    factor, shift = load_affine(weight, bias, channels, columns)
    for tile in range(tiles):
        place, inside = place_of_tile(tile, count, channels, tiles, rows, columns)
        values = load_normalised(x + place, inside, mean, scale)
        values = values * factor[None, :] + shift[None, :]
        if relu:
            values = tl.maximum(values, 0.0)
        tl.store(y + place, values.to(y.dtype.element_ty), mask=inside)


@triton.jit
def channel_sums(
    gradient,
    x,
    statistics,
    weight,
    bias,
    of_parts,
    count,
    channels,
    groups,
    relu: tl.constexpr,
    tiles,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """Of a part: each channel's sum of the gradient, and of the gradient times the normalised value."""
    mean, scale = load_of_channels(statistics, channels, groups, columns)
    factor, shift = load_affine(weight, bias, channels, columns)
    plain, weighted = tl.zeros([columns], tl.float32), tl.zeros([columns], tl.float32)
    for tile in range(tiles):
        place, inside = place_of_tile(tile, count, channels, tiles, rows, columns)
        values = load_normalised(x + place, inside, mean, scale)
        slopes = load_gradient(gradient + place, inside, values, factor, shift, relu)
        plain += tl.sum(slopes, axis=0)
        weighted += tl.sum(slopes * values, axis=0)
    store_of_part(of_parts, channels, plain, weighted, columns)


@triton.jit
def group_means(of_parts, weight, means, count, channels, num_parts, parts: tl.constexpr, columns: tl.constexpr):
    """Of a group: the means of weight * gradient, and of weight * gradient * normalised value."""
    plain, weighted, _ = load_of_group(of_parts, channels, num_parts, parts, columns)
    size = channels // tl.num_programs(1)
    column = tl.arange(0, columns)
    factor = tl.load(weight + tl.program_id(1) * size + column, mask=column < size, other=0.0).to(tl.float32)[None, :]
    total = (count * size).to(tl.float32)
    store_of_group(means, tl.sum(plain * factor) / total, tl.sum(weighted * factor) / total)


@triton.jit
def input_gradient(
    gradient,
    x,
    statistics,
    weight,
    bias,
    means,
    of_x,
    count,
    channels,
    groups,
    relu: tl.constexpr,
    tiles,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """The gradient of x, from that of y and the means of its group."""
    mean, scale = load_of_channels(statistics, channels, groups, columns)
    factor, shift = load_affine(weight, bias, channels, columns)
    plain, weighted = load_of_channels(means, channels, groups, columns)
    for tile in range(tiles):
        place, inside = place_of_tile(tile, count, channels, tiles, rows, columns)
        values = load_normalised(x + place, inside, mean, scale)
        slopes = load_gradient(gradient + place, inside, values, factor, shift, relu)
        slopes = slopes * factor[None, :] - plain[None, :] - values * weighted[None, :]
        tl.store(of_x + place, (slopes * scale[None, :]).to(of_x.dtype.element_ty), mask=inside)
