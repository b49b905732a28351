"""Token atlas of finished runs: signed benefit of every token id's experts, and what share of it the token id explains.

The signed benefit of a visit is <g, y>, the slope of the loss in the routing weight, in nats: the lower, the more the
expert helps (`training.step.surprise`). It is measured with the run's own routing, without exploration, so that a token
id has values of the experts that it visits alone.

For every layer, one-way analyses of variance say what share of the variance the groups explain, as omega squared

    omega^2 = (SS_between - (groups - 1) MS_within) / (SS_total + MS_within)        MS_within = SS_within / (N - groups)

which is 0 on average where groups say nothing, unlike SS_between / SS_total, which grows with their number (Hays 1963).
`token`: groups are the token ids, and values the mean benefit of an occurrence over the experts that it visits, one
value each, as visits of one occurrence have their luck in common. `token_expert`: groups are the pairs of token id and
expert, and values the visits: no table of token ids can explain more of the visits that were made.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import vmap

from tiny_onn_func.tree import Tree, device_of, number_dtype, to_device
from training.data.batches import held_out_batches
from training.data.corpus import Corpus
from training.fields import Field
from training.run.config import RunConfig
from training.step.batch import IGNORE_INDEX, Batch
from training.step.surprise import SurpriseKind, divide_by_weight
from training.storage.token_atlas import Visits
from training.study.agreement import recorded_surprises

KIND: SurpriseKind = "benefit"
MOST_TOKENS = 512  # token ids of a table, the most frequent ones


class Moments(NamedTuple):
    """Number, mean and sum of squared deviations of the values of each group, float64."""

    number: Float[Tensor, "*groups"]
    mean: Float[Tensor, "*groups"]
    squares: Float[Tensor, "*groups"]


class TokenBenefit(NamedTuple):
    """Moments of the signed benefit of one run."""

    visits: Moments  # (layers, vocab, experts)
    occurrences: Moments  # (layers, vocab), of the mean over the experts that an occurrence visits


def token_benefits(params: Tree, configs: Sequence[RunConfig], corpus: Corpus, tokens: int) -> list[TokenBenefit]:
    """Measure the benefit of every run on the same held-out text; `params` are stacked.

    Args:
        tokens: about so many, in windows that do not overlap; fewer where the text is shorter.
    """
    config, device = configs[0], device_of(params)
    budgets = torch.tensor([c.hyper.pi_alpha for c in configs], dtype=number_dtype(device), device=device)

    def benefit(params: Tree, budget: Tensor, batch: Batch) -> Tensor:
        (values,), trace = recorded_surprises(params, batch, config.model, budget, (KIND,))
        return divide_by_weight(values, trace.expert_ids, trace.weights, trace.active)

    shape = config.model.num_hidden_layers, config.model.vocab_size, config.model.num_experts
    found = [TokenBenefit(_empty(shape), _empty(shape[:2])) for _ in configs]
    for batch in _batches(corpus, config, tokens):
        values = to_device(vmap(benefit, in_dims=(0, 0, None))(params, budgets, to_device(batch, device)), "cpu")
        ids = torch.where(batch.labels == IGNORE_INDEX, -1, batch.input_ids).flatten()
        found = [add_batch(mine, of_run.double(), ids) for mine, of_run in zip(found, values, strict=True)]
    return found


def _batches(corpus: Corpus, config: RunConfig, tokens: int) -> Iterator[Batch]:
    length, seen = config.sequence_length, 0
    for batch in held_out_batches(corpus, config.batch_size, length, stride=length, pack=config.pack):
        if seen >= tokens:
            return
        seen += int((batch.labels != IGNORE_INDEX).sum())
        yield batch


def add_batch(
    so_far: TokenBenefit, values: Float[Tensor, "layers tokens experts"], ids: Int[Tensor, " tokens"]
) -> TokenBenefit:
    """Add the values of a batch, +inf where a token does not visit; ids of -1 are left out."""
    known = values.isfinite() & (ids >= 0)[:, None]
    visited = known.any(dim=-1)
    mean = torch.where(known, values, 0.0).sum(dim=-1) / known.sum(dim=-1).clamp_min(1)
    place = ids.clamp_min(0).expand(values.shape[0], -1)
    return TokenBenefit(_add(so_far.visits, values, known, place), _add(so_far.occurrences, mean, visited, place))


def _add(so_far: Moments, values: Tensor, known: Tensor, place: Int[Tensor, "layers tokens"]) -> Moments:
    """Merge the moments of new values (Chan, Golub and LeVeque 1979); `place` says to which token id they belong."""
    filled, ones = torch.where(known, values, 0.0), known.to(values.dtype)
    index = place.reshape(place.shape + (1,) * (values.ndim - 2)).expand(values.shape)
    zero = torch.zeros_like(so_far.mean)
    count = zero.scatter_add(1, index, ones)
    mean = zero.scatter_add(1, index, filled) / count.clamp_min(1)
    squares = zero.scatter_add(1, index, ones * (filled - mean.gather(1, index)) ** 2)
    total, apart = so_far.number + count, mean - so_far.mean
    return Moments(
        total,
        so_far.mean + apart * count / total.clamp_min(1),
        so_far.squares + squares + apart**2 * so_far.number * count / total.clamp_min(1),
    )


def _empty(shape: tuple[int, ...]) -> Moments:
    return Moments(*torch.zeros(3, *shape, dtype=torch.float64))


# Variance -------------------------------------------------------------------------------------------------------------


def omega_squared(groups: Moments) -> float | None:
    """Share of the variance that the groups explain, of groups with two values or more; None where nothing varies."""
    counted = groups.number >= 2
    count, mean, squares = (part[counted].double() for part in groups)
    n, k = float(count.sum()), int(counted.sum())
    if k < 2 or n <= k:
        return None
    between = float((count * (mean - (count * mean).sum() / n) ** 2).sum())
    within = float(squares.sum())
    rest = within / (n - k)
    total = between + within + rest
    return (between - (k - 1) * rest) / total if total > 0 else None


VARIANCE = {  # `routing` of summary.json, with `atlas_tokens`
    "benefit_variance.token": Field("omega squared, (L,)", "Share of the benefit's variance that token ids explain."),
    "benefit_variance.token_expert": Field(
        "omega squared, (L,)", "Share of the benefit's variance that pairs of token id and expert explain."
    ),
    "benefit_variance.occurrences": Field("tokens", "Occurrences of tokens behind these shares."),
}


def variance_shares(found: TokenBenefit) -> dict[str, Any]:
    """`token` and `token_expert`: omega^2 of every layer; `occurrences`: how many there were."""
    return {
        "token": [_plain(omega_squared(layer)) for layer in _layers(found.occurrences)],
        "token_expert": [_plain(omega_squared(layer)) for layer in _layers(found.visits)],
        "occurrences": int(found.occurrences.number[0].sum()),
    }


def atlas_rows(found: TokenBenefit) -> list[Visits]:
    """List a row for each visited (layer, token id, expert).

    Layers in order, then frequent tokens first, and for each token the most helpful expert first.
    """
    rows = []
    occurrences = [int(number) for number in found.occurrences.number.amax(dim=0).tolist()]
    tokens = sorted((token for token, n in enumerate(occurrences) if n), key=lambda token: (-occurrences[token], token))
    for layer, visits in enumerate(_layers(found.visits)):
        n, mean, squares = (part.tolist() for part in visits)
        for token in tokens[:MOST_TOKENS]:
            experts = [expert for expert, visited in enumerate(n[token]) if visited]
            for expert in sorted(experts, key=mean[token].__getitem__):
                count = int(n[token][expert])
                error = math.sqrt(squares[token][expert] / (count - 1) / count) if count > 1 else None
                rows.append(Visits(layer, token, occurrences[token], expert, count, mean[token][expert], error))
    return rows


def _layers(moments: Moments) -> list[Moments]:
    return [Moments(*layer) for layer in zip(*moments, strict=True)]


def _plain(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")
