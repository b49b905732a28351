"""Router logits -> which experts a token visits, and with what weight. A decision; no learning rule in it."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tiny_onn_func import kernels, native
from tiny_onn_func.config import DYNAMIC_K, ModelConfig
from tiny_onn_func.mapped import over_runs
from tiny_onn_func.ops import wide_dtype


class Routing(NamedTuple):
    """M slots per token, best expert first; the experts of one token are distinct."""

    expert_ids: Int[Tensor, "tokens slots"]
    weights: Float[Tensor, "tokens slots"]  # sums to 1 over the active slots, 0 elsewhere
    active: Bool[Tensor, "tokens slots"]  # never on padding


def route(
    router_logits: Float[Tensor, "tokens experts"],
    real: Bool[Tensor, " tokens"],
    config: ModelConfig,
    surprise_budget: int | float | Tensor,
    bias: Float[Tensor, " experts"] | None = None,
    explore: Int[Tensor, " tokens"] | None = None,
) -> Routing:
    """Keep the most probable experts until their mass reaches the surprise budget.

    p = softmax(router_logits); experts are ranked by p + bias; rank r is kept iff the mass of p before it is below
    the budget, so K = 1 + #(cumulative mass < budget), token by token. A budget of 1 keeps every expert. The floor
    and the cap of the configuration then apply; a positive `num_experts_per_tok` keeps exactly that many.

    With `config.routing == "thresholds"` an expert is kept iff logit + bias > 0, under the same floor and cap, and all
    kept ones weigh the same; gradients pass through the gates (top-any gating of DynMoE, arXiv 2405.14297).

    Args:
        router_logits: higher = preferred.
        real: False on padding, which keeps no expert.
        surprise_budget: in (0, 1]; read by dynamic K only.
        bias: added to p for the ranking, never for the weights (loss-free balancing, arXiv 2408.15664). With
            thresholds it is added to the logits, and learned.
        explore: expert that the token also tries, -1 for none; it takes a free slot, or else the last one.
    """
    slots = config.routes_per_token
    logits = router_logits.to(wide_dtype(router_logits.dtype))
    p = logits.softmax(dim=-1)
    ranked = logits if config.routing == "thresholds" else p
    above = ranked if bias is None else ranked + bias
    (expert_ids,) = over_runs(lambda scores: (_best(scores, slots),), above.detach())
    rank = torch.arange(slots, device=p.device)
    if config.routing == "thresholds":
        kept = (above.detach().gather(-1, expert_ids) > 0) | (rank < config.min_experts_per_tok)
    elif config.num_experts_per_tok == DYNAMIC_K:
        mass_before = F.pad(p.detach().gather(-1, expert_ids).cumsum(dim=-1)[..., :-1], (1, 0))
        budget = torch.as_tensor(surprise_budget, device=p.device)
        kept = (mass_before < budget) | (budget >= 1) | (rank < config.min_experts_per_tok)
    else:
        kept = torch.ones_like(expert_ids, dtype=torch.bool)
    if explore is not None:
        expert_ids, kept = _try_expert(expert_ids, kept, explore, rank)
    active = kept & rearrange(real, "tokens -> tokens 1")
    if config.routing == "thresholds":
        return Routing(expert_ids, _open_gates(above.gather(-1, expert_ids), active), active)
    # p renormalised over the kept experts, from logits: what was kept may have a p that underflows (bias, exploration)
    kept_logits = logits.gather(-1, expert_ids).masked_fill(~active, torch.finfo(logits.dtype).min)
    return Routing(expert_ids, kept_logits.softmax(dim=-1) * active, active)


def send_alone(routing: Routing, expert: Int[Tensor, " tokens"], real: Bool[Tensor, " tokens"]) -> Routing:
    """The token visits that expert alone, with weight 1; -1 leaves it as it is routed. Padding still visits none."""
    wanted, first = rearrange(expert, "tokens -> tokens 1"), routing.expert_ids[:, :1]
    slot_0 = torch.arange(routing.expert_ids.shape[-1], device=expert.device) == 0
    ids = torch.where(slot_0, wanted, torch.where(routing.expert_ids == wanted, first, routing.expert_ids))
    alone = Routing(ids, slot_0.to(routing.weights.dtype) * real[:, None], slot_0 & real[:, None])
    return Routing(*(torch.where(wanted >= 0, new, old) for new, old in zip(alone, routing, strict=True)))


def _best(scores: Tensor, slots: int) -> Tensor:
    """Indices of the highest scores."""
    return kernels.top(scores, slots) if native.may_run(scores) else scores.topk(slots, dim=-1).indices


def _open_gates(above: Tensor, active: Tensor) -> Tensor:
    """1 / K for each open gate; straight through: the gradient is that of sigmoid(logit + bias) / K."""
    soft = above.sigmoid()
    return torch.where(active, 1 + soft - soft.detach(), 0.0) / active.sum(dim=-1, keepdim=True).clamp_min(1)


def _try_expert(expert_ids: Tensor, kept: Tensor, explore: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """Put the explored expert into the first free slot, or the last one; the one it displaces takes its old slot."""
    wanted = rearrange(explore, "tokens -> tokens 1")
    count = kept.sum(dim=-1, keepdim=True)
    new = (wanted >= 0) & ~((expert_ids == wanted) & kept).any(dim=-1, keepdim=True)
    slot = count.clamp_max(rank.shape[0] - 1)
    displaced = expert_ids.gather(-1, slot)
    swapped = torch.where(expert_ids == wanted, displaced, expert_ids)
    swapped = torch.where(rank == slot, wanted, swapped)
    return torch.where(new, swapped, expert_ids), kept | (new & (rank == slot))
