"""Layout of a run over processes: which rank holds which parameters, and whole states from parts."""

from typing import NamedTuple

import torch
import torch.distributed as dist

from tiny_onn_func.config import ModelConfig
from tiny_onn_func.tree import Tree, flatten, merge, partition, tree_map, unflatten
from training.distributed.collectives import Group
from training.distributed.flat_params import (
    EXPERT_LEAVES,
    Vectors,
    from_vectors,
    joined_shares,
    named_shares,
    share_of,
    to_vectors,
)
from training.step.hyper_step import TrainState


class Layout(NamedTuple):
    """Process groups of a run: all ranks, the ranks that share a layer's experts, the replicas of the same experts."""

    world: Group
    experts: Group
    replicas: Group
    shard_optimizer: bool = False

    @property
    def is_sharded(self) -> bool:
        """True if no rank has the whole state."""
        return self.world.size > 1 and (self.shard_optimizer or self.experts.size > 1)

    def own_experts(self, config: ModelConfig) -> int:
        """Number of a layer's experts on this rank."""
        return config.num_experts // self.experts.size


def layout_of(world: Group, shard_optimizer: bool, shard_experts: int) -> Layout:
    """Group neighbours in rank, so ranks of one machine as far as possible, to share the experts of a layer."""
    copies = world.size // shard_experts
    copy, share = divmod(world.rank, shard_experts)
    together = [list(range(c * shard_experts, (c + 1) * shard_experts)) for c in range(copies)]
    same = [list(range(s, world.size, shard_experts)) for s in range(shard_experts)]
    experts, replicas = (
        [dist.new_group(ranks) if len(ranks) > 1 else None for ranks in groups] for groups in (together, same)
    )
    return Layout(
        world,
        Group(experts[copy], size=shard_experts, rank=share, sent=world.sent),
        Group(replicas[share], size=copies, rank=copy, sent=world.sent),
        shard_optimizer,
    )


def shares(vectors: Vectors, layout: Layout) -> tuple[slice, slice]:
    """Ranges of this rank's two parameter vectors whose optimizer state it keeps."""
    groups = layout.world, layout.replicas
    return tuple(share_of(len(v), group.size, group.rank) for v, group in zip(vectors, groups, strict=True))  # type: ignore[return-value]


def gathered(mine: Vectors, like: Vectors, layout: Layout) -> Vectors:
    """All-gather the two flat parameter vectors from the shares that ranks hold; `like` has their full lengths."""
    whole = []
    for share, vector, group in zip(mine, like, (layout.world, layout.replicas), strict=True):
        each = -(-len(vector) // group.size)
        room = torch.cat((share, share.new_zeros(each - len(share))))
        whole.append(group.all_gather(room, "parameters")[: len(vector)])
    return Vectors(*whole)


# Whole states and parts of them ---------------------------------------------------------------------------------------


def own_state(state: TrainState, config: ModelConfig, layout: Layout) -> TrainState:
    """This rank's part of a whole state."""
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
        experts = layout.experts.all_gather(vectors.experts, "whole state")
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
