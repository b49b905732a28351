"""One hyper step on many processes: each has its rows of the batch, and all make the step that one process would.

    observe own rows -> add up sums -> router's gradient of own rows -> add it up -> update
                     \\-> add up the fast gradients, meanwhile ------------------/

Sums are sums over tokens, never means of means, so uneven padding and uneven targets change nothing. Optimizer states
may be shared out (each process updates its range of the fast parameters and gathers the others'; ZeRO-1, arXiv
1910.02054), and experts spread over processes (`training.distributed.expert_parallel`).
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from tiny_onn_func.config import ModelConfig
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
from training.step.batch import Batch
from training.step.hooks import SurpriseHookManager
from training.step.hyper_params import HyperParams
from training.step.hyper_step import TrainState, router_gradients, run_pass, update_experts, update_router
from training.step.main_pass import BatchShard
from training.step.metrics import Metrics
from training.step.optim import AdamWState
from training.step.sums import Sums
from training.step.surprise import SurpriseKind


def parallel_step(
    state: TrainState,
    batch: Batch,
    hyper: HyperParams,
    config: ModelConfig,
    layout: Layout,
    *,
    kind: SurpriseKind = "w2",
    compute_dtype: torch.dtype | None = None,
    teacher_logits: Float[Tensor, "batch seq vocab"] | None = None,
) -> tuple[TrainState, Metrics]:
    """`hyper_step` of the batch that the processes' rows make together, in the order of ranks.

    Args:
        state: this process's own part, as `own_state` makes it.
        batch: this process's rows, equally many on each.

    Returns:
        This process's part of the new state, and the metrics of the whole batch, the same on all.
    """
    world = layout.world
    spread = layout.experts.size > 1
    hooks_factory = partial(ExpertParallelHooks, group=layout.experts) if spread else SurpriseHookManager
    part = run_pass(
        state, batch, hyper, config, kind=kind, compute_dtype=compute_dtype, teacher_logits=teacher_logits,
        share=BatchShard(world.rank, world.size), hooks_factory=hooks_factory,
    )  # fmt: skip
    grads = to_vectors(part.grads, config)
    pending = (  # on their way while the router's gradient is computed
        _begin(layout.world, grads.dense, "gradients", layout),
        _begin(layout.replicas, grads.experts, "gradients of experts", layout),
    )
    sums = world.all_reduce_tree(part.sums, "sums over tokens")
    router_grads, loss = world.all_reduce_tree(
        router_gradients(state, part, sums, hyper, config), "gradient of the router"
    )
    fast, expert_opt, grad_norm = _fast_step(
        state, Vectors(*(wait() for wait in pending)), sums, hyper, config, layout
    )  # fmt: skip
    new, metrics = update_router(state, fast, expert_opt, router_grads, loss, sums, hyper, config)
    return new, metrics._replace(grad_norm=grad_norm)


def _begin(group: Group, grads: Tensor, purpose: str, layout: Layout) -> Callable[[], Tensor]:
    """The sum of a vector of gradients, or this process's share of it, under way."""
    if layout.shard_optimizer:
        return group.reduce_scatter_async(padded(grads, group.size), purpose)
    return group.all_reduce_async(grads, purpose)


def _fast_step(
    state: TrainState, grads: Vectors, sums: Sums, hyper: HyperParams, config: ModelConfig, layout: Layout
) -> tuple[Tree, AdamWState, Tensor]:
    """The fast parameters' step from the summed gradients, or a share of them; and the norm of their mean."""
    fast, experts = partition(state.params)[0], layout.own_experts(config)
    dense, own = (torch.linalg.vector_norm(grad, dtype=torch.float64).square() for grad in grads)
    holders = layout.world if layout.shard_optimizer else layout.experts
    shared = layout.world.sum(dense + own, "norm") if layout.shard_optimizer else dense + holders.sum(own, "norm")
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
