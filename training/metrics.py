"""What a step measures about routing: pure tensor functions that run inside torch.func transforms.

Counts are made by `scatter_add` on tensors that are batched whenever an input is; nothing waits for the device.
Shares and counts are float32; means of a float64 tensor stay float64.
"""

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tiny_onn_func.ops import wide_dtype


def routed_rows(
    expert_ids: Int[Tensor, "*runs layers tokens slots"],
    active: Bool[Tensor, "*runs layers tokens slots"],
    num_experts: int,
) -> Int[Tensor, "*runs layers experts"]:
    """Rows of each layer that each expert got.

    Args:
        expert_ids: in [0, num_experts) on active slots, anything elsewhere.
        active: which slots are routed.
    """
    flat = "... tokens slots -> ... (tokens slots)"
    return counts(rearrange(expert_ids, flat), rearrange(active, flat), num_experts)


def counts(
    index: Int[Tensor, "*runs layers rows"], counted: Bool[Tensor, "*runs layers rows"], bins: int
) -> Int[Tensor, "*runs layers bins"]:
    """Each layer's counted rows that fall into each bin; uncounted rows go to a spare bin first."""
    index = torch.where(counted, index, bins)
    empty = index.new_zeros((*index.shape[:-1], bins + 1))
    return empty.scatter_add(-1, index, torch.ones_like(index))[..., :bins]


def shares(counts: Int[Tensor, "*runs layers bins"]) -> Float[Tensor, "*runs layers bins"]:
    """Share of each layer's rows that falls into each bin; zeros where there is none. Of experts: their load."""
    return counts.to(torch.float32) / counts.sum(dim=-1, keepdim=True).clamp_min(1)


def max_vio(load: Float[Tensor, "*runs layers experts"]) -> Float[Tensor, "*runs"]:
    """Mean over layers of (max load - mean load) / mean load; 0 is even, E - 1 is one expert alone.

    A layer without load counts as 0 (MaxVio: Wang et al. 2024, arXiv 2408.15664).
    """
    load = _wide(load)
    mean, highest = load.mean(dim=-1), load.amax(dim=-1)
    used = mean > 0
    return torch.where(used, (highest - mean) / torch.where(used, mean, 1.0), 0.0).mean(dim=-1)


def dead_experts(load: Float[Tensor, "*runs layers experts"]) -> Float[Tensor, "*runs"]:
    """Number of (layer, expert) pairs that got no row in this batch."""
    return (load == 0).sum(dim=(-2, -1)).to(torch.float32)


def load_entropy(load: Float[Tensor, "layers experts"]) -> Float[Tensor, ""]:
    """Mean over layers of -sum_e p_e log p_e / log E with p = load / sum(load), in [0, 1]; 1 is even.

    A layer without load counts as 0; a lone expert with load is even.
    """
    load = _wide(load)
    total = load.sum(dim=-1)
    p = load / torch.where(total > 0, total, 1.0).unsqueeze(-1)
    experts = load.shape[-1]
    if experts == 1:
        return p.mean()
    entropy = -(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum(dim=-1)
    return (entropy / p.new_full((), experts).log()).clamp(0.0, 1.0).mean()


def average_k(
    active: Bool[Tensor, "layers tokens slots"], attention_mask: Bool[Tensor, " tokens"] | Int[Tensor, " tokens"]
) -> Float[Tensor, ""]:
    """Mean number of experts that a real token visits, over layers and tokens; 0 where no token is real."""
    real = attention_mask != 0
    visits = count_visits(active, real).to(torch.float32)
    return visits / (active.shape[0] * real.sum()).clamp_min(1)


def count_visits(
    active: Bool[Tensor, "*runs layers tokens slots"], real: Bool[Tensor, "*runs tokens"]
) -> Int[Tensor, "*runs"]:
    """Visits of real tokens to experts, over all layers."""
    return (active & rearrange(real, "... tokens -> ... 1 tokens 1")).sum(dim=(-3, -2, -1))


def finite_sum(x: Float[Tensor, "..."], dim: int | None = None) -> tuple[Float[Tensor, "..."], Int[Tensor, "..."]]:
    """(sum of the finite entries, how many they are), over all of x or one axis."""
    kept, finite = _finite_or_zero(x), x.isfinite()
    return (kept.sum(), finite.sum()) if dim is None else (kept.sum(dim=dim), finite.sum(dim=dim))


def nonfinite_surprise(
    surprise: Float[Tensor, "*runs layers tokens experts"],
    expert_ids: Int[Tensor, "*runs layers tokens slots"],
    active: Bool[Tensor, "*runs layers tokens slots"],
) -> Int[Tensor, "*runs"]:
    """How many routed (layer, token, expert) have a surprise that is NaN or infinite; those not routed have none."""
    routed = surprise.gather(-1, torch.where(active, expert_ids, 0))
    return (active & ~routed.isfinite()).sum(dim=(-3, -2, -1))


def _finite_or_zero(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), _wide(x), 0.0)


def _wide(x: Tensor) -> Tensor:
    return x.to(wide_dtype(x.dtype))
