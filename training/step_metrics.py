"""What a hyper step tells about itself."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tiny_onn_func.kernels import runtime
from tiny_onn_func.kernels import step as step_kernels
from tiny_onn_func.moe import RouterTrace
from tiny_onn_func.primitives.vmap import one_axis, over_runs
from training import metrics as measure
from training.hyper import HyperParams
from training.objectives import LanguageModelling, RouterLoss, Targets, predictive_integrity


class Metrics(NamedTuple):
    """What a step measured before its update; a number of each run unless a shape is given."""

    main_loss: Tensor  # mean nats per target
    distill_loss: Tensor  # mean KL(teacher || student) per target, nats; 0 without a teacher
    router_loss: Tensor  # mean nats per informative (layer, token)
    main_acc: Tensor  # share of targets that the most probable token hits
    gating_acc: Tensor  # share of informative tokens whose preferred expert is the target
    gating_trivial: Tensor  # what picking a routed expert at random would score
    surprise: Tensor  # mean over routed (layer, token, expert)
    nonfinite_surprise: Tensor  # routed (layer, token, expert) whose surprise is NaN or infinite
    tau: Tensor  # mean entropy of the output distribution, nats
    pi_score: Tensor
    avg_k: Tensor  # experts per real token
    max_vio: Tensor  # (max load - mean load) / mean load, mean over layers
    dead_experts: Tensor  # (layer, expert) pairs without a row in this batch
    tie_rate: Tensor  # share of real (layer, token) whose candidates are all equally surprised
    balance_loss: Tensor
    z_loss: Tensor
    grad_norm: Tensor  # of the mean main loss in the fast parameters, before clipping
    router_grad_norm: Tensor
    lr: Tensor
    expert_load: Tensor  # (L, E) share of routed rows
    target_load: Tensor  # (L, E) share of informative tokens whose target it is
    expert_surprise: Tensor  # (L, E) mean surprise of the expert's rows, 0 where it got none


class Observed(NamedTuple):
    """What one pass through the model yields beside the gradient."""

    lm: LanguageModelling
    trace: RouterTrace
    per_token_surprise: Float[Tensor, "*runs layers tokens experts"]
    distill_sum: Tensor  # KL(teacher || student), nats, summed over targets
    nonfinite: Tensor  # routed (layer, token, expert) whose measured surprise is NaN or infinite


class Sums(NamedTuple):
    """Sums over tokens and counts of them: those of a batch's parts add up to those of the batch.

    A number of each run unless a shape is given; counts are integers.
    """

    loss: Tensor  # nats
    targets: Tensor  # target tokens
    correct: Tensor
    entropy: Tensor  # nats
    distill: Tensor  # nats
    real: Tensor  # tokens
    visits: Tensor  # real (layer, token, expert)
    informative: Tensor  # (layer, token)
    hits: Tensor  # informative (layer, token) whose preferred expert is the target
    chance: Tensor  # hits that a routed expert at random would score
    tied: Tensor  # (layer, token)
    routed: Tensor  # (L, E) rows
    wanted: Tensor  # (L, E) informative tokens whose target it is
    surprise: Tensor
    surprised: Tensor  # (layer, token, expert) with a surprise
    expert_surprise: Tensor  # (L, E)
    expert_surprised: Tensor  # (L, E)
    nonfinite: Tensor


def sums_of(seen: Observed, targets: Targets, real: Bool[Tensor, "*runs tokens"]) -> Sums:
    """What the step's objectives and metrics need of its tokens."""
    lm, trace = seen.lm, seen.trace
    of_tokens = trace.router_logits, seen.per_token_surprise, trace.expert_ids, trace.active
    taught = targets.expert, targets.informative, targets.tied
    counted = over_runs(_routing_sums, *of_tokens, *taught, real.expand(*trace.active.shape[:-3], -1))
    informative, hits, tied, visits, chance, routed, wanted, size, sized = counted
    return Sums(
        loss=lm.loss_sum,
        targets=lm.targets,
        correct=lm.correct,
        entropy=lm.entropy_sum,
        distill=seen.distill_sum,
        real=real.sum(dim=-1),
        visits=visits,
        informative=informative,
        hits=hits,
        chance=chance,
        tied=tied,
        routed=routed,
        wanted=wanted,
        surprise=size.sum(dim=(-2, -1)),
        surprised=sized.sum(dim=(-2, -1)),
        expert_surprise=size,
        expert_surprised=sized,
        nonfinite=seen.nonfinite,
    )


def _routing_sums(
    logits: Tensor, surprise: Tensor, ids: Tensor, active: Tensor, target: Tensor, informative: Tensor, tied: Tensor,
    real: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(informative, hits, tied, visits, chance, routed, wanted, size, sized) of one run or of several, in front."""
    if runtime.may_run(logits, surprise):
        by_width = (logits, surprise, ids, active), (target, informative, tied), (real,)
        given = [one_axis(t, 3 - place) for place, some in enumerate(by_width) for t in some]
        counts, chance, *by_expert = step_kernels.routing_sums(*given)
        runs, by_expert[2] = logits.shape[:-3], by_expert[2].to(torch.float32)
        totals = counts.sum(dim=-1).unbind(0)
        of_runs = (t.view(runs) for t in (*totals, chance.sum(dim=-1)))
        return *of_runs, *(t.view(*runs, *t.shape[1:]) for t in by_expert)
    experts, all_tokens = logits.shape[-1], (-2, -1)
    hits = (logits.argmax(dim=-1) == target) & informative
    chance = torch.where(informative, 1 / active.sum(dim=-1).clamp_min(1), 0.0)
    return (
        informative.sum(dim=all_tokens),
        hits.sum(dim=all_tokens),
        tied.sum(dim=all_tokens),
        measure.count_visits(active, real),
        chance.sum(dim=all_tokens),
        measure.routed_rows(ids, active, experts),
        measure.counts(target, informative, experts),
        *measure.finite_sum(surprise, dim=-2),
    )


def step_metrics(sums: Sums, loss: RouterLoss, hyper: HyperParams) -> Metrics:
    """All but what only the optimizers know: `grad_norm`, `router_grad_norm` and `lr` are zero here."""
    count, informative, layers = sums.targets.clamp_min(1), sums.informative.clamp_min(1), sums.routed.shape[-2]
    main_loss, tau, load = sums.loss / count, sums.entropy / count, measure.shares(sums.routed)
    surprise = sums.surprise / sums.surprised.clamp_min(1)
    unset = torch.zeros_like(main_loss)
    return Metrics(
        main_loss=main_loss,
        distill_loss=sums.distill / count,
        router_loss=loss.surprise,
        main_acc=sums.correct / count,
        gating_acc=sums.hits / informative,
        gating_trivial=sums.chance / informative,
        surprise=surprise,
        nonfinite_surprise=sums.nonfinite,
        tau=tau,
        pi_score=predictive_integrity(main_loss, tau, surprise, hyper.pi_alpha, hyper.pi_gamma),
        avg_k=sums.visits.to(torch.float32) / (layers * sums.real).clamp_min(1),
        max_vio=measure.max_vio(load),
        dead_experts=measure.dead_experts(load),
        tie_rate=sums.tied / (sums.real * layers).clamp_min(1),
        balance_loss=loss.balance,
        z_loss=loss.z,
        grad_norm=unset,
        router_grad_norm=unset,
        lr=unset,
        expert_load=load,
        target_load=measure.shares(sums.wanted),
        expert_surprise=sums.expert_surprise / sums.expert_surprised.clamp_min(1),
    )
