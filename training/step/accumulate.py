"""Gradient accumulation: the hyper step of a batch whose parts go through the model one after another.

    pass of part 1, ..., pass of part N -> rule on all tokens -> sums -> router's gradient, part by part -> update

Everything is a sum over tokens, never a mean of means, so the parts add up to the whole step, as the rows of several
processes do (`training.distributed.parallel_step` makes parts of its own rows with the same function). The activations
in memory are those of one part. What stays of every part is its routing: the router's inputs, its choices, surprise.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tiny_onn_func.config import ModelConfig
from tiny_onn_func.moe import RouterTrace
from tiny_onn_func.primitives.vmap import outside_vmap_tree
from tiny_onn_func.tree import Tree, partition, tree_map
from training.step.batch import Batch
from training.step.hooks import SurpriseHookManager
from training.step.hyper_params import HyperParams
from training.step.hyper_step import (
    Pass,
    RunRule,
    ShardResult,
    TrainState,
    checked_numbers,
    hyper_step,
    router_gradients,
    run_pass,
    shard_result,
    update,
)
from training.step.main_pass import WHOLE, BatchShard, HooksFactory, PassResult, StepOptions, main_gradients
from training.step.metrics import Metrics
from training.step.router_loss import RouterLoss
from training.step.rules import LEAST_SURPRISE, Rule, Targets, apply_rule
from training.step.sums import Sums
from training.step.surprise import SurpriseKind, kind_of


def accumulated_step(
    state: TrainState,
    batch: Batch,
    hyper: HyperParams,
    config: ModelConfig,
    *,
    parts: int,
    kind: SurpriseKind = "w2",
    compute_dtype: torch.dtype | None = None,
    teacher_logits: Float[Tensor, "*runs batch seq vocab"] | None = None,
    rule: Rule = LEAST_SURPRISE,
) -> tuple[TrainState, Metrics]:
    """`hyper_step` of the batch, whose rows go through the model in `parts` equal parts; runs under vmap as it does.

    Raises:
        ValueError: as `hyper_step`; rows that are no multiple of the parts; the oracle, which samples the whole batch.
    """
    if parts == 1:
        return hyper_step(
            state,
            batch,
            hyper,
            config,
            kind=kind,
            compute_dtype=compute_dtype,
            teacher_logits=teacher_logits,
            rule=rule,
        )
    hyper = checked_numbers(state, hyper, config)
    options = StepOptions(kind, compute_dtype)

    def step(inputs: Any) -> tuple[TrainState, Metrics]:
        state, batch, hyper, teacher_logits = inputs
        fast, router = partition(state.params)
        total = run_parts(state, fast, router, batch, hyper, config, options, rule, teacher_logits, parts=parts)
        of_router = router_gradients_of_parts(router, state.step, total, total.sums, hyper, config)
        return update(state, fast, router, total, *of_router, hyper, config)

    return outside_vmap_tree(step, (state, batch, hyper, teacher_logits))


class Accumulated(NamedTuple):
    """The passes over all parts: gradients and sums added up, and what the router's gradient takes of each part."""

    grads: Tree  # of the summed main loss in the fast parameters
    sums: Sums
    rule: Any  # the rule's new state
    parts: tuple[ShardResult, ...]  # without the fast parameters' gradients, unless there is one part


def run_parts(
    state: TrainState,
    fast: Tree,
    router: Tree,
    batch: Batch,
    hyper: HyperParams,
    config: ModelConfig,
    options: StepOptions,
    rule: Rule,
    teacher_logits: Float[Tensor, "*runs batch seq vocab"] | None = None,
    *,
    parts: int = 1,
    shard: BatchShard = WHOLE,
    hooks_factory: HooksFactory = SurpriseHookManager,
    run_rule: RunRule = apply_rule,
) -> Accumulated:
    """`run_pass` of each part of the batch; the rule sees all of its tokens at once.

    Raises:
        ValueError: rows that are no multiple of the parts; the oracle in parts.
    """
    if parts == 1:
        seen = run_pass(
            state, fast, router, batch, hyper, config, options, rule, teacher_logits, shard=shard,
            hooks_factory=hooks_factory, run_rule=run_rule,
        )  # fmt: skip
        result = shard_result(seen, router, batch, hyper, config)
        return Accumulated(result.grads, result.sums, result.rule, (result,))
    batches = _cut(batch, parts)
    if kind_of(options.kind).losses is not None:
        raise ValueError(f"kind: expected one without samples of the whole batch, got {options.kind}; take 1 part")
    logits = [None] * parts if teacher_logits is None else teacher_logits.chunk(parts, dim=-3)
    grads: Tree = {}
    passes: list[tuple[Tree | None, PassResult]] = []
    for place, (own, own_logits) in enumerate(zip(batches, logits, strict=True)):
        (part_grads, router_grads), observed = main_gradients(
            fast, router, own, hyper, config, state.step, options, own_logits,
            shard=BatchShard(shard.place * parts + place, shard.of * parts), hooks_factory=hooks_factory,
        )  # fmt: skip
        grads = tree_map(torch.add, grads, part_grads) if passes else part_grads
        passes.append((router_grads, observed))
    surprise = _joined([observed.per_token_surprise for _, observed in passes])
    trace = RouterTrace(*map(_joined, zip(*(observed.trace for _, observed in passes), strict=True)))
    rule_state, targets = run_rule(rule, state.rule, surprise, trace, batch, hyper, state.step)
    results = tuple(
        shard_result(Pass({}, router_grads, observed, own_targets, rule_state), router, own, hyper, config)
        for (router_grads, observed), own_targets, own in zip(passes, _shared(targets, parts), batches, strict=True)
    )
    return Accumulated(grads, _added([result.sums for result in results]), rule_state, results)


def router_gradients_of_parts(
    router: Tree, step: Tensor, total: Accumulated, sums: Sums, hyper: HyperParams, config: ModelConfig
) -> tuple[Tree, RouterLoss]:
    """`router_gradients` of each part, added up; `sums` are those of the whole batch."""
    return _added([router_gradients(router, step, part, sums, hyper, config) for part in total.parts])


def _cut(batch: Batch, parts: int) -> list[Batch]:
    rows = batch.input_ids.shape[-2]
    if parts < 1 or rows % parts:
        raise ValueError(f"parts: expected a divisor of the batch's rows ({rows}), got {parts}; change one of them")
    return [Batch(*own) for own in zip(*(tensor.chunk(parts, dim=-2) for tensor in batch), strict=True)]


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    """Tokens of all parts, in the order of the batch: (..., tokens, width)."""
    return torch.cat([*pieces], dim=-2)


def _shared(targets: Targets, parts: int) -> list[Targets]:
    """The targets of each part's tokens."""
    axes = {"expert": -1, "informative": -1, "tied": -1, "shares": -2}
    columns = {name: t.chunk(parts, dim=axes[name]) for name, t in targets._asdict().items() if t is not None}
    return [Targets(**{name: pieces[place] for name, pieces in columns.items()}) for place in range(parts)]


def _added(trees: Sequence[Any]) -> Any:
    """The sum of trees of one form, leaf by leaf."""
    first, *others = trees
    for other in others:
        first = tree_map(torch.add, first, other)
    return first
