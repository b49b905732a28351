"""One hyper step on many processes: each has its rows of the batch, and all make the step that one process would.

    observe own rows -> add up sums -> router's gradient of own rows -> add it up -> update
                     \\-> add up the fast gradients, meanwhile ------------------/

Sums are sums over tokens, never means of means, so uneven padding and uneven targets change nothing. Optimizer states
may be shared out (each process updates its range of the fast parameters and gathers the others'; ZeRO-1, arXiv
1910.02054), and experts spread over processes (`training.distributed.expert_parallel`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tiny_onn_func.config import ModelConfig
from tiny_onn_func.moe import RouterTrace
from tiny_onn_func.tree import Tree, partition
from training.distributed.collectives import Group
from training.distributed.expert_parallel import ExpertParallelHooks
from training.distributed.flat_params import (
    Vectors,
    from_vectors,
    joined_shares,
    named_shares,
    padded,
    to_vectors,
)
from training.distributed.layout import Layout, gathered, shares
from training.step.accumulate import router_gradients_of_parts, run_parts
from training.step.batch import Batch
from training.step.hooks import SurpriseHookManager
from training.step.hyper_params import HyperParams
from training.step.hyper_step import TrainState, update_experts, update_router
from training.step.main_pass import BatchShard, StepOptions
from training.step.metrics import Metrics
from training.step.optim import AdamWState
from training.step.rules import LEAST_SURPRISE, Rule, Targets, apply_rule
from training.step.sums import Sums
from training.step.surprise import SurpriseKind


def parallel_step(
    state: TrainState,
    batch: Batch,
    hyper: HyperParams,
    config: ModelConfig,
    layout: Layout,
    *,
    parts: int = 1,
    kind: SurpriseKind = "w2",
    compute_dtype: torch.dtype | None = None,
    teacher_logits: Float[Tensor, "batch seq vocab"] | None = None,
    rule: Rule = LEAST_SURPRISE,
) -> tuple[TrainState, Metrics]:
    """`hyper_step` of the batch that the processes' rows make together, in the order of ranks.

    Args:
        state: this process's own part, as `own_state` makes it.
        batch: this process's rows, equally many on each.
        parts: equal parts of these rows that go through the model one after another.

    Returns:
        This process's part of the new state, and the metrics of the whole batch, the same on all.
    """
    world, options = layout.world, StepOptions(kind, compute_dtype)
    spread = layout.experts.size > 1
    hooks_factory = partial(ExpertParallelHooks, group=layout.experts) if spread else SurpriseHookManager
    fast, router = partition(state.params)
    shard = run_parts(
        state, fast, router, batch, hyper, config, options, rule, teacher_logits, parts=parts,
        shard=BatchShard(world.rank, world.size), hooks_factory=hooks_factory, run_rule=partial(_run_rule, world),
    )  # fmt: skip
    grads = to_vectors(shard.grads, config)
    pending = (  # on their way while the router's gradient is computed
        _begin(layout.world, grads.dense, "gradients", layout),
        _begin(layout.replicas, grads.experts, "gradients of experts", layout),
    )
    sums = world.all_reduce_tree(shard.sums, "sums over tokens")
    router_grads, loss = world.all_reduce_tree(
        router_gradients_of_parts(router, state.step, shard, sums, hyper, config), "gradient of the router"
    )
    vectors = Vectors(*(wait() for wait in pending))
    new_fast, expert_opt, grad_norm = _fast_step(state, fast, vectors, sums, hyper, config, layout)
    new = state._replace(expert_opt=expert_opt, rule=shard.rule)
    return update_router(new, new_fast, router, router_grads, loss, sums, grad_norm, hyper, config)


def _run_rule(
    world: Group, rule: Rule, state: Any, surprise: Tensor, trace: RouterTrace, batch: Batch, hyper: HyperParams,
    step: Tensor,
) -> tuple[Any, Targets]:  # fmt: skip
    """The rule's update. The shipped one decides token by token; any other sees all processes' tokens, as on one."""
    if rule is LEAST_SURPRISE or world.size == 1:
        return apply_rule(rule, state, surprise, trace, batch, hyper, step)

    def whole(part: Tensor, axis: int) -> Tensor:
        moved = part.movedim(axis, 0)
        bits = moved.to(torch.uint8) if part.dtype == torch.bool else moved
        return world.all_gather(bits.contiguous(), "tokens of a rule").to(part.dtype).movedim(0, axis)

    everywhere = (
        whole(surprise, 1),
        RouterTrace(*(whole(part, 1) for part in trace)),
        Batch(*(whole(t, 0) for t in batch)),
    )
    new, targets = apply_rule(rule, state, *everywhere, hyper, step)
    tokens = surprise.shape[1]
    own = slice(tokens * world.rank, tokens * (world.rank + 1))
    return new, Targets(**{name: part[:, own] for name, part in targets._asdict().items() if part is not None})


def _begin(group: Group, grads: Tensor, purpose: str, layout: Layout) -> Callable[[], Tensor]:
    """The sum of a vector of gradients, or this process's share of it, under way."""
    if layout.shard_optimizer:
        return group.reduce_scatter_async(padded(grads, group.size), purpose)
    return group.all_reduce_async(grads, purpose)


def _fast_step(
    state: TrainState, fast: Tree, grads: Vectors, sums: Sums, hyper: HyperParams, config: ModelConfig, layout: Layout
) -> tuple[Tree, AdamWState, Tensor]:
    """The fast parameters' step from the summed gradients, or a share of them; and the norm of their mean."""
    experts = layout.own_experts(config)
    dense, own = (torch.linalg.vector_norm(grad, dtype=torch.float64).square() for grad in grads)
    holders = layout.world if layout.shard_optimizer else layout.experts
    shared = (
        layout.world.all_reduce(dense + own, "norm")
        if layout.shard_optimizer
        else dense + holders.all_reduce(own, "norm")
    )
    grad_norm = shared.sqrt().to(grads.dense.dtype) / sums.targets.clamp_min(1)
    step = partial(
        update_experts, optimizer=state.expert_opt, grad_norm=grad_norm, sums=sums, step=state.step, hyper=hyper
    )
    if not layout.shard_optimizer:
        return *step(fast, from_vectors(grads, config, experts)), grad_norm
    vectors = to_vectors(fast, config)
    own_ranges = shares(vectors, layout)
    mine = Vectors(*(vector[where] for vector, where in zip(vectors, own_ranges, strict=True)))
    mine_grads = Vectors(*(g[: len(m)] for g, m in zip(grads, mine, strict=True)))
    start = own_ranges[0].start
    new, optimizer = step(named_shares(mine, start, config), named_shares(mine_grads, start, config))
    return from_vectors(gathered(joined_shares(new), vectors, layout), config, experts), optimizer, grad_norm
