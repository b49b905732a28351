"""One hyper step on many processes: each has its rows of the batch, and all make the step that one process would.

    observe own rows -> add up sums -> router's gradient of own rows -> add it up -> update
                     \\-> add up the fast gradients, meanwhile ------------------/

Sums are sums over tokens, never means of means, so uneven padding and uneven targets change nothing. Optimizer states
may be shared out (each process updates its range of the fast parameters and gathers the others'; ZeRO-1, arXiv
1910.02054), and experts spread over processes (`training.expert_parallel`).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tiny_onn_func.config import ModelConfig
from tiny_onn_func.tree import Tree, flatten, merge, partition, tree_map, unflatten
from training.collectives import Group
from training.expert_parallel import TravellingRows
from training.shards import (
    EXPERT_LEAVES,
    Vectors,
    from_vectors,
    joined_shares,
    named_shares,
    padded,
    share_of,
    to_vectors,
)
from training.step.batch import Batch
from training.step.hooks import SurpriseHookManager
from training.step.hyper_params import HyperParams
from training.step.hyper_step import TrainState, fast_update, observe, router_gradients, slow_update
from training.step.main_pass import Share
from training.step.metrics import Metrics
from training.step.optim import AdamWState
from training.step.sums import Sums
from training.step.surprise import SurpriseKind


class Layout(NamedTuple):
    """Who holds what: all processes; those that hold a layer's experts together; those that hold the same experts."""

    world: Group
    experts: Group
    replicas: Group
    shard_optimizer: bool = False

    @property
    def is_sharded(self) -> bool:
        """Whether no process has the whole state."""
        return self.world.size > 1 and (self.shard_optimizer or self.experts.size > 1)

    def own_experts(self, config: ModelConfig) -> int:
        """How many of a layer's experts this process holds."""
        return config.num_experts // self.experts.size


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
    hooks_of = partial(TravellingRows, group=layout.experts) if spread else SurpriseHookManager
    part = observe(
        state, batch, hyper, config, kind=kind, compute_dtype=compute_dtype, teacher_logits=teacher_logits,
        share=Share(world.rank, world.size), hooks_of=hooks_of,
    )  # fmt: skip
    grads = to_vectors(part.grads, config)
    pending = (  # on their way while the router's gradient is computed
        _begin(layout.world, grads.dense, "gradients", layout),
        _begin(layout.replicas, grads.experts, "gradients of experts", layout),
    )
    sums = world.sum_tree(part.sums, "sums over tokens")
    router_grads, loss = world.sum_tree(router_gradients(state, part, sums, hyper, config), "gradient of the router")
    fast, expert_opt, grad_norm = _fast_step(
        state, Vectors(*(wait() for wait in pending)), sums, hyper, config, layout
    )  # fmt: skip
    new, metrics = slow_update(state, fast, expert_opt, router_grads, loss, sums, hyper, config)
    return new, metrics._replace(grad_norm=grad_norm)


def _begin(group: Group, grads: Tensor, purpose: str, layout: Layout) -> Callable[[], Tensor]:
    """The sum of a vector of gradients, or this process's share of it, under way."""
    if layout.shard_optimizer:
        return group.begin_scattered_sum(padded(grads, group.size), purpose)
    return group.begin_sum(grads, purpose)


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
        fast_update, optimizer=state.expert_opt, grad_norm=grad_norm, sums=sums, step=state.step, hyper=hyper
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


def shares(vectors: Vectors, layout: Layout) -> tuple[slice, slice]:
    """The ranges of a process's two vectors whose optimizer state it keeps."""
    groups = layout.world, layout.replicas
    return tuple(share_of(len(v), group.size, group.rank) for v, group in zip(vectors, groups, strict=True))  # type: ignore[return-value]


def gathered(mine: Vectors, like: Vectors, layout: Layout) -> Vectors:
    """Both vectors of a process from the shares of all that have one; `like` says how long they are."""
    whole = []
    for share, vector, group in zip(mine, like, (layout.world, layout.replicas), strict=True):
        each = -(-len(vector) // group.size)
        room = torch.cat((share, share.new_zeros(each - len(share))))
        whole.append(group.gather(room, "parameters")[: len(vector)])
    return Vectors(*whole)


# Whole states and parts of them ---------------------------------------------------------------------------------------


def own_state(state: TrainState, config: ModelConfig, layout: Layout) -> TrainState:
    """This process's part of a whole state."""
    if not layout.is_sharded:
        return state
    fast, router = partition(state.params)
    mu, nu = (_own_moment(moment, config, layout) for moment in (state.expert_opt.mu, state.expert_opt.nu))
    params = tree_map(lambda _, leaf: leaf, state.params, merge(_own_experts(fast, config, layout), router))
    return state._replace(params=params, expert_opt=state.expert_opt._replace(mu=mu, nu=nu))


def whole_state(state: TrainState, config: ModelConfig, layout: Layout) -> TrainState:
    """The inverse of `own_state`, on every process."""
    if not layout.is_sharded:
        return state
    fast, router = partition(state.params)
    like = to_vectors(fast, config)

    def whole(vectors: Vectors) -> Tree:
        experts = layout.experts.gather(vectors.experts, "whole state")
        return from_vectors(Vectors(vectors.dense, experts), config, config.num_experts)

    def moment(tree: Tree) -> Tree:
        own = gathered(joined_shares(tree), like, layout) if layout.shard_optimizer else to_vectors(tree, config)
        return whole(own)

    params = tree_map(lambda _, leaf: leaf, state.params, merge(whole(like), router))
    optimizer = state.expert_opt._replace(mu=moment(state.expert_opt.mu), nu=moment(state.expert_opt.nu))
    return state._replace(params=params, expert_opt=optimizer)


def _own_experts(fast: Tree, config: ModelConfig, layout: Layout) -> Tree:
    count = layout.own_experts(config)
    first = layout.experts.rank * count
    return unflatten(
        {n: leaf[:, first : first + count] if n in EXPERT_LEAVES else leaf for n, leaf in flatten(fast).items()}
    )


def _own_moment(moment: Tree, config: ModelConfig, layout: Layout) -> Tree:
    own = _own_experts(moment, config, layout)
    if not layout.shard_optimizer:
        return own
    vectors = to_vectors(own, config)
    ranges = shares(vectors, layout)
    mine = Vectors(*(vector[where].clone() for vector, where in zip(vectors, ranges, strict=True)))
    return named_shares(mine, ranges[0].start, config)
