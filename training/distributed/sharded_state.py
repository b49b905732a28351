"""A state as DCP stores it: ranges of six vectors, which are parameters and both moments, and tensors of the router."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tiny_onn_func.config import ModelConfig
from tiny_onn_func.tree import Tree, flatten, merge, partition, tree_map, unflatten, walk
from training.distributed.flat_params import Vectors, fast_shapes, from_vectors, joined_shares, named_shares, to_vectors
from training.distributed.layout import Layout, gathered, shares
from training.step.hyper_step import TrainState, init_state
from training.step.optim import AdamWState
from training.step.rules import LEAST_SURPRISE, Rule


def as_stored(state: TrainState, config: ModelConfig, layout: Layout) -> dict[str, Any]:
    """Dotted name -> ranges of vectors, and whole tensors of what is small."""
    fast, router = partition(state.params)
    stored: dict[str, Any] = {"step": state.step, "updates": state.expert_opt.updates}
    stored |= {f"router.{name}": leaf for name, leaf in flatten(router).items()}
    for name, leaf in flatten(state.router_opt._asdict()).items():
        stored[f"router_opt.{name}"] = leaf
    stored |= {f"rule.{name}": leaf for name, leaf in walk(state.rule)}
    vectors = to_vectors(fast, config)
    where = shares(vectors, layout)

    def ranges(whole: Vectors) -> Vectors:
        return Vectors(*(vector[part] for vector, part in zip(whole, where, strict=True)))

    for name, moment in (("mu", state.expert_opt.mu), ("nu", state.expert_opt.nu)):
        own = joined_shares(moment) if layout.shard_optimizer else ranges(to_vectors(moment, config))
        stored |= _spread(name, own, vectors, layout)
    return stored | _spread("params", ranges(vectors), vectors, layout)


def _spread(name: str, mine: Vectors, own: Vectors, layout: Layout) -> dict[str, Tensor]:
    """This process's ranges as parts of tensors that are spread over all; plain ones where there is one process."""
    if layout.world.size == 1:
        return {f"{name}.{key}": part.contiguous() for key, part in mine._asdict().items()}
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    order = torch.arange(layout.world.size)
    holders = order.reshape(layout.replicas.size, layout.experts.size).T.contiguous()
    meshes = (
        (DeviceMesh("cpu", order), [Shard(0)], 1),
        (DeviceMesh("cpu", holders), [Shard(0)] * 2, layout.experts.size),
    )
    spread: dict[str, Tensor] = {}
    for (key, part), vector, (mesh, placements, times) in zip(mine._asdict().items(), own, meshes, strict=True):
        shape = torch.Size([len(vector) * times])
        spread[f"{name}.{key}"] = DTensor.from_local(
            part.contiguous(), mesh, placements, run_check=False, shape=shape, stride=(1,)
        )
    return spread


def from_stored(stored: Mapping[str, Any], like: TrainState, config: ModelConfig, layout: Layout) -> TrainState:
    """The inverse of `as_stored`; `like` says of what shapes this process's part is. All processes must call."""
    experts = layout.own_experts(config)
    own = to_vectors(partition(like.params)[0], config)

    def mine(name: str) -> Vectors:
        parts = (stored[f"{name}.{key}"] for key in Vectors._fields)
        return Vectors(*(part.to_local() if layout.world.size > 1 else part for part in parts))

    def moment(name: str) -> Tree:
        if layout.shard_optimizer:
            return named_shares(mine(name), shares(own, layout)[0].start, config)
        return from_vectors(gathered(mine(name), own, layout), config, experts)

    router = unflatten({name[7:]: leaf for name, leaf in stored.items() if name.startswith("router.")})
    fast = from_vectors(gathered(mine("params"), own, layout), config, experts)
    rule = iter([stored[f"rule.{name}"] for name, _ in walk(like.rule)])
    router_opt = unflatten({name[11:]: leaf for name, leaf in stored.items() if name.startswith("router_opt.")})
    return TrainState(
        tree_map(lambda _, leaf: leaf, like.params, merge(fast, router)),
        AdamWState(stored["updates"], moment("mu"), moment("nu")),
        AdamWState(**router_opt),
        stored["step"],
        tree_map(lambda _: next(rule), like.rule),
    )


def empty_state(config: ModelConfig, layout: Layout, rule: Rule = LEAST_SURPRISE) -> TrainState:
    """A state of this process's shapes, of any content."""
    fresh = init_state(config, torch.Generator().manual_seed(0), rule)
    router = partition(fresh.params)[1]
    own = unflatten(
        {name: torch.zeros(shape) for name, shape in fast_shapes(config, layout.own_experts(config)).items()}
    )
    vectors = to_vectors(own, config)
    where = shares(vectors, layout)
    zeros = Vectors(*(vector[part] for vector, part in zip(vectors, where, strict=True)))
    moment = named_shares(zeros, where[0].start, config) if layout.shard_optimizer else own
    params = tree_map(lambda _, leaf: leaf, fresh.params, merge(own, router))
    copies = (tree_map(torch.clone, moment) for _ in range(2))
    return TrainState(params, AdamWState(fresh.expert_opt.updates, *copies), fresh.router_opt, fresh.step, fresh.rule)
