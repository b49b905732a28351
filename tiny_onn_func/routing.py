"""Router logits -> which experts a token visits, and with what weight. A decision; no learning rule in it."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tiny_onn_func.config import DYNAMIC_K, Gate, ModelConfig
from tiny_onn_func.kernels import forward as forward_kernels
from tiny_onn_func.kernels.runtime import is_untracked
from tiny_onn_func.ops import as_scalar, wide_dtype
from tiny_onn_func.primitives.fused import Values, fused
from tiny_onn_func.primitives.vmap import outside_vmap

LEAST_SUM = 1e-20  # of sigmoids: below it the bias alone ranks


class Routing(NamedTuple):
    """M slots per token, best expert first; the experts of one token are distinct."""

    expert_ids: Int[Tensor, "*runs tokens slots"]
    weights: Float[Tensor, "*runs tokens slots"]  # sums to 1 over the active slots, 0 elsewhere
    active: Bool[Tensor, "*runs tokens slots"]  # never on padding


def check_budget(surprise_budget: int | float | Tensor) -> None:
    """Refuse a budget out of range; what a tensor holds is not looked at.

    Raises:
        ValueError: it is.
    """
    if not isinstance(surprise_budget, Tensor) and not 0 < surprise_budget <= 1:
        raise ValueError(f"surprise_budget: expected a number in (0, 1], got {surprise_budget}")


def gated(logits: Float[Tensor, "*runs tokens experts"], config: ModelConfig) -> Float[Tensor, "*runs tokens experts"]:
    """Logits of which a softmax is the normalised score: themselves, or log sigmoid(logit) with `gate: sigmoid`.

    The softmax of log s over some experts is s / (the sum of theirs), so that weights, the mass of dynamic K and the
    losses of the router are those of sigmoid scores.
    """
    return logits if config.gate == "softmax" else F.logsigmoid(logits) + _zero_or_nan(logits)


def route(
    router_logits: Float[Tensor, "*runs tokens experts"],
    real: Bool[Tensor, "*#runs tokens"],
    config: ModelConfig,
    surprise_budget: int | float | Tensor,
    bias: Float[Tensor, "*#runs experts"] | None = None,
    explore: Int[Tensor, "*runs tokens"] | None = None,
    choice: Float[Tensor, "*runs tokens experts"] | None = None,
) -> Routing:
    """Keep the most probable experts until their mass reaches the surprise budget.

    p = softmax(router_logits); experts are ranked by p + bias; rank r is kept iff the mass of p before it is below
    the budget, so K = 1 + #(cumulative mass < budget), token by token. A budget of 1 keeps every expert. The floor
    and the cap of the configuration then apply; a positive `num_experts_per_tok` keeps exactly that many.

    With `config.routing == "thresholds"` an expert is kept iff logit + bias > 0, under the same floor and cap, and all
    kept ones weigh the same; gradients pass through the gates (top-any gating of DynMoE, arXiv 2405.14297).

    Args:
        router_logits: higher = preferred; those of `gated`.
        real: False on padding, which keeps no expert.
        surprise_budget: in (0, 1]; read by dynamic K only. Rounded like the mass that it is compared with, so that it
            does not matter whether it is a Python number or a tensor of another precision.
        bias: added to p, or to the sigmoid, for the ranking, never for the weights (loss-free balancing, arXiv
            2408.15664). With thresholds it is added to the logits, and learned.
        explore: expert that the token also tries, -1 for none; it takes a free slot, or else the last one.
        choice: logits that choose the experts in place of `router_logits`, which weigh them then (a hash with learned
            weights); a constant.
    """
    slots, least = config.routes_per_token, config.min_experts_per_tok
    logits = router_logits.to(wide_dtype(router_logits.dtype))
    runs, experts = logits.shape[:-2], logits.shape[-1]
    bias = logits.new_zeros(*runs, experts) if bias is None else bias
    if config.routing == "thresholds":
        return _by_thresholds(logits + bias.unsqueeze(-2), real, slots, least, explore)
    dynamic = config.num_experts_per_tok == DYNAMIC_K
    budget = as_scalar(surprise_budget, logits.device, logits.dtype).expand(runs)
    chooses = logits if choice is None else choice.to(logits.dtype).expand_as(logits)
    inputs = logits, chooses, bias.to(logits.dtype).expand(*runs, experts), budget, real.expand(logits.shape[:-1])
    weights, expert_ids, active = outside_vmap(_chosen, *inputs, slots, least, dynamic, choice is None, config.gate)
    if explore is not None:
        routed = expert_ids, active
        expert_ids, kept = _try_expert(expert_ids, active, explore)
        active = kept & real.unsqueeze(-1)
        elsewhere = ((expert_ids != routed[0]) | (active != routed[1])).any(dim=-1, keepdim=True)
        weights = torch.where(elsewhere, _weights(logits, expert_ids, active), weights)
    return Routing(expert_ids, weights, active)


def send_alone(routing: Routing, expert: Int[Tensor, "*runs tokens"], real: Bool[Tensor, "*runs tokens"]) -> Routing:
    """The token visits that expert alone, with weight 1; -1 leaves it as it is routed. Padding still visits none."""
    wanted, first = expert.unsqueeze(-1), routing.expert_ids[..., :1]
    slot_0 = torch.arange(routing.expert_ids.shape[-1], device=expert.device) == 0
    ids = torch.where(slot_0, wanted, torch.where(routing.expert_ids == wanted, first, routing.expert_ids))
    alone = Routing(ids, slot_0.to(routing.weights.dtype) * real.unsqueeze(-1), slot_0 & real.unsqueeze(-1))
    return Routing(*(torch.where(wanted >= 0, new, old) for new, old in zip(alone, routing, strict=True)))


def _chosen(
    logits: Tensor, choice: Tensor, bias: Tensor, budget: Tensor, real: Tensor, slots: int, least: int, dynamic: bool,
    is_own: bool, gate: Gate,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(weights, expert_ids, active), of one run or of several with axes of them in front.

    Which experts they are has no gradient, and is decided once: a gradient of the weights is that of these experts.
    `is_own` says that the logits choose for themselves.
    """
    choice, bias = choice.detach(), bias.detach()
    if gate == "sigmoid":  # log s: ranked by s + bias, as by p + bias / sum of s, a bias of each token's own
        own = bias.unsqueeze(-2) / choice.exp().sum(dim=-1, keepdim=True).clamp_min(LEAST_SUM)
        each = choice.unsqueeze(-2), own, budget.unsqueeze(-1).expand(real.shape), real.unsqueeze(-1)
        weights, expert_ids, active = (part.squeeze(-2) for part in CHOOSE(*each, slots, least, dynamic))
    else:
        weights, expert_ids, active = CHOOSE(choice, bias, budget, real, slots, least, dynamic)
    if not (is_own and is_untracked(logits)):
        weights = _weights(logits, expert_ids, active)
    return weights, expert_ids, active


def _choose(
    logits: Tensor, bias: Tensor, budget: Tensor, real: Tensor, slots: int, least: int, dynamic: bool
) -> Values:  # fmt: skip
    """Experts by (score = p + bias, logit, place): the larger first, of equal ones the first, NaN last."""
    p = logits.softmax(dim=-1)
    logit, score = (x.masked_fill(x.isnan(), -torch.inf) for x in (logits, p + bias.unsqueeze(-2)))
    by_logit = logit.argsort(dim=-1, descending=True, stable=True)
    by_score = score.gather(-1, by_logit).argsort(dim=-1, descending=True, stable=True)
    expert_ids = by_logit.gather(-1, by_score)[..., :slots]
    kept = torch.ones_like(expert_ids, dtype=torch.bool)
    if dynamic:
        mass_before = F.pad(p.gather(-1, expert_ids).cumsum(dim=-1)[..., :-1], (1, 0))
        budget = budget[..., None, None]
        kept = (mass_before < budget) | (budget >= 1) | (torch.arange(slots, device=p.device) < least)
    active = kept & real.unsqueeze(-1)
    return _weights(logits, expert_ids, active), expert_ids, active


CHOOSE = fused(
    reference=_choose,
    kernel=lambda logits, bias, budget, real, slots, least, dynamic: forward_kernels.choose(
        logits, bias, budget.to(torch.float64), real, slots=slots, least=least, dynamic=dynamic
    ),
    dims=(2, 1, 0, 1), out_dims=(2, 2, 2),
)  # fmt: skip


def _weights(logits: Tensor, expert_ids: Tensor, active: Tensor) -> Tensor:
    """p renormalised over the active experts, from logits: what was kept may have a p that underflows.

    A NaN among a token's logits, or +inf, makes all its weights NaN: a broken router must not vanish with the experts
    that were not chosen.
    """
    kept = logits.gather(-1, expert_ids).masked_fill(~active, torch.finfo(logits.dtype).min)
    return torch.where(active, kept.softmax(dim=-1) + _zero_or_nan(logits), 0.0)


def _zero_or_nan(logits: Tensor) -> Tensor:
    """0 of each token, or NaN if one of its logits is NaN or +inf."""
    return logits.detach().amax(dim=-1, keepdim=True) * 0


def _by_thresholds(above: Tensor, real: Tensor, slots: int, least: int, explore: Tensor | None) -> Routing:
    expert_ids = above.detach().argsort(dim=-1, descending=True, stable=True)[..., :slots]
    kept = (above.detach().gather(-1, expert_ids) > 0) | (torch.arange(slots, device=above.device) < least)
    if explore is not None:
        expert_ids, kept = _try_expert(expert_ids, kept, explore)
    active = kept & real.unsqueeze(-1)
    weights = _open_gates(above.gather(-1, expert_ids), active)
    return Routing(expert_ids, torch.where(active, weights + _zero_or_nan(above), 0.0), active)


def _open_gates(above: Tensor, active: Tensor) -> Tensor:
    """1 / K for each open gate; straight through: the gradient is that of sigmoid(logit + bias) / K."""
    soft = above.sigmoid()
    return torch.where(active, 1 + soft - soft.detach(), 0.0) / active.sum(dim=-1, keepdim=True).clamp_min(1)


def _try_expert(expert_ids: Tensor, kept: Tensor, explore: Tensor) -> tuple[Tensor, Tensor]:
    """Put the explored expert into the first free slot, or the last one; the one it displaces takes its old slot."""
    rank = torch.arange(expert_ids.shape[-1], device=expert_ids.device)
    wanted = explore.unsqueeze(-1)
    count = kept.sum(dim=-1, keepdim=True)
    new = (wanted >= 0) & ~((expert_ids == wanted) & kept).any(dim=-1, keepdim=True)
    slot = count.clamp_max(rank.shape[0] - 1)
    displaced = expert_ids.gather(-1, slot)
    swapped = torch.where(expert_ids == wanted, displaced, expert_ids)
    swapped = torch.where(rank == slot, wanted, swapped)
    return torch.where(new, swapped, expert_ids), kept | (new & (rank == slot))
