"""The greedy choice of facility location (models/token_reduction.py) as one operator, on a GPU as one kernel."""

import torch

from models.probing import load_kernel


@torch.library.custom_op("token_reduction::facility_location", mutates_args=())
def facility_location(s: torch.Tensor, k: int) -> torch.Tensor:
    """The k greedy picks (B, k) that maximise f, in order; s (B, N, N) >= 0 has one row per candidate.

    Of candidates that gain the same, the one of lowest index is picked. The sums are those of float64 if s is, and on a
    GPU always. A custom operator, because torch.compile would unroll the k rounds, which takes minutes.
    """
    return greedy_picks(s, k)


@facility_location.register_fake
def _(s, k):
    return s.new_empty(s.shape[0], k, dtype=torch.long)


@facility_location.register_kernel("cuda")
def picks_on_gpu(s, k):
    """As `facility_location`, in float64; by PyTorch's operators where Triton does not work."""
    kernel = load_kernel("facility_location_kernel", s.device)
    return kernel(s, k) if kernel else greedy_picks(s.double(), k)


def greedy_picks(s, k):
    """As `facility_location`, by PyTorch's operators: a few per round."""
    best = s.new_zeros(len(s), 1, s.shape[-1])  # how well the picks so far represent each token
    extended = torch.empty_like(s)
    picks = torch.empty(len(s), k, dtype=torch.long, device=s.device)
    for n in range(k):
        values = torch.maximum(s, best, out=extended).sum(dim=-1)  # (B, N): f of the picks so far and one more
        pick = values.scatter_(1, picks[:, :n], -torch.inf).argmax(dim=1, keepdim=True)
        picks[:, n : n + 1] = pick
        best = torch.maximum(best, s.gather(1, pick[..., None].expand(-1, -1, s.shape[-1])))
    return picks
