"""Triton kernels in Triton's interpreter, on the CPU: for a process of its own (test_facility_location_kernel.py).

Triton decides once, when it is imported, if kernels are interpreted: by TRITON_INTERPRET.
"""

import pytest
import torch

from models import facility_location_kernel
from models.facility_location import facility_location
from models.token_reduction import similarity


def keys_with_ties(tokens):
    """Keys (2, tokens, 8) of which some are equal, so that several tokens gain the same, or nothing."""
    keys = torch.randn(2, tokens, 8, generator=torch.Generator().manual_seed(tokens))
    keys[:, tokens // 2] = keys[:, 1]
    keys[1, -3:] = keys[1, :1]
    return keys


@pytest.mark.parametrize("tokens, k, tile", [(16, 4, 8192), (9, 9, 32), (21, 7, 64), (5, 1, 8)])
def test_picks_are_those_of_pytorchs_operators(tokens, k, tile, monkeypatch):
    """Also over several tiles whose size does not divide the tokens."""
    monkeypatch.setattr(facility_location_kernel, "TILE", tile)
    s = similarity(keys_with_ties(tokens))
    expected = facility_location(s.double(), k)
    assert torch.equal(facility_location_kernel.launch(s, k), expected)
    assert torch.equal(facility_location_kernel.launch(s.double(), k), expected)


def test_rows_are_candidates():
    """Of similarities that are neither symmetric nor contiguous."""
    s = torch.rand(2, 12, 12, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
    assert torch.equal(facility_location_kernel.launch(s, 5), facility_location(s.double(), 5))
