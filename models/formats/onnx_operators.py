"""PyTorch operators that torch.onnx does not translate, written with ONNX's operators.

This module needs onnxscript, so it is imported where a model is exported. The decorator reads the source of a function:
`op.` is an operator of ONNX, a `for` becomes a Loop. torch.onnx expects opset 18 here and converts the graph.
"""

import onnxscript
import torch
from onnxscript import DOUBLE, INT64
from onnxscript import opset18 as op


@onnxscript.script(onnxscript.values.Opset("token_reduction", 1))
def facility_location(s: DOUBLE[...], k: int) -> INT64[...]:
    """As models.facility_location.facility_location: the k greedy picks (B, k) for similarities s (B, N, N) >= 0."""
    zero = op.CastLike(0.0, s)
    lowest = op.CastLike(-1.0, s)  # below any sum of similarities
    best = op.ReduceMax(op.Mul(s, zero), [1], keepdims=1)  # (B, 1, N)
    never = op.Cast(k, to=7)
    indices = op.Range(0, op.Squeeze(op.Gather(op.Shape(s), [1])), 1)  # (N,)
    turn = op.Add(op.Cast(op.ReduceSum(op.Mul(s, zero), [2], keepdims=0), to=7), never)  # (B, N): when it is picked
    for n in range(k):
        values = op.ReduceSum(op.Max(s, best), [2], keepdims=0)
        pick = op.ArgMax(op.Where(op.Less(turn, never), lowest, values), axis=1, keepdims=1)  # (B, 1)
        is_pick = op.Equal(indices, pick)
        turn = op.Where(is_pick, n, turn)
        best = op.Max(best, op.ReduceMax(op.Where(op.Unsqueeze(is_pick, [2]), s, zero), [1], keepdims=1))
    turns, picks = op.TopK(turn, op.Reshape(never, [1]), axis=1, largest=0)
    return picks


def stable_sort(x, stable=None, dim=-1, descending=False):
    """Of equal values, TopK returns the one of lower index first."""
    return op.TopK(x, op.Gather(op.Shape(x), [dim]), axis=dim, largest=int(descending))


def translations():
    """The `custom_translation_table` of torch.onnx.export."""
    return {
        torch.ops.token_reduction.facility_location.default: facility_location,
        torch.ops.aten.sort.stable: stable_sort,
    }
