"""Routing analysis of a finished run on held-out text: regret, agreement, drift, co-activation, as plain values.

All runs of all arms are looked at on the same held-out tokens, so that their numbers are paired.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.func import vmap

from tiny_onn_func.config import ModelConfig
from tiny_onn_func.decoder import forward
from tiny_onn_func.moe import RouterTrace
from tiny_onn_func.tree import Tree, device_of, number_dtype, to_device, unstack
from training.data.batches import batch_at, held_out_batches
from training.data.corpus import Corpus
from training.fields import Field
from training.run.config import RunConfig
from training.step.batch import IGNORE_INDEX, Batch
from training.step.oracle import counterfactual_losses, draw_sample, fill_sampled, regret
from training.study.agreement import VALUES, all_surprises, rank_agreement

KINDS = (*VALUES, "oracle")  # rows and columns of the agreement matrices
MOST_PICKS = 4  # sampled tokens of a sequence and layer: more sequences are more independent
WIDER = 4  # forks may make a sequence this many times longer
Facts = dict[str, Any]
ROUTING = {  # `routing` of summary.json; in analysis.json the means over an arm's runs
    "sampled": Field("tokens", "Sampled held-out tokens per layer."),
    "regret.router": Field("nats", "Oracle regret of the router's first choice."),
    "regret.random": Field("nats", "Oracle regret of an expert drawn at random."),
    "regret.visited random": Field("nats", "Oracle regret of one of the visited experts drawn at random."),
    "regret.visited best": Field("nats", "Oracle regret of the best visited expert."),
    "regret.KIND": Field(
        "nats",
        "Oracle regret of the visited expert with the lowest value of a kind of surprise, or the lowest routing "
        "weight (`weight`).",
    ),
    "regret_by_layer": Field("nats, (L,)", "Oracle regret of the router's first choice in each layer."),
    "oracle_hits": Field("share", "Share of sampled tokens whose first choice is the best expert by the oracle."),
    "oracle_chance": Field("share", "`oracle_hits` of an expert drawn at random: 1 / E."),
    "agreement.kinds": Field("list of text", "Rows and columns of the agreement matrices."),
    "agreement.tau": Field(
        "-1 to 1",
        "Kendall's tau-b of two kinds' rankings of a token's visited experts, mean over tokens.",
    ),
    "agreement.top1": Field("share", "Share of tokens for which both kinds put the same expert first."),
    "agreement.chance": Field("share", "`top1` of a visited expert drawn at random: mean 1 / K."),
    "co_activation": Field(
        "nats",
        "Excess co-activation of the experts, mean over layers; null where no token visits two.",
    ),
    "co_activation_cosine": Field(
        "0 to 1, (L, E, E)",
        "Tokens that visit both experts / root of the product of each one's tokens; in a run's summary.json "
        "alone.",
    ),
    "seconds": Field("s", "Time that the analysis took, divided by the runs of the group."),
}  # fmt: skip


class Sampled(NamedTuple):
    """Values of VALUES, trace and oracle losses of one run on the analysis batch."""

    values: Float[Tensor, "values layers tokens experts"]
    trace: RouterTrace
    losses: Float[Tensor, "layers batch picks experts"]  # of the oracle


def analysis_batch(corpus: Corpus, config: RunConfig, tokens: int) -> tuple[Batch, Int[Tensor, "layers batch picks"]]:
    """Held-out windows and the sampled positions, about `tokens` a layer; they depend on no seed of a run."""
    layers, length = config.model.num_hidden_layers, config.sequence_length
    picks = max(1, min(MOST_PICKS, WIDER * length // (config.model.num_experts * layers), length, tokens))
    rows = -(-tokens // picks)
    if corpus.tokens.size > length and corpus.num_targets:
        batch = batch_at(corpus, 0, 0, rows, length, config.pack)
    else:  # shorter than one window
        batch = next(held_out_batches(corpus, 1, length, pack=config.pack))
    return batch, draw_sample(batch.labels, layers, picks, 0, torch.zeros((), dtype=torch.int64))


def routing_facts(params: Tree, configs: Sequence[RunConfig], corpus: Corpus, tokens: int) -> list[Facts]:
    """The facts of every run; `params` are stacked, `tokens` are sampled in each layer. See `facts_of` for the keys."""
    config = configs[0]
    batch, sample = analysis_batch(corpus, config, tokens)
    device = device_of(params)
    budgets = _budgets(configs, device)

    def surprises(params: Tree, budget: Tensor, part: Batch) -> tuple[Tensor, RouterTrace]:
        return all_surprises(params, part, config.model, budget)

    def oracle(params: Tree, budget: Tensor, part: Batch, sample: Tensor) -> Tensor:
        return counterfactual_losses(params, part, config.model, sample, surprise_budget=budget)

    parts = _parts(to_device(batch, device), sample.to(device), config.batch_size)
    passes = [vmap(surprises, in_dims=(0, 0, None))(params, budgets, part) for part, _ in parts]
    forks = sample.shape[0] * sample.shape[2] * config.model.num_experts
    rows = max(1, 2 * config.batch_size * config.sequence_length // (config.sequence_length + forks))
    with torch.no_grad():
        losses = [
            vmap(oracle, in_dims=(0, 0, None, None))(params, budgets, *part)
            for part in _parts(to_device(batch, device), sample.to(device), rows)
        ]
    values = torch.cat([surprise for surprise, _ in passes], dim=3)
    trace = RouterTrace(*(torch.cat(part, dim=2) for part in zip(*(trace for _, trace in passes), strict=True)))
    whole = to_device(Sampled(values, trace, torch.cat(losses, dim=2)), "cpu")
    return [facts_of(run, batch, sample, config.model) for run in unstack(whole)]


class RouterSnapshot(NamedTuple):
    """First choices and co-activation of the routers on the analysis batch."""

    first_choices: Int[Tensor, "runs layers tokens"]  # the expert that a router likes best; -1 on padding
    co_activation: Float[Tensor, "runs layers"]  # as `coactivation_excess` has it


def router_snapshot(params: Tree, configs: Sequence[RunConfig], corpus: Corpus, tokens: int) -> RouterSnapshot:
    """Take a snapshot of every run's routers, cheap enough for use during the training."""
    config = configs[0]
    batch, sample = analysis_batch(corpus, config, tokens)

    def routes(params: Tree, budget: Tensor, part: Batch) -> tuple[Tensor, Tensor]:
        _, trace = forward(
            params, part.input_ids, config.model, attention_mask=part.attention_mask, surprise_budget=budget
        )
        return trace.expert_ids, trace.active

    with torch.no_grad():
        device = device_of(params)
        budgets, parts = (
            _budgets(configs, device),
            _parts(to_device(batch, device), sample.to(device), 2 * config.batch_size),
        )
        routed = [vmap(routes, in_dims=(0, 0, None))(params, budgets, part) for part, _ in parts]
    ids, active = (torch.cat(part, dim=2) for part in zip(*routed, strict=True))
    met = [coactivation_excess(*run, config.model.num_experts)[0] for run in zip(ids, active, strict=True)]
    return RouterSnapshot(torch.where(active[..., 0], ids[..., 0], -1), torch.stack(met))


def drift(
    before: Int[Tensor, "runs layers tokens"], after: Int[Tensor, "runs layers tokens"]
) -> Float[Tensor, "runs layers"]:
    """Share of the real tokens whose first choice has changed."""
    real = after >= 0
    return ((before != after) & real).sum(dim=-1) / real.sum(dim=-1).clamp_min(1)


def facts_of(run: Sampled, batch: Batch, sample: Tensor, model: ModelConfig) -> Facts:
    """Facts of regret, agreement and co-activation as plain values, with `sampled` tokens a layer."""
    layers, rows, _ = sample.shape
    seq = batch.labels.shape[1]
    labelled = batch.labels.expand(layers, rows, seq).gather(-1, sample) != IGNORE_INDEX
    token = (torch.arange(rows)[:, None] * seq + sample).flatten(1)  # layers, batch * picks
    losses, keep = rearrange(run.losses, "l b p e -> l (b p) e"), labelled.flatten(1)
    values = run.values.gather(2, token[None, :, :, None].expand(len(VALUES), -1, -1, model.num_experts))
    ids, active = (
        part.gather(1, token[..., None].expand(-1, -1, part.shape[-1]))
        for part in (run.trace.expert_ids, run.trace.active)
    )
    dense = fill_sampled(run.losses, sample, seq)[None]
    everywhere = torch.cat((run.values, dense)).gather(-1, run.trace.expert_ids.expand(len(KINDS), -1, -1, -1))
    return {
        "sampled": int(keep.sum()) // layers,
        **regret_facts(losses, values, ids, active, keep),
        "agreement": agreement_facts(everywhere, run.trace.active),
        **co_activation_facts(run.trace.expert_ids, run.trace.active, model.num_experts),
    }


def regret_facts(
    losses: Float[Tensor, "layers sampled experts"],
    values: Float[Tensor, "values layers sampled experts"],
    ids: Int[Tensor, "layers sampled slots"],
    active: Bool[Tensor, "layers sampled slots"],
    keep: Bool[Tensor, "layers sampled"],
) -> Facts:
    """Mean nats above the best expert, for a token sent alone to the expert that each rule prefers.

    Over all experts: `router` (its first choice), `random`. Among those that the token visits: `visited random`,
    `visited best`, and the least of each value. `oracle_hits` is the share of tokens whose first choice is the best
    expert, `oracle_chance` what a random expert would score. Surprise points at good experts where its regret is below
    that of `visited random`.
    """
    visited = torch.zeros_like(losses).scatter_add(-1, ids, active.to(losses.dtype)) > 0
    best = losses.amin(dim=-1)
    counts = visited.sum(dim=-1).clamp_min(1)
    of = {
        "router": regret(losses, ids[..., 0]),
        "random": losses.mean(dim=-1) - best,
        "visited random": torch.where(visited, losses, 0.0).sum(dim=-1) / counts - best,
        "visited best": torch.where(visited, losses, torch.inf).amin(dim=-1) - best,
        **{name: regret(losses, value.argmin(dim=-1)) for name, value in zip(VALUES, values, strict=True)},
    }
    hits = ids[..., 0] == losses.argmin(dim=-1)
    return {
        "regret": {name: _mean(value, keep) for name, value in of.items()},
        "regret_by_layer": [_mean(*pair) for pair in zip(of["router"], keep, strict=True)],
        "oracle_hits": _mean(hits, keep),
        "oracle_chance": 1 / losses.shape[-1],
    }


def agreement_facts(
    values: Float[Tensor, "kinds layers tokens slots"], active: Bool[Tensor, "layers tokens slots"]
) -> Facts:
    """`kinds`, and their matrices `tau`, `top1` and `chance`; None where no token can be ranked."""
    agreement = rank_agreement(values, active)
    matrices = {
        name: [[_plain(x) for x in row] for row in getattr(agreement, name).tolist()] for name in agreement._fields[:3]
    }
    return {"kinds": list(KINDS), **matrices}


def co_activation_facts(
    ids: Int[Tensor, "layers tokens slots"], active: Bool[Tensor, "layers tokens slots"], experts: int
) -> Facts:
    """Facts `co_activation` and `co_activation_cosine` of `ROUTING`; the first is None where no token visits two."""
    excess, cosine = coactivation_excess(ids, active, experts)
    return {
        "co_activation": _mean(excess, excess.isfinite()),
        "co_activation_cosine": [[[round(x, 4) for x in row] for row in layer] for layer in cosine.tolist()],
    }


def coactivation_excess(
    ids: Int[Tensor, "layers tokens slots"], active: Bool[Tensor, "layers tokens slots"], experts: int
) -> tuple[Float[Tensor, " layers"], Float[Tensor, "layers experts experts"]]:
    """(sum_{e<f} q_ef log(q_ef / p_ef) in nats of every layer, NaN where no token visits two; cosines).

    q is the share of the layer's pairs of visits, p the share that loads n give, p_ef ~ n_e n_f; 0: experts meet by
    chance. cosine[l, e, f] = tokens that visit both / sqrt(tokens that visit e * tokens that visit f).
    """
    visits = active.to(number_dtype(ids.device))
    one_hot = visits.new_zeros(*ids.shape[:2], experts).scatter_add(-1, ids, visits)
    both = one_hot.mT @ one_hot
    count = both.diagonal(dim1=-2, dim2=-1)
    expected = count.unsqueeze(-1) * count.unsqueeze(-2)
    row, column = torch.triu_indices(experts, experts, 1, device=ids.device)
    q, p = (_shares(pairs[:, row, column]) for pairs in (both, expected))
    excess = torch.where(q > 0, q * (q / p).log(), 0.0).sum(dim=-1)
    met = both[:, row, column].sum(dim=-1) > 0
    return torch.where(met, excess, torch.nan), both / expected.sqrt().clamp_min(1)


def _parts(batch: Batch, sample: Tensor, rows: int) -> Iterator[tuple[Batch, Tensor]]:
    for start in range(0, sample.shape[1], rows):
        part = slice(start, start + rows)
        yield Batch(*(field[part] for field in batch)), sample[:, part]


def _budgets(configs: Sequence[RunConfig], device: torch.device) -> Tensor:
    return torch.tensor([config.hyper.pi_alpha for config in configs], dtype=number_dtype(device), device=device)


def _shares(x: Tensor) -> Tensor:
    return x / reduce(x, "layers pairs -> layers 1", "sum").clamp_min(1e-300)


def _mean(x: Tensor, keep: Tensor) -> float | None:
    return _plain(float(torch.where(keep, x.double(), 0.0).sum() / keep.sum())) if keep.any() else None


def _plain(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None
